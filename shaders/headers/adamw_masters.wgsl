// Header "masters": updates weights in f32 and rounds them to the packed ones.
@group(0) @binding(4) var<storage, read_write> weight: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> packed: array<vec2<u32>>;

fn advance(i: u32, inside: vec4<bool>, shrink: f32) {
    let at = i - lag;
    let w = updated(i, weight[at], inside, shrink);
    weight[at] = w;
    packed[i] = words(w);
}
