// rmsnorm_weight_backward, first of two stages: for each block of rows, partial sums of dy · x / rms, one invocation a
// column. `column_sum` adds the blocks.
// Grid: (ceil(columns/64), blocks, 1).

struct Params { rows: u32, columns: u32, block: u32, unused: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> statistics: array<f32>;
@group(0) @binding(4) var<storage, read_write> d_gain: array<f32>; // (blocks, columns)

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.columns {
        return;
    }
    var gain = 0.0;
    let end = min((id.y + 1u) * p.block, p.rows);
    for (var row = id.y * p.block; row < end; row++) {
        gain = fma(dy[row * p.columns + id.x], x[row * p.columns + id.x] * statistics[row], gain);
    }
    d_gain[id.y * p.columns + id.x] = gain;
}
