// unpack: values[2i], values[2i + 1] = the bf16 in the low and high half of words[i], for what has travelled at half of its
// bytes. Reads and writes whole buffers; values has two elements for each word. Grid: one invocation a word, workgroups of 64
// over x and y.

@group(0) @binding(0) var<storage, read> words: array<u32>;
@group(0) @binding(1) var<storage, read_write> values: array<f32>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = (group.y * groups.x + group.x) * 64u + local.x;
    if i < arrayLength(&words) {
        values[2u * i] = bitcast<f32>(words[i] << 16u);
        values[2u * i + 1u] = bitcast<f32>(words[i] & 0xffff0000u);
    }
}
