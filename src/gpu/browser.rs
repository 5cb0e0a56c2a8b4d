//! What WebGPU has in a browser and wgpu does not pass on there: subgroups, pipelines that are compiled beside each other,
//! work whose end is noticed at once, and a timer.

use wasm_bindgen::prelude::{JsValue, wasm_bindgen};

#[wasm_bindgen(inline_js = r#"
let granted = false;
export function ask_for_subgroups() {
    const prototype = globalThis.GPUAdapter?.prototype;
    if (prototype === undefined || "asksForSubgroups" in prototype) return;
    const request = prototype.requestDevice;
    prototype.asksForSubgroups = true;
    prototype.requestDevice = function (wanted = {}) {
        granted = this.features.has("subgroups");
        const features = [...(wanted.requiredFeatures ?? []), ...(granted ? ["subgroups"] : [])];
        return request.call(this, { ...wanted, requiredFeatures: features });
    };
}
export function subgroups_granted() {
    return granted;
}
let waiting = 0;
let nudges = false;
const queues = new Set();
function nudge() {
    nudges = waiting > 0;
    if (!nudges) return;
    for (const queue of queues) queue.submit([]);
    setTimeout(nudge, 1);
}
function nudged(prototype, name) {
    const begin = prototype[name];
    prototype[name] = function (...values) {
        const end = begin.apply(this, values);
        waiting += 1;
        if (!nudges) setTimeout(nudge, 1);
        nudges = true;
        const ended = () => { waiting -= 1; };
        end.then(ended, ended);
        return end;
    };
}
export function notice_ends() {
    const prototype = globalThis.GPUAdapter?.prototype;
    if (prototype === undefined || "noticesEnds" in prototype || !/Firefox\//.test(navigator.userAgent)) return;
    const request = prototype.requestDevice;
    prototype.noticesEnds = true;
    prototype.requestDevice = async function (wanted) {
        const device = await request.call(this, wanted);
        queues.add(device.queue);
        device.lost.then(() => queues.delete(device.queue));
        return device;
    };
    nudged(GPUBuffer.prototype, "mapAsync");
    nudged(GPUQueue.prototype, "onSubmittedWorkDone");
}
const compiling = new Set();
let refused = "";
export function compile_together() {
    const prototype = globalThis.GPUDevice?.prototype;
    if (prototype === undefined || "compilesTogether" in prototype) return;
    prototype.compilesTogether = true;
    // In its place stands an object that gets the pipeline when there is one.
    prototype.createComputePipeline = function (descriptor) {
        const kernel = {};
        const made = this.createComputePipelineAsync(descriptor).then(
            (pipeline) => { kernel.pipeline = pipeline; },
            (reason) => { refused ||= `${descriptor.label}: ${reason.message}`; },
        ).then(() => compiling.delete(made));
        compiling.add(made);
        return kernel;
    };
    const encoder = GPUComputePassEncoder.prototype;
    const set = encoder.setPipeline;
    encoder.setPipeline = function (kernel) {
        set.call(this, kernel.pipeline);
    };
}
export async function compiled() {
    while (compiling.size > 0) await Promise.all(compiling);
    const said = refused;
    refused = "";
    return said;
}
"#)]
extern "C" {
    /// From now on every device has subgroups where its adapter has them: wgpu knows of no such feature here.
    pub(super) fn ask_for_subgroups();
    /// Whether the device that was asked for last has them.
    pub(super) fn subgroups_granted() -> bool;
    /// From now on pipelines are compiled on all cores: wgpu asks for them in the way in which a browser compiles one after
    /// another, which takes a software adapter most of the time until the first step.
    pub(super) fn compile_together();
    /// From now on Firefox looks for ended work whenever somebody waits for some. By itself it does so ten times a second and
    /// whenever work is submitted, be it none (https://bugzilla.mozilla.org/show_bug.cgi?id=1870699).
    pub(super) fn notice_ends();
    /// Resolves when none is being compiled any more, on any device, to why one could not be, or nothing.
    #[wasm_bindgen(js_name = compiled)]
    async fn all_compiled() -> JsValue;
}

/// What a shader must say in a browser before it may use subgroups. That all lanes of one take the same way, naga proves
/// by other rules than a browser does: the kernels are held to naga's, and to the reference in the page too.
pub(super) const SUBGROUPS: &str = "enable subgroups;\ndiagnostic(off, subgroup_uniformity);\n";

/// Resolves when all pipelines are there, to what was wrong with one if anything was.
pub(super) async fn compiled() -> Option<String> {
    all_compiled().await.as_string().filter(|refused| !refused.is_empty())
}

/// Resolves after so many seconds, by the timer of pages and workers.
pub(super) async fn timer(seconds: f64) {
    #[wasm_bindgen]
    extern "C" {
        #[wasm_bindgen(js_name = setTimeout)]
        fn set_timeout(then: &js_sys::Function, milliseconds: f64) -> JsValue;
    }
    let promise = js_sys::Promise::new(&mut |resolve, _| {
        set_timeout(&resolve, 1000.0 * seconds);
    });
    // It never rejects.
    let _ = wasm_bindgen_futures::JsFuture::from(promise).await;
}
