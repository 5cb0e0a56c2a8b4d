// matmul_rows: matmul for up to 16 rows of C, as when decoding, where reading B is all the work. Each element of B is
// loaded once for all rows: an invocation owns 4 columns of every row, SLICES of them share the columns and take turns at
// four of K, and their sums are added through workgroup memory.
// Grid: ceil(N/(4*QUADS)) workgroups over x and y. Variants: header of `matmul_subgroup` when N and K are multiples of 4; for B as rows
// of K many QUADS, neighbours along N, for the transposed many SLICES, neighbours along K.
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
override LAYOUT: u32 = 0u;          // 0 NN, 1 NT
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

// Four rows of B, each at the same four columns.
struct Block { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

fn block(k: u32, column: u32) -> Block {
    if LAYOUT == 1u {
        let t0 = load_b(column + 0u, k, p.n, p.k);
        let t1 = load_b(column + 1u, k, p.n, p.k);
        let t2 = load_b(column + 2u, k, p.n, p.k);
        let t3 = load_b(column + 3u, k, p.n, p.k);
        return Block(
            vec4(t0.x, t1.x, t2.x, t3.x),
            vec4(t0.y, t1.y, t2.y, t3.y),
            vec4(t0.z, t1.z, t2.z, t3.z),
            vec4(t0.w, t1.w, t2.w, t3.w),
        );
    }
    return Block(
        load_b(k + 0u, column, p.k, p.n),
        load_b(k + 1u, column, p.k, p.n),
        load_b(k + 2u, column, p.k, p.n),
        load_b(k + 3u, column, p.k, p.n),
    );
}

// Four neighbours in a row of A, those past K as 0.
fn part(row: u32, k: u32) -> vec4<f32> {
    let valid = vec4(k) + vec4(0u, 1u, 2u, 3u) < vec4(p.k);
    return select(vec4<f32>(), load_a(row, k, p.m, p.k), valid);
}

fn add(sum: vec4<f32>, x: vec4<f32>, b: Block) -> vec4<f32> {
    return fma(vec4(x.w), b.r3, fma(vec4(x.z), b.r2, fma(vec4(x.y), b.r1, fma(vec4(x.x), b.r0, sum))));
}

override QUADS: u32 = 8u;  // fours of columns side by side
override SLICES: u32 = 8u; // a power of two
override ROWS: u32 = 16u;  // 1, 2, 4, 8 or 16

var<workgroup> sums: array<vec4<f32>, ROWS * QUADS * SLICES>; // row, slice, quad

@compute @workgroup_size(QUADS, SLICES, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let column = ((group.y * groups.x + group.x) * QUADS + local.x) * 4u;
    let slice = local.y;
    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    var sum2 = vec4<f32>();
    var sum3 = vec4<f32>();
    var sum4 = vec4<f32>();
    var sum5 = vec4<f32>();
    var sum6 = vec4<f32>();
    var sum7 = vec4<f32>();
    var sum8 = vec4<f32>();
    var sum9 = vec4<f32>();
    var sum10 = vec4<f32>();
    var sum11 = vec4<f32>();
    var sum12 = vec4<f32>();
    var sum13 = vec4<f32>();
    var sum14 = vec4<f32>();
    var sum15 = vec4<f32>();
    for (var k = 4u * slice; k < p.k; k += 4u * SLICES) {
        let b = block(k, column);
        sum0 = add(sum0, part(0u, k), b);
        if ROWS > 1u {
            sum1 = add(sum1, part(1u, k), b);
        }
        if ROWS > 2u {
            sum2 = add(sum2, part(2u, k), b);
            sum3 = add(sum3, part(3u, k), b);
        }
        if ROWS > 4u {
            sum4 = add(sum4, part(4u, k), b);
            sum5 = add(sum5, part(5u, k), b);
            sum6 = add(sum6, part(6u, k), b);
            sum7 = add(sum7, part(7u, k), b);
        }
        if ROWS > 8u {
            sum8 = add(sum8, part(8u, k), b);
            sum9 = add(sum9, part(9u, k), b);
            sum10 = add(sum10, part(10u, k), b);
            sum11 = add(sum11, part(11u, k), b);
            sum12 = add(sum12, part(12u, k), b);
            sum13 = add(sum13, part(13u, k), b);
            sum14 = add(sum14, part(14u, k), b);
            sum15 = add(sum15, part(15u, k), b);
        }
    }
    let each = QUADS * SLICES;
    let mine = slice * QUADS + local.x;
    sums[mine] = sum0;
    if ROWS > 1u {
        sums[1u * each + mine] = sum1;
    }
    if ROWS > 2u {
        sums[2u * each + mine] = sum2;
        sums[3u * each + mine] = sum3;
    }
    if ROWS > 4u {
        sums[4u * each + mine] = sum4;
        sums[5u * each + mine] = sum5;
        sums[6u * each + mine] = sum6;
        sums[7u * each + mine] = sum7;
    }
    if ROWS > 8u {
        sums[8u * each + mine] = sum8;
        sums[9u * each + mine] = sum9;
        sums[10u * each + mine] = sum10;
        sums[11u * each + mine] = sum11;
        sums[12u * each + mine] = sum12;
        sums[13u * each + mine] = sum13;
        sums[14u * each + mine] = sum14;
        sums[15u * each + mine] = sum15;
    }
    for (var half = SLICES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if slice < half {
            for (var row = 0u; row < ROWS; row++) {
                sums[row * each + mine] += sums[row * each + mine + half * QUADS];
            }
        }
    }
    workgroupBarrier();
    for (var row = slice; row < ROWS; row += SLICES) {
        finish(row, column, sums[row * each + local.x]);
    }
}
