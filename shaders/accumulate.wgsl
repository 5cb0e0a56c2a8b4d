// accumulate: out[i] += x[i] + x[count + i] + ..., `batch` terms. Sums the gradient of the position table over sequences,
// and the two gradients of a tied parameter. Grid: one invocation an element of out, workgroups of 64 over x and y.

struct Params { batch: u32, count: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i >= p.count {
        return;
    }
    var sum = 0.0;
    for (var b = 0u; b < p.batch; b++) {
        sum += x[b * p.count + i];
    }
    out[i] += sum;
}
