// attention: causal softmax(q kᵀ · scale) v of one head, without storing the scores. A workgroup owns 8 queries; it walks
// over the keys in blocks of 4 a lane, keeps a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022),
// and each lane gathers 8 columns of the output. Writes o (B,T,HD) and lse (B,H,T), the logarithm of the sum.
// If CACHED, keys and values are those of a cache (B,P,2KD) up to each query's position, the 8 queries are neighbours
// among all tokens of the heads that share a key-value head, and lse is not written.
// If STARTS, a query sees no key before the first of its own text, and whole blocks before that are passed over.
// Bounds (B,T) of each token: if CACHED the last key that it sees, if STARTS the first.
// Grid: (ceil(T/8), B·H, ceil(size/(8*LANES))); if CACHED, (ceil(T·H/K/8), B·K, same). Variants: header "multiples of
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

// What differs between invocations; apart from the workgroup's number, which must be seen to be uniform.
struct Input {
    @builtin(local_invocation_id) local: vec3<u32>,
}

// Four neighbours in each of 8 rows.
struct Rows { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32> }

// First elements of 8 rows.
struct Bases { b0: u32, b1: u32, b2: u32, b3: u32, b4: u32, b5: u32, b6: u32, b7: u32 }

fn query_rows(batch: u32, head: u32, row0: u32, input: Input) -> Bases {
    return Bases(
        query(batch, head, row0),
        query(batch, head, row0 + 1u),
        query(batch, head, row0 + 2u),
        query(batch, head, row0 + 3u),
        query(batch, head, row0 + 4u),
        query(batch, head, row0 + 5u),
        query(batch, head, row0 + 6u),
        query(batch, head, row0 + 7u),
    );
}

fn rows_qkv(b: Bases, d: u32) -> Rows {
    return Rows(
        load_qkv(b.b0, d),
        load_qkv(b.b1, d),
        load_qkv(b.b2, d),
        load_qkv(b.b3, d),
        load_qkv(b.b4, d),
        load_qkv(b.b5, d),
        load_qkv(b.b6, d),
        load_qkv(b.b7, d),
    );
}

fn store_o(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { o[base + d] = x.x; }
    if d + 1u < p.size { o[base + d + 1u] = x.y; }
    if d + 2u < p.size { o[base + d + 2u] = x.z; }
    if d + 3u < p.size { o[base + d + 3u] = x.w; }
}

// ---- body ----

const MASKED = -1e30; // finite: shaders may assume that there are no infinities

override LANES: u32 = 32u; // invocations of a workgroup; each owns 4 keys or queries of a block and 8 columns
override CACHED: bool = false;
override STARTS: bool = false;
const ROWS = 8u;

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

// Of no more elements than are used: a browser clears them, and some drivers spell that out, one by one.
var<workgroup> weights: array<vec4<f32>, 8u * LANES>; // (4*LANES keys) x 8 queries as two vectors
var<workgroup> partial: array<f32, 8u * LANES>;       // 8 queries x LANES
var<workgroup> reduced: array<f32, 8>;

// The largest of every lane's value, for each of the 8 queries.
fn reduce_max(lane: u32, low: vec4<f32>, high: vec4<f32>) {
    partial[0u * LANES + lane] = low.x;
    partial[1u * LANES + lane] = low.y;
    partial[2u * LANES + lane] = low.z;
    partial[3u * LANES + lane] = low.w;
    partial[4u * LANES + lane] = high.x;
    partial[5u * LANES + lane] = high.y;
    partial[6u * LANES + lane] = high.z;
    partial[7u * LANES + lane] = high.w;
    workgroupBarrier();
    for (var i = lane; i < ROWS; i += LANES) {
        var x = partial[i * LANES];
        for (var j = 1u; j < LANES; j++) {
            x = max(x, partial[i * LANES + j]);
        }
        reduced[i] = x;
    }
    workgroupBarrier();
}

// The sum of every lane's value, for each of the 8 queries.
fn reduce_sum(lane: u32, low: vec4<f32>, high: vec4<f32>) {
    partial[0u * LANES + lane] = low.x;
    partial[1u * LANES + lane] = low.y;
    partial[2u * LANES + lane] = low.z;
    partial[3u * LANES + lane] = low.w;
    partial[4u * LANES + lane] = high.x;
    partial[5u * LANES + lane] = high.y;
    partial[6u * LANES + lane] = high.z;
    partial[7u * LANES + lane] = high.w;
    workgroupBarrier();
    for (var i = lane; i < ROWS; i += LANES) {
        var x = 0.0;
        for (var j = 0u; j < LANES; j++) {
            x += partial[i * LANES + j];
        }
        reduced[i] = x;
    }
    workgroupBarrier();
}

fn largest(x: vec4<f32>) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

fn total(x: vec4<f32>) -> f32 {
    return x.x + x.y + x.z + x.w;
}

// Scores of keys that the query does not see are masked. A block without any for a row adds what the next block with
// one multiplies by 0.
fn mask(score: vec4<f32>, key: u32, batch: u32, row: u32) -> vec4<f32> {
    let keys = vec4(key) + vec4(0u, 1u, 2u, 3u);
    let seen = (keys >= vec4(first_key(batch, row))) & (keys <= vec4(last_key(batch, row)));
    return select(vec4(MASKED), score * p.scale, seen);
}

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, input: Input) {
    let lane = input.local.x;
    let row0 = group.x * ROWS;
    let heads = select(p.heads, p.kv_heads, CACHED);
    let batch = group.y / heads;
    let head = group.y % heads;
    let key_slot = select(p.heads + head / sharing(), head, CACHED);
    let value_slot = key_slot + p.kv_heads;
    let rows = row_count();
    let column = (group.z * LANES + lane) * 8u;
    let queries = query_rows(batch, head, row0, input);
    var max_low = vec4(MASKED);
    var max_high = vec4(MASKED);
    var sum_low = vec4<f32>();
    var sum_high = vec4<f32>();
    var o0l = vec4<f32>();
    var o0r = vec4<f32>();
    var o1l = vec4<f32>();
    var o1r = vec4<f32>();
    var o2l = vec4<f32>();
    var o2r = vec4<f32>();
    var o3l = vec4<f32>();
    var o3r = vec4<f32>();
    var o4l = vec4<f32>();
    var o4r = vec4<f32>();
    var o5l = vec4<f32>();
    var o5r = vec4<f32>();
    var o6l = vec4<f32>();
    var o6r = vec4<f32>();
    var o7l = vec4<f32>();
    var o7r = vec4<f32>();
    let keys = last_key(batch, min(row0 + ROWS, rows) - 1u) + 1u;
    let begin = first_key(batch, row0) / (4u * LANES) * (4u * LANES);
    for (var block = begin; block < keys; block += 4u * LANES) {
        let key = block + 4u * lane;
        let k0 = kept(key_slot, batch, key + 0u);
        let k1 = kept(key_slot, batch, key + 1u);
        let k2 = kept(key_slot, batch, key + 2u);
        let k3 = kept(key_slot, batch, key + 3u);
        var s0 = vec4<f32>();
        var s1 = vec4<f32>();
        var s2 = vec4<f32>();
        var s3 = vec4<f32>();
        var s4 = vec4<f32>();
        var s5 = vec4<f32>();
        var s6 = vec4<f32>();
        var s7 = vec4<f32>();
        for (var d = 0u; d < p.size; d += 4u) {
            let y0 = load_kv(k0, d);
            let y1 = load_kv(k1, d);
            let y2 = load_kv(k2, d);
            let y3 = load_kv(k3, d);
            let x = rows_qkv(queries, d);
            s0 += vec4(dot(x.r0, y0), dot(x.r0, y1), dot(x.r0, y2), dot(x.r0, y3));
            s1 += vec4(dot(x.r1, y0), dot(x.r1, y1), dot(x.r1, y2), dot(x.r1, y3));
            s2 += vec4(dot(x.r2, y0), dot(x.r2, y1), dot(x.r2, y2), dot(x.r2, y3));
            s3 += vec4(dot(x.r3, y0), dot(x.r3, y1), dot(x.r3, y2), dot(x.r3, y3));
            s4 += vec4(dot(x.r4, y0), dot(x.r4, y1), dot(x.r4, y2), dot(x.r4, y3));
            s5 += vec4(dot(x.r5, y0), dot(x.r5, y1), dot(x.r5, y2), dot(x.r5, y3));
            s6 += vec4(dot(x.r6, y0), dot(x.r6, y1), dot(x.r6, y2), dot(x.r6, y3));
            s7 += vec4(dot(x.r7, y0), dot(x.r7, y1), dot(x.r7, y2), dot(x.r7, y3));
        }
        s0 = mask(s0, key, batch, row0 + 0u);
        s1 = mask(s1, key, batch, row0 + 1u);
        s2 = mask(s2, key, batch, row0 + 2u);
        s3 = mask(s3, key, batch, row0 + 3u);
        s4 = mask(s4, key, batch, row0 + 4u);
        s5 = mask(s5, key, batch, row0 + 5u);
        s6 = mask(s6, key, batch, row0 + 6u);
        s7 = mask(s7, key, batch, row0 + 7u);
        reduce_max(
            lane,
            vec4(largest(s0), largest(s1), largest(s2), largest(s3)),
            vec4(largest(s4), largest(s5), largest(s6), largest(s7)),
        );
        let new_low = max(max_low, vec4(reduced[0], reduced[1], reduced[2], reduced[3]));
        let new_high = max(max_high, vec4(reduced[4], reduced[5], reduced[6], reduced[7]));
        let shrink_low = exp(max_low - new_low);
        let shrink_high = exp(max_high - new_high);
        max_low = new_low;
        max_high = new_high;
        s0 = exp(s0 - new_low.x);
        s1 = exp(s1 - new_low.y);
        s2 = exp(s2 - new_low.z);
        s3 = exp(s3 - new_low.w);
        s4 = exp(s4 - new_high.x);
        s5 = exp(s5 - new_high.y);
        s6 = exp(s6 - new_high.z);
        s7 = exp(s7 - new_high.w);
        sum_low = sum_low * shrink_low + vec4(total(s0), total(s1), total(s2), total(s3));
        sum_high = sum_high * shrink_high + vec4(total(s4), total(s5), total(s6), total(s7));
        weights[(4u * lane + 0u) * 2u] = vec4(s0.x, s1.x, s2.x, s3.x);
        weights[(4u * lane + 0u) * 2u + 1u] = vec4(s4.x, s5.x, s6.x, s7.x);
        weights[(4u * lane + 1u) * 2u] = vec4(s0.y, s1.y, s2.y, s3.y);
        weights[(4u * lane + 1u) * 2u + 1u] = vec4(s4.y, s5.y, s6.y, s7.y);
        weights[(4u * lane + 2u) * 2u] = vec4(s0.z, s1.z, s2.z, s3.z);
        weights[(4u * lane + 2u) * 2u + 1u] = vec4(s4.z, s5.z, s6.z, s7.z);
        weights[(4u * lane + 3u) * 2u] = vec4(s0.w, s1.w, s2.w, s3.w);
        weights[(4u * lane + 3u) * 2u + 1u] = vec4(s4.w, s5.w, s6.w, s7.w);
        o0l *= shrink_low.x;
        o0r *= shrink_low.x;
        o1l *= shrink_low.y;
        o1r *= shrink_low.y;
        o2l *= shrink_low.z;
        o2r *= shrink_low.z;
        o3l *= shrink_low.w;
        o3r *= shrink_low.w;
        o4l *= shrink_high.x;
        o4r *= shrink_high.x;
        o5l *= shrink_high.y;
        o5r *= shrink_high.y;
        o6l *= shrink_high.z;
        o6r *= shrink_high.z;
        o7l *= shrink_high.w;
        o7r *= shrink_high.w;
        workgroupBarrier();
        let count = min(4u * LANES, keys - block);
        if column < p.size {
            for (var j = 0u; j < count; j++) {
                let v = kept(value_slot, batch, block + j);
                let vl = load_kv(v, column);
                let vr = load_kv(v, column + 4u);
                let wl = weights[j * 2u];
                let wr = weights[j * 2u + 1u];
                o0l = fma(vec4(wl.x), vl, o0l);
                o0r = fma(vec4(wl.x), vr, o0r);
                o1l = fma(vec4(wl.y), vl, o1l);
                o1r = fma(vec4(wl.y), vr, o1r);
                o2l = fma(vec4(wl.z), vl, o2l);
                o2r = fma(vec4(wl.z), vr, o2r);
                o3l = fma(vec4(wl.w), vl, o3l);
                o3r = fma(vec4(wl.w), vr, o3r);
                o4l = fma(vec4(wr.x), vl, o4l);
                o4r = fma(vec4(wr.x), vr, o4r);
                o5l = fma(vec4(wr.y), vl, o5l);
                o5r = fma(vec4(wr.y), vr, o5r);
                o6l = fma(vec4(wr.z), vl, o6l);
                o6r = fma(vec4(wr.z), vr, o6r);
                o7l = fma(vec4(wr.w), vl, o7l);
                o7r = fma(vec4(wr.w), vr, o7r);
            }
        }
        workgroupBarrier();
    }
    reduce_sum(lane, sum_low, sum_high);
    if row0 + 0u < rows {
        let base = output(batch, head, row0 + 0u);
        store_o(base, column, o0l / reduced[0]);
        store_o(base, column + 4u, o0r / reduced[0]);
    }
    if row0 + 1u < rows {
        let base = output(batch, head, row0 + 1u);
        store_o(base, column, o1l / reduced[1]);
        store_o(base, column + 4u, o1r / reduced[1]);
    }
    if row0 + 2u < rows {
        let base = output(batch, head, row0 + 2u);
        store_o(base, column, o2l / reduced[2]);
        store_o(base, column + 4u, o2r / reduced[2]);
    }
    if row0 + 3u < rows {
        let base = output(batch, head, row0 + 3u);
        store_o(base, column, o3l / reduced[3]);
        store_o(base, column + 4u, o3r / reduced[3]);
    }
    if row0 + 4u < rows {
        let base = output(batch, head, row0 + 4u);
        store_o(base, column, o4l / reduced[4]);
        store_o(base, column + 4u, o4r / reduced[4]);
    }
    if row0 + 5u < rows {
        let base = output(batch, head, row0 + 5u);
        store_o(base, column, o5l / reduced[5]);
        store_o(base, column + 4u, o5r / reduced[5]);
    }
    if row0 + 6u < rows {
        let base = output(batch, head, row0 + 6u);
        store_o(base, column, o6l / reduced[6]);
        store_o(base, column + 4u, o6r / reduced[6]);
    }
    if row0 + 7u < rows {
        let base = output(batch, head, row0 + 7u);
        store_o(base, column, o7l / reduced[7]);
        store_o(base, column + 4u, o7r / reduced[7]);
    }
    if !CACHED && group.z == 0u && lane == 0u {
        let base = (batch * p.heads + head) * p.tokens + row0;
        if row0 + 0u < p.tokens { lse[base + 0u] = max_low.x + log(reduced[0]); }
        if row0 + 1u < p.tokens { lse[base + 1u] = max_low.y + log(reduced[1]); }
        if row0 + 2u < p.tokens { lse[base + 2u] = max_low.z + log(reduced[2]); }
        if row0 + 3u < p.tokens { lse[base + 3u] = max_low.w + log(reduced[3]); }
        if row0 + 4u < p.tokens { lse[base + 4u] = max_high.x + log(reduced[4]); }
        if row0 + 5u < p.tokens { lse[base + 5u] = max_high.y + log(reduced[5]); }
        if row0 + 6u < p.tokens { lse[base + 6u] = max_high.z + log(reduced[6]); }
        if row0 + 7u < p.tokens { lse[base + 7u] = max_high.w + log(reduced[7]); }
    }
}
