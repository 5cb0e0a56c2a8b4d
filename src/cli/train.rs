//! `polystage train`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::planning::{Experiment, MachineArguments, device_budgets, for_devices, settle};
use super::{Environment, adapters, leave, note, open, progress_bar, say, show_bytes, show_count, speaking};
use crate::error::{Error, Result};
use crate::generate::Sampling;
use crate::gpu::Device;
use crate::model::Weights;
use crate::pipeline::Plan;
use crate::pipeline::Prediction;
use crate::plan::Planned;
use crate::train::checkpoint;
use crate::train::config::Config;
use crate::train::data::Batches;
use crate::train::planning::Planning;
use crate::train::replan::{Replanner, Verdict};
use crate::train::run::Run;
use crate::train::source::Source;
use crate::train::trainer::{Row, Trainer};

/// Trains a model whose layers are split over the machine's adapters.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage train configs/tiny.toml\n  polystage train configs/tiny.toml --devices 0,1 --set train.steps=500 --out runs/mine\n  polystage train configs/tiny.toml --out runs/mine --resume"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    experiment: Experiment,
    #[command(flatten)]
    launch: Launch,
}

/// How a run begins.
#[derive(clap::Args)]
pub(super) struct Launch {
    /// Neither measure nor plan: balance by floating-point operations, in 1f1b unless the config says otherwise.
    #[arg(long, conflicts_with_all = ["machine", "measure"])]
    no_plan: bool,
    /// The run's folder (default: runs/<config's name>-<number>).
    #[arg(long)]
    out: Option<PathBuf>,
    /// Continue from the folder's last checkpoint. The same config gives the uninterrupted run bit for bit; another
    /// train.steps also changes the rest of the learning rate's cosine.
    #[arg(long)]
    resume: bool,
    /// With --resume: this checkpoint instead of the last.
    #[arg(long, value_name = "CHECKPOINT", requires = "resume")]
    from: Option<PathBuf>,
    /// Print the resolved config and the plan, and stop.
    #[arg(long)]
    dry_run: bool,
}

/// Everything that is settled before a device is used.
struct Job {
    config: Config,
    /// Every device that was opened.
    all: Vec<Device>,
    /// Those of the plan, in pipeline order.
    devices: Vec<Device>,
    plan: Plan,
    planned: Option<(Planning, Planned)>,
    source: Source,
    batches: Batches,
    out: PathBuf,
    resume: Option<PathBuf>,
    /// What a user who resumes may not expect, said once the checkpoint is found to be good.
    warnings: Vec<String>,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let experiment = &arguments.experiment;
    let name = experiment.config.file_stem().map_or("run".into(), |s| s.to_string_lossy().into_owned());
    let (config, bases) = (experiment.read()?, experiment.bases());
    start(config, &name, &experiment.machine, &arguments.launch, &bases, environment)
}

/// Trains as a config says, in a run that is called `name` unless its folder is given.
pub(super) fn start(
    config: Config,
    name: &str,
    machine: &MachineArguments,
    launch: &Launch,
    bases: &[PathBuf],
    environment: &Environment,
) -> Result<u8> {
    let out = out_folder(launch, name)?;
    let job = prepare(config, out, machine, launch, bases, environment)?;
    if launch.dry_run {
        say(job.config.to_toml());
        describe(&job);
        return Ok(0);
    }
    train(job)
}

fn prepare(
    mut config: Config,
    out: PathBuf,
    machine: &MachineArguments,
    launch: &Launch,
    bases: &[PathBuf],
    environment: &Environment,
) -> Result<Job> {
    let source = Source::open(&config, bases)?;
    let (t, order) = (&config.train, config.data.order);
    let batches = Batches::new(source.train.clone(), t.batch, t.sequence, order, t.seed)?;
    let mut warnings = Vec::new();
    let resume = match launch.resume {
        true => resume_from(&out, launch.from.as_deref(), &mut config, &mut warnings)?,
        false => None,
    };
    if !launch.resume {
        Run::check_new(&out)?;
    }
    let (all, devices, plan, planned) = if launch.no_plan {
        let devices = open(&config.pipeline.devices, &adapters()?)?;
        let budgets = device_budgets(machine.memory.as_deref(), &devices)?;
        let plan = Plan::within(Trainer::setup(&config, budgets)?, &devices)?;
        (devices.clone(), devices, plan, None)
    } else {
        let (planning, all) = for_devices(&config, machine, environment, bases)?;
        let planned = planning.search()?;
        let plan = planning.plan(&planned.best)?;
        (all.clone(), pick(&all, &planned.best.devices), plan, Some((planning, planned)))
    };
    settle(&mut config, &devices, plan.schedule.microbatches);
    Ok(Job { config, all, devices, plan, planned, source, batches, out, resume, warnings })
}

fn pick(all: &[Device], which: &[usize]) -> Vec<Device> {
    which.iter().map(|&device| all[device].clone()).collect()
}

/// `--out`, or the next free `runs/<name>-<number>` (the last used one to resume).
fn out_folder(launch: &Launch, name: &str) -> Result<PathBuf> {
    if let Some(out) = &launch.out {
        return Ok(out.clone());
    }
    let numbered = |n: usize| PathBuf::from("runs").join(format!("{name}-{n}"));
    let free = (1..).find(|&n| !numbered(n).exists()).unwrap_or(1);
    if !launch.resume {
        return Ok(numbered(free));
    }
    match free {
        1 => Err(Error::config(
            "--resume",
            format!("there is no run in {}; name one with --out", numbered(1).display()),
        )),
        n => Ok(numbered(n - 1)),
    }
}

/// The checkpoint to continue from; warns about what a user may not expect.
fn resume_from(
    out: &Path,
    from: Option<&Path>,
    config: &mut Config,
    warnings: &mut Vec<String>,
) -> Result<Option<PathBuf>> {
    let Ok(old) = std::fs::read_to_string(out.join("config.toml")) else {
        let message = format!("{} does not exist or holds no run; there is nothing to resume", out.display());
        return Err(Error::config("--resume", message));
    };
    let table = |text: &str| text.parse::<toml::Table>().unwrap_or_default();
    let (old, new) = (table(&old), table(&config.to_toml()));
    // Rounding depends on the microbatches, so a choice that was left to the planner stays as it was.
    let before = old.get("pipeline").and_then(|p| p.get("microbatches")).and_then(toml::Value::as_integer);
    if config.pipeline.microbatches.is_none()
        && config.train.batch.is_multiple_of(before.unwrap_or(1) as usize)
    {
        config.pipeline.microbatches = before.map(|count| count as usize);
    }
    for section in ["data", "train"] {
        let (Some(old), Some(new)) = (old.get(section), new.get(section)) else { continue };
        for (key, value) in new.as_table().into_iter().flatten() {
            if let Some(before) = old.get(key)
                && before != value
            {
                warnings
                    .push(format!("warning: resuming with {section}.{key} = {value}, which was {before}"));
            }
        }
    }
    if let Some(from) = from {
        return checkpoint::resolve(from).map(Some);
    }
    let found = checkpoint::latest(out)?;
    let pointer = std::fs::read_to_string(out.join("checkpoints/latest")).unwrap_or_default();
    match &found {
        None => {
            warnings.push(format!("warning: {} holds no checkpoint yet; starting at step 0", out.display()))
        }
        Some(path) if !path.ends_with(pointer.trim()) => {
            let name = pointer.trim();
            warnings.push(format!(
                "warning: checkpoint {name:?} is incomplete; continuing from {}",
                path.display()
            ));
        }
        Some(_) => {}
    }
    Ok(found)
}

fn describe(job: &Job) {
    let (plan, config) = (&job.plan, &job.config);
    let p = &config.model;
    say(format!(
        "model    {}, {} parameters{}: {} layers, width {}, {} heads, context {}, vocabulary {}",
        serde_json::to_value(p.kind).unwrap_or_default().as_str().unwrap_or_default(),
        show_count(plan.model.parameter_count() as u64),
        match plan.model.adapter() {
            Some(_) => format!(", {} of them trained", show_count(plan.model.trained_count() as u64)),
            None => String::new(),
        },
        p.layers,
        p.width,
        p.heads,
        p.context,
        p.vocabulary
    ));
    say(format!(
        "data     {} {}, {} sequences of {}; unigram entropy {:.3} nats",
        show_count(job.batches.corpus().len() as u64),
        if job.source.text.tokenizer.is_bytes() { "bytes" } else { "tokens" },
        show_count(job.batches.sequences() as u64),
        config.train.sequence,
        job.batches.corpus().unigram_entropy()
    ));
    if let Some(valid) = &job.source.valid {
        say(format!(
            "valid    {} tokens, every {} steps",
            show_count(valid.len() as u64),
            config.train.evaluate_every
        ));
    }
    say(format!(
        "schedule {}, {} microbatches of {} sequences",
        plan.schedule.name, plan.schedule.microbatches, plan.setup.batch
    ));
    let total: f64 = plan.ranks.iter().map(|r| r.flops).sum();
    for (rank, device) in plan.ranks.iter().zip(&job.devices) {
        let layers: Vec<String> =
            rank.layers.iter().flat_map(Clone::clone).map(|l| plan.model.layer_name(l)).collect();
        let shown = match layers.as_slice() {
            [first, .., last] => format!("{first} to {last}"),
            [only] => only.clone(),
            [] => String::new(),
        };
        let budget =
            plan.setup.budgets[rank.rank].map_or(String::new(), |b| format!(" of {}", show_bytes(b)));
        say(format!(
            "device {} adapter {} ({}): {shown}; {:.1} % of the work, {}{budget}",
            rank.rank,
            device.info().index,
            device.info().name,
            100.0 * rank.flops / total,
            show_bytes(rank.bytes)
        ));
    }
}

fn train(job: Job) -> Result<u8> {
    describe(&job);
    let entropy = job.batches.corpus().unigram_entropy();
    let Job { config, all, devices, plan, planned, source, batches, out, resume, warnings } = job;
    let checkpoint = resume.as_ref().map(|path| checkpoint::open(path)).transpose()?;
    let bytes = source.text.tokenizer.is_bytes();
    let mut prompt = vec![0u32; batches.corpus().len().min(32)];
    batches.corpus().read(0, &mut prompt);
    let budgets = plan.setup.budgets.clone();
    let mut trainer = Trainer::launch(&config, plan, &devices, batches)?;
    let watch = trainer.watch();
    trainer.evaluate_on(source.valid);
    if checkpoint.is_none() || config.adapter.is_some() {
        watch.block_on(trainer.begin(&source.origin))?;
    }
    if let (Some(checkpoint), Some(path)) = (&checkpoint, &resume) {
        watch.block_on(trainer.restore(checkpoint, path))?;
        say(format!("resumed  from {} at step {}", path.display(), checkpoint.step));
    }
    drop(checkpoint);
    warnings.iter().for_each(note);
    let keep = config.output.keep;
    let mut run = Run::open(&out, &config.to_toml(), source.origin, keep, trainer.step_number())?;
    say(format!("run      {}", run.path().display()));
    let stop = stop_flag()?;
    if config.output.checkpoint_at_start && trainer.step_number() == 0 {
        run.save(&mut trainer)?;
    }
    let mut replanner = planned.map(|(planning, planned)| Replanner::new(planning, planned.best));
    promise(&run, &mut trainer, replanner.as_ref())?;
    let bar = progress(config.train.steps, trainer.step_number());
    let mut shown = Instant::now();
    let mut last = None;
    let mut saved = resume.as_ref().map(|_| trainer.step_number());
    while trainer.step_number() < config.train.steps && stop.load(Ordering::SeqCst) == 0 {
        let mut row = match watch.block_on(trainer.step()) {
            Ok(row) => row,
            Err(error) => {
                bar.abandon();
                let kept = checkpoint::latest(&out).ok().flatten();
                let kept = kept.map_or("there is no checkpoint yet".into(), |p| {
                    format!("the last checkpoint is {}", p.display())
                });
                note(format!("step {} failed; {kept}", trainer.step_number() + 1));
                return Err(error);
            }
        };
        evaluate(&mut trainer, &config, &mut row, &bar)?;
        run.log(&row)?;
        show(&bar, &row, config.train.steps, &mut shown);
        if let Some(replanner) = &mut replanner {
            let moved =
                compare(replanner, &mut trainer, &row, config.pipeline.replan.then_some(&run), &all, &bar)?;
            if moved {
                promise(&run, &mut trainer, Some(replanner))?;
            }
        }
        let every = config.output.checkpoint_every;
        let best = row.valid_loss.is_some() && run.best().is_some_and(|(step, _)| step == row.step);
        if best || every > 0 && row.step.is_multiple_of(every) {
            run.save(&mut trainer)?;
            draw(&run, &trainer);
            saved = Some(row.step);
        }
        last = Some(row);
        if config.train.patience > 0 && run.stale() >= config.train.patience {
            note(format!("the last {} evaluations were no better than the best; stopping", run.stale()));
            break;
        }
    }
    bar.finish_and_clear();
    if saved != Some(trainer.step_number()) {
        run.save(&mut trainer)?;
    }
    draw(&run, &trainer);
    let interrupted = stop.load(Ordering::SeqCst) > 0 && trainer.step_number() < config.train.steps;
    finish(&run, &trainer, last.as_ref(), entropy);
    drop(trainer);
    if interrupted {
        say("stopped on request; continue with --resume");
    } else if last.is_some() {
        if let Some((step, loss)) = run.best() {
            say(format!("best     step {step}: {loss:.4} nats a token on the text for evaluation"));
        }
        sample(&run, config.train.weights, &prompt, if bytes { 200 } else { 32 }, &devices, budgets)?;
    }
    Ok(0)
}

/// Evaluates where it is due, and puts the loss into the row.
fn evaluate(trainer: &mut Trainer, config: &Config, row: &mut Row, bar: &ProgressBar) -> Result<()> {
    if !row.step.is_multiple_of(config.train.evaluate_every) && row.step != config.train.steps {
        return Ok(());
    }
    let watch = trainer.watch();
    let found = watch
        .block_on(trainer.evaluate(|windows| bar.set_message(format!("evaluating, window {windows}"))))?;
    let Some(found) = found else { return Ok(()) };
    row.valid_loss = Some(found.loss);
    let text = format!(
        "step {}: {:.4} nats a token on the text for evaluation, perplexity {:.2}",
        row.step, found.loss, found.perplexity
    );
    if bar.is_hidden() {
        note(text)
    } else {
        bar.println(text)
    }
    Ok(())
}

/// Sets what steps are said to take, and writes down how that came about.
fn promise(run: &Run, trainer: &mut Trainer, replanner: Option<&Replanner>) -> Result<()> {
    let Some(current) = replanner.map(Replanner::current) else { return Ok(()) };
    trainer.predict(current.simulation.step);
    run.predict(&Prediction::new(trainer.adapters().to_vec(), &current.schedule, current.costs.clone()))
}

/// Says how well steps keep to their prediction, once; moves to another plan where the config allows it. Whether the
/// plan or its prediction has changed.
fn compare(
    replanner: &mut Replanner,
    trainer: &mut Trainer,
    row: &Row,
    may_move: Option<&Run>,
    all: &[Device],
    bar: &ProgressBar,
) -> Result<bool> {
    let known = replanner.residual().is_some();
    let promised = replanner.current().simulation.step;
    let verdict = match may_move {
        Some(_) => replanner.step(row.step_seconds, trainer.events())?,
        None => replanner.listen(row.step_seconds),
    };
    let tell = |text: String| if bar.is_hidden() { note(text) } else { bar.println(text) };
    if let Some(off) = replanner.residual().filter(|_| !known) {
        let (promised, measured) = (1e3 * promised, 1e3 * promised * (1.0 + off));
        tell(format!(
            "a step was predicted to take {promised:.1} ms and takes {measured:.1} ms ({:+.1} %)",
            100.0 * off
        ));
    }
    match verdict {
        Verdict::Keep => Ok(false),
        Verdict::Corrected { seconds, off } => {
            tell(format!(
                "steps are {:+.1} % off their prediction; no other plan is better, so {:.1} ms are predicted from here",
                100.0 * off,
                1e3 * seconds
            ));
            Ok(true)
        }
        Verdict::Move { to, off, staying } => {
            if let Some(run) = may_move {
                run.move_to(trainer, replanner.planning().plan(&to)?, &pick(all, &to.devices))?;
            }
            let cuts = to.cuts();
            tell(format!(
                "steps are {:+.1} % off their prediction; moved to devices {:?}, cuts {cuts:?}, {}: {:.1} ms predicted instead of {:.1} ms",
                100.0 * off,
                to.devices,
                to.schedule.name,
                1e3 * to.simulation.step,
                1e3 * staying
            ));
            Ok(true)
        }
    }
}

/// A picture that cannot be written must not end a run.
fn draw(run: &Run, trainer: &Trainer) {
    if let Err(error) = run.draw(trainer) {
        note(format!("warning: {error}"));
    }
}

/// Counts Ctrl-C: the first asks for a stop after the step, the second ends the program at once.
fn stop_flag() -> Result<Arc<AtomicUsize>> {
    static WARNED: AtomicBool = AtomicBool::new(false);
    let count = Arc::new(AtomicUsize::new(0));
    let handler = count.clone();
    ctrlc::set_handler(move || {
        if handler.fetch_add(1, Ordering::SeqCst) > 0 {
            leave(130);
        }
        if !WARNED.swap(true, Ordering::SeqCst) {
            note("\nstopping after this step; press Ctrl-C again to stop at once");
        }
    })
    .map_err(|e| Error::config("signals", e.to_string()))?;
    Ok(count)
}

fn progress(steps: u64, done: u64) -> ProgressBar {
    let bar = progress_bar(steps, "{bar:30.cyan/dim} {pos}/{len}  {msg}  {elapsed} elapsed, {eta} left");
    bar.set_position(done);
    bar.reset_eta();
    bar
}

/// On a terminal the bar moves; elsewhere a line now and then.
fn show(bar: &ProgressBar, row: &Row, steps: u64, shown: &mut Instant) {
    let text = format!("loss {:.4}  {} tokens/s", row.loss, show_count(row.tokens_per_second as u64));
    bar.set_message(text.clone());
    bar.set_position(row.step);
    let due = shown.elapsed() > Duration::from_secs(10) || row.step == 1 || row.step == steps;
    if bar.is_hidden() && due {
        *shown = Instant::now();
        note(format!("step {}/{steps}  {text}", row.step));
    }
}

fn finish(run: &Run, trainer: &Trainer, last: Option<&Row>, entropy: f64) {
    let Some(row) = last else {
        say(format!("nothing to do: step {} of the config is already done", trainer.step_number()));
        return;
    };
    say(format!(
        "step {}: loss {:.4} nats a token ({:.3} bits); the text's unigram entropy is {entropy:.4}",
        row.step,
        row.loss,
        row.loss / std::f64::consts::LN_2
    ));
    for (rank, device) in row.devices.iter().enumerate() {
        say(format!(
            "device {rank} ({}): busy {:.0} %, host {:.1} % of the last step, {} sent",
            device.adapter,
            100.0 * device.busy_fraction,
            100.0 * device.host_fraction,
            show_bytes(device.bytes_moved)
        ));
    }
    say(format!("timeline {}", run.path().join("timeline.svg").display()));
    if let Ok(Some(folder)) = checkpoint::latest(run.path()) {
        say(format!("folder   {}", folder.display()));
    }
}

fn sample(
    run: &Run,
    weights: Weights,
    prompt: &[u32],
    count: usize,
    devices: &[Device],
    budgets: Vec<Option<u64>>,
) -> Result<()> {
    let Some(path) = checkpoint::latest(run.path())? else { return Ok(()) };
    let sampling = Sampling { temperature: 0.8, top_k: 40, top_p: 1.0, seed: 1 };
    let text = speaking::sample(&path, weights, prompt, count, sampling, devices, budgets)?;
    say(format!("sample   {}", text.replace('\n', "\n         ")));
    Ok(())
}
