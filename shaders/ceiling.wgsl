// ceiling: multiplications and additions and nothing else, 8 a round for each of 32 sums of an invocation: how fast arithmetic can be, beside
// which `polystage bench` sets kernels. The factors come from a buffer, so that nothing can be worked out before.
// Grid: as many workgroups as wanted, over x.

struct Params { rounds: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> factors: array<vec4<f32>>; // two, of which the first is below 1
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>; // one an invocation

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let a = factors[0];
    let b = factors[1];
    var s0 = b;
    var s1 = b + 1.0;
    var s2 = b + 2.0;
    var s3 = b + 3.0;
    var s4 = b + 4.0;
    var s5 = b + 5.0;
    var s6 = b + 6.0;
    var s7 = b + 7.0;
    for (var round = 0u; round < p.rounds; round++) {
        for (var i = 0u; i < 8u; i++) {
            s0 = fma(a, s0, b);
            s1 = fma(a, s1, b);
            s2 = fma(a, s2, b);
            s3 = fma(a, s3, b);
            s4 = fma(a, s4, b);
            s5 = fma(a, s5, b);
            s6 = fma(a, s6, b);
            s7 = fma(a, s7, b);
        }
    }
    out[id.x] = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7));
}
