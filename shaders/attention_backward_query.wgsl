// attention_backward_query: the gradient of q. A workgroup owns 8 queries and walks over the keys in blocks of 4 a lane,
// recomputing the weights from lse: w = exp(q·k scale − lse), ds = w (do·v − delta) scale, dq = Σ ds k.
// Grid: (ceil(T/8), B·H, ceil(size/(8*LANES))). Variants: header "multiples of 4"; software
// adapters with subgroups have `attention_backward_query_subgroup`.
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

// What differs between invocations; apart from the workgroup's number, which must be seen to be uniform.
struct Input {
    @builtin(local_invocation_id) local: vec3<u32>,
}

// Four neighbours in each of 8 rows.
struct Rows { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>, r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32> }

// First elements of 8 rows.
struct Bases { b0: u32, b1: u32, b2: u32, b3: u32, b4: u32, b5: u32, b6: u32, b7: u32 }

fn packed_rows(slot: u32, batch: u32, row0: u32, input: Input) -> Bases {
    return Bases(
        packed(slot, batch, row0),
        packed(slot, batch, row0 + 1u),
        packed(slot, batch, row0 + 2u),
        packed(slot, batch, row0 + 3u),
        packed(slot, batch, row0 + 4u),
        packed(slot, batch, row0 + 5u),
        packed(slot, batch, row0 + 6u),
        packed(slot, batch, row0 + 7u),
    );
}

fn plain_rows(batch: u32, head: u32, row0: u32, input: Input) -> Bases {
    return Bases(
        plain(batch, head, row0),
        plain(batch, head, row0 + 1u),
        plain(batch, head, row0 + 2u),
        plain(batch, head, row0 + 3u),
        plain(batch, head, row0 + 4u),
        plain(batch, head, row0 + 5u),
        plain(batch, head, row0 + 6u),
        plain(batch, head, row0 + 7u),
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

fn rows_d_o(b: Bases, d: u32) -> Rows {
    return Rows(
        load_d_o(b.b0, d),
        load_d_o(b.b1, d),
        load_d_o(b.b2, d),
        load_d_o(b.b3, d),
        load_d_o(b.b4, d),
        load_d_o(b.b5, d),
        load_d_o(b.b6, d),
        load_d_o(b.b7, d),
    );
}

fn store_dqkv(base: u32, d: u32, x: vec4<f32>) {
    if d < p.size { dqkv[base + d] = x.x; }
    if d + 1u < p.size { dqkv[base + d + 1u] = x.y; }
    if d + 2u < p.size { dqkv[base + d + 2u] = x.z; }
    if d + 3u < p.size { dqkv[base + d + 3u] = x.w; }
}

// ---- body ----

override LANES: u32 = 32u; // invocations of a workgroup; each owns 4 keys or queries of a block and 8 columns
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

var<workgroup> d_scores: array<vec4<f32>, 8u * LANES>; // (4*LANES keys) x 8 queries as two vectors

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
        d_scores[(4u * lane + 0u) * 2u] = vec4(s0.x, s1.x, s2.x, s3.x);
        d_scores[(4u * lane + 0u) * 2u + 1u] = vec4(s4.x, s5.x, s6.x, s7.x);
        d_scores[(4u * lane + 1u) * 2u] = vec4(s0.y, s1.y, s2.y, s3.y);
        d_scores[(4u * lane + 1u) * 2u + 1u] = vec4(s4.y, s5.y, s6.y, s7.y);
        d_scores[(4u * lane + 2u) * 2u] = vec4(s0.z, s1.z, s2.z, s3.z);
        d_scores[(4u * lane + 2u) * 2u + 1u] = vec4(s4.z, s5.z, s6.z, s7.z);
        d_scores[(4u * lane + 3u) * 2u] = vec4(s0.w, s1.w, s2.w, s3.w);
        d_scores[(4u * lane + 3u) * 2u + 1u] = vec4(s4.w, s5.w, s6.w, s7.w);
        workgroupBarrier();
        let count = min(4u * LANES, keys - block);
        if column < p.size {
            for (var j = 0u; j < count; j++) {
                let k = packed(key_slot, batch, block + j);
                let kl = load_qkv(k, column);
                let kr = load_qkv(k, column + 4u);
                let wl = d_scores[j * 2u];
                let wr = d_scores[j * 2u + 1u];
                d0l = fma(vec4(wl.x), kl, d0l);
                d0r = fma(vec4(wl.x), kr, d0r);
                d1l = fma(vec4(wl.y), kl, d1l);
                d1r = fma(vec4(wl.y), kr, d1r);
                d2l = fma(vec4(wl.z), kl, d2l);
                d2r = fma(vec4(wl.z), kr, d2r);
                d3l = fma(vec4(wl.w), kl, d3l);
                d3r = fma(vec4(wl.w), kr, d3r);
                d4l = fma(vec4(wr.x), kl, d4l);
                d4r = fma(vec4(wr.x), kr, d4r);
                d5l = fma(vec4(wr.y), kl, d5l);
                d5r = fma(vec4(wr.y), kr, d5r);
                d6l = fma(vec4(wr.z), kl, d6l);
                d6r = fma(vec4(wr.z), kr, d6r);
                d7l = fma(vec4(wr.w), kl, d7l);
                d7r = fma(vec4(wr.w), kr, d7r);
            }
        }
        workgroupBarrier();
    }
    if row0 + 0u < p.tokens {
        let at = packed(head, batch, row0 + 0u);
        store_dqkv(at, column, d0l);
        store_dqkv(at, column + 4u, d0r);
    }
    if row0 + 1u < p.tokens {
        let at = packed(head, batch, row0 + 1u);
        store_dqkv(at, column, d1l);
        store_dqkv(at, column + 4u, d1r);
    }
    if row0 + 2u < p.tokens {
        let at = packed(head, batch, row0 + 2u);
        store_dqkv(at, column, d2l);
        store_dqkv(at, column + 4u, d2r);
    }
    if row0 + 3u < p.tokens {
        let at = packed(head, batch, row0 + 3u);
        store_dqkv(at, column, d3l);
        store_dqkv(at, column + 4u, d3r);
    }
    if row0 + 4u < p.tokens {
        let at = packed(head, batch, row0 + 4u);
        store_dqkv(at, column, d4l);
        store_dqkv(at, column + 4u, d4r);
    }
    if row0 + 5u < p.tokens {
        let at = packed(head, batch, row0 + 5u);
        store_dqkv(at, column, d5l);
        store_dqkv(at, column + 4u, d5r);
    }
    if row0 + 6u < p.tokens {
        let at = packed(head, batch, row0 + 6u);
        store_dqkv(at, column, d6l);
        store_dqkv(at, column + 4u, d6r);
    }
    if row0 + 7u < p.tokens {
        let at = packed(head, batch, row0 + 7u);
        store_dqkv(at, column, d7l);
        store_dqkv(at, column + 4u, d7r);
    }
}
