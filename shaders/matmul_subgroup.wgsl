// matmul_subgroup: C(M,N) = epilogue(A · B), A and B read as LAYOUT says. For software adapters, where a load costs as
// much as many multiplications and a barrier costs a context switch: no workgroup memory. The invocations of a
// workgroup share 8 rows of C and own 8 columns each, 8x8 sums in registers. For four of K at a time, lane l of a
// subgroup loads rows l%4 and l%4 + 4 of A (or, for TN, row l%4 of K), and the others take them by broadcast.
// Grid: (ceil(N/(8*LANES)), ceil(M/8), 1). LANES is a multiple of the subgroup size, which is at least 4.
// Variants: header of `matmul` for any shape.
// Header "multiples of 4": M, N and K all are, so four neighbours in a row are one load. Indices are clamped into the
// matrix, so what lies outside repeats its edge and the caller masks it.
struct Params { m: u32, n: u32, k: u32, more: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> extra: array<vec4<f32>>; // residual or u, (M,N)
@group(0) @binding(5) var<storage, read_write> c: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> c2: array<vec4<f32>>;

const EXACT = true; // whether K is known to be a multiple of 4

fn load_a(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    return a[(min(row, rows - 1u) * columns + min(column, columns - 4u)) / 4u];
}

fn load_b(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    return b[(min(row, rows - 1u) * columns + min(column, columns - 4u)) / 4u];
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

// ---- body ----
override LAYOUT: u32 = 0u;          // 0 NN, 1 NT, 2 TN
// Params.more: 0 none, 1 bias, 2 bias + gelu (u to c2), 3 bias + residual, 4 times gelu'(u), 5 residual; 8 more to add
// to what c holds. A number of the launch and no constant of the pipeline: where drivers run on a CPU, compiling takes
// longer than many launches, and so there are few to compile.

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
    let epilogue = p.more & 7u;
    var x = sum;
    if epilogue >= 1u && epilogue <= 3u {
        x += load_bias(column);
    }
    if epilogue == 2u {
        store2(row, column, x);
        x *= gate(x);
    } else if epilogue == 3u || epilogue == 5u {
        x += load_extra(row, column);
    } else if epilogue == 4u {
        x *= gelu_derivative(load_extra(row, column));
    }
    if p.more >= 8u {
        x += load_c(row, column);
    }
    store(row, column, x);
}

override LANES: u32 = 8u;

@compute @workgroup_size(LANES, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let row = group.y * 8u;
    let column = (group.x * LANES + local.x) * 8u;
    let mine = lane & 3u;
    var sum0l = vec4<f32>();
    var sum0r = vec4<f32>();
    var sum1l = vec4<f32>();
    var sum1r = vec4<f32>();
    var sum2l = vec4<f32>();
    var sum2r = vec4<f32>();
    var sum3l = vec4<f32>();
    var sum3r = vec4<f32>();
    var sum4l = vec4<f32>();
    var sum4r = vec4<f32>();
    var sum5l = vec4<f32>();
    var sum5r = vec4<f32>();
    var sum6l = vec4<f32>();
    var sum6r = vec4<f32>();
    var sum7l = vec4<f32>();
    var sum7r = vec4<f32>();
    for (var k = 0u; k < p.k; k += 4u) {
        var low: vec4<f32>;  // rows 0-3 of A
        var high: vec4<f32>; // rows 4-7 of A
        if LAYOUT == 2u {
            low = load_a(k + mine, row, p.k, p.m);
            high = load_a(k + mine, row + 4u, p.k, p.m);
            if !EXACT && k + mine >= p.k {
                low = vec4<f32>();
                high = vec4<f32>();
            }
        } else {
            low = load_a(row + mine, k, p.m, p.k);
            high = load_a(row + mine + 4u, k, p.m, p.k);
            if !EXACT {
                let valid = vec4(k) + vec4(0u, 1u, 2u, 3u) < vec4(p.k);
                low = select(vec4<f32>(), low, valid);
                high = select(vec4<f32>(), high, valid);
            }
        }
        var b0l: vec4<f32>;
        var b0r: vec4<f32>;
        var b1l: vec4<f32>;
        var b1r: vec4<f32>;
        var b2l: vec4<f32>;
        var b2r: vec4<f32>;
        var b3l: vec4<f32>;
        var b3r: vec4<f32>;
        if LAYOUT == 1u {
            let t0 = load_b(column + 0u, k, p.n, p.k);
            let t1 = load_b(column + 1u, k, p.n, p.k);
            let t2 = load_b(column + 2u, k, p.n, p.k);
            let t3 = load_b(column + 3u, k, p.n, p.k);
            let t4 = load_b(column + 4u, k, p.n, p.k);
            let t5 = load_b(column + 5u, k, p.n, p.k);
            let t6 = load_b(column + 6u, k, p.n, p.k);
            let t7 = load_b(column + 7u, k, p.n, p.k);
            b0l = vec4(t0.x, t1.x, t2.x, t3.x);
            b0r = vec4(t4.x, t5.x, t6.x, t7.x);
            b1l = vec4(t0.y, t1.y, t2.y, t3.y);
            b1r = vec4(t4.y, t5.y, t6.y, t7.y);
            b2l = vec4(t0.z, t1.z, t2.z, t3.z);
            b2r = vec4(t4.z, t5.z, t6.z, t7.z);
            b3l = vec4(t0.w, t1.w, t2.w, t3.w);
            b3r = vec4(t4.w, t5.w, t6.w, t7.w);
        } else {
            b0l = load_b(k + 0u, column, p.k, p.n);
            b0r = load_b(k + 0u, column + 4u, p.k, p.n);
            b1l = load_b(k + 1u, column, p.k, p.n);
            b1r = load_b(k + 1u, column + 4u, p.k, p.n);
            b2l = load_b(k + 2u, column, p.k, p.n);
            b2r = load_b(k + 2u, column + 4u, p.k, p.n);
            b3l = load_b(k + 3u, column, p.k, p.n);
            b3r = load_b(k + 3u, column + 4u, p.k, p.n);
        }
        if LAYOUT == 2u {
            let a00 = vec4(subgroupBroadcast(low.x, 0u));
            sum0l = fma(a00, b0l, sum0l);
            sum0r = fma(a00, b0r, sum0r);
            let a01 = vec4(subgroupBroadcast(low.y, 0u));
            sum1l = fma(a01, b0l, sum1l);
            sum1r = fma(a01, b0r, sum1r);
            let a02 = vec4(subgroupBroadcast(low.z, 0u));
            sum2l = fma(a02, b0l, sum2l);
            sum2r = fma(a02, b0r, sum2r);
            let a03 = vec4(subgroupBroadcast(low.w, 0u));
            sum3l = fma(a03, b0l, sum3l);
            sum3r = fma(a03, b0r, sum3r);
            let a04 = vec4(subgroupBroadcast(high.x, 0u));
            sum4l = fma(a04, b0l, sum4l);
            sum4r = fma(a04, b0r, sum4r);
            let a05 = vec4(subgroupBroadcast(high.y, 0u));
            sum5l = fma(a05, b0l, sum5l);
            sum5r = fma(a05, b0r, sum5r);
            let a06 = vec4(subgroupBroadcast(high.z, 0u));
            sum6l = fma(a06, b0l, sum6l);
            sum6r = fma(a06, b0r, sum6r);
            let a07 = vec4(subgroupBroadcast(high.w, 0u));
            sum7l = fma(a07, b0l, sum7l);
            sum7r = fma(a07, b0r, sum7r);
            let a10 = vec4(subgroupBroadcast(low.x, 1u));
            sum0l = fma(a10, b1l, sum0l);
            sum0r = fma(a10, b1r, sum0r);
            let a11 = vec4(subgroupBroadcast(low.y, 1u));
            sum1l = fma(a11, b1l, sum1l);
            sum1r = fma(a11, b1r, sum1r);
            let a12 = vec4(subgroupBroadcast(low.z, 1u));
            sum2l = fma(a12, b1l, sum2l);
            sum2r = fma(a12, b1r, sum2r);
            let a13 = vec4(subgroupBroadcast(low.w, 1u));
            sum3l = fma(a13, b1l, sum3l);
            sum3r = fma(a13, b1r, sum3r);
            let a14 = vec4(subgroupBroadcast(high.x, 1u));
            sum4l = fma(a14, b1l, sum4l);
            sum4r = fma(a14, b1r, sum4r);
            let a15 = vec4(subgroupBroadcast(high.y, 1u));
            sum5l = fma(a15, b1l, sum5l);
            sum5r = fma(a15, b1r, sum5r);
            let a16 = vec4(subgroupBroadcast(high.z, 1u));
            sum6l = fma(a16, b1l, sum6l);
            sum6r = fma(a16, b1r, sum6r);
            let a17 = vec4(subgroupBroadcast(high.w, 1u));
            sum7l = fma(a17, b1l, sum7l);
            sum7r = fma(a17, b1r, sum7r);
            let a20 = vec4(subgroupBroadcast(low.x, 2u));
            sum0l = fma(a20, b2l, sum0l);
            sum0r = fma(a20, b2r, sum0r);
            let a21 = vec4(subgroupBroadcast(low.y, 2u));
            sum1l = fma(a21, b2l, sum1l);
            sum1r = fma(a21, b2r, sum1r);
            let a22 = vec4(subgroupBroadcast(low.z, 2u));
            sum2l = fma(a22, b2l, sum2l);
            sum2r = fma(a22, b2r, sum2r);
            let a23 = vec4(subgroupBroadcast(low.w, 2u));
            sum3l = fma(a23, b2l, sum3l);
            sum3r = fma(a23, b2r, sum3r);
            let a24 = vec4(subgroupBroadcast(high.x, 2u));
            sum4l = fma(a24, b2l, sum4l);
            sum4r = fma(a24, b2r, sum4r);
            let a25 = vec4(subgroupBroadcast(high.y, 2u));
            sum5l = fma(a25, b2l, sum5l);
            sum5r = fma(a25, b2r, sum5r);
            let a26 = vec4(subgroupBroadcast(high.z, 2u));
            sum6l = fma(a26, b2l, sum6l);
            sum6r = fma(a26, b2r, sum6r);
            let a27 = vec4(subgroupBroadcast(high.w, 2u));
            sum7l = fma(a27, b2l, sum7l);
            sum7r = fma(a27, b2r, sum7r);
            let a30 = vec4(subgroupBroadcast(low.x, 3u));
            sum0l = fma(a30, b3l, sum0l);
            sum0r = fma(a30, b3r, sum0r);
            let a31 = vec4(subgroupBroadcast(low.y, 3u));
            sum1l = fma(a31, b3l, sum1l);
            sum1r = fma(a31, b3r, sum1r);
            let a32 = vec4(subgroupBroadcast(low.z, 3u));
            sum2l = fma(a32, b3l, sum2l);
            sum2r = fma(a32, b3r, sum2r);
            let a33 = vec4(subgroupBroadcast(low.w, 3u));
            sum3l = fma(a33, b3l, sum3l);
            sum3r = fma(a33, b3r, sum3r);
            let a34 = vec4(subgroupBroadcast(high.x, 3u));
            sum4l = fma(a34, b3l, sum4l);
            sum4r = fma(a34, b3r, sum4r);
            let a35 = vec4(subgroupBroadcast(high.y, 3u));
            sum5l = fma(a35, b3l, sum5l);
            sum5r = fma(a35, b3r, sum5r);
            let a36 = vec4(subgroupBroadcast(high.z, 3u));
            sum6l = fma(a36, b3l, sum6l);
            sum6r = fma(a36, b3r, sum6r);
            let a37 = vec4(subgroupBroadcast(high.w, 3u));
            sum7l = fma(a37, b3l, sum7l);
            sum7r = fma(a37, b3r, sum7r);
        } else {
            let a00 = vec4(subgroupBroadcast(low.x, 0u));
            sum0l = fma(a00, b0l, sum0l);
            sum0r = fma(a00, b0r, sum0r);
            let a01 = vec4(subgroupBroadcast(low.x, 1u));
            sum1l = fma(a01, b0l, sum1l);
            sum1r = fma(a01, b0r, sum1r);
            let a02 = vec4(subgroupBroadcast(low.x, 2u));
            sum2l = fma(a02, b0l, sum2l);
            sum2r = fma(a02, b0r, sum2r);
            let a03 = vec4(subgroupBroadcast(low.x, 3u));
            sum3l = fma(a03, b0l, sum3l);
            sum3r = fma(a03, b0r, sum3r);
            let a04 = vec4(subgroupBroadcast(high.x, 0u));
            sum4l = fma(a04, b0l, sum4l);
            sum4r = fma(a04, b0r, sum4r);
            let a05 = vec4(subgroupBroadcast(high.x, 1u));
            sum5l = fma(a05, b0l, sum5l);
            sum5r = fma(a05, b0r, sum5r);
            let a06 = vec4(subgroupBroadcast(high.x, 2u));
            sum6l = fma(a06, b0l, sum6l);
            sum6r = fma(a06, b0r, sum6r);
            let a07 = vec4(subgroupBroadcast(high.x, 3u));
            sum7l = fma(a07, b0l, sum7l);
            sum7r = fma(a07, b0r, sum7r);
            let a10 = vec4(subgroupBroadcast(low.y, 0u));
            sum0l = fma(a10, b1l, sum0l);
            sum0r = fma(a10, b1r, sum0r);
            let a11 = vec4(subgroupBroadcast(low.y, 1u));
            sum1l = fma(a11, b1l, sum1l);
            sum1r = fma(a11, b1r, sum1r);
            let a12 = vec4(subgroupBroadcast(low.y, 2u));
            sum2l = fma(a12, b1l, sum2l);
            sum2r = fma(a12, b1r, sum2r);
            let a13 = vec4(subgroupBroadcast(low.y, 3u));
            sum3l = fma(a13, b1l, sum3l);
            sum3r = fma(a13, b1r, sum3r);
            let a14 = vec4(subgroupBroadcast(high.y, 0u));
            sum4l = fma(a14, b1l, sum4l);
            sum4r = fma(a14, b1r, sum4r);
            let a15 = vec4(subgroupBroadcast(high.y, 1u));
            sum5l = fma(a15, b1l, sum5l);
            sum5r = fma(a15, b1r, sum5r);
            let a16 = vec4(subgroupBroadcast(high.y, 2u));
            sum6l = fma(a16, b1l, sum6l);
            sum6r = fma(a16, b1r, sum6r);
            let a17 = vec4(subgroupBroadcast(high.y, 3u));
            sum7l = fma(a17, b1l, sum7l);
            sum7r = fma(a17, b1r, sum7r);
            let a20 = vec4(subgroupBroadcast(low.z, 0u));
            sum0l = fma(a20, b2l, sum0l);
            sum0r = fma(a20, b2r, sum0r);
            let a21 = vec4(subgroupBroadcast(low.z, 1u));
            sum1l = fma(a21, b2l, sum1l);
            sum1r = fma(a21, b2r, sum1r);
            let a22 = vec4(subgroupBroadcast(low.z, 2u));
            sum2l = fma(a22, b2l, sum2l);
            sum2r = fma(a22, b2r, sum2r);
            let a23 = vec4(subgroupBroadcast(low.z, 3u));
            sum3l = fma(a23, b2l, sum3l);
            sum3r = fma(a23, b2r, sum3r);
            let a24 = vec4(subgroupBroadcast(high.z, 0u));
            sum4l = fma(a24, b2l, sum4l);
            sum4r = fma(a24, b2r, sum4r);
            let a25 = vec4(subgroupBroadcast(high.z, 1u));
            sum5l = fma(a25, b2l, sum5l);
            sum5r = fma(a25, b2r, sum5r);
            let a26 = vec4(subgroupBroadcast(high.z, 2u));
            sum6l = fma(a26, b2l, sum6l);
            sum6r = fma(a26, b2r, sum6r);
            let a27 = vec4(subgroupBroadcast(high.z, 3u));
            sum7l = fma(a27, b2l, sum7l);
            sum7r = fma(a27, b2r, sum7r);
            let a30 = vec4(subgroupBroadcast(low.w, 0u));
            sum0l = fma(a30, b3l, sum0l);
            sum0r = fma(a30, b3r, sum0r);
            let a31 = vec4(subgroupBroadcast(low.w, 1u));
            sum1l = fma(a31, b3l, sum1l);
            sum1r = fma(a31, b3r, sum1r);
            let a32 = vec4(subgroupBroadcast(low.w, 2u));
            sum2l = fma(a32, b3l, sum2l);
            sum2r = fma(a32, b3r, sum2r);
            let a33 = vec4(subgroupBroadcast(low.w, 3u));
            sum3l = fma(a33, b3l, sum3l);
            sum3r = fma(a33, b3r, sum3r);
            let a34 = vec4(subgroupBroadcast(high.w, 0u));
            sum4l = fma(a34, b3l, sum4l);
            sum4r = fma(a34, b3r, sum4r);
            let a35 = vec4(subgroupBroadcast(high.w, 1u));
            sum5l = fma(a35, b3l, sum5l);
            sum5r = fma(a35, b3r, sum5r);
            let a36 = vec4(subgroupBroadcast(high.w, 2u));
            sum6l = fma(a36, b3l, sum6l);
            sum6r = fma(a36, b3r, sum6r);
            let a37 = vec4(subgroupBroadcast(high.w, 3u));
            sum7l = fma(a37, b3l, sum7l);
            sum7r = fma(a37, b3r, sum7r);
        }
    }
    // Through an array, so that the epilogue is one piece of code in a loop: unrolled, it takes drivers longer to
    // compile than all the rest.
    var tile: array<vec4<f32>, 16>;
    tile[0] = sum0l;
    tile[1] = sum0r;
    tile[2] = sum1l;
    tile[3] = sum1r;
    tile[4] = sum2l;
    tile[5] = sum2r;
    tile[6] = sum3l;
    tile[7] = sum3r;
    tile[8] = sum4l;
    tile[9] = sum4r;
    tile[10] = sum5l;
    tile[11] = sum5r;
    tile[12] = sum6l;
    tile[13] = sum6r;
    tile[14] = sum7l;
    tile[15] = sum7r;
    let count = 2u * min(8u, p.m - row);
    for (var i = 0u; i < count; i++) {
        finish(row + i / 2u, column + (i % 2u) * 4u, tile[i]);
    }
}
