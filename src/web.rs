//! The engine in a web page's worker: what JavaScript calls. Values pass as JSON, as `web/src/protocol.ts` has them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use wasm_bindgen::prelude::{JsValue, wasm_bindgen};

use crate::demo::{self, Failure, Settings};
use crate::error::Error;
use crate::gpu::{Device, OpenOptions};
use crate::ops::verify::{self, Case};

type Thrown<T> = std::result::Result<T, JsValue>;

/// What there is to choose from.
#[wasm_bindgen]
pub fn catalog() -> String {
    json(&demo::catalog())
}

/// Every kernel on the first adapter against the reference in f64: how many kernels and cases there were, and which failed.
/// `each` is told how many inputs of how many are done, and answers whether to go on.
///
/// # Errors
/// An `Error` of JavaScript whose message is a `Failure`, as that of everything here.
#[wasm_bindgen(js_name = verify)]
pub async fn verify_kernels(each: js_sys::Function) -> Thrown<String> {
    let cases = in_turns(verify::cases());
    let outcomes = async {
        let device = Device::open(0, OpenOptions::default()).await?;
        let outcomes = verify::verify(&device, &cases, |done, _| {
            match each.call2(&JsValue::NULL, &done.into(), &cases.len().into()) {
                Ok(on) if on.is_falsy() => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        outcomes.await
    };
    let outcomes = outcomes.await.map_err(|error| thrown(&error, None))?;
    let mut kernels: Vec<&str> = outcomes.iter().map(|outcome| outcome.variant.as_str()).collect();
    kernels.sort_unstable();
    kernels.dedup();
    let failed = outcomes.iter().filter(|outcome| !outcome.passed);
    let failures: Vec<String> =
        failed.map(|outcome| format!("{}, {}: {}", outcome.op, outcome.case, outcome.variant)).collect();
    let (kernels, cases) = (kernels.len(), outcomes.len());
    Ok(serde_json::json!({ "kernels": kernels, "cases": cases, "failures": failures }).to_string())
}

/// A case of every op, then another of every op, and so on, so that whoever stops early has seen something of all.
fn in_turns(cases: Vec<Case>) -> Vec<Case> {
    let mut seen = BTreeMap::new();
    let turn = |case: Case| {
        let seen: &mut usize = seen.entry(case.op.name()).or_default();
        *seen += 1;
        (*seen, case)
    };
    let mut cases: Vec<(usize, Case)> = cases.into_iter().map(turn).collect();
    cases.sort_by_key(|&(turn, _)| turn);
    cases.into_iter().map(|(_, case)| case).collect()
}

/// A run: [`demo::Session`].
#[wasm_bindgen]
pub struct Session(demo::Session);

#[wasm_bindgen]
impl Session {
    /// Opens a run with these settings, which takes over the devices of the one before, and its weights too if they are to be
    /// kept.
    ///
    /// # Errors
    /// As those of all functions here.
    pub async fn open(settings: String, earlier: Option<Session>, keep: bool) -> Thrown<Session> {
        console_error_panic_hook::set_once();
        let opened = async {
            let settings = Settings::parse(&settings)?;
            demo::Session::open(settings, earlier.map(|session| session.0), keep).await
        };
        opened.await.map(Session).map_err(|error| thrown(&error, None))
    }

    /// Whether a run with these settings can be opened in this one's place, which [`Session::open`] ends.
    pub fn check(&self, settings: String) -> Thrown<()> {
        let checked = Settings::parse(&settings).and_then(|settings| self.0.check(&settings));
        checked.map_err(|error| thrown(&error, None))
    }

    /// What the page draws of it.
    pub fn run(&self) -> String {
        json(&self.0.run())
    }

    /// One step.
    pub async fn step(&mut self) -> Thrown<String> {
        let stepped = self.0.step().await;
        self.told(stepped)
    }

    /// What the model can do by now.
    pub async fn show(&mut self) -> Thrown<String> {
        let shown = self.0.show().await;
        self.told(shown)
    }

    /// Makes devices take so many times as long: a list of numbers.
    pub fn slow(&mut self, slow: String) -> Thrown<()> {
        let slow = serde_json::from_str(&slow).map_err(|error| Error::config("slow", error.to_string()));
        let done = slow.and_then(|slow| self.0.slow(slow));
        done.map_err(|error| thrown(&error, self.0.failed()))
    }

    /// What the planner would do.
    pub fn advise(&self) -> Thrown<String> {
        self.told(self.0.advise())
    }

    /// Gives a device up.
    pub fn lose(&mut self, device: usize) {
        self.0.lose(device);
    }

    /// The last step for Perfetto.
    pub fn trace(&self) -> String {
        self.0.trace()
    }

    /// The model as a Hugging Face folder in a zip file.
    pub async fn model(&mut self) -> Thrown<Vec<u8>> {
        self.0.export().await.map_err(|error| thrown(&error, self.0.failed()))
    }

    /// Stops it; resolves once its memory is free.
    pub async fn close(self) {
        self.0.close().await;
    }

    fn told<T: serde::Serialize>(&self, outcome: crate::error::Result<T>) -> Thrown<String> {
        outcome.map(|value| json(&value)).map_err(|error| thrown(&error, self.0.failed()))
    }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// The error as JavaScript throws it.
fn thrown(error: &Error, device: Option<usize>) -> JsValue {
    js_sys::Error::new(&json(&Failure::new(error, device))).into()
}
