// matmul_reduce: C(M,N) = epilogue(the sum of K matrices), which stand one after another in a and are added in order: what a matmul
// whose K was split among workgroups leaves to be done. An invocation has four columns of a row.
// Grid: one invocation per four columns, over x and y. Variants: header of `matmul_subgroup` when N is a multiple of 4.
// Header "any shape": scalar elements. Four neighbours in a row at a time; indices are clamped into the matrix, so what
// lies outside repeats its edge and the caller masks it.
struct Params { m: u32, n: u32, k: u32, more: u32 }

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

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    let fours = (p.n + 3u) / 4u;
    let row = i / fours;
    let column = i % fours * 4u;
    if row >= p.m {
        return;
    }
    var sum = vec4<f32>();
    for (var k = 0u; k < p.k; k++) {
        sum += load_a(k * p.m + row, column, p.k * p.m, p.n);
    }
    finish(row, column, sum);
}
