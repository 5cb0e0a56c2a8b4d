// rope: turns the pairs (i, i + D/2) of each head of q and k by the angle of the token's position and packs q, k and v
// into rows of H + 2K heads. A row of the table has D/2 cosines, then D/2 sines.
// Grid: one invocation a pair of Elements, workgroups of 64 over x and y. Variant: header "multiples of 4".
// Header "any size": one element at a time.
alias Element = f32;
const EACH = 1u; // f32 in an Element

fn across(x: Element) -> f32 {
    return x;
}

// ---- body ----

struct Params { rows: u32, tokens: u32, heads: u32, kv_heads: u32, size: u32, context: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<Element>;
@group(0) @binding(2) var<storage, read> k: array<Element>;
@group(0) @binding(3) var<storage, read> v: array<Element>;
@group(0) @binding(4) var<storage, read> table: array<Element>;
@group(0) @binding(5) var<storage, read> positions: array<u32>;
@group(0) @binding(6) var<storage, read_write> qkv: array<Element>;

override POSITIONS: bool = false; // else a token's position is its place in the sequence

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let pair = (group.y * groups.x + group.x) * 64u + local.x;
    let half = p.size / (2u * EACH);
    let slots = p.heads + 2u * p.kv_heads;
    if pair >= p.rows * slots * half {
        return;
    }
    let i = pair % half;
    let slot = pair / half % slots;
    let row = pair / half / slots;
    let to = (row * slots + slot) * 2u * half + i;
    if slot >= p.heads + p.kv_heads {
        let source = (row * p.kv_heads + slot - p.heads - p.kv_heads) * 2u * half + i;
        qkv[to] = v[source];
        qkv[to + half] = v[source + half];
        return;
    }
    var first: Element;
    var second: Element;
    if slot < p.heads {
        let source = (row * p.heads + slot) * 2u * half + i;
        first = q[source];
        second = q[source + half];
    } else {
        let source = (row * p.kv_heads + slot - p.heads) * 2u * half + i;
        first = k[source];
        second = k[source + half];
    }
    var position = row % p.tokens;
    if POSITIONS {
        position = min(positions[row], p.context - 1u);
    }
    let cosine = table[position * 2u * half + i];
    let sine = table[position * 2u * half + half + i];
    qkv[to] = first * cosine - second * sine;
    qkv[to + half] = second * cosine + first * sine;
}
