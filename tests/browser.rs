//! The page in headless Chromium: `web/tests/page.mjs` does with it what people do, on the engine built for the browser, and
//! keeps the losses of a run, which must be those of the same run here. Firefox trains too where it is there.

use std::path::Path;
use std::process::{Command, Stdio};

use pollster::block_on;
use polystage::demo::{Session, Settings};

use crate::common::{adapters, open};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn run(command: &mut Command) {
    let output = command.current_dir(root()).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{command:?} does not start: {e}"));
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?} failed\n{}\n{}",
        said(&output.stdout),
        said(&output.stderr)
    );
}

#[test]
fn the_page_does_what_it_says_in_chromium_and_its_losses_are_those_of_the_same_run_here() {
    let folder = tempfile::tempdir().expect("a folder");
    let losses = folder.path().join("losses.json");
    run(Command::new("scripts/web.sh").arg("quick"));
    for test in ["web/tests/page.mjs", "web/tests/firefox.mjs"] {
        run(Command::new("node").args(["--test", test]).env("LOSSES", &losses));
    }

    let text = std::fs::read_to_string(&losses).expect("the losses that the page had");
    let kept: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let settings = Settings::parse(&kept["settings"].to_string()).expect("its settings");
    let losses = kept["losses"].as_array().expect("a list");
    assert_eq!(losses.len(), 50);
    for adapter in adapters() {
        let devices = open(&vec![adapter.index; settings.devices]);
        let mut session = block_on(Session::on(settings.clone(), devices)).expect("opens");
        let mut first = 0.0;
        for (step, page) in losses.iter().enumerate() {
            let page = page.as_f64().expect("a loss");
            let here = block_on(session.step()).expect("a step").loss;
            if step == 0 {
                first = here;
            }
            // Two vendors round exp and fused multiply-adds differently: about 1e-7 a step, which training amplifies.
            let off = (page - here).abs() / here;
            assert!(off < 1e-4, "step {step} on {}: {page} in the page, {here} here", adapter.name);
            assert!(step < 49 || here < 0.7 * first, "the run learns, or equal losses would say little");
        }
    }
}
