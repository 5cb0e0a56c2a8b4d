
// ---- operands rounded to f16 ----
override GRADIENT: u32 = 0u; // which operand is a gradient: 0 none, 1 A, 2 B

// Taken `scale` times, rounded to f16 and taken `back` times: powers of 2 whose product is 1. What f16 cannot hold becomes NaN, so
// that it cannot be overlooked; some cards would round it to the largest number that f16 has.
fn rounded(x: vec4<f32>, scale: f32, back: f32) -> vec4<f32> {
    let y = x * scale;
    let half = vec4(unpack2x16float(pack2x16float(y.xy)), unpack2x16float(pack2x16float(y.zw)));
    // By its bits: compilers may assume that no number is NaN.
    return bitcast<vec4<f32>>(select(bitcast<vec4<u32>>(half * back), vec4(0x7fc00000u), abs(y) > vec4(65504.0)));
}

fn load_a(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    let taken = GRADIENT == 1u;
    return rounded(whole_a(row, column, rows, columns), select(1.0, p.scale, taken), select(1.0, p.back, taken));
}

fn load_b(row: u32, column: u32, rows: u32, columns: u32) -> vec4<f32> {
    let taken = GRADIENT == 2u;
    return rounded(whole_b(row, column, rows, columns), select(1.0, p.scale, taken), select(1.0, p.back, taken));
}
