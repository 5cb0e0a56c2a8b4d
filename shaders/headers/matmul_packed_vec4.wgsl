// Header "multiples of 4, packed B": as "multiples of 4", but B holds bf16, element 2i in the low half of word i.
struct Params { m: u32, n: u32, k: u32, more: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> extra: array<vec4<f32>>; // residual or u, (M,N)
@group(0) @binding(5) var<storage, read_write> c: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> c2: array<vec4<f32>>;

const EXACT = true; // whether K is known to be a multiple of 4

fn load_a(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    return a[(min(row, rows - 1u) * columns + min(column, columns - 4u)) / 4u];
}

fn load_b(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    let words = b[(min(row, rows - 1u) * columns + min(column, columns - 4u)) / 4u];
    let low = bitcast<vec2<f32>>(words << vec2(16u));
    let high = bitcast<vec2<f32>>(words & vec2(0xffff0000u));
    return vec4(low.x, high.x, low.y, high.y);
}

fn load_bias(column: u32) -> vec4<f32> {
    return bias[column / 4u];
}

fn load_extra(row: u32, column: u32) -> vec4<f32> {
    return extra[(row * p.n + column) / 4u];
}

fn load_c(row: u32, column: u32) -> vec4<f32> {
    return c[(row * p.n + column) / 4u];
}

fn store(row: u32, column: u32, x: vec4<f32>) {
    c[(row * p.n + column) / 4u] = x;
}

fn store2(row: u32, column: u32, x: vec4<f32>) {
    c2[(row * p.n + column) / 4u] = x;
}
