// pack: words[i] = bf16(values[2i]) | bf16(values[2i + 1]) << 16, for what travels at half of its bytes. Reads and writes whole
// buffers; values has two elements for each word. Grid: one invocation a word, workgroups of 64 over x and y.

@group(0) @binding(0) var<storage, read> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> words: array<u32>;

// To the nearest, ties to even; what is not a number stays none.
fn rounded(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let nearest = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(nearest, (bits >> 16u) | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i < arrayLength(&words) {
        words[i] = rounded(values[2u * i]) | rounded(values[2u * i + 1u]) << 16u;
    }
}
