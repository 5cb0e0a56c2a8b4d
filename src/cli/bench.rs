//! `polystage bench`.

use std::path::PathBuf;

use serde_json::json;

use super::planning::{cache, tuned};
use super::progress::Counter;
use super::{Environment, Features, adapters, once_each, open_named, print, save, say};
use crate::error::{Error, Result};
use crate::ops::roofline::{self, Report, Sizes};

/// Measures every hot kernel on each adapter, beside what the adapter can do at most: a loop of multiplications and additions,
/// and a copy.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage bench\n  polystage bench --devices 0 --width 1024 --sequence 2048 --svg roofline.svg\n\nBoth ceilings are measured. Nothing else should run meanwhile. What is expected of a card: docs/kernels.md."
)]
pub(super) struct Arguments {
    /// Adapters, such as 0,1 (default: all).
    #[arg(long)]
    devices: Option<String>,
    #[command(flatten)]
    features: Features,
    /// Sequences of a microbatch (default: 8, on software adapters 1).
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Tokens of a sequence (default: 1024, on software adapters 256).
    #[arg(long, value_name = "N")]
    sequence: Option<usize>,
    /// Columns of activations (default: 768, on software adapters 256).
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// Heads of attention, which divide the width (default: one for each 64 columns).
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Tokens of the vocabulary (default: 50257, on software adapters 4096).
    #[arg(long, value_name = "N")]
    vocabulary: Option<usize>,
    /// Where a picture goes; with several adapters one each, with their number in its name.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Extents are below this, so that no product of them overflows.
const MOST: usize = 1 << 20;

impl Arguments {
    fn sizes(&self, software: bool) -> Result<Sizes> {
        let usual = Sizes::usual(software);
        let width = self.width.unwrap_or(usual.width);
        let sizes = Sizes {
            batch: self.batch.unwrap_or(usual.batch),
            sequence: self.sequence.unwrap_or(usual.sequence),
            width,
            heads: self.heads.unwrap_or((width / 64).max(1)),
            vocabulary: self.vocabulary.unwrap_or(usual.vocabulary),
        };
        let named = [
            ("--batch", sizes.batch),
            ("--sequence", sizes.sequence),
            ("--width", sizes.width),
            ("--heads", sizes.heads),
            ("--vocabulary", sizes.vocabulary),
        ];
        for (name, extent) in named {
            if !(1..=MOST).contains(&extent) {
                return Err(Error::config(name, format!("{extent} is not between 1 and {MOST}")));
            }
        }
        if !sizes.width.is_multiple_of(sizes.heads) {
            let message = format!("{} heads do not divide a width of {}", sizes.heads, sizes.width);
            return Err(Error::config("--heads", message));
        }
        Ok(sizes)
    }
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let adapters = adapters()?;
    // What is wrong with the sizes is said before anything is opened.
    adapters.iter().try_for_each(|a| arguments.sizes(a.software).map(|_| ()))?;
    let devices = open_named(arguments.devices.as_deref(), &adapters, &arguments.features)?;
    let devices = tuned(devices, cache(environment).as_ref())?;
    let devices = once_each(&devices);
    let mut reports = Vec::new();
    for &device in &devices {
        let (index, name) = (device.info().index, device.info().name.clone());
        let sizes = arguments.sizes(device.info().software)?;
        let label = name.clone();
        let bar = Counter::new(roofline::measurements(sizes) as u64, move |done, all| {
            format!("measuring {label}, {}/{all}", (done + 1).min(all))
        });
        let report = device.block_on(roofline::measure(device, sizes, || bar.one_more()))?;
        drop(bar);
        if !arguments.json {
            table(index, &name, &report)?;
        }
        if let Some(path) = &arguments.svg {
            let path = if devices.len() == 1 { path.clone() } else { numbered(path, index) };
            save(&path, &report.to_svg(&name))?;
            if !arguments.json {
                say(format!("   picture in {}", path.display()))?;
            }
        }
        reports.push(json!({ "adapter": index, "name": name, "report": report }));
    }
    if arguments.json {
        print(serde_json::to_string_pretty(&reports).unwrap_or_default())?;
    }
    Ok(0)
}

/// `roofline.svg` for adapter 1 is `roofline-1.svg`.
fn numbered(path: &std::path::Path, index: usize) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let ending = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    path.with_file_name(format!("{stem}-{index}{ending}"))
}

fn table(index: usize, name: &str, report: &Report) -> Result<()> {
    let Sizes { batch, sequence, width, heads, vocabulary } = report.sizes;
    say(format!("adapter {index}: {name}"))?;
    say(format!(
        "   {batch} x {sequence} tokens, width {width}, {heads} heads, vocabulary {vocabulary}; ceilings {:.1} GFLOP/s and {:.2} GB/s",
        report.ceilings.gflops, report.ceilings.gb_s
    ))?;
    say(format!(
        "   {:<24} {:>10} {:>10} {:>9} {:>8}  {}",
        "what", "ms", "GFLOP/s", "GB/s", "ceiling", "kernels"
    ))?;
    for kernel in &report.kernels {
        say(format!(
            "   {:<24} {:>10.3} {:>10.1} {:>9.2} {:>6.0} %  {}",
            kernel.role,
            1e3 * kernel.seconds,
            kernel.gflops,
            kernel.gb_s,
            100.0 * kernel.share,
            kernel.kernels
        ))?;
    }
    for reason in &report.left_out {
        say(format!("   left out: {reason}"))?;
    }
    let tokens = (batch * sequence) as f64;
    say(format!(
        "   a block, forward and backward: {:.2} ms, {:.0} tokens/s through one block",
        1e3 * report.block_seconds,
        tokens / report.block_seconds
    ))
}
