// attention_backward_key_subgroup: as `attention_backward_key`, for software adapters: see `attention_subgroup`.
// Grid: (ceil(T/8), B·K, ceil(size/(8*LANES))). The size of a head is a multiple of 4.

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

override LANES: u32 = 4u; // of a subgroup; each owns 4 queries of a block and 8 columns
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
            let count = min(4u * LANES, p.tokens - block);
            for (var quad = 0u; 4u * quad < count; quad++) {
                let u0 = subgroupShuffle(s0, quad);
                let u1 = subgroupShuffle(s1, quad);
                let u2 = subgroupShuffle(s2, quad);
                let u3 = subgroupShuffle(s3, quad);
                let u4 = subgroupShuffle(s4, quad);
                let u5 = subgroupShuffle(s5, quad);
                let u6 = subgroupShuffle(s6, quad);
                let u7 = subgroupShuffle(s7, quad);
                let t0 = subgroupShuffle(w0, quad);
                let t1 = subgroupShuffle(w1, quad);
                let t2 = subgroupShuffle(w2, quad);
                let t3 = subgroupShuffle(w3, quad);
                let t4 = subgroupShuffle(w4, quad);
                let t5 = subgroupShuffle(w5, quad);
                let t6 = subgroupShuffle(w6, quad);
                let t7 = subgroupShuffle(w7, quad);
                let q_at0 = packed(head, batch, block + 4u * quad + 0u);
                let g_at0 = plain(batch, head, block + 4u * quad + 0u);
                let q0l = load_qkv(q_at0, column);
                let q0r = load_qkv(q_at0, column + 4u);
                let g0l = load_d_o(g_at0, column);
                let g0r = load_d_o(g_at0, column + 4u);
                let q_at1 = packed(head, batch, block + 4u * quad + 1u);
                let g_at1 = plain(batch, head, block + 4u * quad + 1u);
                let q1l = load_qkv(q_at1, column);
                let q1r = load_qkv(q_at1, column + 4u);
                let g1l = load_d_o(g_at1, column);
                let g1r = load_d_o(g_at1, column + 4u);
                let q_at2 = packed(head, batch, block + 4u * quad + 2u);
                let g_at2 = plain(batch, head, block + 4u * quad + 2u);
                let q2l = load_qkv(q_at2, column);
                let q2r = load_qkv(q_at2, column + 4u);
                let g2l = load_d_o(g_at2, column);
                let g2r = load_d_o(g_at2, column + 4u);
                let q_at3 = packed(head, batch, block + 4u * quad + 3u);
                let g_at3 = plain(batch, head, block + 4u * quad + 3u);
                let q3l = load_qkv(q_at3, column);
                let q3r = load_qkv(q_at3, column + 4u);
                let g3l = load_d_o(g_at3, column);
                let g3r = load_d_o(g_at3, column + 4u);
                dk0l = fma(vec4(t0.x), q0l, dk0l);
                dk0r = fma(vec4(t0.x), q0r, dk0r);
                dv0l = fma(vec4(u0.x), g0l, dv0l);
                dv0r = fma(vec4(u0.x), g0r, dv0r);
                dk1l = fma(vec4(t1.x), q0l, dk1l);
                dk1r = fma(vec4(t1.x), q0r, dk1r);
                dv1l = fma(vec4(u1.x), g0l, dv1l);
                dv1r = fma(vec4(u1.x), g0r, dv1r);
                dk2l = fma(vec4(t2.x), q0l, dk2l);
                dk2r = fma(vec4(t2.x), q0r, dk2r);
                dv2l = fma(vec4(u2.x), g0l, dv2l);
                dv2r = fma(vec4(u2.x), g0r, dv2r);
                dk3l = fma(vec4(t3.x), q0l, dk3l);
                dk3r = fma(vec4(t3.x), q0r, dk3r);
                dv3l = fma(vec4(u3.x), g0l, dv3l);
                dv3r = fma(vec4(u3.x), g0r, dv3r);
                dk4l = fma(vec4(t4.x), q0l, dk4l);
                dk4r = fma(vec4(t4.x), q0r, dk4r);
                dv4l = fma(vec4(u4.x), g0l, dv4l);
                dv4r = fma(vec4(u4.x), g0r, dv4r);
                dk5l = fma(vec4(t5.x), q0l, dk5l);
                dk5r = fma(vec4(t5.x), q0r, dk5r);
                dv5l = fma(vec4(u5.x), g0l, dv5l);
                dv5r = fma(vec4(u5.x), g0r, dv5r);
                dk6l = fma(vec4(t6.x), q0l, dk6l);
                dk6r = fma(vec4(t6.x), q0r, dk6r);
                dv6l = fma(vec4(u6.x), g0l, dv6l);
                dv6r = fma(vec4(u6.x), g0r, dv6r);
                dk7l = fma(vec4(t7.x), q0l, dk7l);
                dk7r = fma(vec4(t7.x), q0r, dk7r);
                dv7l = fma(vec4(u7.x), g0l, dv7l);
                dv7r = fma(vec4(u7.x), g0r, dv7r);
                dk0l = fma(vec4(t0.y), q1l, dk0l);
                dk0r = fma(vec4(t0.y), q1r, dk0r);
                dv0l = fma(vec4(u0.y), g1l, dv0l);
                dv0r = fma(vec4(u0.y), g1r, dv0r);
                dk1l = fma(vec4(t1.y), q1l, dk1l);
                dk1r = fma(vec4(t1.y), q1r, dk1r);
                dv1l = fma(vec4(u1.y), g1l, dv1l);
                dv1r = fma(vec4(u1.y), g1r, dv1r);
                dk2l = fma(vec4(t2.y), q1l, dk2l);
                dk2r = fma(vec4(t2.y), q1r, dk2r);
                dv2l = fma(vec4(u2.y), g1l, dv2l);
                dv2r = fma(vec4(u2.y), g1r, dv2r);
                dk3l = fma(vec4(t3.y), q1l, dk3l);
                dk3r = fma(vec4(t3.y), q1r, dk3r);
                dv3l = fma(vec4(u3.y), g1l, dv3l);
                dv3r = fma(vec4(u3.y), g1r, dv3r);
                dk4l = fma(vec4(t4.y), q1l, dk4l);
                dk4r = fma(vec4(t4.y), q1r, dk4r);
                dv4l = fma(vec4(u4.y), g1l, dv4l);
                dv4r = fma(vec4(u4.y), g1r, dv4r);
                dk5l = fma(vec4(t5.y), q1l, dk5l);
                dk5r = fma(vec4(t5.y), q1r, dk5r);
                dv5l = fma(vec4(u5.y), g1l, dv5l);
                dv5r = fma(vec4(u5.y), g1r, dv5r);
                dk6l = fma(vec4(t6.y), q1l, dk6l);
                dk6r = fma(vec4(t6.y), q1r, dk6r);
                dv6l = fma(vec4(u6.y), g1l, dv6l);
                dv6r = fma(vec4(u6.y), g1r, dv6r);
                dk7l = fma(vec4(t7.y), q1l, dk7l);
                dk7r = fma(vec4(t7.y), q1r, dk7r);
                dv7l = fma(vec4(u7.y), g1l, dv7l);
                dv7r = fma(vec4(u7.y), g1r, dv7r);
                dk0l = fma(vec4(t0.z), q2l, dk0l);
                dk0r = fma(vec4(t0.z), q2r, dk0r);
                dv0l = fma(vec4(u0.z), g2l, dv0l);
                dv0r = fma(vec4(u0.z), g2r, dv0r);
                dk1l = fma(vec4(t1.z), q2l, dk1l);
                dk1r = fma(vec4(t1.z), q2r, dk1r);
                dv1l = fma(vec4(u1.z), g2l, dv1l);
                dv1r = fma(vec4(u1.z), g2r, dv1r);
                dk2l = fma(vec4(t2.z), q2l, dk2l);
                dk2r = fma(vec4(t2.z), q2r, dk2r);
                dv2l = fma(vec4(u2.z), g2l, dv2l);
                dv2r = fma(vec4(u2.z), g2r, dv2r);
                dk3l = fma(vec4(t3.z), q2l, dk3l);
                dk3r = fma(vec4(t3.z), q2r, dk3r);
                dv3l = fma(vec4(u3.z), g2l, dv3l);
                dv3r = fma(vec4(u3.z), g2r, dv3r);
                dk4l = fma(vec4(t4.z), q2l, dk4l);
                dk4r = fma(vec4(t4.z), q2r, dk4r);
                dv4l = fma(vec4(u4.z), g2l, dv4l);
                dv4r = fma(vec4(u4.z), g2r, dv4r);
                dk5l = fma(vec4(t5.z), q2l, dk5l);
                dk5r = fma(vec4(t5.z), q2r, dk5r);
                dv5l = fma(vec4(u5.z), g2l, dv5l);
                dv5r = fma(vec4(u5.z), g2r, dv5r);
                dk6l = fma(vec4(t6.z), q2l, dk6l);
                dk6r = fma(vec4(t6.z), q2r, dk6r);
                dv6l = fma(vec4(u6.z), g2l, dv6l);
                dv6r = fma(vec4(u6.z), g2r, dv6r);
                dk7l = fma(vec4(t7.z), q2l, dk7l);
                dk7r = fma(vec4(t7.z), q2r, dk7r);
                dv7l = fma(vec4(u7.z), g2l, dv7l);
                dv7r = fma(vec4(u7.z), g2r, dv7r);
                dk0l = fma(vec4(t0.w), q3l, dk0l);
                dk0r = fma(vec4(t0.w), q3r, dk0r);
                dv0l = fma(vec4(u0.w), g3l, dv0l);
                dv0r = fma(vec4(u0.w), g3r, dv0r);
                dk1l = fma(vec4(t1.w), q3l, dk1l);
                dk1r = fma(vec4(t1.w), q3r, dk1r);
                dv1l = fma(vec4(u1.w), g3l, dv1l);
                dv1r = fma(vec4(u1.w), g3r, dv1r);
                dk2l = fma(vec4(t2.w), q3l, dk2l);
                dk2r = fma(vec4(t2.w), q3r, dk2r);
                dv2l = fma(vec4(u2.w), g3l, dv2l);
                dv2r = fma(vec4(u2.w), g3r, dv2r);
                dk3l = fma(vec4(t3.w), q3l, dk3l);
                dk3r = fma(vec4(t3.w), q3r, dk3r);
                dv3l = fma(vec4(u3.w), g3l, dv3l);
                dv3r = fma(vec4(u3.w), g3r, dv3r);
                dk4l = fma(vec4(t4.w), q3l, dk4l);
                dk4r = fma(vec4(t4.w), q3r, dk4r);
                dv4l = fma(vec4(u4.w), g3l, dv4l);
                dv4r = fma(vec4(u4.w), g3r, dv4r);
                dk5l = fma(vec4(t5.w), q3l, dk5l);
                dk5r = fma(vec4(t5.w), q3r, dk5r);
                dv5l = fma(vec4(u5.w), g3l, dv5l);
                dv5r = fma(vec4(u5.w), g3r, dv5r);
                dk6l = fma(vec4(t6.w), q3l, dk6l);
                dk6r = fma(vec4(t6.w), q3r, dk6r);
                dv6l = fma(vec4(u6.w), g3l, dv6l);
                dv6r = fma(vec4(u6.w), g3r, dv6r);
                dk7l = fma(vec4(t7.w), q3l, dk7l);
                dk7r = fma(vec4(t7.w), q3r, dk7r);
                dv7l = fma(vec4(u7.w), g3l, dv7l);
                dv7r = fma(vec4(u7.w), g3r, dv7r);
            }
        }
    }
    // Through arrays, so that the stores are one piece of code in a loop.
    var dk: array<vec4<f32>, 16>;
    var dv: array<vec4<f32>, 16>;
    dk[0] = dk0l;
    dk[1] = dk0r;
    dv[0] = dv0l;
    dv[1] = dv0r;
    dk[2] = dk1l;
    dk[3] = dk1r;
    dv[2] = dv1l;
    dv[3] = dv1r;
    dk[4] = dk2l;
    dk[5] = dk2r;
    dv[4] = dv2l;
    dv[5] = dv2r;
    dk[6] = dk3l;
    dk[7] = dk3r;
    dv[6] = dv3l;
    dv[7] = dv3r;
    dk[8] = dk4l;
    dk[9] = dk4r;
    dv[8] = dv4l;
    dv[9] = dv4r;
    dk[10] = dk5l;
    dk[11] = dk5r;
    dv[10] = dv5l;
    dv[11] = dv5r;
    dk[12] = dk6l;
    dk[13] = dk6r;
    dv[12] = dv6l;
    dv[13] = dv6r;
    dk[14] = dk7l;
    dk[15] = dk7r;
    dv[14] = dv7l;
    dv[15] = dv7r;
    for (var r = 0u; r < min(ROWS, p.tokens - row0); r++) {
        let k = packed(key_slot, batch, row0 + r);
        store_dqkv(k, column, dk[2u * r]);
        store_dqkv(k, column + 4u, dk[2u * r + 1u]);
        let v = packed(value_slot, batch, row0 + r);
        store_dqkv(v, column, dv[2u * r]);
        store_dqkv(v, column + 4u, dv[2u * r + 1u]);
    }
}
