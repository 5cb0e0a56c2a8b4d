// layernorm: y = (x − mean) / sqrt(variance + epsilon) · gain + bias over the last axis, and statistics (M,2) = mean, 1/σ.
// Two passes over the row, mean first: one pass with sums of squares loses digits.
// Grid: one workgroup a row, rows over x and y. Variant: header "multiples of 4".
// Header "any size": one element at a time.
alias Element = f32;
const EACH = 1u; // f32 in an Element

fn across(x: Element) -> f32 {
    return x;
}

// ---- body ----

struct Params { rows: u32, epsilon: f32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<Element>;
@group(0) @binding(2) var<storage, read> gain: array<Element>;
@group(0) @binding(3) var<storage, read> bias: array<Element>;
@group(0) @binding(4) var<storage, read_write> y: array<Element>;
@group(0) @binding(5) var<storage, read_write> statistics: array<f32>;

override COLUMNS: u32 = 4u; // of a row; known to the compiler, whose loops over it then need no tests
override LANES: u32 = 64u;  // a power of two
override KEPT: u32 = 0u;    // elements of the row that an invocation keeps in registers, of at most 8; of the rest each pass reads memory

var<workgroup> partial: array<f32, LANES>;

fn total(lane: u32, value: f32) -> f32 {
    workgroupBarrier();
    partial[lane] = value;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partial[lane] += partial[lane + half];
        }
    }
    workgroupBarrier();
    return partial[0];
}

@compute @workgroup_size(LANES, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let row = group.y * groups.x + group.x;
    let lane = local.x;
    if row >= p.rows {
        return;
    }
    let columns = COLUMNS / EACH;
    let base = row * columns;
    let n = f32(COLUMNS);
    var kept: array<Element, 8>;
    var sum = Element();
    for (var j = 0u; j < KEPT; j++) {
        let i = lane + j * LANES;
        if i < columns {
            kept[j] = x[base + i];
            sum += kept[j];
        }
    }
    for (var i = lane + KEPT * LANES; i < columns; i += LANES) {
        sum += x[base + i];
    }
    let mean = total(lane, across(sum)) / n;
    var squares = Element();
    for (var j = 0u; j < KEPT; j++) {
        if lane + j * LANES < columns {
            kept[j] -= mean;
            squares = fma(kept[j], kept[j], squares);
        }
    }
    for (var i = lane + KEPT * LANES; i < columns; i += LANES) {
        let d = x[base + i] - mean;
        squares = fma(d, d, squares);
    }
    let inverse = inverseSqrt(total(lane, across(squares)) / n + p.epsilon);
    for (var j = 0u; j < KEPT; j++) {
        let i = lane + j * LANES;
        if i < columns {
            y[base + i] = kept[j] * inverse * gain[i] + bias[i];
        }
    }
    for (var i = lane + KEPT * LANES; i < columns; i += LANES) {
        y[base + i] = (x[base + i] - mean) * inverse * gain[i] + bias[i];
    }
    if lane == 0u {
        statistics[2u * row] = mean;
        statistics[2u * row + 1u] = inverse;
    }
}
