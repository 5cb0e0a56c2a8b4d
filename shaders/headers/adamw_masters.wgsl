// Header "masters": updates weights in f32 and rounds them to the packed ones. An invocation has the two of a word.
@group(0) @binding(4) var<storage, read_write> weight: array<f32>;
@group(0) @binding(7) var<storage, read_write> packed: array<u32>;

const EACH = 2u; // weights that an invocation has at a time

// To the nearest, ties to even; what is not a number stays none.
fn rounded(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let nearest = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(nearest, (bits >> 16u) | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn advance(i: u32, end: u32, shrink: f32) {
    let at = i - lag;
    let low = updated(i, weight[at], shrink);
    weight[at] = low;
    var word = rounded(low);
    if i + 1u < end {
        let high = updated(i + 1u, weight[at + 1u], shrink);
        weight[at + 1u] = high;
        word |= rounded(high) << 16u;
    }
    packed[i / 2u] = word;
}
