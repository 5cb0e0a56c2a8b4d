// Header "multiples of 4, subgroups": as "multiples of 4"; of 8 rows that all invocations read, each loads two and takes the
// others by broadcast, for adapters where a load is dear.

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
