// attention_backward_key: the gradients of k and v. A workgroup owns 8 keys and walks over the queries that see them, 4 a
// lane and head after head of those that share the key, recomputing the weights from lse: dv = Σ w do and dk = Σ ds q,
// with w and ds as in attention_backward_query.
// Grid: (ceil(T/8), B·K, ceil(size/(8*LANES))). Variants: header "multiples of 4"; software
// adapters with subgroups have `attention_backward_key_subgroup`.
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

var<workgroup> weights: array<vec4<f32>, 8u * LANES>;  // (4*LANES queries) x 8 keys as two vectors
var<workgroup> d_scores: array<vec4<f32>, 8u * LANES>; // the same for the gradients of the scores

// The first keys that four queries see.
fn first_keys(batch: u32, query: u32) -> vec4<u32> {
    if !STARTS {
        return vec4<u32>();
    }
    let at = batch * p.tokens + min(vec4(query) + vec4(0u, 1u, 2u, 3u), vec4(p.tokens - 1u));
    return vec4(starts[at.x], starts[at.y], starts[at.z], starts[at.w]);
}

// Which of four queries see a key.
fn sees(query: u32, first: vec4<u32>, key: u32) -> vec4<bool> {
    let queries = vec4(query) + vec4(0u, 1u, 2u, 3u);
    return (queries >= vec4(key)) & (first <= vec4(key)) & (queries < vec4(p.tokens));
}

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, input: Input) {
    let lane = input.local.x;
    let row0 = group.x * ROWS;
    let batch = group.y / p.kv_heads;
    let shared_head = group.y % p.kv_heads;
    let sharing = p.heads / p.kv_heads;
    let key_slot = p.heads + shared_head;
    let value_slot = key_slot + p.kv_heads;
    let column = (group.z * LANES + lane) * 8u;
    let keys = packed_rows(key_slot, batch, row0, input);
    let values = packed_rows(value_slot, batch, row0, input);
    var dk0l = vec4<f32>();
    var dk0r = vec4<f32>();
    var dv0l = vec4<f32>();
    var dv0r = vec4<f32>();
    var dk1l = vec4<f32>();
    var dk1r = vec4<f32>();
    var dv1l = vec4<f32>();
    var dv1r = vec4<f32>();
    var dk2l = vec4<f32>();
    var dk2r = vec4<f32>();
    var dv2l = vec4<f32>();
    var dv2r = vec4<f32>();
    var dk3l = vec4<f32>();
    var dk3r = vec4<f32>();
    var dv3l = vec4<f32>();
    var dv3r = vec4<f32>();
    var dk4l = vec4<f32>();
    var dk4r = vec4<f32>();
    var dv4l = vec4<f32>();
    var dv4r = vec4<f32>();
    var dk5l = vec4<f32>();
    var dk5r = vec4<f32>();
    var dv5l = vec4<f32>();
    var dv5r = vec4<f32>();
    var dk6l = vec4<f32>();
    var dk6r = vec4<f32>();
    var dv6l = vec4<f32>();
    var dv6r = vec4<f32>();
    var dk7l = vec4<f32>();
    var dk7r = vec4<f32>();
    var dv7l = vec4<f32>();
    var dv7r = vec4<f32>();
    for (var head = shared_head * sharing; head < (shared_head + 1u) * sharing; head++) {
        let row = (batch * p.heads + head) * p.tokens;
        for (var block = row0; block < p.tokens; block += 4u * LANES) {
            let query = block + 4u * lane;
            let q0 = packed(head, batch, query + 0u);
            let g0 = plain(batch, head, query + 0u);
            let q1 = packed(head, batch, query + 1u);
            let g1 = plain(batch, head, query + 1u);
            let q2 = packed(head, batch, query + 2u);
            let g2 = plain(batch, head, query + 2u);
            let q3 = packed(head, batch, query + 3u);
            let g3 = plain(batch, head, query + 3u);
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
                let y0 = load_qkv(q0, d);
                let z0 = load_d_o(g0, d);
                let y1 = load_qkv(q1, d);
                let z1 = load_d_o(g1, d);
                let y2 = load_qkv(q2, d);
                let z2 = load_d_o(g2, d);
                let y3 = load_qkv(q3, d);
                let z3 = load_d_o(g3, d);
                let x = rows_qkv(keys, d);
                let u = rows_qkv(values, d);
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
            let at = row + min(vec4(query) + vec4(0u, 1u, 2u, 3u), vec4(p.tokens - 1u));
            let first = first_keys(batch, query);
            let sums = vec4(lse[at.x], lse[at.y], lse[at.z], lse[at.w]);
            let deltas = vec4(delta[at.x], delta[at.y], delta[at.z], delta[at.w]);
            s0 = select(vec4<f32>(), exp(min(s0 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 0u));
            w0 = s0 * (w0 - deltas) * p.scale;
            s1 = select(vec4<f32>(), exp(min(s1 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 1u));
            w1 = s1 * (w1 - deltas) * p.scale;
            s2 = select(vec4<f32>(), exp(min(s2 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 2u));
            w2 = s2 * (w2 - deltas) * p.scale;
            s3 = select(vec4<f32>(), exp(min(s3 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 3u));
            w3 = s3 * (w3 - deltas) * p.scale;
            s4 = select(vec4<f32>(), exp(min(s4 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 4u));
            w4 = s4 * (w4 - deltas) * p.scale;
            s5 = select(vec4<f32>(), exp(min(s5 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 5u));
            w5 = s5 * (w5 - deltas) * p.scale;
            s6 = select(vec4<f32>(), exp(min(s6 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 6u));
            w6 = s6 * (w6 - deltas) * p.scale;
            s7 = select(vec4<f32>(), exp(min(s7 * p.scale - sums, vec4(0.0))), sees(query, first, row0 + 7u));
            w7 = s7 * (w7 - deltas) * p.scale;
            weights[(4u * lane + 0u) * 2u] = vec4(s0.x, s1.x, s2.x, s3.x);
            weights[(4u * lane + 0u) * 2u + 1u] = vec4(s4.x, s5.x, s6.x, s7.x);
            d_scores[(4u * lane + 0u) * 2u] = vec4(w0.x, w1.x, w2.x, w3.x);
            d_scores[(4u * lane + 0u) * 2u + 1u] = vec4(w4.x, w5.x, w6.x, w7.x);
            weights[(4u * lane + 1u) * 2u] = vec4(s0.y, s1.y, s2.y, s3.y);
            weights[(4u * lane + 1u) * 2u + 1u] = vec4(s4.y, s5.y, s6.y, s7.y);
            d_scores[(4u * lane + 1u) * 2u] = vec4(w0.y, w1.y, w2.y, w3.y);
            d_scores[(4u * lane + 1u) * 2u + 1u] = vec4(w4.y, w5.y, w6.y, w7.y);
            weights[(4u * lane + 2u) * 2u] = vec4(s0.z, s1.z, s2.z, s3.z);
            weights[(4u * lane + 2u) * 2u + 1u] = vec4(s4.z, s5.z, s6.z, s7.z);
            d_scores[(4u * lane + 2u) * 2u] = vec4(w0.z, w1.z, w2.z, w3.z);
            d_scores[(4u * lane + 2u) * 2u + 1u] = vec4(w4.z, w5.z, w6.z, w7.z);
            weights[(4u * lane + 3u) * 2u] = vec4(s0.w, s1.w, s2.w, s3.w);
            weights[(4u * lane + 3u) * 2u + 1u] = vec4(s4.w, s5.w, s6.w, s7.w);
            d_scores[(4u * lane + 3u) * 2u] = vec4(w0.w, w1.w, w2.w, w3.w);
            d_scores[(4u * lane + 3u) * 2u + 1u] = vec4(w4.w, w5.w, w6.w, w7.w);
            workgroupBarrier();
            let count = min(4u * LANES, p.tokens - block);
            if column < p.size {
                for (var j = 0u; j < count; j++) {
                    let q = packed(head, batch, block + j);
                    let g = plain(batch, head, block + j);
                    let ql = load_qkv(q, column);
                    let qr = load_qkv(q, column + 4u);
                    let gl = load_d_o(g, column);
                    let gr = load_d_o(g, column + 4u);
                    let wl = weights[j * 2u];
                    let wr = weights[j * 2u + 1u];
                    let sl = d_scores[j * 2u];
                    let sr = d_scores[j * 2u + 1u];
                    dk0l = fma(vec4(sl.x), ql, dk0l);
                    dk0r = fma(vec4(sl.x), qr, dk0r);
                    dv0l = fma(vec4(wl.x), gl, dv0l);
                    dv0r = fma(vec4(wl.x), gr, dv0r);
                    dk1l = fma(vec4(sl.y), ql, dk1l);
                    dk1r = fma(vec4(sl.y), qr, dk1r);
                    dv1l = fma(vec4(wl.y), gl, dv1l);
                    dv1r = fma(vec4(wl.y), gr, dv1r);
                    dk2l = fma(vec4(sl.z), ql, dk2l);
                    dk2r = fma(vec4(sl.z), qr, dk2r);
                    dv2l = fma(vec4(wl.z), gl, dv2l);
                    dv2r = fma(vec4(wl.z), gr, dv2r);
                    dk3l = fma(vec4(sl.w), ql, dk3l);
                    dk3r = fma(vec4(sl.w), qr, dk3r);
                    dv3l = fma(vec4(wl.w), gl, dv3l);
                    dv3r = fma(vec4(wl.w), gr, dv3r);
                    dk4l = fma(vec4(sr.x), ql, dk4l);
                    dk4r = fma(vec4(sr.x), qr, dk4r);
                    dv4l = fma(vec4(wr.x), gl, dv4l);
                    dv4r = fma(vec4(wr.x), gr, dv4r);
                    dk5l = fma(vec4(sr.y), ql, dk5l);
                    dk5r = fma(vec4(sr.y), qr, dk5r);
                    dv5l = fma(vec4(wr.y), gl, dv5l);
                    dv5r = fma(vec4(wr.y), gr, dv5r);
                    dk6l = fma(vec4(sr.z), ql, dk6l);
                    dk6r = fma(vec4(sr.z), qr, dk6r);
                    dv6l = fma(vec4(wr.z), gl, dv6l);
                    dv6r = fma(vec4(wr.z), gr, dv6r);
                    dk7l = fma(vec4(sr.w), ql, dk7l);
                    dk7r = fma(vec4(sr.w), qr, dk7r);
                    dv7l = fma(vec4(wr.w), gl, dv7l);
                    dv7r = fma(vec4(wr.w), gr, dv7r);
                }
            }
            workgroupBarrier();
        }
    }
    if row0 + 0u < p.tokens {
        let k = packed(key_slot, batch, row0 + 0u);
        store_dqkv(k, column, dk0l);
        store_dqkv(k, column + 4u, dk0r);
        let v = packed(value_slot, batch, row0 + 0u);
        store_dqkv(v, column, dv0l);
        store_dqkv(v, column + 4u, dv0r);
    }
    if row0 + 1u < p.tokens {
        let k = packed(key_slot, batch, row0 + 1u);
        store_dqkv(k, column, dk1l);
        store_dqkv(k, column + 4u, dk1r);
        let v = packed(value_slot, batch, row0 + 1u);
        store_dqkv(v, column, dv1l);
        store_dqkv(v, column + 4u, dv1r);
    }
    if row0 + 2u < p.tokens {
        let k = packed(key_slot, batch, row0 + 2u);
        store_dqkv(k, column, dk2l);
        store_dqkv(k, column + 4u, dk2r);
        let v = packed(value_slot, batch, row0 + 2u);
        store_dqkv(v, column, dv2l);
        store_dqkv(v, column + 4u, dv2r);
    }
    if row0 + 3u < p.tokens {
        let k = packed(key_slot, batch, row0 + 3u);
        store_dqkv(k, column, dk3l);
        store_dqkv(k, column + 4u, dk3r);
        let v = packed(value_slot, batch, row0 + 3u);
        store_dqkv(v, column, dv3l);
        store_dqkv(v, column + 4u, dv3r);
    }
    if row0 + 4u < p.tokens {
        let k = packed(key_slot, batch, row0 + 4u);
        store_dqkv(k, column, dk4l);
        store_dqkv(k, column + 4u, dk4r);
        let v = packed(value_slot, batch, row0 + 4u);
        store_dqkv(v, column, dv4l);
        store_dqkv(v, column + 4u, dv4r);
    }
    if row0 + 5u < p.tokens {
        let k = packed(key_slot, batch, row0 + 5u);
        store_dqkv(k, column, dk5l);
        store_dqkv(k, column + 4u, dk5r);
        let v = packed(value_slot, batch, row0 + 5u);
        store_dqkv(v, column, dv5l);
        store_dqkv(v, column + 4u, dv5r);
    }
    if row0 + 6u < p.tokens {
        let k = packed(key_slot, batch, row0 + 6u);
        store_dqkv(k, column, dk6l);
        store_dqkv(k, column + 4u, dk6r);
        let v = packed(value_slot, batch, row0 + 6u);
        store_dqkv(v, column, dv6l);
        store_dqkv(v, column + 4u, dv6r);
    }
    if row0 + 7u < p.tokens {
        let k = packed(key_slot, batch, row0 + 7u);
        store_dqkv(k, column, dk7l);
        store_dqkv(k, column + 4u, dk7r);
        let v = packed(value_slot, batch, row0 + 7u);
        store_dqkv(v, column, dv7l);
        store_dqkv(v, column + 4u, dv7r);
    }
}
