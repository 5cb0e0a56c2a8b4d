// Header "multiples of 4": the head size is, so four neighbours are one load.

struct Params { batch: u32, tokens: u32, width: u32, heads: u32, size: u32, scale: f32, kv_heads: u32, stride: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> delta: array<f32>;
@group(0) @binding(5) var<storage, read> starts: array<u32>;
@group(0) @binding(6) var<storage, read_write> dqkv: array<vec4<f32>>;

fn load_qkv(base: u32, d: u32) -> vec4<f32> {
    return select(vec4<f32>(), qkv[(base + min(d, p.size - 4u)) / 4u], d < p.size);
}

fn load_d_o(base: u32, d: u32) -> vec4<f32> {
    return select(vec4<f32>(), d_o[(base + min(d, p.size - 4u)) / 4u], d < p.size);
}

fn store_dqkv(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { dqkv[(base + d) / 4u] = x; }
}
