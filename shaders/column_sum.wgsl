// column_sum: for each block of rows, the sum of every column, one invocation a column. Run twice it sums a tall matrix
// in two stages: blocks first, then one block of the partial sums, added to what `out` holds if ACCUMULATE.
// Grid: (ceil(columns/64), blocks, 1).

struct Params { rows: u32, columns: u32, block: u32, unused: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>; // (blocks, columns)

override ACCUMULATE: bool = false;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= p.columns {
        return;
    }
    var sum = 0.0;
    let end = min((id.y + 1u) * p.block, p.rows);
    for (var row = id.y * p.block; row < end; row++) {
        sum += x[row * p.columns + id.x];
    }
    let i = id.y * p.columns + id.x;
    if ACCUMULATE {
        sum += out[i];
    }
    out[i] = sum;
}
