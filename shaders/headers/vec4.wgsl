// Header "multiples of 4": extents are, so four neighbours are one load.
alias Element = vec4<f32>;
const EACH = 4u; // f32 in an Element

fn across(x: Element) -> f32 {
    return x.x + x.y + x.z + x.w;
}
