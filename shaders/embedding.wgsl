// embedding: x[row, c] = table[token[row], c], or 0 for a token beyond the table, plus positions[row mod tokens, c] if POSITIONS, or
// positions[place[row], c] if PLACES too. Either table may be packed as bf16, two elements in a word.
// Grid: one invocation an element, workgroups of 64 over x and y.

struct Params { rows: u32, columns: u32, tokens: u32, vocabulary: u32, context: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> token: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<u32>;
@group(0) @binding(3) var<storage, read> positions: array<u32>;
@group(0) @binding(4) var<storage, read> place: array<u32>;
@group(0) @binding(5) var<storage, read_write> x: array<f32>;

override POSITIONS: bool = true;
override PLACES: bool = false;
override PACKED: bool = false;           // the table
override PACKED_POSITIONS: bool = false;

fn unpack(word: u32, i: u32) -> f32 {
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, i % 2u == 1u));
}

fn load_table(i: u32) -> f32 {
    if PACKED {
        return unpack(table[i / 2u], i);
    }
    return bitcast<f32>(table[i]);
}

fn load_position(i: u32) -> f32 {
    if PACKED_POSITIONS {
        return unpack(positions[i / 2u], i);
    }
    return bitcast<f32>(positions[i]);
}

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i >= p.rows * p.columns {
        return;
    }
    let row = i / p.columns;
    let column = i % p.columns;
    var value = 0.0;
    if token[row] < p.vocabulary {
        value = load_table(token[row] * p.columns + column);
    }
    if POSITIONS {
        var at = row % p.tokens;
        if PLACES {
            at = min(place[row], p.context - 1u);
        }
        value += load_position(at * p.columns + column);
    }
    x[i] = value;
}
