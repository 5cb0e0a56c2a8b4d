// ---- matrices of 16x16 ----
const SIZE = 16u;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sum = coop_mat16x16<f32, C>;

const UNIT = 4u; // numbers in an element of a tile
var<workgroup> a_tile: array<vec4<f16>, 1280>;
var<workgroup> b_tile: array<vec4<f16>, 1280>;

fn keep_a(at: u32, x: vec4<f16>) {
    a_tile[at / 4u] = x;
}

fn keep_b(at: u32, x: vec4<f16>) {
    b_tile[at / 4u] = x;
}
