// Header "any shape, packed B": as "any shape", but B holds bf16, element 2i in the low half of word i.
struct Params { m: u32, n: u32, k: u32, more: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<u32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read> extra: array<f32>; // residual or u, (M,N)
@group(0) @binding(5) var<storage, read_write> c: array<f32>;
@group(0) @binding(6) var<storage, read_write> c2: array<f32>;

const EXACT = false; // whether K is known to be a multiple of 4

fn load_a(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    let base = min(row, rows - 1u) * columns;
    let i = base + min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(columns - 1u));
    return vec4(a[i.x], a[i.y], a[i.z], a[i.w]);
}

fn unpack(i: u32) -> f32 {
    let word = b[i / 2u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, i % 2u == 1u));
}

fn load_b(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    let base = min(row, rows - 1u) * columns;
    let i = base + min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(columns - 1u));
    return vec4(unpack(i.x), unpack(i.y), unpack(i.z), unpack(i.w));
}

fn inside(column: u32) -> vec4<u32> {
    return min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(p.n - 1u));
}

fn load_bias(column: u32) -> vec4<f32> {
    let i = inside(column);
    return vec4(bias[i.x], bias[i.y], bias[i.z], bias[i.w]);
}

fn load_extra(row: u32, column: u32) -> vec4<f32> {
    let i = row * p.n + inside(column);
    return vec4(extra[i.x], extra[i.y], extra[i.z], extra[i.w]);
}

fn load_c(row: u32, column: u32) -> vec4<f32> {
    let i = row * p.n + inside(column);
    return vec4(c[i.x], c[i.y], c[i.z], c[i.w]);
}

fn store(row: u32, column: u32, x: vec4<f32>) {
    let i = row * p.n + column;
    c[i] = x.x;
    if column + 1u < p.n { c[i + 1u] = x.y; }
    if column + 2u < p.n { c[i + 2u] = x.z; }
    if column + 3u < p.n { c[i + 3u] = x.w; }
}

fn store2(row: u32, column: u32, x: vec4<f32>) {
    let i = row * p.n + column;
    c2[i] = x.x;
    if column + 1u < p.n { c2[i + 1u] = x.y; }
    if column + 2u < p.n { c2[i + 2u] = x.z; }
    if column + 3u < p.n { c2[i + 3u] = x.w; }
}
