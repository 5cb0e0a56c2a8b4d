// Header "packed": weights are bf16 and nothing else, widened, updated in f32 and rounded.
@group(0) @binding(4) var<storage, read_write> weight: array<vec2<u32>>;

// To the nearest, ties to even; what is not a number stays none.
fn rounded(x: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(x);
    let nearest = (bits + 0x7fffu + ((bits >> vec4(16u)) & vec4(1u))) >> vec4(16u);
    return select(nearest, (bits >> vec4(16u)) | vec4(0x40u), (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u));
}

fn words(x: vec4<f32>) -> vec2<u32> {
    let halves = rounded(x);
    return halves.xz | (halves.yw << vec2(16u));
}

fn advance(i: u32, inside: vec4<bool>, shrink: f32) {
    let old = weight[i];
    let low = bitcast<vec2<f32>>(old << vec2(16u));
    let high = bitcast<vec2<f32>>(old & vec2(0xffff0000u));
    weight[i] = words(updated(i, vec4(low.x, high.x, low.y, high.y), inside, shrink));
}
