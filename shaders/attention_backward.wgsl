// attention_backward: one of the gradients of causal attention, recomputing the weights from lse: with w = exp(q·k scale − lse) and
// ds = w (do·v − delta) scale, dq = Σ ds k, dk = Σ ds q and dv = Σ w do (Dao et al. 2022). A workgroup owns ROWS queries (or keys) and
// walks over the keys that they see (or the queries that see them, head after head of those that share a key) in blocks of 32. Both
// sides come through workgroup memory, 32 columns of the head at a time; of its 16 x 8 invocations each has ROWS/16 x 4 of the
// weights, and of each 32 columns of the gradient 4.
// Grid: (ceil(T/ROWS), B·H or B·K, ceil(size/(32*CHUNKS))). Variants: header "multiples of 4"; software adapters with subgroups
// have `attention_backward_query_subgroup` and `attention_backward_key_subgroup`.
// Header "any head size": scalar elements; what lies past the head's last element is 0.

struct Params { batch: u32, tokens: u32, width: u32, heads: u32, size: u32, scale: f32, kv_heads: u32, stride: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;
@group(0) @binding(2) var<storage, read> d_o: array<f32>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> delta: array<f32>;
@group(0) @binding(5) var<storage, read> starts: array<u32>;
@group(0) @binding(6) var<storage, read_write> dqkv: array<f32>;

fn load_qkv(base: u32, d: u32) -> vec4<f32> {
    let at = vec4(d) + vec4(0u, 1u, 2u, 3u);
    let i = base + min(at, vec4(p.size - 1u));
    return select(vec4<f32>(), vec4(qkv[i.x], qkv[i.y], qkv[i.z], qkv[i.w]), at < vec4(p.size));
}

fn load_d_o(base: u32, d: u32) -> vec4<f32> {
    let at = vec4(d) + vec4(0u, 1u, 2u, 3u);
    let i = base + min(at, vec4(p.size - 1u));
    return select(vec4<f32>(), vec4(d_o[i.x], d_o[i.y], d_o[i.z], d_o[i.w]), at < vec4(p.size));
}

fn store_dqkv(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { dqkv[base + d] = x.x; }
    if d + 1u < p.size { dqkv[base + d + 1u] = x.y; }
    if d + 2u < p.size { dqkv[base + d + 2u] = x.z; }
    if d + 3u < p.size { dqkv[base + d + 3u] = x.w; }
}

// ---- body ----

override GRADIENT: u32 = 0u;   // of 0 q, 1 k, 2 v
override STARTS: bool = false; // a query sees no key before the first of its own text
override ROWS: u32 = 64u;      // queries or keys of a workgroup: 64, 32 or 16
override CHUNKS: u32 = 2u;     // columns of the gradient in units of 32, up to 4

const BLOCK = 32u; // keys or queries
const WIDE = 8u;   // fours in 32 columns, or in 32 rows
const STRIDE = 9u; // padded, so that 8 rows of one column are in different banks

// First element of row `token` of head `slot` in the packed tensor: H heads of q, K of k, K of v; rows past the end
// repeat the last.
fn packed(slot: u32, batch: u32, token: u32) -> u32 {
    return (batch * p.tokens + min(token, p.tokens - 1u)) * p.stride + slot * p.size;
}

// First element of row `token` of this head in a (B,T,HD) tensor; rows past the end repeat the last.
fn plain(batch: u32, head: u32, token: u32) -> u32 {
    return (batch * p.tokens + min(token, p.tokens - 1u)) * p.width + head * p.size;
}

// The first key that a query sees; it does not fall from query to query.
fn first_key(batch: u32, query: u32) -> u32 {
    if !STARTS {
        return 0u;
    }
    return starts[batch * p.tokens + min(query, p.tokens - 1u)];
}

// Four neighbours in each of up to 4 rows.
struct Tile { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

var<workgroup> owned: array<vec4<f32>, ROWS * STRIDE>;   // ROWS x 32 columns; then weights, ROWS x 32 places
var<workgroup> others: array<vec4<f32>, BLOCK * STRIDE>; // 32 rows x 32 columns

// Row i of a block stands in place (i % 8) * 4 + i / 8: four places of an invocation are one vector, and eight invocations
// read rows that are neighbours.
fn place(i: u32) -> u32 {
    return i % WIDE * 4u + i / WIDE;
}

fn dot4(x: vec4<f32>, y: vec4<f32>, sum: f32) -> f32 {
    return fma(x.w, y.w, fma(x.z, y.z, fma(x.y, y.y, fma(x.x, y.x, sum))));
}

fn dots(x: vec4<f32>, y: Tile, sum: vec4<f32>) -> vec4<f32> {
    return vec4(dot4(x, y.r0, sum.x), dot4(x, y.r1, sum.y), dot4(x, y.r2, sum.z), dot4(x, y.r3, sum.w));
}

// Adds what up to 32 columns give to the products of owned rows and others.
fn multiply(across: u32, down: u32, fours: u32, sum: Tile) -> Tile {
    var s = sum;
    for (var d = 0u; d < fours; d++) {
        let j = across * STRIDE + d;
        let y = Tile(others[j], others[j + 8u * STRIDE], others[j + 16u * STRIDE], others[j + 24u * STRIDE]);
        let i = down * (ROWS / 16u) * STRIDE + d;
        s.r0 = dots(owned[i], y, s.r0);
        if ROWS > 16u {
            s.r1 = dots(owned[i + STRIDE], y, s.r1);
        }
        if ROWS > 32u {
            s.r2 = dots(owned[i + 2u * STRIDE], y, s.r2);
            s.r3 = dots(owned[i + 3u * STRIDE], y, s.r3);
        }
    }
    return s;
}

fn combine(w: vec4<f32>, v: Tile, sum: vec4<f32>) -> vec4<f32> {
    return fma(vec4(w.w), v.r3, fma(vec4(w.z), v.r2, fma(vec4(w.y), v.r1, fma(vec4(w.x), v.r0, sum))));
}

// Adds the other rows, each times its weight.
fn weigh(across: u32, down: u32, fours: u32, sum: Tile) -> Tile {
    var t = sum;
    for (var four = 0u; four < fours; four++) {
        let j = 4u * four * STRIDE + across;
        let v = Tile(others[j], others[j + STRIDE], others[j + 2u * STRIDE], others[j + 3u * STRIDE]);
        let i = down * (ROWS / 16u) * STRIDE + four;
        t.r0 = combine(owned[i], v, t.r0);
        if ROWS > 16u {
            t.r1 = combine(owned[i + STRIDE], v, t.r1);
        }
        if ROWS > 32u {
            t.r2 = combine(owned[i + 2u * STRIDE], v, t.r2);
            t.r3 = combine(owned[i + 3u * STRIDE], v, t.r3);
        }
    }
    return t;
}

// Where a workgroup is: its batch, the head of its queries, and the heads of q, k and v in the packed tensor.
struct Place { batch: u32, head: u32, query: u32, key: u32, value: u32 }

// Four elements of a row: of q, k or v as `slot` says, or of do.
fn row_of(slot: u32, at: Place, row: u32, column: u32) -> vec4<f32> {
    return load_qkv(packed(slot, at.batch, row), column);
}

fn d_o_of(at: Place, row: u32, column: u32) -> vec4<f32> {
    return load_d_o(plain(at.batch, at.head, row), column);
}

// Brings 32 columns of q and k, or of do and v, of the owned rows and a block of others.
fn stage(thread: u32, at: Place, second: bool, row0: u32, block: u32, column: u32) {
    for (var i = thread; i < ROWS * WIDE; i += 128u) {
        let d = column + 4u * (i % WIDE);
        let row = row0 + i / WIDE;
        var x: vec4<f32>;
        if GRADIENT == 0u && second {
            x = d_o_of(at, row, d);
        } else {
            x = row_of(select(select(at.key, at.query, GRADIENT == 0u), at.value, second), at, row, d);
        }
        owned[i / WIDE * STRIDE + i % WIDE] = x;
    }
    for (var i = thread; i < BLOCK * WIDE; i += 128u) {
        let d = column + 4u * (i % WIDE);
        let row = block + i / WIDE;
        var x: vec4<f32>;
        if GRADIENT != 0u && second {
            x = d_o_of(at, row, d);
        } else {
            x = row_of(select(select(at.query, at.key, GRADIENT == 0u), at.value, second), at, row, d);
        }
        others[i / WIDE * STRIDE + i % WIDE] = x;
    }
}

// Brings 32 columns of what the weights are applied to: k, q or do.
fn stage_sources(thread: u32, at: Place, block: u32, column: u32) {
    for (var i = thread; i < BLOCK * WIDE; i += 128u) {
        let d = column + 4u * (i % WIDE);
        let row = block + i / WIDE;
        var x: vec4<f32>;
        if GRADIENT == 2u {
            x = d_o_of(at, row, d);
        } else {
            x = row_of(select(at.query, at.key, GRADIENT == 0u), at, row, d);
        }
        others[place(i / WIDE) * STRIDE + i % WIDE] = x;
    }
}

// Of four queries the logarithm of the sum, delta and the first key that each sees.
struct Sums { lse: vec4<f32>, delta: vec4<f32>, first: vec4<u32> }

fn sums(at: Place, queries: vec4<u32>) -> Sums {
    let i = (at.batch * p.heads + at.head) * p.tokens + min(queries, vec4(p.tokens - 1u));
    var first = vec4<u32>();
    if STARTS {
        let j = at.batch * p.tokens + min(queries, vec4(p.tokens - 1u));
        first = vec4(starts[j.x], starts[j.y], starts[j.z], starts[j.w]);
    }
    return Sums(
        vec4(lse[i.x], lse[i.y], lse[i.z], lse[i.w]),
        vec4(delta[i.x], delta[i.y], delta[i.z], delta[i.w]),
        first,
    );
}

// The factors of four pairs of a query and a key: w or ds, or 0 if the one does not see the other.
fn factors(score: vec4<f32>, d_weight: vec4<f32>, s: Sums, queries: vec4<u32>, keys: vec4<u32>) -> vec4<f32> {
    let weight = exp(min(score * p.scale - s.lse, vec4(0.0)));
    let seen = (queries < vec4(p.tokens)) & (keys <= queries) & (keys >= s.first);
    if GRADIENT == 2u {
        return select(vec4<f32>(), weight, seen);
    }
    return select(vec4<f32>(), weight * (d_weight - s.delta) * p.scale, seen);
}

// The factors of an owned row and four others, whose sums are known where they are queries.
fn factors_of_row(score: vec4<f32>, d_weight: vec4<f32>, at: Place, row: u32, others: vec4<u32>, s: Sums) -> vec4<f32> {
    if GRADIENT == 0u {
        return factors(score, d_weight, sums(at, vec4(row)), vec4(row), others);
    }
    return factors(score, d_weight, s, others, vec4(row));
}

fn write(slot: u32, batch: u32, row: u32, column: u32, c0: vec4<f32>, c1: vec4<f32>, c2: vec4<f32>, c3: vec4<f32>) {
    if row >= p.tokens {
        return;
    }
    let base = packed(slot, batch, row);
    store_dqkv(base, column, c0);
    if CHUNKS > 1u { store_dqkv(base, column + 32u, c1); }
    if CHUNKS > 2u { store_dqkv(base, column + 64u, c2); }
    if CHUNKS > 3u { store_dqkv(base, column + 96u, c3); }
}

@compute @workgroup_size(8, 16, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let across = local.x;
    let down = local.y;
    let thread = down * 8u + across;
    let row0 = group.x * ROWS;
    let row = row0 + down * (ROWS / 16u);
    let column0 = group.z * CHUNKS * 32u;
    let sharing = p.heads / p.kv_heads;
    let heads = select(p.kv_heads, p.heads, GRADIENT == 0u);
    let batch = group.y / heads;
    let own = group.y % heads;
    // The queries of one head have one key-value head; keys have all query heads that share them.
    let first_head = select(own * sharing, own, GRADIENT == 0u);
    let end_head = select(first_head + sharing, own + 1u, GRADIENT == 0u);
    let kv_head = first_head / sharing;
    var begin = row0 / BLOCK * BLOCK;
    var end = p.tokens;
    if GRADIENT == 0u {
        begin = first_key(batch, row0) / BLOCK * BLOCK;
        end = min(row0 + ROWS, p.tokens);
    }
    var t0 = Tile();
    var t1 = Tile();
    var t2 = Tile();
    var t3 = Tile();
    for (var head = first_head; head < end_head; head++) {
        let at = Place(batch, head, head, p.heads + kv_head, p.heads + p.kv_heads + kv_head);
        for (var block = begin; block < end; block += BLOCK) {
            if GRADIENT != 0u && STARTS {
                // Queries of later texts see none of these keys.
                if first_key(batch, block) >= row0 + ROWS {
                    break;
                }
            }
            var s = Tile();
            for (var d = 0u; d < p.size; d += 32u) {
                workgroupBarrier();
                stage(thread, at, false, row0, block, d);
                workgroupBarrier();
                s = multiply(across, down, min(WIDE, (p.size - d + 3u) / 4u), s);
            }
            var w = Tile();
            if GRADIENT != 2u {
                for (var d = 0u; d < p.size; d += 32u) {
                    workgroupBarrier();
                    stage(thread, at, true, row0, block, d);
                    workgroupBarrier();
                    w = multiply(across, down, min(WIDE, (p.size - d + 3u) / 4u), w);
                }
            }
            workgroupBarrier();
            let other = vec4(block + across) + vec4(0u, 8u, 16u, 24u);
            var shared_sums = Sums();
            if GRADIENT != 0u {
                shared_sums = sums(at, other);
            }
            let i = down * (ROWS / 16u) * STRIDE + across;
            owned[i] = factors_of_row(s.r0, w.r0, at, row, other, shared_sums);
            if ROWS > 16u {
                owned[i + STRIDE] = factors_of_row(s.r1, w.r1, at, row + 1u, other, shared_sums);
            }
            if ROWS > 32u {
                owned[i + 2u * STRIDE] = factors_of_row(s.r2, w.r2, at, row + 2u, other, shared_sums);
                owned[i + 3u * STRIDE] = factors_of_row(s.r3, w.r3, at, row + 3u, other, shared_sums);
            }
            let fours = min(WIDE, end - block);
            stage_sources(thread, at, block, column0);
            workgroupBarrier();
            t0 = weigh(across, down, fours, t0);
            if CHUNKS > 1u {
                workgroupBarrier();
                stage_sources(thread, at, block, column0 + 32u);
                workgroupBarrier();
                t1 = weigh(across, down, fours, t1);
            }
            if CHUNKS > 2u {
                workgroupBarrier();
                stage_sources(thread, at, block, column0 + 64u);
                workgroupBarrier();
                t2 = weigh(across, down, fours, t2);
            }
            if CHUNKS > 3u {
                workgroupBarrier();
                stage_sources(thread, at, block, column0 + 96u);
                workgroupBarrier();
                t3 = weigh(across, down, fours, t3);
            }
        }
    }
    var slot = own;
    if GRADIENT != 0u {
        slot += p.heads;
    }
    if GRADIENT == 2u {
        slot += p.kv_heads;
    }
    let column = column0 + 4u * across;
    write(slot, batch, row, column, t0.r0, t1.r0, t2.r0, t3.r0);
    if ROWS > 16u {
        write(slot, batch, row + 1u, column, t0.r1, t1.r1, t2.r1, t3.r1);
    }
    if ROWS > 32u {
        write(slot, batch, row + 2u, column, t0.r2, t1.r2, t2.r2, t3.r2);
        write(slot, batch, row + 3u, column, t0.r3, t1.r3, t2.r3, t3.r3);
    }
}
