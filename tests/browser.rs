//! The library in a browser: ten two-stage steps in headless Chromium give the losses of the same steps here.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use polystage::pipeline::Plan;
use polystage::train::config::Config;
use polystage::train::data::{Batches, Corpus};
use polystage::train::trainer::Trainer;
use serde_json::Value;

use crate::common::{adapters, open};

const CONFIG: &str = r#"
[model]
kind = "gpt2"
layers = 2
width = 32
heads = 2
context = 32
vocabulary = 256

[data]
train = ["text"]

[train]
steps = 10
batch = 4
sequence = 32
learning_rate = 0.003
warmup = 2

[pipeline]
devices = 2
microbatches = 2
"#;

/// It takes about 25 seconds on two cores, 20 of them in the first step, in which SwiftShader compiles the kernels.
const LIMIT: Duration = Duration::from_secs(180);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text() -> Vec<u8> {
    let words = ["stage ", "rank ", "bubble ", "stash ", "link ", "plan.\n"];
    (0..600usize).flat_map(|i| words[(i * i + i / 7) % words.len()].bytes()).collect()
}

/// Builds the library for the browser and puts it with its JavaScript into `to`.
fn build(to: &Path) {
    // A target folder of its own: cargo locks the usual one while another cargo builds.
    let target = root().join("target/browser");
    let arguments =
        "build --lib --profile quick --no-default-features --target wasm32-unknown-unknown --target-dir";
    let status = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(arguments.split(' '))
        .arg(&target)
        .status()
        .expect("cargo starts");
    assert!(
        status.success(),
        "the library does not build for the browser; is its target there? `rustup target add wasm32-unknown-unknown`"
    );
    wasm_bindgen_cli_support::Bindgen::new()
        .input_path(target.join("wasm32-unknown-unknown/quick/polystage.wasm"))
        .web(true)
        .and_then(|bindgen| bindgen.omit_default_module_path(false).typescript(false).generate(to))
        .expect("bindings");
}

/// Serves the page, its wasm, the config and the text. The body of a POST goes to `outcome`.
fn serve(listener: TcpListener, package: PathBuf, outcome: Sender<String>) {
    for stream in listener.incoming().flatten() {
        // A thread each: a browser opens connections on which it says nothing for a while.
        let (package, outcome) = (package.clone(), outcome.clone());
        std::thread::spawn(move || {
            // An answer that the browser did not wait for is nobody's loss.
            let _ = answer(stream, &package, &outcome);
        });
    }
}

fn answer(mut stream: TcpStream, package: &Path, outcome: &Sender<String>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut request, mut length) = (String::new(), 0);
    reader.read_line(&mut request)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().unwrap_or(0);
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let path = request.split(' ').nth(1).unwrap_or_default();
    let found = match path {
        _ if request.starts_with("POST") => {
            // A test that no longer listens has its result.
            let _ = outcome.send(String::from_utf8_lossy(&body).into());
            Some(("text/plain", Vec::new()))
        }
        "/" => Some(("text/html", std::fs::read(root().join("web/index.html"))?)),
        "/main.js" => Some(("text/javascript", std::fs::read(root().join("web/main.js"))?)),
        "/pkg/polystage.js" => Some(("text/javascript", std::fs::read(package.join("polystage.js"))?)),
        "/pkg/polystage_bg.wasm" => {
            Some(("application/wasm", std::fs::read(package.join("polystage_bg.wasm"))?))
        }
        "/config.toml" => Some(("text/plain", CONFIG.into())),
        "/text" => Some(("application/octet-stream", text())),
        _ => None,
    };
    let status = if found.is_some() { "200 OK" } else { "404 Not Found" };
    let (kind, body) = found.unwrap_or_default();
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(&body)
}

/// A running browser, killed when dropped.
struct Browser {
    child: Child,
    log: PathBuf,
}

impl Browser {
    fn start(url: &str, folder: &Path) -> Browser {
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let folders: Vec<PathBuf> =
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
        let program =
            names.iter().flat_map(|name| folders.iter().map(move |f| f.join(name))).find(|p| p.is_file());
        let program = program.expect("no Chromium in PATH; install it: `sudo apt-get install chromium`");
        let log = folder.join("log");
        let file = File::create(&log).expect("a log");
        let child = Command::new(program)
            .args(["--headless=new", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--disable-dev-shm-usage", "--disable-gpu-watchdog"])
            .args(["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"])
            .arg(format!("--user-data-dir={}", folder.join("profile").display()))
            .arg(url)
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file)
            .spawn()
            .expect("Chromium starts");
        Browser { child, log }
    }

    /// What the page posts; panics with the end of the browser's log when it does not.
    fn outcome(&mut self, outcomes: &Receiver<String>) -> String {
        let deadline = Instant::now() + LIMIT;
        let why = loop {
            match outcomes.recv_timeout(Duration::from_millis(100)) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Disconnected) => break "the server has stopped".into(),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                break format!("Chromium has ended ({status})");
            }
            if Instant::now() > deadline {
                break format!("no result after {} s", LIMIT.as_secs());
            }
        };
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        panic!("{why}; the end of its log:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The losses of the same steps on the first adapter, opened twice.
fn native() -> Vec<f64> {
    let config = Config::parse(CONFIG, &[], "config").expect("parses");
    let first = adapters()[0].index;
    let devices = open(&[first, first]);
    let described: Vec<_> = devices.iter().map(|d| (d.info().clone(), *d.capabilities())).collect();
    let plan = Plan::new(Trainer::setup(&config, vec![None; 2]).unwrap(), &described).expect("plans");
    let train = &config.train;
    let corpus = Corpus::from_bytes(text());
    let batches = Batches::new(corpus, train.batch, train.sequence, config.data.order, train.seed);
    let mut trainer = Trainer::launch(&config, plan, &devices, batches.expect("text")).expect("launches");
    let watch = trainer.watch();
    watch.block_on(trainer.initialise()).expect("initialises");
    (0..train.steps).map(|_| watch.block_on(trainer.step()).expect("a step").loss).collect()
}

#[test]
fn ten_two_stage_steps_in_headless_chromium_give_the_losses_of_the_native_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let package = folder.path().join("pkg");
    build(&package);
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let (sender, outcomes) = channel();
    std::thread::spawn(move || serve(listener, package, sender));

    let outcome = Browser::start(&url, folder.path()).outcome(&outcomes);
    let outcome: Value = serde_json::from_str(&outcome).expect("JSON");
    assert!(outcome["error"].is_null(), "the page failed: {}", outcome["error"]);
    let numbers = |list: &Value| -> Vec<f64> {
        list.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
    };
    let losses = numbers(&outcome["losses"]);
    let rows = outcome["rows"].as_array().expect("rows");
    let shown: Vec<f64> = rows.iter().map(|row| row["loss"].as_f64().expect("a loss")).collect();
    assert_eq!(shown, losses, "every step is reported as it comes");
    for row in rows {
        let devices = row["devices"].as_array().expect("devices");
        assert_eq!(devices.len(), 2);
        assert!(devices.iter().all(|d| d["bytes_moved"].as_u64() > Some(0)), "both stages send");
    }

    let native = native();
    eprintln!("browser {losses:?}\nnative  {native:?}");
    assert_eq!(losses.len(), 10);
    assert!(native[9] < native[0] - 0.1, "the run learns, or equal losses would say little");
    for (step, (got, want)) in losses.iter().zip(&native).enumerate() {
        // Two vendors round exp and fused multiply-adds differently: about 1e-7 a step, which training amplifies.
        let off = (got - want).abs() / want;
        assert!(off < 1e-4, "loss of step {step} is {got} in the browser and {want} here, {off:.1e} apart");
    }
}
