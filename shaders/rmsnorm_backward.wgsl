// rmsnorm_backward: dx = (g − x̂ · mean(g · x̂)) / rms with g = dy · gain and x̂ = x / rms, plus `residual` if RESIDUAL.
// Grid: one workgroup a row, rows over x and y. Variant: header "multiples of 4".
// Header "any size": one element at a time.
alias Element = f32;
const EACH = 1u; // f32 in an Element

fn across(x: Element) -> f32 {
    return x;
}

// ---- body ----

struct Params { rows: u32, unused: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dy: array<Element>;
@group(0) @binding(2) var<storage, read> x: array<Element>;
@group(0) @binding(3) var<storage, read> gain: array<Element>;
@group(0) @binding(4) var<storage, read> statistics: array<f32>;
@group(0) @binding(5) var<storage, read> residual: array<Element>;
@group(0) @binding(6) var<storage, read_write> dx: array<Element>;

override RESIDUAL: bool = false;
override COLUMNS: u32 = 4u; // of a row; known to the compiler, whose loops over it then need no tests
override LANES: u32 = 64u;  // a power of two
override KEPT: u32 = 0u;    // elements of the rows that an invocation keeps in registers, of at most 8; of the rest each pass reads memory

var<workgroup> partial: array<f32, LANES>;

fn put(at: u32, d: Element) {
    if RESIDUAL {
        dx[at] = d + residual[at];
    } else {
        dx[at] = d;
    }
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
    let inverse = statistics[row];
    var g: array<Element, 8>;
    var kept: array<Element, 8>; // of x
    var sum = Element();         // of g · x
    for (var j = 0u; j < KEPT; j++) {
        let i = lane + j * LANES;
        if i < columns {
            g[j] = dy[base + i] * gain[i];
            kept[j] = x[base + i];
            sum = fma(g[j], kept[j], sum);
        }
    }
    for (var i = lane + KEPT * LANES; i < columns; i += LANES) {
        sum = fma(dy[base + i] * gain[i], x[base + i], sum);
    }
    partial[lane] = across(sum);
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half {
            partial[lane] += partial[lane + half];
        }
    }
    workgroupBarrier();
    let share = partial[0] / f32(COLUMNS) * inverse * inverse;
    for (var j = 0u; j < KEPT; j++) {
        let i = lane + j * LANES;
        if i < columns {
            put(base + i, (g[j] - kept[j] * share) * inverse);
        }
    }
    for (var i = lane + KEPT * LANES; i < columns; i += LANES) {
        put(base + i, (dy[base + i] * gain[i] - x[base + i] * share) * inverse);
    }
}
