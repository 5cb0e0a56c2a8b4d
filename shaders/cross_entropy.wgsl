// cross_entropy: loss[row] = log Σ exp(logits) − logits[target]; the row of logits is replaced by its gradient,
// scale · (softmax − onehot). A target beyond the vocabulary does not count: loss and gradient are 0. Of a vocabulary in parts,
// of which this has the columns from `first` on: with STATISTICS, the part's maximum, Σ exp(logits − maximum) and target's
// logit go where the losses go, among zeros for the other parts; with GIVEN, those of all parts are there.
// Grid: one workgroup a row, rows over x and y.

struct Params { rows: u32, columns: u32, scale: f32, first: u32, vocabulary: u32, part: u32, parts: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;
@group(0) @binding(3) var<storage, read> given: array<f32>; // (parts, rows, 3)
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;

override LANES: u32 = 64u; // a power of two
override STATISTICS: bool = false;
override GIVEN: bool = false;

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

var<workgroup> tops: array<f32, LANES>;
var<workgroup> sums: array<f32, LANES>;

// A maximum, and Σ exp(logit − maximum).
struct Statistics { top: f32, sum: f32 }

fn both(a: Statistics, b: Statistics) -> Statistics {
    let top = max(a.top, b.top);
    return Statistics(top, a.sum * exp(a.top - top) + b.sum * exp(b.top - top));
}

// Of a row, whose logits come from memory once: those of a part are in a cache when they are looked at again.
fn statistics(lane: u32, base: u32) -> Statistics {
    var own = Statistics(LOWEST, 0.0);
    // In parts: beside a probability near 1 each of many thousand small ones would be rounded away.
    for (var part = lane; part < p.columns; part += PART * LANES) {
        let end = min(part + PART * LANES, p.columns);
        var top = LOWEST;
        for (var i = part; i < end; i += LANES) {
            top = max(top, logits[base + i]);
        }
        var sum = 0.0;
        for (var i = part; i < end; i += LANES) {
            sum += exp(logits[base + i] - top);
        }
        own = both(own, Statistics(top, sum));
    }
    tops[lane] = own.top;
    sums[lane] = own.sum;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            let added = both(Statistics(tops[lane], sums[lane]), Statistics(tops[lane + half], sums[lane + half]));
            tops[lane] = added.top;
            sums[lane] = added.sum;
        }
    }
    workgroupBarrier();
    return Statistics(tops[0], sums[0]);
}

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let row = group.y * groups.x + group.x;
    let lane = local.x;
    if row >= p.rows {
        return;
    }
    let base = row * p.columns;
    let counts = targets[row] < p.vocabulary;
    // Far beyond the columns where the target is another part's.
    let goal = targets[row] - p.first;
    var top = LOWEST;
    var sum = 0.0;
    var reached = 0.0;
    if GIVEN {
        for (var part = 0u; part < p.parts; part++) {
            top = max(top, given[(part * p.rows + row) * 3u]);
        }
        for (var part = 0u; part < p.parts; part++) {
            let at = (part * p.rows + row) * 3u;
            sum += given[at + 1u] * exp(given[at] - top);
            reached += given[at + 2u];
        }
    } else {
        let own = statistics(lane, base);
        top = own.top;
        sum = own.sum;
        if goal < p.columns {
            reached = logits[base + goal];
        }
    }
    if STATISTICS {
        for (var i = lane; i < 3u * p.parts; i += LANES) {
            let own = select(select(reached, sum, i % 3u == 1u), top, i % 3u == 0u);
            loss[(i / 3u * p.rows + row) * 3u + i % 3u] = select(0.0, own, i / 3u == p.part);
        }
        return;
    }
    if lane == 0u {
        loss[row] = select(0.0, top + logarithm(sum) - reached, counts);
    }
    // The logit of the goal has been read before another lane overwrites it.
    storageBarrier();
    let scale = select(0.0, p.scale, counts);
    let factor = scale / sum;
    for (var i = lane; i < p.columns; i += LANES) {
        logits[base + i] = factor * exp(logits[base + i] - top) - select(0.0, scale, i == goal);
    }
}
