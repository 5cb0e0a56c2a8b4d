//! The run itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use indicatif::ProgressBar;

use super::job::{Job, pick};
use super::report::{compared, describe, finish, progress, sample, show};
use crate::cli::{leave, note, say};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::pipeline::Prediction;
use crate::train::checkpoint;
use crate::train::config::Config;
use crate::train::replan::{Replanner, Verdict};
use crate::train::run::Run;
use crate::train::trainer::{Row, Trainer};

pub(super) fn train(job: Job) -> Result<u8> {
    describe(&job);
    let entropy = job.batches.corpus().unigram_entropy();
    let Job { config, all, devices, plan, planned, mut lessons, source, batches, out, resume, warnings } =
        job;
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
        if let Some(lessons) = &mut lessons {
            lessons.step(trainer.events());
        }
        evaluate(&mut trainer, &config, &mut row, &bar)?;
        run.log(&row)?;
        show(&bar, &row, config.train.steps, &mut shown);
        if let Some(replanner) = &mut replanner {
            let moved =
                compare(replanner, &mut trainer, &row, config.pipeline.replan.then_some(&run), &all, &bar)?;
            if moved {
                promise(&run, &mut trainer, Some(replanner))?;
                lessons.iter_mut().for_each(|lessons| lessons.change(replanner.current()));
            }
        }
        let every = config.output.checkpoint_every;
        let best = row.valid_loss.is_some() && run.best().is_some_and(|(step, _)| step == row.step);
        if best || every > 0 && row.step.is_multiple_of(every) {
            run.save(&mut trainer)?;
            draw(&run, &trainer);
            // A run that is killed has learnt something too.
            lessons.iter_mut().for_each(|lessons| drop(lessons.teach()));
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
    let learnt = lessons.map(|mut lessons| lessons.teach()).unwrap_or_default();
    let interrupted = stop.load(Ordering::SeqCst) > 0 && trainer.step_number() < config.train.steps;
    finish(&run, &trainer, last.as_ref(), entropy);
    learnt.iter().filter_map(compared).for_each(note);
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
    trainer.predict(current.simulation.expected);
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
    let promised = replanner.current().simulation.expected;
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
                1e3 * to.simulation.expected,
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
    .map_err(|e| Error::failed("signals", e.to_string()))?;
    Ok(count)
}
