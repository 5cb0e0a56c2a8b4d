// attention_delta: delta(B,H,T) = the sum over a head's elements of do · o, both (B,T,C).
// Grid: one invocation a (sequence, head, token), workgroups of 64 along x.

struct Params { batch: u32, tokens: u32, width: u32, heads: u32, size: u32, scale: f32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> d_o: array<f32>;
@group(0) @binding(2) var<storage, read> o: array<f32>;
@group(0) @binding(3) var<storage, read_write> delta: array<f32>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i >= p.batch * p.heads * p.tokens {
        return;
    }
    // Neighbouring invocations take neighbouring heads of one token, so that their reads are close.
    let head = i % p.heads;
    let token = i / p.heads % p.tokens;
    let batch = i / p.heads / p.tokens;
    let base = (batch * p.tokens + token) * p.width + head * p.size;
    var sum = 0.0;
    for (var d = 0u; d < p.size; d++) {
        sum = fma(d_o[base + d], o[base + d], sum);
    }
    delta[(batch * p.heads + head) * p.tokens + token] = sum;
}
