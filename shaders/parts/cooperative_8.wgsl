// ---- matrices of 8x8 ----
const SIZE = 8u;
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
alias Sum = coop_mat8x8<f32, C>;

const UNIT = 1u; // numbers in an element of a tile: Metal loads matrices from single ones
var<workgroup> a_tile: array<f16, 2560>;
var<workgroup> b_tile: array<f16, 2560>;

fn keep_a(at: u32, x: vec4<f16>) {
    a_tile[at] = x.x;
    a_tile[at + 1u] = x.y;
    a_tile[at + 2u] = x.z;
    a_tile[at + 3u] = x.w;
}

fn keep_b(at: u32, x: vec4<f16>) {
    b_tile[at] = x.x;
    b_tile[at + 1u] = x.y;
    b_tile[at + 2u] = x.z;
    b_tile[at + 3u] = x.w;
}
