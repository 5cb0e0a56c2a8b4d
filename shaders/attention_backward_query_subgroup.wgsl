// attention_backward_query_subgroup: as `attention_backward_query`, for software adapters: see `attention_subgroup`.
// Grid: (ceil(T/8), B·H, ceil(size/(8*LANES))). The size of a head is a multiple of 4.

struct Params { batch: u32, tokens: u32, width: u32, heads: u32, size: u32, scale: f32, kv_heads: u32, stride: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> delta: array<f32>;
@group(0) @binding(5) var<storage, read> starts: array<u32>;
@group(0) @binding(6) var<storage, read_write> dqkv: array<vec4<f32>>;

fn load_qkv(base: u32, d: u32) -> vec4<f32> {
    return qkv[(base + min(d, p.size - 4u)) / 4u];
}

fn load_d_o(base: u32, d: u32) -> vec4<f32> {
    return d_o[(base + min(d, p.size - 4u)) / 4u];
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

fn packed_rows(slot: u32, batch: u32, row0: u32, input: Input) -> Bases {
    let row = row0 + (input.lane & 3u);
    return Bases(packed(slot, batch, row), packed(slot, batch, row + 4u));
}

fn plain_rows(batch: u32, head: u32, row0: u32, input: Input) -> Bases {
    let row = row0 + (input.lane & 3u);
    return Bases(plain(batch, head, row), plain(batch, head, row + 4u));
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

fn rows_d_o(b: Bases, d: u32) -> Rows {
    let low = load_d_o(b.low, d);
    let high = load_d_o(b.high, d);
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

fn store_dqkv(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { dqkv[(base + d) / 4u] = x; }
}

// ---- body ----

override LANES: u32 = 4u; // of a subgroup; each owns 4 keys of a block and 8 columns
override STARTS: bool = false; // a query sees no key before the first of its own text
const ROWS = 8u;

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

// The gradient of four scores of one query; those of keys that it does not see are 0.
fn d_score(score: vec4<f32>, d_weight: vec4<f32>, batch: u32, row: u32, key: u32, query: u32) -> vec4<f32> {
    let at = row + min(query, p.tokens - 1u);
    let weight = exp(min(score * p.scale - lse[at], vec4(0.0)));
    let keys = vec4(key) + vec4(0u, 1u, 2u, 3u);
    let allowed = (keys >= vec4(first_key(batch, query))) & (keys <= vec4(min(query, p.tokens - 1u)));
    return select(vec4<f32>(), weight * (d_weight - delta[at]) * p.scale, allowed);
}

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, input: Input) {
    let lane = input.local.x;
    let row0 = group.x * ROWS;
    let batch = group.y / p.heads;
    let head = group.y % p.heads;
    let column = (group.z * LANES + lane) * 8u;
    let row = (batch * p.heads + head) * p.tokens;
    let key_slot = p.heads + head / (p.heads / p.kv_heads);
    let value_slot = key_slot + p.kv_heads;
    let queries = packed_rows(head, batch, row0, input);
    let outputs = plain_rows(batch, head, row0, input);
    var d0l = vec4<f32>();
    var d0r = vec4<f32>();
    var d1l = vec4<f32>();
    var d1r = vec4<f32>();
    var d2l = vec4<f32>();
    var d2r = vec4<f32>();
    var d3l = vec4<f32>();
    var d3r = vec4<f32>();
    var d4l = vec4<f32>();
    var d4r = vec4<f32>();
    var d5l = vec4<f32>();
    var d5r = vec4<f32>();
    var d6l = vec4<f32>();
    var d6r = vec4<f32>();
    var d7l = vec4<f32>();
    var d7r = vec4<f32>();
    let keys = min(row0 + ROWS, p.tokens);
    let begin = first_key(batch, row0) / (4u * LANES) * (4u * LANES);
    for (var block = begin; block < keys; block += 4u * LANES) {
        let key = block + 4u * lane;
        let k0 = packed(key_slot, batch, key + 0u);
        let v0 = packed(value_slot, batch, key + 0u);
        let k1 = packed(key_slot, batch, key + 1u);
        let v1 = packed(value_slot, batch, key + 1u);
        let k2 = packed(key_slot, batch, key + 2u);
        let v2 = packed(value_slot, batch, key + 2u);
        let k3 = packed(key_slot, batch, key + 3u);
        let v3 = packed(value_slot, batch, key + 3u);
        var s0 = vec4<f32>();
        var w0 = vec4<f32>();
        var s1 = vec4<f32>();
        var w1 = vec4<f32>();
        var s2 = vec4<f32>();
        var w2 = vec4<f32>();
        var s3 = vec4<f32>();
        var w3 = vec4<f32>();
        var s4 = vec4<f32>();
        var w4 = vec4<f32>();
        var s5 = vec4<f32>();
        var w5 = vec4<f32>();
        var s6 = vec4<f32>();
        var w6 = vec4<f32>();
        var s7 = vec4<f32>();
        var w7 = vec4<f32>();
        for (var d = 0u; d < p.size; d += 4u) {
            let y0 = load_qkv(k0, d);
            let z0 = load_qkv(v0, d);
            let y1 = load_qkv(k1, d);
            let z1 = load_qkv(v1, d);
            let y2 = load_qkv(k2, d);
            let z2 = load_qkv(v2, d);
            let y3 = load_qkv(k3, d);
            let z3 = load_qkv(v3, d);
            let x = rows_qkv(queries, d);
            let u = rows_d_o(outputs, d);
            s0 += vec4(dot(x.r0, y0), dot(x.r0, y1), dot(x.r0, y2), dot(x.r0, y3));
            w0 += vec4(dot(u.r0, z0), dot(u.r0, z1), dot(u.r0, z2), dot(u.r0, z3));
            s1 += vec4(dot(x.r1, y0), dot(x.r1, y1), dot(x.r1, y2), dot(x.r1, y3));
            w1 += vec4(dot(u.r1, z0), dot(u.r1, z1), dot(u.r1, z2), dot(u.r1, z3));
            s2 += vec4(dot(x.r2, y0), dot(x.r2, y1), dot(x.r2, y2), dot(x.r2, y3));
            w2 += vec4(dot(u.r2, z0), dot(u.r2, z1), dot(u.r2, z2), dot(u.r2, z3));
            s3 += vec4(dot(x.r3, y0), dot(x.r3, y1), dot(x.r3, y2), dot(x.r3, y3));
            w3 += vec4(dot(u.r3, z0), dot(u.r3, z1), dot(u.r3, z2), dot(u.r3, z3));
            s4 += vec4(dot(x.r4, y0), dot(x.r4, y1), dot(x.r4, y2), dot(x.r4, y3));
            w4 += vec4(dot(u.r4, z0), dot(u.r4, z1), dot(u.r4, z2), dot(u.r4, z3));
            s5 += vec4(dot(x.r5, y0), dot(x.r5, y1), dot(x.r5, y2), dot(x.r5, y3));
            w5 += vec4(dot(u.r5, z0), dot(u.r5, z1), dot(u.r5, z2), dot(u.r5, z3));
            s6 += vec4(dot(x.r6, y0), dot(x.r6, y1), dot(x.r6, y2), dot(x.r6, y3));
            w6 += vec4(dot(u.r6, z0), dot(u.r6, z1), dot(u.r6, z2), dot(u.r6, z3));
            s7 += vec4(dot(x.r7, y0), dot(x.r7, y1), dot(x.r7, y2), dot(x.r7, y3));
            w7 += vec4(dot(u.r7, z0), dot(u.r7, z1), dot(u.r7, z2), dot(u.r7, z3));
        }
        s0 = d_score(s0, w0, batch, row, key, row0 + 0u);
        s1 = d_score(s1, w1, batch, row, key, row0 + 1u);
        s2 = d_score(s2, w2, batch, row, key, row0 + 2u);
        s3 = d_score(s3, w3, batch, row, key, row0 + 3u);
        s4 = d_score(s4, w4, batch, row, key, row0 + 4u);
        s5 = d_score(s5, w5, batch, row, key, row0 + 5u);
        s6 = d_score(s6, w6, batch, row, key, row0 + 6u);
        s7 = d_score(s7, w7, batch, row, key, row0 + 7u);
        let count = min(4u * LANES, keys - block);
        for (var quad = 0u; 4u * quad < count; quad++) {
            let t0 = subgroupShuffle(s0, quad);
            let t1 = subgroupShuffle(s1, quad);
            let t2 = subgroupShuffle(s2, quad);
            let t3 = subgroupShuffle(s3, quad);
            let t4 = subgroupShuffle(s4, quad);
            let t5 = subgroupShuffle(s5, quad);
            let t6 = subgroupShuffle(s6, quad);
            let t7 = subgroupShuffle(s7, quad);
            let at0 = packed(key_slot, batch, block + 4u * quad + 0u);
            let k0l = load_qkv(at0, column);
            let k0r = load_qkv(at0, column + 4u);
            let at1 = packed(key_slot, batch, block + 4u * quad + 1u);
            let k1l = load_qkv(at1, column);
            let k1r = load_qkv(at1, column + 4u);
            let at2 = packed(key_slot, batch, block + 4u * quad + 2u);
            let k2l = load_qkv(at2, column);
            let k2r = load_qkv(at2, column + 4u);
            let at3 = packed(key_slot, batch, block + 4u * quad + 3u);
            let k3l = load_qkv(at3, column);
            let k3r = load_qkv(at3, column + 4u);
            d0l = fma(vec4(t0.x), k0l, d0l);
            d0r = fma(vec4(t0.x), k0r, d0r);
            d1l = fma(vec4(t1.x), k0l, d1l);
            d1r = fma(vec4(t1.x), k0r, d1r);
            d2l = fma(vec4(t2.x), k0l, d2l);
            d2r = fma(vec4(t2.x), k0r, d2r);
            d3l = fma(vec4(t3.x), k0l, d3l);
            d3r = fma(vec4(t3.x), k0r, d3r);
            d4l = fma(vec4(t4.x), k0l, d4l);
            d4r = fma(vec4(t4.x), k0r, d4r);
            d5l = fma(vec4(t5.x), k0l, d5l);
            d5r = fma(vec4(t5.x), k0r, d5r);
            d6l = fma(vec4(t6.x), k0l, d6l);
            d6r = fma(vec4(t6.x), k0r, d6r);
            d7l = fma(vec4(t7.x), k0l, d7l);
            d7r = fma(vec4(t7.x), k0r, d7r);
            d0l = fma(vec4(t0.y), k1l, d0l);
            d0r = fma(vec4(t0.y), k1r, d0r);
            d1l = fma(vec4(t1.y), k1l, d1l);
            d1r = fma(vec4(t1.y), k1r, d1r);
            d2l = fma(vec4(t2.y), k1l, d2l);
            d2r = fma(vec4(t2.y), k1r, d2r);
            d3l = fma(vec4(t3.y), k1l, d3l);
            d3r = fma(vec4(t3.y), k1r, d3r);
            d4l = fma(vec4(t4.y), k1l, d4l);
            d4r = fma(vec4(t4.y), k1r, d4r);
            d5l = fma(vec4(t5.y), k1l, d5l);
            d5r = fma(vec4(t5.y), k1r, d5r);
            d6l = fma(vec4(t6.y), k1l, d6l);
            d6r = fma(vec4(t6.y), k1r, d6r);
            d7l = fma(vec4(t7.y), k1l, d7l);
            d7r = fma(vec4(t7.y), k1r, d7r);
            d0l = fma(vec4(t0.z), k2l, d0l);
            d0r = fma(vec4(t0.z), k2r, d0r);
            d1l = fma(vec4(t1.z), k2l, d1l);
            d1r = fma(vec4(t1.z), k2r, d1r);
            d2l = fma(vec4(t2.z), k2l, d2l);
            d2r = fma(vec4(t2.z), k2r, d2r);
            d3l = fma(vec4(t3.z), k2l, d3l);
            d3r = fma(vec4(t3.z), k2r, d3r);
            d4l = fma(vec4(t4.z), k2l, d4l);
            d4r = fma(vec4(t4.z), k2r, d4r);
            d5l = fma(vec4(t5.z), k2l, d5l);
            d5r = fma(vec4(t5.z), k2r, d5r);
            d6l = fma(vec4(t6.z), k2l, d6l);
            d6r = fma(vec4(t6.z), k2r, d6r);
            d7l = fma(vec4(t7.z), k2l, d7l);
            d7r = fma(vec4(t7.z), k2r, d7r);
            d0l = fma(vec4(t0.w), k3l, d0l);
            d0r = fma(vec4(t0.w), k3r, d0r);
            d1l = fma(vec4(t1.w), k3l, d1l);
            d1r = fma(vec4(t1.w), k3r, d1r);
            d2l = fma(vec4(t2.w), k3l, d2l);
            d2r = fma(vec4(t2.w), k3r, d2r);
            d3l = fma(vec4(t3.w), k3l, d3l);
            d3r = fma(vec4(t3.w), k3r, d3r);
            d4l = fma(vec4(t4.w), k3l, d4l);
            d4r = fma(vec4(t4.w), k3r, d4r);
            d5l = fma(vec4(t5.w), k3l, d5l);
            d5r = fma(vec4(t5.w), k3r, d5r);
            d6l = fma(vec4(t6.w), k3l, d6l);
            d6r = fma(vec4(t6.w), k3r, d6r);
            d7l = fma(vec4(t7.w), k3l, d7l);
            d7r = fma(vec4(t7.w), k3r, d7r);
        }
    }
    // Through an array, so that the stores are one piece of code in a loop.
    var tile: array<vec4<f32>, 16>;
    tile[0] = d0l;
    tile[1] = d0r;
    tile[2] = d1l;
    tile[3] = d1r;
    tile[4] = d2l;
    tile[5] = d2r;
    tile[6] = d3l;
    tile[7] = d3r;
    tile[8] = d4l;
    tile[9] = d4r;
    tile[10] = d5l;
    tile[11] = d5r;
    tile[12] = d6l;
    tile[13] = d6r;
    tile[14] = d7l;
    tile[15] = d7r;
    for (var r = 0u; r < keys - row0; r++) {
        let at = packed(head, batch, row0 + r);
        store_dqkv(at, column, tile[2u * r]);
        store_dqkv(at, column + 4u, tile[2u * r + 1u]);
    }
}
