// Header "packed": weights are bf16 and nothing else, widened, updated in f32 and rounded. An invocation has the two of a
// word.
@group(0) @binding(4) var<storage, read_write> weight: array<u32>;

const EACH = 2u; // weights that an invocation has at a time

// To the nearest, ties to even; what is not a number stays none.
fn rounded(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let nearest = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(nearest, (bits >> 16u) | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn advance(i: u32, end: u32, shrink: f32) {
    let old = weight[i / 2u];
    var word = rounded(updated(i, bitcast<f32>(old << 16u), shrink));
    if i + 1u < end {
        word |= rounded(updated(i + 1u, bitcast<f32>(old & 0xffff0000u), shrink)) << 16u;
    }
    weight[i / 2u] = word;
}
