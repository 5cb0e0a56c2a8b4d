// square_sum: for each chunk (offset, length, ..) of a pool, the sum of squares. Chunks never cross a parameter, so the
// host can add them in parameter order whatever the cut. Grid: one workgroup a chunk, chunks over x and y.

struct Params { chunks: u32, first: u32 } // first: where this pool's results start

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> chunks: array<vec4<u32>>; // offset, length, decay, unused
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read_write> sums: array<f32>;

override LANES: u32 = 64u; // a power of two

var<workgroup> partial: array<f32, LANES>;

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let chunk = group.y * groups.x + group.x;
    let lane = local.x;
    if chunk >= p.chunks {
        return;
    }
    let c = chunks[chunk];
    var sum = 0.0;
    for (var i = lane; i < c.y; i += LANES) {
        sum = fma(x[c.x + i], x[c.x + i], sum);
    }
    partial[lane] = sum;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partial[lane] += partial[lane + half];
        }
    }
    workgroupBarrier();
    if lane == 0u {
        sums[p.first + chunk] = partial[0];
    }
}
