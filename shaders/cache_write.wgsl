// cache_write: copies k and v of new tokens, the last 2K heads of each packed row, into the rows of a cache (B,P,2KD) that
// their positions name.
// Grid: one invocation an Element, workgroups of 64 over x and y. Variant: header "multiples of 4".
// Header "any size": one element at a time.
alias Element = f32;
const EACH = 1u; // f32 in an Element

fn across(x: Element) -> f32 {
    return x;
}

// ---- body ----

struct Params { rows: u32, tokens: u32, width: u32, kv_width: u32, capacity: u32, unused: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> qkv: array<Element>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> cache: array<Element>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    let width = p.width / EACH;         // of q
    let columns = 2u * p.kv_width / EACH; // of k and v together
    if i >= p.rows * columns {
        return;
    }
    let row = i / columns;
    let column = i % columns;
    let to = row / p.tokens * p.capacity + min(positions[row], p.capacity - 1u);
    cache[to * columns + column] = qkv[row * (width + columns) + width + column];
}
