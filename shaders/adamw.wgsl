// adamw: one AdamW step (Loshchilov and Hutter 2019) on a pool of parameters, chunk by chunk, with the gradient scaled
// by `clip`; weight decay applies to chunks of matrices. Grid: one workgroup a chunk, chunks over x and y. Variants:
// headers for weights that are packed as bf16, with f32 masters or without.
// Header "f32": an invocation has one weight at a time.
@group(0) @binding(4) var<storage, read_write> weight: array<f32>;

const EACH = 1u; // weights that an invocation has at a time

fn advance(i: u32, end: u32, shrink: f32) {
    weight[i] = updated(i, weight[i], shrink);
}

// ---- body ----
struct Params { chunks: u32, first: u32 }

struct Step {
    clip: f32,          // factor of the gradient
    rate: f32,          // learning rate
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    decay: f32,         // learning rate times weight decay
    correction1: f32,   // 1 / (1 − beta1^step)
    correction2: f32,   // 1 / (1 − beta2^step)
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> chunks: array<vec4<u32>>; // offset, length, decay, lag
@group(0) @binding(2) var<storage, read> step: Step;
@group(0) @binding(3) var<storage, read> gradient: array<f32>;
@group(0) @binding(5) var<storage, read_write> m: array<f32>;
@group(0) @binding(6) var<storage, read_write> v: array<f32>;

// Whether gradients too are there only for what the device owns, while weights are there for all.
override GRADIENT_LAGS: u32 = 0u;

// By how much the number of an element is more than that of its moments (and of its master, where weights are packed): they
// are there only for what the device owns.
var<private> lag: u32;

// Takes the moments of element i a step further; what its weight w becomes.
fn updated(i: u32, w: f32, shrink: f32) -> f32 {
    let at = i - lag;
    let g = gradient[select(i, at, GRADIENT_LAGS != 0u)] * step.clip;
    let first = step.beta1 * m[at] + (1.0 - step.beta1) * g;
    let second = step.beta2 * v[at] + (1.0 - step.beta2) * g * g;
    m[at] = first;
    v[at] = second;
    let update = step.rate * first * step.correction1 / (sqrt(second * step.correction2) + step.epsilon);
    return w * shrink - update;
}

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let chunk = group.y * groups.x + group.x;
    if chunk >= p.chunks {
        return;
    }
    let c = chunks[chunk];
    lag = c.w;
    let shrink = select(1.0, 1.0 - step.decay, c.z != 0u);
    let end = c.x + c.y;
    for (var i = c.x + local.x * EACH; i < end; i += 64u * EACH) {
        advance(i, end, shrink);
    }
}
