// attention_subgroup: as `attention`, for software adapters, where a barrier costs more than all the arithmetic between two of
// them: the workgroup is one subgroup, whose lanes hand each other what they have, and there is no workgroup memory. Of the 8
// rows of queries, each lane loads two and takes the others by broadcast. LANES is the size of a subgroup, at least 4.
// Grid: (ceil(T/8), B·H, ceil(size/(8*LANES))); if CACHED, (ceil(T·H/K/8), B·K, same). The size of a head is a multiple of 4.

struct Params { batch: u32, tokens: u32, width: u32, heads: u32, size: u32, scale: f32, kv_heads: u32, stride: u32, capacity: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> cache: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> bounds: array<u32>;
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;

fn load_qkv(base: u32, d: u32) -> vec4<f32> {
    return qkv[(base + min(d, p.size - 4u)) / 4u];
}

fn load_kv(base: u32, d: u32) -> vec4<f32> {
    if !CACHED {
        return load_qkv(base, d);
    }
    return cache[(base + min(d, p.size - 4u)) / 4u];
}

// What differs between invocations; apart from the workgroup's number, which must be seen to be uniform.
struct Input {
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
}

// Four neighbours in each of 8 rows.
struct Rows { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32> }

// First elements of the two rows that this invocation loads.
struct Bases { low: u32, high: u32 }

fn query_rows(batch: u32, head: u32, row0: u32, input: Input) -> Bases {
    let row = row0 + (input.lane & 3u);
    return Bases(query(batch, head, row), query(batch, head, row + 4u));
}

fn rows_qkv(b: Bases, d: u32) -> Rows {
    let low = load_qkv(b.low, d);
    let high = load_qkv(b.high, d);
    return Rows(
        subgroupBroadcast(low, 0u),
        subgroupBroadcast(low, 1u),
        subgroupBroadcast(low, 2u),
        subgroupBroadcast(low, 3u),
        subgroupBroadcast(high, 0u),
        subgroupBroadcast(high, 1u),
        subgroupBroadcast(high, 2u),
        subgroupBroadcast(high, 3u),
    );
}

fn store_o(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { o[(base + d) / 4u] = x; }
}

// ---- body ----

const MASKED = -1e30; // finite: shaders may assume that there are no infinities

override LANES: u32 = 4u; // of a subgroup; each owns 4 keys of a block and 8 columns
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
        let low = vec4(largest(s0), largest(s1), largest(s2), largest(s3));
        let high = vec4(largest(s4), largest(s5), largest(s6), largest(s7));
        let new_low = max(max_low, subgroupMax(low));
        let new_high = max(max_high, subgroupMax(high));
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
        let count = min(4u * LANES, keys - block);
        for (var quad = 0u; 4u * quad < count; quad++) {
            let w0 = subgroupShuffle(s0, quad);
            let w1 = subgroupShuffle(s1, quad);
            let w2 = subgroupShuffle(s2, quad);
            let w3 = subgroupShuffle(s3, quad);
            let w4 = subgroupShuffle(s4, quad);
            let w5 = subgroupShuffle(s5, quad);
            let w6 = subgroupShuffle(s6, quad);
            let w7 = subgroupShuffle(s7, quad);
            let v0 = kept(value_slot, batch, min(block + 4u * quad + 0u, keys - 1u));
            let v0l = load_kv(v0, column);
            let v0r = load_kv(v0, column + 4u);
            let v1 = kept(value_slot, batch, min(block + 4u * quad + 1u, keys - 1u));
            let v1l = load_kv(v1, column);
            let v1r = load_kv(v1, column + 4u);
            let v2 = kept(value_slot, batch, min(block + 4u * quad + 2u, keys - 1u));
            let v2l = load_kv(v2, column);
            let v2r = load_kv(v2, column + 4u);
            let v3 = kept(value_slot, batch, min(block + 4u * quad + 3u, keys - 1u));
            let v3l = load_kv(v3, column);
            let v3r = load_kv(v3, column + 4u);
            o0l = fma(vec4(w0.x), v0l, o0l);
            o0r = fma(vec4(w0.x), v0r, o0r);
            o1l = fma(vec4(w1.x), v0l, o1l);
            o1r = fma(vec4(w1.x), v0r, o1r);
            o2l = fma(vec4(w2.x), v0l, o2l);
            o2r = fma(vec4(w2.x), v0r, o2r);
            o3l = fma(vec4(w3.x), v0l, o3l);
            o3r = fma(vec4(w3.x), v0r, o3r);
            o4l = fma(vec4(w4.x), v0l, o4l);
            o4r = fma(vec4(w4.x), v0r, o4r);
            o5l = fma(vec4(w5.x), v0l, o5l);
            o5r = fma(vec4(w5.x), v0r, o5r);
            o6l = fma(vec4(w6.x), v0l, o6l);
            o6r = fma(vec4(w6.x), v0r, o6r);
            o7l = fma(vec4(w7.x), v0l, o7l);
            o7r = fma(vec4(w7.x), v0r, o7r);
            o0l = fma(vec4(w0.y), v1l, o0l);
            o0r = fma(vec4(w0.y), v1r, o0r);
            o1l = fma(vec4(w1.y), v1l, o1l);
            o1r = fma(vec4(w1.y), v1r, o1r);
            o2l = fma(vec4(w2.y), v1l, o2l);
            o2r = fma(vec4(w2.y), v1r, o2r);
            o3l = fma(vec4(w3.y), v1l, o3l);
            o3r = fma(vec4(w3.y), v1r, o3r);
            o4l = fma(vec4(w4.y), v1l, o4l);
            o4r = fma(vec4(w4.y), v1r, o4r);
            o5l = fma(vec4(w5.y), v1l, o5l);
            o5r = fma(vec4(w5.y), v1r, o5r);
            o6l = fma(vec4(w6.y), v1l, o6l);
            o6r = fma(vec4(w6.y), v1r, o6r);
            o7l = fma(vec4(w7.y), v1l, o7l);
            o7r = fma(vec4(w7.y), v1r, o7r);
            o0l = fma(vec4(w0.z), v2l, o0l);
            o0r = fma(vec4(w0.z), v2r, o0r);
            o1l = fma(vec4(w1.z), v2l, o1l);
            o1r = fma(vec4(w1.z), v2r, o1r);
            o2l = fma(vec4(w2.z), v2l, o2l);
            o2r = fma(vec4(w2.z), v2r, o2r);
            o3l = fma(vec4(w3.z), v2l, o3l);
            o3r = fma(vec4(w3.z), v2r, o3r);
            o4l = fma(vec4(w4.z), v2l, o4l);
            o4r = fma(vec4(w4.z), v2r, o4r);
            o5l = fma(vec4(w5.z), v2l, o5l);
            o5r = fma(vec4(w5.z), v2r, o5r);
            o6l = fma(vec4(w6.z), v2l, o6l);
            o6r = fma(vec4(w6.z), v2r, o6r);
            o7l = fma(vec4(w7.z), v2l, o7l);
            o7r = fma(vec4(w7.z), v2r, o7r);
            o0l = fma(vec4(w0.w), v3l, o0l);
            o0r = fma(vec4(w0.w), v3r, o0r);
            o1l = fma(vec4(w1.w), v3l, o1l);
            o1r = fma(vec4(w1.w), v3r, o1r);
            o2l = fma(vec4(w2.w), v3l, o2l);
            o2r = fma(vec4(w2.w), v3r, o2r);
            o3l = fma(vec4(w3.w), v3l, o3l);
            o3r = fma(vec4(w3.w), v3r, o3r);
            o4l = fma(vec4(w4.w), v3l, o4l);
            o4r = fma(vec4(w4.w), v3r, o4r);
            o5l = fma(vec4(w5.w), v3l, o5l);
            o5r = fma(vec4(w5.w), v3r, o5r);
            o6l = fma(vec4(w6.w), v3l, o6l);
            o6r = fma(vec4(w6.w), v3r, o6r);
            o7l = fma(vec4(w7.w), v3l, o7l);
            o7r = fma(vec4(w7.w), v3r, o7r);
        }
    }
    // Through arrays, so that what is done with each row is one piece of code in a loop: unrolled, it takes drivers longer to
    // compile than all the rest.
    let all_low = subgroupAdd(sum_low);
    let all_high = subgroupAdd(sum_high);
    var totals = array<f32, 8>(all_low.x, all_low.y, all_low.z, all_low.w, all_high.x, all_high.y, all_high.z, all_high.w);
    var maxima = array<f32, 8>(max_low.x, max_low.y, max_low.z, max_low.w, max_high.x, max_high.y, max_high.z, max_high.w);
    var tile: array<vec4<f32>, 16>;
    tile[0] = o0l;
    tile[1] = o0r;
    tile[2] = o1l;
    tile[3] = o1r;
    tile[4] = o2l;
    tile[5] = o2r;
    tile[6] = o3l;
    tile[7] = o3r;
    tile[8] = o4l;
    tile[9] = o4r;
    tile[10] = o5l;
    tile[11] = o5r;
    tile[12] = o6l;
    tile[13] = o6r;
    tile[14] = o7l;
    tile[15] = o7r;
    for (var r = 0u; r < min(ROWS, rows - row0); r++) {
        let base = output(batch, head, row0 + r);
        store_o(base, column, tile[2u * r] / totals[r]);
        store_o(base, column + 4u, tile[2u * r + 1u] / totals[r]);
        if !CACHED && group.z == 0u && lane == 0u {
            lse[(batch * p.heads + head) * p.tokens + row0 + r] = maxima[r] + log(totals[r]);
        }
    }
}
