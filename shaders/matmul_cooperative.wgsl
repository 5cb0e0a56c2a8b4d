// matmul_cooperative: C(M,N) = epilogue(A · B), as `matmul`, with A and B rounded to f16 and products summed in f32 by matrices that a
// subgroup holds together. A workgroup of 256 owns a tile of C of 8 x 8 matrices and takes 32 of K at a time through workgroup memory; a
// subgroup sums 2 x 4 of the tile's matrices, and then others until all are done: how many subgroups there are is the driver's choice.
// If SPLIT, workgroup z sums its own slice of K into the z-th of the matrices in c, and `matmul_reduce` adds them.
// Grid: (ceil(N/(8*SIZE)), up to ceil(M/(8*SIZE)), 1 or ceil(K/slice)). Variants: the headers of `matmul`, matrices of 8x8.
// Header "any shape": scalar elements. Four neighbours in a row at a time; indices are clamped into the matrix, so what
// lies outside repeats its edge and the caller masks it.
enable f16;
enable wgpu_cooperative_matrix;

struct Params { m: u32, n: u32, k: u32, more: u32, scale: f32, back: f32 }

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

// ---- matrices of 16x16 ----
const SIZE = 16u;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sum = coop_mat16x16<f32, C>;

const UNIT = 4u; // numbers in an element of a tile
var<workgroup> a_tile: array<vec4<f16>, 1280>;
var<workgroup> b_tile: array<vec4<f16>, 1280>;

fn keep_a(at: u32, x: vec4<f16>) {
    a_tile[at / 4u] = x;
}

fn keep_b(at: u32, x: vec4<f16>) {
    b_tile[at / 4u] = x;
}

// ---- body ----
override LAYOUT: u32 = 0u;          // 0 NN, 1 NT, 2 TN
override EPILOGUE: u32 = 0u;        // 0 none, 1 bias, 2 bias + gelu (u to c2), 3 bias + residual, 4 times gelu'(u), 5 residual
override ACCUMULATE: bool = false;  // add to what c holds
override GRADIENT: u32 = 0u;        // which operand is a gradient, to be taken p.scale times: 0 none, 1 A, 2 B
override SPLIT: bool = false;       // along K; p.more is then the length of a slice, and else the number of the first row of tiles

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

const WIDE = 8u * SIZE; // rows and columns of a tile
const DEPTH = 32u;      // of K at a time
// Numbers in workgroup memory for a row of A or a column of B: some more than DEPTH, so that they begin in different banks.
const STRIDE = DEPTH + 8u;
const BLOCKS = WIDE * DEPTH / 16u; // of 4x4 numbers that a step takes of each operand

// One matrix of each of eight subgroups.
var<workgroup> sums: array<f32, 8u * SIZE * SIZE>;

// As f16; what that cannot hold becomes NaN, so that it cannot be overlooked.
fn held(x: vec4<f32>) -> vec4<f16> {
    let bits = select(bitcast<vec4<u32>>(x), vec4(0x7fc00000u), abs(x) > vec4(65504.0));
    return vec4<f16>(bitcast<vec4<f32>>(bits));
}

// Those of four along K that are before its end.
fn within(x: vec4<f32>, k: u32) -> vec4<f32> {
    if EXACT {
        return select(vec4<f32>(), x, k < p.k);
    }
    return select(vec4<f32>(), x, vec4(k) + vec4(0u, 1u, 2u, 3u) < vec4(p.k));
}

// The first row (of A, or column of B) of block i and its first k, in fours. Where an operand lies along K in memory, eight
// neighbours load 128 bytes of a row; where it lies across, eight neighbours load them of four rows at one k.
fn along(i: u32) -> vec2<u32> {
    return vec2(i / 8u, i % 8u);
}

fn across(i: u32) -> vec2<u32> {
    let eights = WIDE / 32u;
    return vec2(i / 32u % eights * 8u + i % 8u, i / 32u / eights * 4u + i / 8u % 4u);
}

fn block_a(i: u32) -> vec2<u32> {
    if LAYOUT == 2u {
        return across(i);
    }
    return along(i);
}

fn block_b(i: u32) -> vec2<u32> {
    if LAYOUT == 1u {
        return along(i);
    }
    return across(i);
}

// Block i at k0 as it lies in memory, unchanged: what would be done with it would wait for it, and matrices are multiplied meanwhile.
fn fetch_a(i: u32, row0: u32, k0: u32) -> mat4x4<f32> {
    let at = block_a(i) * 4u + vec2(row0, k0);
    if LAYOUT == 2u {
        return mat4x4(
            load_a(at.y, at.x, p.k, p.m),
            load_a(at.y + 1u, at.x, p.k, p.m),
            load_a(at.y + 2u, at.x, p.k, p.m),
            load_a(at.y + 3u, at.x, p.k, p.m),
        );
    }
    return mat4x4(
        load_a(at.x, at.y, p.m, p.k),
        load_a(at.x + 1u, at.y, p.m, p.k),
        load_a(at.x + 2u, at.y, p.m, p.k),
        load_a(at.x + 3u, at.y, p.m, p.k),
    );
}

fn fetch_b(i: u32, column0: u32, k0: u32) -> mat4x4<f32> {
    let at = block_b(i) * 4u + vec2(column0, k0);
    if LAYOUT == 1u {
        return mat4x4(
            load_b(at.x, at.y, p.n, p.k),
            load_b(at.x + 1u, at.y, p.n, p.k),
            load_b(at.x + 2u, at.y, p.n, p.k),
            load_b(at.x + 3u, at.y, p.n, p.k),
        );
    }
    return mat4x4(
        load_b(at.y, at.x, p.k, p.n),
        load_b(at.y + 1u, at.x, p.k, p.n),
        load_b(at.y + 2u, at.x, p.k, p.n),
        load_b(at.y + 3u, at.x, p.k, p.n),
    );
}

// Both operands lie along K in workgroup memory.
fn put_a(i: u32, k0: u32, block: mat4x4<f32>) {
    let at = block_a(i) * 4u;
    var x = block;
    if LAYOUT == 2u {
        x = transpose(block);
    }
    x *= select(1.0, p.scale, GRADIENT == 1u);
    let to = at.x * STRIDE + at.y;
    keep_a(to, held(within(x[0], k0 + at.y)));
    keep_a(to + STRIDE, held(within(x[1], k0 + at.y)));
    keep_a(to + 2u * STRIDE, held(within(x[2], k0 + at.y)));
    keep_a(to + 3u * STRIDE, held(within(x[3], k0 + at.y)));
}

fn put_b(i: u32, k0: u32, block: mat4x4<f32>) {
    let at = block_b(i) * 4u;
    var x = block;
    if LAYOUT != 1u {
        x = transpose(block);
    }
    x *= select(1.0, p.scale, GRADIENT == 2u);
    let to = at.x * STRIDE + at.y;
    keep_b(to, held(within(x[0], k0 + at.y)));
    keep_b(to + STRIDE, held(within(x[1], k0 + at.y)));
    keep_b(to + 2u * STRIDE, held(within(x[2], k0 + at.y)));
    keep_b(to + 3u * STRIDE, held(within(x[3], k0 + at.y)));
}

// The matrix of A at a row of the tile and at k of the step, and that of B at a column.
fn left(row: u32, k: u32) -> Left {
    return coopLoadT<Left>(&a_tile[(row * STRIDE + k) / UNIT], STRIDE / UNIT);
}

fn right(column: u32, k: u32) -> Right {
    return coopLoad<Right>(&b_tile[(column * STRIDE + k) / UNIT], STRIDE / UNIT);
}

// Where a workgroup is at work, and which of its eight blocks of 2 x 4 matrices its subgroups have now.
struct At { i: u32, row0: u32, column0: u32, slice: u32, first: u32, end: u32, mine: u32 }

// Writes one matrix of each block.
fn leave(at: At, row: u32, column: u32, sum: Sum) {
    let begin = at.mine * SIZE * SIZE;
    let stride = SIZE;
    workgroupBarrier();
    coopStoreT(sum, &sums[begin], stride);
    workgroupBarrier();
    let unscale = select(p.back, 1.0, GRADIENT == 0u);
    for (var v = at.i + at.first * (SIZE * SIZE / 4u); v < at.end * (SIZE * SIZE / 4u); v += 256u) {
        let block = v / (SIZE * SIZE / 4u);
        let r = at.row0 + block / 2u * (2u * SIZE) + row + v / (SIZE / 4u) % SIZE;
        let c = at.column0 + block % 2u * (4u * SIZE) + column + v % (SIZE / 4u) * 4u;
        let x = unscale * vec4(sums[4u * v], sums[4u * v + 1u], sums[4u * v + 2u], sums[4u * v + 3u]);
        if !SPLIT {
            finish(r, c, x);
        } else if r < p.m && c < p.n {
            store(at.slice * p.m + r, c, x);
        }
    }
}

@compute @workgroup_size(256, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) i: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let row0 = (group.y + select(p.more, 0u, SPLIT)) * WIDE;
    let column0 = group.x * WIDE;
    var begin = 0u;
    var end = p.k;
    if SPLIT {
        begin = group.z * p.more;
        end = min(begin + p.more, p.k);
    }
    // A block of each operand, or with small matrices of one.
    let block = i % BLOCKS;
    let has_a = BLOCKS == 256u || i < BLOCKS;
    let has_b = BLOCKS == 256u || i >= BLOCKS;
    for (var first = 0u; first < 8u; first += subgroups) {
        // Those beyond the last block sum it too.
        let mine = min(first + subgroup, 7u);
        let row = mine / 2u * (2u * SIZE);
        let column = mine % 2u * (4u * SIZE);
        var s00 = Sum();
        var s01 = Sum();
        var s02 = Sum();
        var s03 = Sum();
        var s10 = Sum();
        var s11 = Sum();
        var s12 = Sum();
        var s13 = Sum();
        var x: mat4x4<f32>;
        var y: mat4x4<f32>;
        if has_a {
            x = fetch_a(block, row0, begin);
        }
        if has_b {
            y = fetch_b(block, column0, begin);
        }
        for (var k0 = begin; k0 < end; k0 += DEPTH) {
            workgroupBarrier();
            if has_a {
                put_a(block, k0, x);
            }
            if has_b {
                put_b(block, k0, y);
            }
            workgroupBarrier();
            // What comes next is on its way while this is multiplied.
            if has_a {
                x = fetch_a(block, row0, k0 + DEPTH);
            }
            if has_b {
                y = fetch_b(block, column0, k0 + DEPTH);
            }
            for (var k = 0u; k < DEPTH; k += SIZE) {
                let upper = left(row, k);
                let lower = left(row + SIZE, k);
                let r0 = right(column, k);
                s00 = coopMultiplyAdd(upper, r0, s00);
                s10 = coopMultiplyAdd(lower, r0, s10);
                let r1 = right(column + SIZE, k);
                s01 = coopMultiplyAdd(upper, r1, s01);
                s11 = coopMultiplyAdd(lower, r1, s11);
                let r2 = right(column + 2u * SIZE, k);
                s02 = coopMultiplyAdd(upper, r2, s02);
                s12 = coopMultiplyAdd(lower, r2, s12);
                let r3 = right(column + 3u * SIZE, k);
                s03 = coopMultiplyAdd(upper, r3, s03);
                s13 = coopMultiplyAdd(lower, r3, s13);
            }
        }
        let at = At(i, row0, column0, group.z, first, min(first + subgroups, 8u), mine);
        leave(at, 0u, 0u, s00);
        leave(at, 0u, SIZE, s01);
        leave(at, 0u, 2u * SIZE, s02);
        leave(at, 0u, 3u * SIZE, s03);
        leave(at, SIZE, 0u, s10);
        leave(at, SIZE, SIZE, s11);
        leave(at, SIZE, 2u * SIZE, s12);
        leave(at, SIZE, 3u * SIZE, s13);
    }
}
