//! `polystage verify`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use serde_json::json;

use super::progress::Counter;
use super::{Features, adapters, once_each, open_named, print, say};
use crate::error::{Error, Result};
use crate::gpu::{Device, OpenOptions};
use crate::ops::verify::{self, Outcome, cases};
use crate::train::prove::{self, Proof};

/// Proves the results of this machine's adapters: every op and kernel variant against a reference in 64-bit floats, then
/// one stage against several.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  polystage verify --devices 0,1\n\nThe exit status is 1 if anything fails. Which kernel is chosen when: docs/kernels.md."
)]
pub(super) struct Arguments {
    /// Adapters, such as 0,1 (default: all).
    #[arg(long)]
    devices: Option<String>,
    #[command(flatten)]
    features: Features,
    /// Only ops and shapes with this in their name, such as matmul, and no pipelines.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    let adapters = adapters()?;
    let devices = open_named(arguments.devices.as_deref(), &adapters, &arguments.features)?;
    let wanted = arguments.only.as_deref().unwrap_or_default().to_lowercase();
    let cases: Vec<_> = cases().into_iter().filter(|c| c.label.to_lowercase().contains(&wanted)).collect();
    if cases.is_empty() {
        let message = format!("no op or shape has {wanted:?} in its name; try matmul or attention");
        return Err(Error::config("--only", message));
    }
    let mut passed = true;
    let mut reports = Vec::new();
    for device in once_each(&devices) {
        let index = device.info().index;
        if !arguments.json {
            say(format!("adapter {index}: {}", device.info().name))?;
            say(format!(
                "   {:<26} {:>6} {:>9} {:>9} {:>7}  {:<7} {}",
                "op", "cases", "NMSE", "allowed", "ULP", "result", "kernels"
            ))?;
        }
        let name = device.info().name.clone();
        let bar = Counter::new(cases.len() as u64, move |done, all| format!("{name}: case {done}/{all}"));
        let outcomes = device.block_on(verify::verify(device, &cases, |case, _| {
            bar.done(case as u64);
            ControlFlow::Continue(())
        }))?;
        drop(bar);
        passed &= outcomes.iter().all(|o| o.passed);
        if !arguments.json {
            table(&outcomes)?;
        }
        reports.push(json!({ "adapter": index, "name": device.info().name, "ops": outcomes }));
    }
    let proofs =
        if arguments.only.is_none() { proofs(&devices, arguments.features.options())? } else { Vec::new() };
    passed &= proofs.iter().all(|p| p.passed);
    if arguments.json {
        let report = json!({ "passed": passed, "adapters": reports, "pipelines": proofs });
        print(serde_json::to_string_pretty(&report).unwrap_or_default())?;
    } else {
        if !proofs.is_empty() {
            say("one stage against several, five training steps:")?;
        }
        for proof in &proofs {
            let mark = if proof.passed { "ok" } else { "FAILED" };
            say(format!("   {:<44} {:<52} {mark}", proof.what, proof.found))?;
        }
        say(if passed { "everything passed" } else { "FAILED" })?;
    }
    Ok(if passed { 0 } else { 1 })
}

/// Pipelines over the named devices, and over each adapter opened twice and three times.
fn proofs(devices: &[Device], options: OpenOptions) -> Result<Vec<Proof>> {
    let mut indices: Vec<usize> = devices.iter().map(|d| d.info().index).collect();
    let named = indices.clone();
    indices.sort();
    indices.dedup();
    let mut proofs = Vec::new();
    let mut lists: Vec<Vec<usize>> = indices.iter().flat_map(|&i| [vec![i; 2], vec![i; 3]]).collect();
    lists.extend((indices.len() > 1).then_some(named));
    let without: Vec<usize> =
        devices.iter().map(Device::info).filter(|info| !info.f16).map(|info| info.index).collect();
    let in_f16 = |list: &[usize]| list.iter().all(|index| !without.contains(index));
    let all: usize = lists.iter().map(|list| prove::comparisons(list.len(), in_f16(list))).sum();
    let bar = Counter::new(all as u64, |done, all| format!("one stage against several: {done}/{all}"));
    for list in &lists {
        prove::prove(list, options, in_f16(list), |proof| {
            proofs.push(proof);
            bar.one_more();
        })?;
    }
    Ok(proofs)
}

/// The worst case of each op and kernel.
fn table(outcomes: &[Outcome]) -> Result<()> {
    let mut rows: BTreeMap<(&str, &str), Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        rows.entry((&outcome.op, &outcome.variant)).or_default().push(outcome);
    }
    for ((op, variant), cases) in rows {
        let worst = cases.iter().max_by(|a, b| (a.nmse / a.tolerance).total_cmp(&(b.nmse / b.tolerance)));
        let Some(worst) = worst else { continue };
        let ulp = cases.iter().map(|c| c.max_ulp).fold(0.0, f64::max);
        let failed: Vec<&str> = cases.iter().filter(|c| !c.passed).map(|c| c.case.as_str()).collect();
        let mark = if failed.is_empty() { "ok".into() } else { format!("FAILED: {}", failed.join("; ")) };
        say(format!(
            "   {op:<26} {:>6} {:>9.1e} {:>9.1e} {ulp:>7.1}  {mark:<7} {variant}",
            cases.len(),
            worst.nmse,
            worst.tolerance
        ))?;
    }
    Ok(())
}
