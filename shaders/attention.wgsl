// attention: causal softmax(q kᵀ · scale) v of one head, without storing the scores. A workgroup owns ROWS queries and walks over
// the keys in blocks of 32, with a running maximum and sum for each query (Milakov and Gimelshein 2018; Dao et al. 2022). Queries,
// keys and values come through workgroup memory, 32 columns of the head at a time; of its 16 x 8 invocations each has
// ROWS/16 queries x 4 keys of the scores, and of each 32 columns of the output 4. Writes o (B,T,HD) and lse (B,H,T), the logarithm
// of the sum.
// If CACHED, keys and values are those of a cache (B,P,2KD) up to each query's position, the queries are neighbours
// among all tokens of the heads that share a key-value head, and lse is not written.
// If STARTS, a query sees no key before the first of its own text, and whole blocks before that are passed over.
// Bounds (B,T) of each token: if CACHED the last key that it sees, if STARTS the first.
// Grid: (ceil(T/ROWS), B·H, ceil(size/(32*CHUNKS))); if CACHED, (ceil(T·H/K/ROWS), B·K, same). Variants: header "multiples of
// 4"; software adapters with subgroups have `attention_subgroup`.
// Header "any head size": scalar elements; what lies past the head's last element is 0.

struct Params { batch: u32, tokens: u32, width: u32, heads: u32, size: u32, scale: f32, kv_heads: u32, stride: u32, capacity: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;
@group(0) @binding(2) var<storage, read> cache: array<f32>;
@group(0) @binding(3) var<storage, read> bounds: array<u32>;
@group(0) @binding(4) var<storage, read_write> o: array<f32>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;

fn load_qkv(base: u32, d: u32) -> vec4<f32> {
    let at = vec4(d) + vec4(0u, 1u, 2u, 3u);
    let i = base + min(at, vec4(p.size - 1u));
    return select(vec4<f32>(), vec4(qkv[i.x], qkv[i.y], qkv[i.z], qkv[i.w]), at < vec4(p.size));
}

fn load_kv(base: u32, d: u32) -> vec4<f32> {
    if !CACHED {
        return load_qkv(base, d);
    }
    let at = vec4(d) + vec4(0u, 1u, 2u, 3u);
    let i = base + min(at, vec4(p.size - 1u));
    return select(vec4<f32>(), vec4(cache[i.x], cache[i.y], cache[i.z], cache[i.w]), at < vec4(p.size));
}

fn store_o(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { o[base + d] = x.x; }
    if d + 1u < p.size { o[base + d + 1u] = x.y; }
    if d + 2u < p.size { o[base + d + 2u] = x.z; }
    if d + 3u < p.size { o[base + d + 3u] = x.w; }
}

// ---- body ----

const MASKED = -1e30; // finite: shaders may assume that there are no infinities

override CACHED: bool = false;
override STARTS: bool = false;
override ROWS: u32 = 64u;  // queries of a workgroup: 64, 32 or 16
override CHUNKS: u32 = 2u; // columns of the output in units of 32, up to 4

const KEYS = 32u;  // of a block
const WIDE = 8u;   // fours in 32 columns, or in 32 keys
const STRIDE = 9u; // padded, so that 8 rows of one column are in different banks

// First element of row `token` of head `slot` in the packed tensor: H heads of q, K of k, K of v; rows past the end
// repeat the last.
fn packed(slot: u32, batch: u32, token: u32) -> u32 {
    return (batch * p.tokens + min(token, p.tokens - 1u)) * p.stride + slot * p.size;
}

// First element of row `token` of head `slot` among the keys and values.
fn kept(slot: u32, batch: u32, token: u32) -> u32 {
    if !CACHED {
        return packed(slot, batch, token);
    }
    return ((batch * p.capacity + min(token, p.capacity - 1u)) * 2u * p.kv_heads + slot) * p.size;
}

// Query heads that share a key-value head.
fn sharing() -> u32 {
    return p.heads / p.kv_heads;
}

// Rows of queries of a head, or of all heads that share a key-value head, head by head for each token.
fn row_count() -> u32 {
    if !CACHED {
        return p.tokens;
    }
    return p.tokens * sharing();
}

// First element of a row of queries.
fn query(batch: u32, head: u32, row: u32) -> u32 {
    if !CACHED {
        return packed(head, batch, row);
    }
    return packed(head * sharing() + row % sharing(), batch, row / sharing());
}

// First element of a row of the output (B,T,HD).
fn output(batch: u32, head: u32, row: u32) -> u32 {
    if !CACHED {
        return (batch * p.tokens + row) * p.width + head * p.size;
    }
    return (batch * p.tokens + row / sharing()) * p.width + (head * sharing() + row % sharing()) * p.size;
}

// The last key that a row of queries sees.
fn last_key(batch: u32, row: u32) -> u32 {
    if !CACHED {
        return min(row, p.tokens - 1u);
    }
    return min(bounds[batch * p.tokens + min(row / sharing(), p.tokens - 1u)], p.capacity - 1u);
}

// The first key that a row of queries sees; it does not fall from row to row.
fn first_key(batch: u32, row: u32) -> u32 {
    if !STARTS {
        return 0u;
    }
    return bounds[batch * p.tokens + min(row, p.tokens - 1u)];
}

// Four neighbours in each of up to 4 rows.
struct Tile { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

// Of no more elements than are used: a browser clears them, and some drivers spell that out, one by one.
var<workgroup> queries: array<vec4<f32>, ROWS * STRIDE>; // ROWS x 32 columns; then weights, ROWS x 32 keys
var<workgroup> others: array<vec4<f32>, KEYS * STRIDE>;  // 32 keys x 32 columns, then the same of values
var<workgroup> partial: array<f32, ROWS * WIDE>;         // ROWS x what 8 invocations have of each

// Key i of a block stands in place (i % 8) * 4 + i / 8: four places of an invocation are one vector, and eight invocations
// read keys that are neighbours.
fn place(i: u32) -> u32 {
    return i % WIDE * 4u + i / WIDE;
}

fn dot4(x: vec4<f32>, y: vec4<f32>, sum: f32) -> f32 {
    return fma(x.w, y.w, fma(x.z, y.z, fma(x.y, y.y, fma(x.x, y.x, sum))));
}

fn dots(x: vec4<f32>, y: Tile, sum: vec4<f32>) -> vec4<f32> {
    return vec4(dot4(x, y.r0, sum.x), dot4(x, y.r1, sum.y), dot4(x, y.r2, sum.z), dot4(x, y.r3, sum.w));
}

// Adds what 32 columns give to the scores.
fn score(across: u32, down: u32, fours: u32, sum: Tile) -> Tile {
    var s = sum;
    for (var d = 0u; d < fours; d++) {
        let j = across * STRIDE + d;
        let y = Tile(others[j], others[j + 8u * STRIDE], others[j + 16u * STRIDE], others[j + 24u * STRIDE]);
        let i = down * (ROWS / 16u) * STRIDE + d;
        s.r0 = dots(queries[i], y, s.r0);
        if ROWS > 16u {
            s.r1 = dots(queries[i + STRIDE], y, s.r1);
        }
        if ROWS > 32u {
            s.r2 = dots(queries[i + 2u * STRIDE], y, s.r2);
            s.r3 = dots(queries[i + 3u * STRIDE], y, s.r3);
        }
    }
    return s;
}

fn combine(w: vec4<f32>, v: Tile, sum: vec4<f32>) -> vec4<f32> {
    return fma(vec4(w.w), v.r3, fma(vec4(w.z), v.r2, fma(vec4(w.y), v.r1, fma(vec4(w.x), v.r0, sum))));
}

// Adds the values of 32 keys, each times its weight.
fn weigh(across: u32, down: u32, fours: u32, sum: Tile) -> Tile {
    var t = sum;
    for (var key = 0u; key < fours; key++) {
        let j = 4u * key * STRIDE + across;
        let v = Tile(others[j], others[j + STRIDE], others[j + 2u * STRIDE], others[j + 3u * STRIDE]);
        let i = down * (ROWS / 16u) * STRIDE + key;
        t.r0 = combine(queries[i], v, t.r0);
        if ROWS > 16u {
            t.r1 = combine(queries[i + STRIDE], v, t.r1);
        }
        if ROWS > 32u {
            t.r2 = combine(queries[i + 2u * STRIDE], v, t.r2);
            t.r3 = combine(queries[i + 3u * STRIDE], v, t.r3);
        }
    }
    return t;
}

fn shrink(t: Tile, by: vec4<f32>) -> Tile {
    return Tile(t.r0 * by.x, t.r1 * by.y, t.r2 * by.z, t.r3 * by.w);
}

fn largest(x: vec4<f32>) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

fn total(x: vec4<f32>) -> f32 {
    return x.x + x.y + x.z + x.w;
}

fn share(down: u32, across: u32, x: vec4<f32>) {
    let i = down * (ROWS / 16u) * WIDE + across;
    partial[i] = x.x;
    if ROWS > 16u {
        partial[i + WIDE] = x.y;
    }
    if ROWS > 32u {
        partial[i + 2u * WIDE] = x.z;
        partial[i + 3u * WIDE] = x.w;
    }
}

fn shared_max(row: u32) -> f32 {
    let i = row * WIDE;
    return max(
        largest(vec4(partial[i], partial[i + 1u], partial[i + 2u], partial[i + 3u])),
        largest(vec4(partial[i + 4u], partial[i + 5u], partial[i + 6u], partial[i + 7u])),
    );
}

fn shared_sum(row: u32) -> f32 {
    let i = row * WIDE;
    return total(vec4(partial[i], partial[i + 1u], partial[i + 2u], partial[i + 3u]))
        + total(vec4(partial[i + 4u], partial[i + 5u], partial[i + 6u], partial[i + 7u]));
}

// Scores of keys that the query does not see are masked. A block without any for a row adds what the next block with
// one multiplies by 0.
fn mask(score: vec4<f32>, key: u32, batch: u32, row: u32) -> vec4<f32> {
    let keys = vec4(key) + vec4(0u, 8u, 16u, 24u);
    let seen = (keys >= vec4(first_key(batch, row))) & (keys <= vec4(last_key(batch, row)));
    return select(vec4(MASKED), score * p.scale, seen);
}

fn stage_values(thread: u32, slot: u32, batch: u32, block: u32, column: u32) {
    for (var i = thread; i < KEYS * WIDE; i += 128u) {
        let key = i / WIDE;
        others[place(key) * STRIDE + i % WIDE] = load_kv(kept(slot, batch, block + key), column + 4u * (i % WIDE));
    }
}

fn write(batch: u32, head: u32, row: u32, column: u32, inverse: f32, c0: vec4<f32>, c1: vec4<f32>, c2: vec4<f32>, c3: vec4<f32>) {
    if row >= row_count() {
        return;
    }
    let base = output(batch, head, row);
    store_o(base, column, c0 * inverse);
    if CHUNKS > 1u { store_o(base, column + 32u, c1 * inverse); }
    if CHUNKS > 2u { store_o(base, column + 64u, c2 * inverse); }
    if CHUNKS > 3u { store_o(base, column + 96u, c3 * inverse); }
}

@compute @workgroup_size(8, 16, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let across = local.x;
    let down = local.y;
    let thread = down * 8u + across;
    let row0 = group.x * ROWS;
    let heads = select(p.heads, p.kv_heads, CACHED);
    let batch = group.y / heads;
    let head = group.y % heads;
    let key_slot = select(p.heads + head / sharing(), head, CACHED);
    let value_slot = key_slot + p.kv_heads;
    let column0 = group.z * CHUNKS * 32u;
    let row = row0 + down * (ROWS / 16u);
    var highest = vec4(MASKED);
    var sum = vec4<f32>();
    var o0 = Tile();
    var o1 = Tile();
    var o2 = Tile();
    var o3 = Tile();
    let keys = last_key(batch, min(row0 + ROWS, row_count()) - 1u) + 1u;
    let begin = first_key(batch, row0) / KEYS * KEYS;
    for (var block = begin; block < keys; block += KEYS) {
        var s = Tile();
        for (var d = 0u; d < p.size; d += 32u) {
            workgroupBarrier();
            for (var i = thread; i < ROWS * WIDE; i += 128u) {
                queries[i / WIDE * STRIDE + i % WIDE] = load_qkv(query(batch, head, row0 + i / WIDE), d + 4u * (i % WIDE));
            }
            for (var i = thread; i < KEYS * WIDE; i += 128u) {
                others[i / WIDE * STRIDE + i % WIDE] = load_kv(kept(key_slot, batch, block + i / WIDE), d + 4u * (i % WIDE));
            }
            workgroupBarrier();
            s = score(across, down, min(WIDE, (p.size - d + 3u) / 4u), s);
        }
        let fours = min(WIDE, keys - block);
        let key = block + across;
        s.r0 = mask(s.r0, key, batch, row);
        s.r1 = mask(s.r1, key, batch, row + 1u);
        s.r2 = mask(s.r2, key, batch, row + 2u);
        s.r3 = mask(s.r3, key, batch, row + 3u);
        share(down, across, vec4(largest(s.r0), largest(s.r1), largest(s.r2), largest(s.r3)));
        workgroupBarrier();
        let r = row - row0;
        var next = highest;
        next.x = max(next.x, shared_max(r));
        if ROWS > 16u {
            next.y = max(next.y, shared_max(r + 1u));
        }
        if ROWS > 32u {
            next = max(next, vec4(next.xy, shared_max(r + 2u), shared_max(r + 3u)));
        }
        let by = exp(highest - next);
        highest = next;
        s = Tile(exp(s.r0 - next.x), exp(s.r1 - next.y), exp(s.r2 - next.z), exp(s.r3 - next.w));
        sum = sum * by + vec4(total(s.r0), total(s.r1), total(s.r2), total(s.r3));
        let at = r * STRIDE + across;
        queries[at] = s.r0;
        if ROWS > 16u {
            queries[at + STRIDE] = s.r1;
        }
        if ROWS > 32u {
            queries[at + 2u * STRIDE] = s.r2;
            queries[at + 3u * STRIDE] = s.r3;
        }
        stage_values(thread, value_slot, batch, block, column0);
        workgroupBarrier();
        o0 = weigh(across, down, fours, shrink(o0, by));
        if CHUNKS > 1u {
            workgroupBarrier();
            stage_values(thread, value_slot, batch, block, column0 + 32u);
            workgroupBarrier();
            o1 = weigh(across, down, fours, shrink(o1, by));
        }
        if CHUNKS > 2u {
            workgroupBarrier();
            stage_values(thread, value_slot, batch, block, column0 + 64u);
            workgroupBarrier();
            o2 = weigh(across, down, fours, shrink(o2, by));
        }
        if CHUNKS > 3u {
            workgroupBarrier();
            stage_values(thread, value_slot, batch, block, column0 + 96u);
            workgroupBarrier();
            o3 = weigh(across, down, fours, shrink(o3, by));
        }
    }
    workgroupBarrier();
    share(down, across, sum);
    workgroupBarrier();
    let r = row - row0;
    var sums = vec4(shared_sum(r), 1.0, 1.0, 1.0);
    if ROWS > 16u {
        sums.y = shared_sum(r + 1u);
    }
    if ROWS > 32u {
        sums = vec4(sums.xy, shared_sum(r + 2u), shared_sum(r + 3u));
    }
    let inverse = 1.0 / sums;
    let column = column0 + 4u * across;
    write(batch, head, row, column, inverse.x, o0.r0, o1.r0, o2.r0, o3.r0);
    if ROWS > 16u {
        write(batch, head, row + 1u, column, inverse.y, o0.r1, o1.r1, o2.r1, o3.r1);
    }
    if ROWS > 32u {
        write(batch, head, row + 2u, column, inverse.z, o0.r2, o1.r2, o2.r2, o3.r2);
        write(batch, head, row + 3u, column, inverse.w, o0.r3, o1.r3, o2.r3, o3.r3);
    }
    if !CACHED && group.z == 0u && across == 0u {
        let base = (batch * p.heads + head) * p.tokens + row;
        let logarithm = highest + log(sums);
        if row < p.tokens { lse[base] = logarithm.x; }
        if ROWS > 16u && row + 1u < p.tokens { lse[base + 1u] = logarithm.y; }
        if ROWS > 32u && row + 2u < p.tokens { lse[base + 2u] = logarithm.z; }
        if ROWS > 32u && row + 3u < p.tokens { lse[base + 3u] = logarithm.w; }
    }
}
