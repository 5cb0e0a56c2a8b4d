// matmul_rows_subgroup: matmul_subgroup for up to 4 rows of C, as when decoding. An invocation owns 4 columns and all
// rows; for 16 of K at a time, lane l of a subgroup loads four of each row of A, and the others take them by broadcast, so
// that what is loaded is little more than B, once. Sums run along K as in matmul_subgroup.
// Grid: ceil(N/(4*LANES)) workgroups over x and y. LANES is a multiple of the subgroup size, which is at least 4. Variants: header of
// `matmul` for any shape.
// Header "multiples of 4": N and K are, so four neighbours in a row are one load. Indices are clamped into the
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

override LANES: u32 = 8u;
override ROWS: u32 = 4u; // 1, 2 or 4

@compute @workgroup_size(LANES, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let column = ((group.y * groups.x + group.x) * LANES + local.x) * 4u;
    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    var sum2 = vec4<f32>();
    var sum3 = vec4<f32>();
    for (var k = 0u; k < p.k; k += 16u) {
        let mine = k + 4u * (lane & 3u);
        var x0 = part(0u, mine);
        var x1: vec4<f32>;
        var x2: vec4<f32>;
        var x3: vec4<f32>;
        if ROWS > 1u {
            x1 = part(1u, mine);
        }
        if ROWS > 2u {
            x2 = part(2u, mine);
            x3 = part(3u, mine);
        }
        let b0 = block(k + 0u, column);
        sum0 = add(sum0, subgroupBroadcast(x0, 0u), b0);
        if ROWS > 1u {
            sum1 = add(sum1, subgroupBroadcast(x1, 0u), b0);
        }
        if ROWS > 2u {
            sum2 = add(sum2, subgroupBroadcast(x2, 0u), b0);
            sum3 = add(sum3, subgroupBroadcast(x3, 0u), b0);
        }
        let b1 = block(k + 4u, column);
        sum0 = add(sum0, subgroupBroadcast(x0, 1u), b1);
        if ROWS > 1u {
            sum1 = add(sum1, subgroupBroadcast(x1, 1u), b1);
        }
        if ROWS > 2u {
            sum2 = add(sum2, subgroupBroadcast(x2, 1u), b1);
            sum3 = add(sum3, subgroupBroadcast(x3, 1u), b1);
        }
        let b2 = block(k + 8u, column);
        sum0 = add(sum0, subgroupBroadcast(x0, 2u), b2);
        if ROWS > 1u {
            sum1 = add(sum1, subgroupBroadcast(x1, 2u), b2);
        }
        if ROWS > 2u {
            sum2 = add(sum2, subgroupBroadcast(x2, 2u), b2);
            sum3 = add(sum3, subgroupBroadcast(x3, 2u), b2);
        }
        let b3 = block(k + 12u, column);
        sum0 = add(sum0, subgroupBroadcast(x0, 3u), b3);
        if ROWS > 1u {
            sum1 = add(sum1, subgroupBroadcast(x1, 3u), b3);
        }
        if ROWS > 2u {
            sum2 = add(sum2, subgroupBroadcast(x2, 3u), b3);
            sum3 = add(sum3, subgroupBroadcast(x3, 3u), b3);
        }
    }
    finish(0u, column, sum0);
    if ROWS > 1u {
        finish(1u, column, sum1);
    }
    if ROWS > 2u {
        finish(2u, column, sum2);
        finish(3u, column, sum3);
    }
}
