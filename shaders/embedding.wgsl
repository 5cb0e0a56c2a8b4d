// embedding: x[row, c] = table[token[row], c], plus positions[row mod tokens, c] if POSITIONS.
// Grid: one invocation an element, workgroups of 64 over x and y.

struct Params { rows: u32, columns: u32, tokens: u32, vocabulary: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> token: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<f32>;
@group(0) @binding(3) var<storage, read> positions: array<f32>;
@group(0) @binding(4) var<storage, read_write> x: array<f32>;

override POSITIONS: bool = true;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i >= p.rows * p.columns {
        return;
    }
    let row = i / p.columns;
    let column = i % p.columns;
    let id = min(token[row], p.vocabulary - 1u);
    var value = table[id * p.columns + column];
    if POSITIONS {
        value += positions[row % p.tokens * p.columns + column];
    }
    x[i] = value;
}
