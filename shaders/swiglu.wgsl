// swiglu: out = gate / (1 + exp(-gate)) · up.
// Grid: one invocation an Element, workgroups of 64 over x and y. Variant: header "multiples of 4".
// Header "any size": one element at a time.
alias Element = f32;
const EACH = 1u; // f32 in an Element

fn across(x: Element) -> f32 {
    return x;
}

// ---- body ----

struct Params { count: u32, unused: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<Element>;
@group(0) @binding(2) var<storage, read> up: array<Element>;
@group(0) @binding(3) var<storage, read_write> out: array<Element>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i >= p.count / EACH {
        return;
    }
    // The bound keeps exp finite.
    out[i] = gate[i] / (1.0 + exp(min(-gate[i], Element(80.0)))) * up[i];
}
