//! What WebGPU has in a browser and wgpu does not pass on there: subgroups, and a timer.

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
"#)]
extern "C" {
    /// From now on every device has subgroups where its adapter has them: wgpu knows of no such feature here.
    pub(super) fn ask_for_subgroups();
    /// Whether the device that was asked for last has them.
    pub(super) fn subgroups_granted() -> bool;
}

/// What a shader must say in a browser before it may use subgroups. That all lanes of one take the same way, naga proves
/// by other rules than a browser does: the kernels are held to naga's, and to the reference in the page too.
pub(super) const SUBGROUPS: &str = "enable subgroups;\ndiagnostic(off, subgroup_uniformity);\n";

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
