// matmul_subgroup_wide: matmul_subgroup where subgroups have at least 8 lanes. The invocations of a workgroup share 16 rows
// of C and own 4 columns each, 16x4 sums. For four of K at a time, each of eight lanes loads two rows of A (or, for TN, eight
// columns of a row of K), and the others take them by broadcast: 24 loads for 256 products, where four lanes and 8x8 sums take 40.
// Sums run along K as in matmul_subgroup.
// Grid: (ceil(N/(4*LANES)), ceil(M/16), 1). LANES is a multiple of the subgroup size.
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

// The next four of K, in order.
fn add(a: vec4<f32>, b0: vec4<f32>, b1: vec4<f32>, b2: vec4<f32>, b3: vec4<f32>, sum: vec4<f32>) -> vec4<f32> {
    return fma(vec4(a.w), b3, fma(vec4(a.z), b2, fma(vec4(a.y), b1, fma(vec4(a.x), b0, sum))));
}

@compute @workgroup_size(LANES, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let row = group.y * 16u;
    let column = (group.x * LANES + local.x) * 4u;
    let mine = lane & 7u;
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
    for (var k = 0u; k < p.k; k += 4u) {
        // What this lane loads of A: four of K of rows mine and mine + 8; for TN eight neighbours of row k + mine % 4, from
        // column 8*(mine/4) on.
        var a0: vec4<f32>;
        var a1: vec4<f32>;
        if LAYOUT == 2u {
            let first = row + mine / 4u * 8u;
            a0 = load_a(k + mine % 4u, first, p.k, p.m);
            a1 = load_a(k + mine % 4u, first + 4u, p.k, p.m);
            if !EXACT && k + mine % 4u >= p.k {
                a0 = vec4<f32>();
                a1 = vec4<f32>();
            }
        } else {
            a0 = load_a(row + mine, k, p.m, p.k);
            a1 = load_a(row + mine + 8u, k, p.m, p.k);
            if !EXACT {
                let valid = vec4(k) + vec4(0u, 1u, 2u, 3u) < vec4(p.k);
                a0 = select(vec4<f32>(), a0, valid);
                a1 = select(vec4<f32>(), a1, valid);
            }
        }
        var b0: vec4<f32>;
        var b1: vec4<f32>;
        var b2: vec4<f32>;
        var b3: vec4<f32>;
        if LAYOUT == 1u {
            let t0 = load_b(column + 0u, k, p.n, p.k);
            let t1 = load_b(column + 1u, k, p.n, p.k);
            let t2 = load_b(column + 2u, k, p.n, p.k);
            let t3 = load_b(column + 3u, k, p.n, p.k);
            b0 = vec4(t0.x, t1.x, t2.x, t3.x);
            b1 = vec4(t0.y, t1.y, t2.y, t3.y);
            b2 = vec4(t0.z, t1.z, t2.z, t3.z);
            b3 = vec4(t0.w, t1.w, t2.w, t3.w);
        } else {
            b0 = load_b(k + 0u, column, p.k, p.n);
            b1 = load_b(k + 1u, column, p.k, p.n);
            b2 = load_b(k + 2u, column, p.k, p.n);
            b3 = load_b(k + 3u, column, p.k, p.n);
        }
        // Four of K of each row of A.
        var r0: vec4<f32>;
        var r1: vec4<f32>;
        var r2: vec4<f32>;
        var r3: vec4<f32>;
        var r4: vec4<f32>;
        var r5: vec4<f32>;
        var r6: vec4<f32>;
        var r7: vec4<f32>;
        var r8: vec4<f32>;
        var r9: vec4<f32>;
        var r10: vec4<f32>;
        var r11: vec4<f32>;
        var r12: vec4<f32>;
        var r13: vec4<f32>;
        var r14: vec4<f32>;
        var r15: vec4<f32>;
        if LAYOUT == 2u {
            let x00 = subgroupBroadcast(a0, 0u);
            let x01 = subgroupBroadcast(a0, 1u);
            let x02 = subgroupBroadcast(a0, 2u);
            let x03 = subgroupBroadcast(a0, 3u);
            r0 = vec4(x00.x, x01.x, x02.x, x03.x);
            r1 = vec4(x00.y, x01.y, x02.y, x03.y);
            r2 = vec4(x00.z, x01.z, x02.z, x03.z);
            r3 = vec4(x00.w, x01.w, x02.w, x03.w);
            let x10 = subgroupBroadcast(a1, 0u);
            let x11 = subgroupBroadcast(a1, 1u);
            let x12 = subgroupBroadcast(a1, 2u);
            let x13 = subgroupBroadcast(a1, 3u);
            r4 = vec4(x10.x, x11.x, x12.x, x13.x);
            r5 = vec4(x10.y, x11.y, x12.y, x13.y);
            r6 = vec4(x10.z, x11.z, x12.z, x13.z);
            r7 = vec4(x10.w, x11.w, x12.w, x13.w);
            let x20 = subgroupBroadcast(a0, 4u);
            let x21 = subgroupBroadcast(a0, 5u);
            let x22 = subgroupBroadcast(a0, 6u);
            let x23 = subgroupBroadcast(a0, 7u);
            r8 = vec4(x20.x, x21.x, x22.x, x23.x);
            r9 = vec4(x20.y, x21.y, x22.y, x23.y);
            r10 = vec4(x20.z, x21.z, x22.z, x23.z);
            r11 = vec4(x20.w, x21.w, x22.w, x23.w);
            let x30 = subgroupBroadcast(a1, 4u);
            let x31 = subgroupBroadcast(a1, 5u);
            let x32 = subgroupBroadcast(a1, 6u);
            let x33 = subgroupBroadcast(a1, 7u);
            r12 = vec4(x30.x, x31.x, x32.x, x33.x);
            r13 = vec4(x30.y, x31.y, x32.y, x33.y);
            r14 = vec4(x30.z, x31.z, x32.z, x33.z);
            r15 = vec4(x30.w, x31.w, x32.w, x33.w);
        } else {
            r0 = subgroupBroadcast(a0, 0u);
            r1 = subgroupBroadcast(a0, 1u);
            r2 = subgroupBroadcast(a0, 2u);
            r3 = subgroupBroadcast(a0, 3u);
            r4 = subgroupBroadcast(a0, 4u);
            r5 = subgroupBroadcast(a0, 5u);
            r6 = subgroupBroadcast(a0, 6u);
            r7 = subgroupBroadcast(a0, 7u);
            r8 = subgroupBroadcast(a1, 0u);
            r9 = subgroupBroadcast(a1, 1u);
            r10 = subgroupBroadcast(a1, 2u);
            r11 = subgroupBroadcast(a1, 3u);
            r12 = subgroupBroadcast(a1, 4u);
            r13 = subgroupBroadcast(a1, 5u);
            r14 = subgroupBroadcast(a1, 6u);
            r15 = subgroupBroadcast(a1, 7u);
        }
        sum0 = add(r0, b0, b1, b2, b3, sum0);
        sum1 = add(r1, b0, b1, b2, b3, sum1);
        sum2 = add(r2, b0, b1, b2, b3, sum2);
        sum3 = add(r3, b0, b1, b2, b3, sum3);
        sum4 = add(r4, b0, b1, b2, b3, sum4);
        sum5 = add(r5, b0, b1, b2, b3, sum5);
        sum6 = add(r6, b0, b1, b2, b3, sum6);
        sum7 = add(r7, b0, b1, b2, b3, sum7);
        sum8 = add(r8, b0, b1, b2, b3, sum8);
        sum9 = add(r9, b0, b1, b2, b3, sum9);
        sum10 = add(r10, b0, b1, b2, b3, sum10);
        sum11 = add(r11, b0, b1, b2, b3, sum11);
        sum12 = add(r12, b0, b1, b2, b3, sum12);
        sum13 = add(r13, b0, b1, b2, b3, sum13);
        sum14 = add(r14, b0, b1, b2, b3, sum14);
        sum15 = add(r15, b0, b1, b2, b3, sum15);
    }
    // Through an array, so that the epilogue is one piece of code in a loop: unrolled, it takes drivers longer to
    // compile than all the rest.
    var tile: array<vec4<f32>, 16>;
    tile[0] = sum0;
    tile[1] = sum1;
    tile[2] = sum2;
    tile[3] = sum3;
    tile[4] = sum4;
    tile[5] = sum5;
    tile[6] = sum6;
    tile[7] = sum7;
    tile[8] = sum8;
    tile[9] = sum9;
    tile[10] = sum10;
    tile[11] = sum11;
    tile[12] = sum12;
    tile[13] = sum13;
    tile[14] = sum14;
    tile[15] = sum15;
    let end = min(row + 16u, p.m);
    for (var at = row; at < end; at++) {
        finish(at, column, tile[at - row]);
    }
}
