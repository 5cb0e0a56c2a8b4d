// embedding_backward: d_table[id] += the sum of the rows order[start..end] of dx, for each segment (id, start, end). The
// host sorts the rows by token, so every row of the table has one owner: no atomics, one order of summation.
// Grid: (segments over x and y, ceil(columns/64)): a token that most rows have must not wait for one workgroup.

struct Params { segments: u32, columns: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dx: array<f32>;
@group(0) @binding(2) var<storage, read> segments: array<u32>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read_write> d_table: array<f32>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let segment = group.y * groups.x + group.x;
    if segment >= p.segments {
        return;
    }
    let id = segments[3u * segment];
    let start = segments[3u * segment + 1u];
    let end = segments[3u * segment + 2u];
    if start == end {
        return;
    }
    let c = group.z * 64u + local.x;
    if c >= p.columns {
        return;
    }
    var sum = 0.0;
    for (var i = start; i < end; i++) {
        sum += dx[order[i] * p.columns + c];
    }
    d_table[id * p.columns + c] += sum;
}
