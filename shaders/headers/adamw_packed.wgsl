// Header "packed": weights are bf16 and nothing else, widened, updated in f32 and rounded.
@group(0) @binding(4) var<storage, read_write> weight: array<vec2<u32>>;

fn advance(i: u32, inside: vec4<bool>, shrink: f32) {
    let old = weight[i];
    let low = bitcast<vec2<f32>>(old << vec2(16u));
    let high = bitcast<vec2<f32>>(old & vec2(0xffff0000u));
    weight[i] = words(updated(i, vec4(low.x, high.x, low.y, high.y), inside, shrink));
}
