//! What WebGPU has in a browser and wgpu does not pass on there: subgroups, pipelines that are compiled beside each other,
//! work whose end is noticed at once, and a timer.

use wasm_bindgen::prelude::{JsValue, wasm_bindgen};

#[wasm_bindgen(inline_js = r#"
let prepared = false;
let granted = false;
const compiling = new Set();
let refused = "";
let waiting = 0;
let nudges = false;
const queues = new Set();

export function prepare() {
    if (prepared || globalThis.GPUAdapter === undefined) return;
    prepared = true;
    const request = GPUAdapter.prototype.requestDevice;
    GPUAdapter.prototype.requestDevice = async function (wanted = {}) {
        granted = this.features.has("subgroups");
        const features = [...(wanted.requiredFeatures ?? []), ...(granted ? ["subgroups"] : [])];
        const device = await request.call(this, { ...wanted, requiredFeatures: features });
        queues.add(device.queue);
        device.lost.then(() => queues.delete(device.queue));
        return device;
    };
    // In its place stands an object that gets the pipeline when there is one.
    GPUDevice.prototype.createComputePipeline = function (descriptor) {
        const kernel = {};
        const made = this.createComputePipelineAsync(descriptor).then(
            (pipeline) => { kernel.pipeline = pipeline; },
            (reason) => { refused ||= `${descriptor.label}: ${reason.message}`; },
        ).then(() => compiling.delete(made));
        compiling.add(made);
        return kernel;
    };
    const set = GPUComputePassEncoder.prototype.setPipeline;
    GPUComputePassEncoder.prototype.setPipeline = function (kernel) {
        set.call(this, kernel.pipeline);
    };
    if (/Firefox\//.test(navigator.userAgent)) {
        nudged(GPUBuffer.prototype, "mapAsync");
        nudged(GPUQueue.prototype, "onSubmittedWorkDone");
    }
}
export function subgroups_granted() {
    return granted;
}
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
export async function compiled() {
    while (compiling.size > 0) await Promise.all(compiling);
    const said = refused;
    refused = "";
    return said;
}
"#)]
extern "C" {
    /// Mends what wgpu does not do here, for all that follows; once is enough. Devices have subgroups where their adapter has
    /// them: wgpu knows of no such feature. Pipelines are compiled on all cores: wgpu asks for them in the way in which a
    /// browser compiles one after another, which takes a software adapter most of the time until the first step. Firefox
    /// looks for ended work whenever somebody waits for some: by itself it does so ten times a second and whenever work is
    /// submitted, be it none (https://bugzilla.mozilla.org/show_bug.cgi?id=1870699).
    pub(super) fn prepare();
    /// Whether the device that was asked for last has subgroups.
    pub(super) fn subgroups_granted() -> bool;
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
