// matmul: C(M,N) = epilogue(A · B), A and B read as LAYOUT says, summed in order of K. A workgroup of 256 owns a tile of C and
// takes 16 of K at a time through workgroup memory; an invocation has ROWS x (4*FOURS) sums in registers. Which tile it is
// changes no bit of the result. If SPLIT, workgroup z sums its own slice of K into the z-th of the matrices in c, and
// `matmul_reduce` adds them.
// Grid: (ceil(N/WIDE), up to ceil(M/HIGH), 1 or ceil(K/slice)): what would take a card too long is several launches. Variants: header of `matmul_subgroup` when M, N and K are multiples of 4.
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
    if row >= p.m {
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

override SPLIT: bool = false; // along K; p.more is then the length of a slice, and else the number of the first row of tiles
override WRITTEN_OUT: bool = true; // the loop over a tile: cards want it, drivers on a CPU compile it for seconds
override ACROSS: u32 = 16u;   // invocations along N, of 256
override ROWS: u32 = 4u;      // of an invocation: 2, 4 or 8
override FOURS: u32 = 1u;     // columns of an invocation in units of 4: 1 or 2

const DEPTH = 16u; // of K at a time
override DOWN: u32 = 256u / ACROSS;
override HIGH: u32 = DOWN * ROWS;        // rows of a tile
override WIDE: u32 = 4u * ACROSS * FOURS; // columns of a tile

// Both tiles are vectors along M or N for each of K, as halves: what lies along K in memory comes from two rows at a time and is turned
// before it is stored. (Whoever stores one component may store the whole vector: Metal and D3D do.) Row `four` of vectors is then
// turned by 2 * four, so that neighbours write to different banks.
var<workgroup> a_tile: array<vec2<f32>, HIGH * 8u>;
var<workgroup> b_tile: array<vec2<f32>, WIDE * 8u>;

fn in_a(vector: u32) -> vec4<f32> {
    return vec4(a_tile[2u * vector], a_tile[2u * vector + 1u]);
}

fn in_b(vector: u32) -> vec4<f32> {
    return vec4(b_tile[2u * vector], b_tile[2u * vector + 1u]);
}

// Those of four along K that are before its end.
fn within(x: vec4<f32>, k: u32) -> vec4<f32> {
    if EXACT {
        return select(vec4<f32>(), x, k < p.k);
    }
    return select(vec4<f32>(), x, vec4(k) + vec4(0u, 1u, 2u, 3u) < vec4(p.k));
}

// Which invocations bring two vectors, or one, of an operand whose tile is so long.
fn brings(i: u32, length: u32, lies_along: bool) -> bool {
    let count = select(4u, 2u, lies_along) * length;
    return (count >= 256u) | (i < count);
}

// The first or the second vector of the tiles at k0 that an invocation brings: of four along K those of neighbouring rows. Past K
// both have zeros: without B's RADV takes 2 % less, and waits for what was to be on its way.
fn fetch_a(i: u32, second: u32, row0: u32, k0: u32) -> vec4<f32> {
    if LAYOUT == 2u {
        let vector = i + 256u * second;
        let k = k0 + vector / (HIGH / 4u);
        return select(vec4<f32>(), load_a(k, row0 + vector % (HIGH / 4u) * 4u, p.k, p.m), k < p.k);
    }
    let k = k0 + i % 4u * 4u;
    return within(load_a(row0 + i % (2u * HIGH) / 4u * 2u + second, k, p.m, p.k), k);
}

fn fetch_b(i: u32, second: u32, column0: u32, k0: u32) -> vec4<f32> {
    if LAYOUT == 1u {
        let k = k0 + i % 4u * 4u;
        return within(load_b(column0 + i % (2u * WIDE) / 4u * 2u + second, k, p.n, p.k), k);
    }
    let vector = i + 256u * second;
    let k = k0 + vector / (WIDE / 4u);
    return select(vec4<f32>(), load_b(k, column0 + vector % (WIDE / 4u) * 4u, p.k, p.n), k < p.k);
}

// Where vector i of the `four`th four of K stands.
fn place_a(four: u32, i: u32) -> u32 {
    return 4u * four * (HIGH / 4u) + select((i + 2u * four) % (HIGH / 4u), i, LAYOUT == 2u);
}

fn place_b(four: u32, i: u32) -> u32 {
    return 4u * four * (WIDE / 4u) + select(i, (i + 2u * four) % (WIDE / 4u), LAYOUT == 1u);
}

fn put_a(i: u32, x: vec4<f32>, y: vec4<f32>) {
    if LAYOUT == 2u {
        a_tile[2u * i] = x.xy;
        a_tile[2u * i + 1u] = x.zw;
        if HIGH > 64u {
            a_tile[2u * i + 512u] = y.xy;
            a_tile[2u * i + 513u] = y.zw;
        }
        return;
    }
    let at = 2u * place_a(i % 4u, i / 8u) + i / 4u % 2u;
    a_tile[at] = vec2(x.x, y.x);
    a_tile[at + HIGH / 2u] = vec2(x.y, y.y);
    a_tile[at + HIGH] = vec2(x.z, y.z);
    a_tile[at + 3u * (HIGH / 2u)] = vec2(x.w, y.w);
}

fn put_b(i: u32, x: vec4<f32>, y: vec4<f32>) {
    if LAYOUT != 1u {
        b_tile[2u * i] = x.xy;
        b_tile[2u * i + 1u] = x.zw;
        if WIDE > 64u {
            b_tile[2u * i + 512u] = y.xy;
            b_tile[2u * i + 513u] = y.zw;
        }
        return;
    }
    let at = 2u * place_b(i % 4u, i / 8u) + i / 4u % 2u;
    b_tile[at] = vec2(x.x, y.x);
    b_tile[at + WIDE / 2u] = vec2(x.y, y.y);
    b_tile[at + WIDE] = vec2(x.z, y.z);
    b_tile[at + 3u * (WIDE / 2u)] = vec2(x.w, y.w);
}

// Four rows of four columns.
struct Block { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

fn outer(a: vec4<f32>, b: vec4<f32>, s: Block) -> Block {
    return Block(fma(vec4(a.x), b, s.r0), fma(vec4(a.y), b, s.r1), fma(vec4(a.z), b, s.r2), fma(vec4(a.w), b, s.r3));
}

struct Sums { upper_left: Block, upper_right: Block, lower_left: Block, lower_right: Block }

// Adds one of K.
fn add(upper: u32, lower: u32, left: u32, right: u32, half: u32, sums: Sums) -> Sums {
    var s = sums;
    let a = pick(in_a(upper), half);
    let b = in_b(left);
    s.upper_left = outer(a, b, s.upper_left);
    if FOURS > 1u {
        s.upper_right = outer(a, in_b(right), s.upper_right);
    }
    if ROWS > 4u {
        let a = in_a(lower);
        s.lower_left = outer(a, b, s.lower_left);
        if FOURS > 1u {
            s.lower_right = outer(a, in_b(right), s.lower_right);
        }
    }
    return s;
}

// The two rows of an invocation that has two of a vector's four.
fn pick(a: vec4<f32>, half: u32) -> vec4<f32> {
    if ROWS > 2u {
        return a;
    }
    return select(a, a.zwzw, half == 1u);
}

// Adds the `four`th four of K of the tiles, in order.
fn step(four: u32, y: u32, x: u32, sums: Sums) -> Sums {
    let up = y * min(ROWS, 4u) / 4u;
    let upper = place_a(four, up);
    let lower = place_a(four, up + HIGH / 8u);
    let left = place_b(four, x);
    let right = place_b(four, x + ACROSS);
    let high = HIGH / 4u;
    let wide = WIDE / 4u;
    let half = y % 2u;
    var s = add(upper, lower, left, right, half, sums);
    s = add(upper + high, lower + high, left + wide, right + wide, half, s);
    s = add(upper + 2u * high, lower + 2u * high, left + 2u * wide, right + 2u * wide, half, s);
    return add(upper + 3u * high, lower + 3u * high, left + 3u * wide, right + 3u * wide, half, s);
}

fn put(slice: u32, row: u32, column: u32, sum: vec4<f32>) {
    if !SPLIT {
        finish(row, column, sum);
    } else if row < p.m {
        store(slice * p.m + row, column, sum);
    }
}

fn put4(slice: u32, row: u32, column: u32, s: Block) {
    if column >= p.n {
        return;
    }
    put(slice, row, column, s.r0);
    put(slice, row + 1u, column, s.r1);
    if ROWS > 2u {
        put(slice, row + 2u, column, s.r2);
        put(slice, row + 3u, column, s.r3);
    }
}

@compute @workgroup_size(ACROSS, DOWN, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let row0 = (group.y + select(p.more, 0u, SPLIT)) * HIGH;
    let column0 = group.x * WIDE;
    let i = local.y * ACROSS + local.x;
    let row = local.y * min(ROWS, 4u);
    var first = 0u;
    var end = p.k;
    if SPLIT {
        first = group.z * p.more;
        end = min(first + p.more, p.k);
    }
    var sums = Sums();
    var a0 = vec4<f32>();
    var a1 = vec4<f32>();
    var b0 = vec4<f32>();
    var b1 = vec4<f32>();
    let brings_a = brings(i, HIGH, LAYOUT != 2u);
    let brings_b = brings(i, WIDE, LAYOUT == 1u);
    // Of 64 rows that lie along K the other half fetches the same again: drivers wait at a branch's end for what it loads.
    let fetches_a = brings_a | ((LAYOUT != 2u) & (HIGH == 64u));
    let fetches_b = brings_b | ((LAYOUT == 1u) & (WIDE == 64u));
    let two_of_a = (LAYOUT != 2u) | (HIGH > 64u);
    let two_of_b = (LAYOUT == 1u) | (WIDE > 64u);
    if fetches_a {
        a0 = fetch_a(i, 0u, row0, first);
        if two_of_a { a1 = fetch_a(i, 1u, row0, first); }
    }
    if fetches_b {
        b0 = fetch_b(i, 0u, column0, first);
        if two_of_b { b1 = fetch_b(i, 1u, column0, first); }
    }
    // Tested at its end, for which RADV takes 3 % fewer cycles.
    var k0 = first;
    loop {
        workgroupBarrier();
        if brings_a { put_a(i, a0, a1); }
        if brings_b { put_b(i, b0, b1); }
        workgroupBarrier();
        // What comes next is on its way while this is multiplied.
        k0 += DEPTH;
        if fetches_a {
            a0 = fetch_a(i, 0u, row0, k0);
            if two_of_a { a1 = fetch_a(i, 1u, row0, k0); }
        }
        if fetches_b {
            b0 = fetch_b(i, 0u, column0, k0);
            if two_of_b { b1 = fetch_b(i, 1u, column0, k0); }
        }
        if WRITTEN_OUT {
            sums = step(0u, local.y, local.x, sums);
            sums = step(1u, local.y, local.x, sums);
            sums = step(2u, local.y, local.x, sums);
            sums = step(3u, local.y, local.x, sums);
        } else {
            for (var four = 0u; four < 4u; four++) {
                sums = step(four, local.y, local.x, sums);
            }
        }
        if k0 >= end { break; }
    }
    let column = column0 + 4u * local.x;
    put4(group.z, row0 + row, column, sums.upper_left);
    if FOURS > 1u { put4(group.z, row0 + row, column + WIDE / 2u, sums.upper_right); }
    if ROWS > 4u { put4(group.z, row0 + row + HIGH / 2u, column, sums.lower_left); }
    if FOURS > 1u && ROWS > 4u { put4(group.z, row0 + row + HIGH / 2u, column + WIDE / 2u, sums.lower_right); }
}
