// cross_entropy: loss[row] = log Σ exp(logits) − logits[target]; the row of logits is replaced by its gradient,
// scale · (softmax − onehot). A target beyond the vocabulary does not count: loss and gradient are 0. Grid: one workgroup a row, rows over x and y.

struct Params { rows: u32, vocabulary: u32, scale: f32, unused: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;
@group(0) @binding(3) var<storage, read_write> loss: array<f32>;

override LANES: u32 = 64u; // a power of two

const PART = 64u;      // terms of a sum that is added to another
const LOWEST = -3.0e38; // finite: shaders may assume that there are no infinities

// The logarithm of a positive number, which is m 2^e with m between √½ and √2: log m = 2 artanh((m-1)/(m+1)). What
// adapters bring along may be off by 2^-21 and more.
fn logarithm(x: f32) -> f32 {
    let bits = bitcast<u32>(x) - 0x3f3504f3u;
    let m = bitcast<f32>((bits & 0x007fffffu) + 0x3f3504f3u);
    let s = (m - 1.0) / (m + 1.0);
    let t = s * s;
    let series = 1.0 + t * (1.0 / 3.0 + t * (1.0 / 5.0 + t * (1.0 / 7.0 + t / 9.0)));
    return f32(bitcast<i32>(bits) >> 23u) * 0.69314718 + 2.0 * s * series;
}

var<workgroup> partial: array<f32, LANES>;

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let row = group.y * groups.x + group.x;
    let lane = local.x;
    if row >= p.rows {
        return;
    }
    let base = row * p.vocabulary;
    let goal = targets[row];
    let counts = goal < p.vocabulary;
    var top = LOWEST;
    for (var i = lane; i < p.vocabulary; i += LANES) {
        top = max(top, logits[base + i]);
    }
    partial[lane] = top;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partial[lane] = max(partial[lane], partial[lane + half]);
        }
    }
    workgroupBarrier();
    top = partial[0];
    workgroupBarrier();
    var sum = 0.0;
    // In parts: beside a probability near 1 each of many thousand small ones would be rounded away.
    for (var part = lane; part < p.vocabulary; part += PART * LANES) {
        let end = min(part + PART * LANES, p.vocabulary);
        var small = 0.0;
        for (var i = part; i < end; i += LANES) {
            small += exp(logits[base + i] - top);
        }
        sum += small;
    }
    partial[lane] = sum;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partial[lane] += partial[lane + half];
        }
    }
    workgroupBarrier();
    sum = partial[0];
    if lane == 0u {
        loss[row] = select(0.0, top + logarithm(sum) - logits[base + min(goal, p.vocabulary - 1u)], counts);
    }
    workgroupBarrier();
    let scale = select(0.0, p.scale, counts);
    let factor = scale / sum;
    for (var i = lane; i < p.vocabulary; i += LANES) {
        logits[base + i] = factor * exp(logits[base + i] - top) - select(0.0, scale, i == goal);
    }
}
