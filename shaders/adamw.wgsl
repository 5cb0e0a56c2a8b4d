// adamw: one AdamW step (Loshchilov and Hutter 2019) on a pool of parameters, chunk by chunk, with the gradient scaled
// by `clip`; weight decay applies to chunks of matrices. An invocation has four neighbours at a time: chunks and the states that
// belong to them begin at multiples of four, and what lies between a parameter's end and the next is nobody's and stays zero.
// Grid: one workgroup a chunk, chunks over x and y. Variants: headers for weights that are packed as bf16, with f32 masters or
// without.
// Header "f32".
@group(0) @binding(4) var<storage, read_write> weight: array<vec4<f32>>;

fn advance(i: u32, inside: vec4<bool>, shrink: f32) {
    weight[i] = updated(i, weight[i], inside, shrink);
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
@group(0) @binding(3) var<storage, read> gradient: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> m: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> v: array<vec4<f32>>;

// Whether gradients too are there only for what the device owns, while weights are there for all.
override GRADIENT_LAGS: u32 = 0u;

// By how much the number of a vector is more than that of its moments (and of its masters, where weights are packed): they
// are there only for what the device owns.
var<private> lag: u32;

// The numbers of the step, read once: a store might change them, as far as a compiler can tell.
var<private> now: Step;

// Takes the moments of vector i a step further; what its weights w become, of which those outside stay as they are.
fn updated(i: u32, w: vec4<f32>, inside: vec4<bool>, shrink: f32) -> vec4<f32> {
    let at = i - lag;
    let g = gradient[select(i, at, GRADIENT_LAGS != 0u)] * now.clip;
    let before = m[at];
    let spread = v[at];
    let first = now.beta1 * before + (1.0 - now.beta1) * g;
    let second = now.beta2 * spread + (1.0 - now.beta2) * g * g;
    m[at] = select(before, first, inside);
    v[at] = select(spread, second, inside);
    let update = now.rate * first * now.correction1 / (sqrt(second * now.correction2) + now.epsilon);
    return select(w, w * shrink - update, inside);
}

// To the nearest, ties to even; what is not a number stays none.
fn rounded(x: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(x);
    let nearest = (bits + 0x7fffu + ((bits >> vec4(16u)) & vec4(1u))) >> vec4(16u);
    return select(nearest, (bits >> vec4(16u)) | vec4(0x40u), (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u));
}

// As bf16, two of them a word: for the headers of packed weights.
fn words(x: vec4<f32>) -> vec2<u32> {
    let halves = rounded(x);
    return halves.xz | (halves.yw << vec2(16u));
}

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let chunk = group.y * groups.x + group.x;
    if chunk >= p.chunks {
        return;
    }
    let c = chunks[chunk];
    lag = c.w / 4u;
    now = step;
    let shrink = select(1.0, 1.0 - now.decay, c.z != 0u);
    let end = c.x + c.y;
    for (var i = c.x / 4u + local.x; 4u * i < end; i += 64u) {
        advance(i, vec4(4u * i) + vec4(0u, 1u, 2u, 3u) < vec4(end), shrink);
    }
}
