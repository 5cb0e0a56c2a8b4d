// swiglu_backward: with s = 1 / (1 + exp(-gate)), d_gate = dy · up · s (1 + gate (1 − s)) and d_up = dy · gate · s.
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
@group(0) @binding(1) var<storage, read> dy: array<Element>;
@group(0) @binding(2) var<storage, read> gate: array<Element>;
@group(0) @binding(3) var<storage, read> up: array<Element>;
@group(0) @binding(4) var<storage, read_write> d_gate: array<Element>;
@group(0) @binding(5) var<storage, read_write> d_up: array<Element>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i >= p.count / EACH {
        return;
    }
    let g = gate[i];
    let s = 1.0 / (1.0 + exp(min(-g, Element(80.0)))); // the bound keeps exp finite
    d_gate[i] = dy[i] * up[i] * s * (1.0 + g * (1.0 - s));
    d_up[i] = dy[i] * g * s;
}
