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
    return qkv[(base + min(d, p.size - 4u)) / 4u];
}

fn load_d_o(base: u32, d: u32) -> vec4<f32> {
    return d_o[(base + min(d, p.size - 4u)) / 4u];
}

// What differs between invocations; apart from the workgroup's number, which must be seen to be uniform.
struct Input {
    @builtin(local_invocation_id) local: vec3<u32>,
}

// Four neighbours in each of 8 rows.
struct Rows { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32> }

// First elements of 8 rows.
struct Bases { b0: u32, b1: u32, b2: u32, b3: u32, b4: u32, b5: u32, b6: u32, b7: u32 }

fn packed_rows(slot: u32, batch: u32, row0: u32, input: Input) -> Bases {
    return Bases(
        packed(slot, batch, row0),
        packed(slot, batch, row0 + 1u),
        packed(slot, batch, row0 + 2u),
        packed(slot, batch, row0 + 3u),
        packed(slot, batch, row0 + 4u),
        packed(slot, batch, row0 + 5u),
        packed(slot, batch, row0 + 6u),
        packed(slot, batch, row0 + 7u),
    );
}

fn plain_rows(batch: u32, head: u32, row0: u32, input: Input) -> Bases {
    return Bases(
        plain(batch, head, row0),
        plain(batch, head, row0 + 1u),
        plain(batch, head, row0 + 2u),
        plain(batch, head, row0 + 3u),
        plain(batch, head, row0 + 4u),
        plain(batch, head, row0 + 5u),
        plain(batch, head, row0 + 6u),
        plain(batch, head, row0 + 7u),
    );
}

fn rows_qkv(b: Bases, d: u32) -> Rows {
    return Rows(
        load_qkv(b.b0, d),
        load_qkv(b.b1, d),
        load_qkv(b.b2, d),
        load_qkv(b.b3, d),
        load_qkv(b.b4, d),
        load_qkv(b.b5, d),
        load_qkv(b.b6, d),
        load_qkv(b.b7, d),
    );
}

fn rows_d_o(b: Bases, d: u32) -> Rows {
    return Rows(
        load_d_o(b.b0, d),
        load_d_o(b.b1, d),
        load_d_o(b.b2, d),
        load_d_o(b.b3, d),
        load_d_o(b.b4, d),
        load_d_o(b.b5, d),
        load_d_o(b.b6, d),
        load_d_o(b.b7, d),
    );
}

fn store_dqkv(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { dqkv[(base + d) / 4u] = x; }
}
