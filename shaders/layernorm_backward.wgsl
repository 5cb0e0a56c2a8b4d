// layernorm_backward: dx = (g − mean(g) − x̂ · mean(g · x̂)) / σ with g = dy · gain, plus `residual` if RESIDUAL.
// Grid: one workgroup a row, rows over x and y.

struct Params { rows: u32, columns: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> gain: array<f32>;
@group(0) @binding(4) var<storage, read> statistics: array<f32>;
@group(0) @binding(5) var<storage, read> residual: array<f32>;
@group(0) @binding(6) var<storage, read_write> dx: array<f32>;

override RESIDUAL: bool = false;
override LANES: u32 = 64u; // a power of two

var<workgroup> partial: array<vec2<f32>, LANES>;

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let row = group.y * groups.x + group.x;
    let lane = local.x;
    if row >= p.rows {
        return;
    }
    let base = row * p.columns;
    let mean = statistics[2u * row];
    let inverse = statistics[2u * row + 1u];
    var sums = vec2<f32>(); // of g and of g · x̂
    for (var i = lane; i < p.columns; i += LANES) {
        let g = dy[base + i] * gain[i];
        sums += vec2(g, g * (x[base + i] - mean) * inverse);
    }
    partial[lane] = sums;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partial[lane] += partial[lane + half];
        }
    }
    workgroupBarrier();
    let means = partial[0] / f32(p.columns);
    for (var i = lane; i < p.columns; i += LANES) {
        let hat = (x[base + i] - mean) * inverse;
        var d = (dy[base + i] * gain[i] - means.x - hat * means.y) * inverse;
        if RESIDUAL {
            d += residual[base + i];
        }
        dx[base + i] = d;
    }
}
