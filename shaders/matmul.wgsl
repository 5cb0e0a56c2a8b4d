// matmul: C(M,N) = epilogue(A · B), A and B read as LAYOUT says. For GPUs: a workgroup computes a 64x64 tile of C through
// workgroup memory, 16 of K at a time; each of 16x16 invocations keeps 4x4 sums in registers.
// Grid: (ceil(N/64), ceil(M/64), 1). Variants: header of `matmul_subgroup` when M, N and K are multiples of 4.
// Header "any shape": scalar elements. Four neighbours in a row at a time; indices are clamped into the matrix, so what
// lies outside repeats its edge and the caller masks it.
struct Params { m: u32, n: u32, k: u32, epilogue: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
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

fn load_b(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    let base = min(row, rows - 1u) * columns;
    let i = base + min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(columns - 1u));
    return vec4(b[i.x], b[i.y], b[i.z], b[i.w]);
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

// ---- body ----
override LAYOUT: u32 = 0u;          // 0 NN, 1 NT, 2 TN
override EPILOGUE: u32 = 0u;        // 0 none, 1 bias, 2 bias + gelu (u to c2), 3 bias + residual, 4 times gelu'(u), 5 residual
override ACCUMULATE: bool = false;  // add to what c holds

// 1 / (1 + exp(-2z)), z = sqrt(2/pi)(x + 0.044715x^3): gelu(x) = x * gate(x). The bound keeps exp finite.
fn gate(x: vec4<f32>) -> vec4<f32> {
    let z = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    return 1.0 / (1.0 + exp(min(-2.0 * z, vec4(80.0))));
}

fn gelu_derivative(x: vec4<f32>) -> vec4<f32> {
    let s = gate(x);
    return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x);
}

fn finish(row: u32, column: u32, sum: vec4<f32>) {
    if row >= p.m || column >= p.n {
        return;
    }
    var x = sum;
    if EPILOGUE >= 1u && EPILOGUE <= 3u {
        x += load_bias(column);
    }
    if EPILOGUE == 2u {
        store2(row, column, x);
        x *= gate(x);
    } else if EPILOGUE == 3u || EPILOGUE == 5u {
        x += load_extra(row, column);
    } else if EPILOGUE == 4u {
        x *= gelu_derivative(load_extra(row, column));
    }
    if ACCUMULATE {
        x += load_c(row, column);
    }
    store(row, column, x);
}

const TILE = 64u;
const DEPTH = 16u;
const STRIDE = 68u; // padded, so that the four writers of a column use different banks

var<workgroup> a_tile: array<f32, 1088>; // DEPTH x STRIDE, A transposed: k, then m
var<workgroup> b_tile: array<f32, 1088>; // DEPTH x STRIDE: k, then n

// Writes four values along K of one row (or column) of the tile, those past K as 0.
fn put_a(k: u32, m: u32, left: u32, x: vec4<f32>) {
    a_tile[k * STRIDE + m] = select(0.0, x.x, k < left);
    a_tile[(k + 1u) * STRIDE + m] = select(0.0, x.y, k + 1u < left);
    a_tile[(k + 2u) * STRIDE + m] = select(0.0, x.z, k + 2u < left);
    a_tile[(k + 3u) * STRIDE + m] = select(0.0, x.w, k + 3u < left);
}

@compute @workgroup_size(16, 16, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let row0 = group.y * TILE;
    let column0 = group.x * TILE;
    let thread = local.y * 16u + local.x;
    // Along K: 4 quads x 64 rows; across K: 16 quads of columns x 16 rows of K.
    let quad = (thread % 4u) * 4u;
    let line = thread / 4u;
    let across = (thread % 16u) * 4u;
    let depth = thread / 16u;
    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    var sum2 = vec4<f32>();
    var sum3 = vec4<f32>();
    for (var k0 = 0u; k0 < p.k; k0 += DEPTH) {
        let left = p.k - k0;
        if LAYOUT == 2u {
            let x = select(vec4<f32>(), load_a(k0 + depth, row0 + across, p.k, p.m), depth < left);
            a_tile[depth * STRIDE + across] = x.x;
            a_tile[depth * STRIDE + across + 1u] = x.y;
            a_tile[depth * STRIDE + across + 2u] = x.z;
            a_tile[depth * STRIDE + across + 3u] = x.w;
        } else {
            put_a(quad, line, left, load_a(row0 + line, k0 + quad, p.m, p.k));
        }
        if LAYOUT == 1u {
            let x = load_b(column0 + line, k0 + quad, p.n, p.k);
            b_tile[quad * STRIDE + line] = x.x;
            b_tile[(quad + 1u) * STRIDE + line] = x.y;
            b_tile[(quad + 2u) * STRIDE + line] = x.z;
            b_tile[(quad + 3u) * STRIDE + line] = x.w;
        } else {
            let x = load_b(k0 + depth, column0 + across, p.k, p.n);
            b_tile[depth * STRIDE + across] = x.x;
            b_tile[depth * STRIDE + across + 1u] = x.y;
            b_tile[depth * STRIDE + across + 2u] = x.z;
            b_tile[depth * STRIDE + across + 3u] = x.w;
        }
        workgroupBarrier();
        for (var k = 0u; k < DEPTH; k++) {
            let i = k * STRIDE + local.y * 4u;
            let j = k * STRIDE + local.x * 4u;
            let x = vec4(a_tile[i], a_tile[i + 1u], a_tile[i + 2u], a_tile[i + 3u]);
            let y = vec4(b_tile[j], b_tile[j + 1u], b_tile[j + 2u], b_tile[j + 3u]);
            sum0 = fma(vec4(x.x), y, sum0);
            sum1 = fma(vec4(x.y), y, sum1);
            sum2 = fma(vec4(x.z), y, sum2);
            sum3 = fma(vec4(x.w), y, sum3);
        }
        workgroupBarrier();
    }
    let row = row0 + local.y * 4u;
    let column = column0 + local.x * 4u;
    finish(row, column, sum0);
    finish(row + 1u, column, sum1);
    finish(row + 2u, column, sum2);
    finish(row + 3u, column, sum3);
}
