//! Training in a web page or a worker: what JavaScript calls. The same pipeline as on a desktop, every rank a task of
//! the event loop.

use js_sys::{Float64Array, Function, JSON};
use wasm_bindgen::prelude::{JsValue, wasm_bindgen};

use crate::error::{Error, Result};
use crate::gpu::{self, Device, OpenOptions};
use crate::pipeline::Plan;
use crate::train::config::Config;
use crate::train::data::{Batches, Corpus};
use crate::train::trainer::Trainer;

/// Trains the model of a config file on `text` and resolves to the loss of every step. `on_step` is called after each
/// step with its row of metrics. The paths of `data.train` are not read: a page has no files.
///
/// # Errors
/// An `Error` of JavaScript whose message is one line; or whatever `on_step` throws, which stops the run.
#[wasm_bindgen]
pub async fn train(
    config_toml: String,
    text: Vec<u8>,
    on_step: Function,
) -> std::result::Result<Float64Array, JsValue> {
    console_error_panic_hook::set_once();
    let config = Config::parse(&config_toml, &[], "config").map_err(thrown)?;
    let mut trainer = launch(&config, text).await.map_err(thrown)?;
    let mut losses = Vec::new();
    for _ in 0..config.train.steps {
        let row = trainer.step().await.map_err(thrown)?;
        losses.push(row.loss);
        let row = serde_json::to_string(&row).map_err(|e| js_sys::Error::new(&e.to_string()))?;
        on_step.call1(&JsValue::NULL, &JSON::parse(&row)?)?;
    }
    Ok(Float64Array::from(losses.as_slice()))
}

/// Opens the devices that the config asks for and starts a trainer on them, with weights from the seed.
async fn launch(config: &Config, text: Vec<u8>) -> Result<Trainer> {
    let software: Vec<bool> = gpu::list(false).await.iter().map(|adapter| adapter.software).collect();
    if software.is_empty() {
        return Err(gpu::none_found());
    }
    let mut devices = Vec::new();
    for index in config.pipeline.devices.resolve(&software)? {
        devices.push(Device::open(index, OpenOptions::default()).await?);
    }
    // A browser does not say how much memory there is.
    let plan = Plan::for_devices(Trainer::setup(config, vec![None; devices.len()])?, &devices)?;
    let train = &config.train;
    let corpus = Corpus::from_bytes(text);
    let batches = Batches::new(corpus, train.batch, train.sequence, config.data.order, train.seed)?;
    let mut trainer = Trainer::launch(config, plan, &devices, batches)?;
    trainer.initialise().await?;
    Ok(trainer)
}

/// The error as JavaScript throws it. Of a schedule that draws its grid below the message only the message is kept.
fn thrown(error: Error) -> JsValue {
    js_sys::Error::new(error.to_string().lines().next().unwrap_or_default()).into()
}
