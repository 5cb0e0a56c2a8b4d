//! The run itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::describe::describe;
use super::job::{Job, pick};
use super::progress::{Doing, Progress};
use super::report::{compared, finish};
use super::sample::{Beginning, sample};
use crate::cli::records::Evaluated;
use crate::cli::{leave, note, say};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::layers::Layers;
use crate::timeline::Prediction;
use crate::train::checkpoint;
use crate::train::config::Config;
use crate::train::replan::{Replanner, Verdict};
use crate::train::resume::Resume;
use crate::train::run::Run;
use crate::train::trainer::{Row, Trainer};

pub(super) fn train(job: Job) -> Result<u8> {
    let entropy = describe(&job)?;
    let beginning = Beginning::new(&job)?;
    let Job {
        config,
        all,
        devices,
        names,
        plan,
        planned,
        mut lessons,
        source,
        isolation,
        batches,
        out,
        again,
        resume,
        ..
    } = job;
    let Resume { checkpoint, .. } = resume;
    let (budgets, microbatches) = (plan.setup.budgets.clone(), plan.schedule.microbatches);
    let mut trainer = Trainer::launch(&config, plan, &devices, batches)?;
    trainer.call(names);
    let watch = trainer.watch();
    let evaluated = source.valid.as_ref().map(|valid| Evaluated::new(valid, config.train.sequence));
    trainer.evaluate_on(source.valid);
    if checkpoint.is_none() || config.adapter.is_some() {
        watch.block_on(trainer.begin(&source.origin))?;
    }
    if let Some((path, checkpoint)) = &checkpoint {
        watch.block_on(trainer.restore(checkpoint, path))?;
        say(format!("resumed  from {} at step {}", path.display(), checkpoint.step))?;
    }
    let mut saved = checkpoint.map(|(_, checkpoint)| checkpoint.step);
    let keep = config.output.keep;
    let mut run = Run::open(&out, &config.to_toml(), source.origin, keep, trainer.step_number())?;
    run.warning().into_iter().for_each(|text| note(format!("warning: {text}")));
    say(format!("run      {}", run.path().display()))?;
    let stop = stop_flag()?;
    if config.output.checkpoint_at_start && trainer.step_number() == 0 {
        run.save(&mut trainer)?;
    }
    let mut replanner = planned.map(|(planning, planned)| Replanner::new(planning, planned.best));
    promise(&mut run, &mut trainer, replanner.as_ref());
    let bar = Progress::new(&config, trainer.step_number(), microbatches, evaluated);
    let mut last = None;
    while trainer.step_number() < config.train.steps && stop.load(Ordering::SeqCst) == 0 {
        // A run that has moved to another plan has other devices to watch.
        let watch = trainer.watch();
        bar.step_begins(watch.clone());
        let mut row = match watch.block_on(trainer.step()) {
            Ok(row) => row,
            Err(error) => {
                bar.abandon();
                let failed = format!("step {}", trainer.step_number() + 1);
                return Err(fail(error, &failed, &run, &mut trainer, saved, &again));
            }
        };
        if let Some(lessons) = &mut lessons {
            lessons.step(trainer.events());
        }
        bar.step(&row);
        if let Some(scale) = row.loss_scale.filter(|_| row.skipped) {
            bar.note(format!(
                "step {}: the gradient is not finite at a loss scale of {scale}; weights stay as they are, and the scale is {} now",
                row.step,
                scale / 2.0
            ));
        }
        let judged = evaluate(&mut trainer, &config, &mut row, evaluated, &bar);
        run.log(&row)?;
        if let Err(error) = judged {
            bar.abandon();
            let failed = format!("the evaluation after step {}", row.step);
            return Err(fail(error, &failed, &run, &mut trainer, saved, &again));
        }
        if let Some(warning) = row.valid_loss.and_then(|_| run.overfitting(config.train.patience)) {
            bar.note(warning);
        }
        if let Some(replanner) = &mut replanner {
            let moved =
                compare(replanner, &mut trainer, &row, config.pipeline.replan.then_some(&run), &all, &bar)?;
            if moved {
                promise(&mut run, &mut trainer, Some(replanner));
                lessons.iter_mut().for_each(|lessons| lessons.change(replanner.current()));
            }
        }
        let every = config.output.checkpoint_every;
        let best = row.valid_loss.is_some() && run.best().is_some_and(|(step, _)| step == row.step);
        if best || every > 0 && row.step.is_multiple_of(every) {
            bar.begin(Doing::Save);
            run.save(&mut trainer)?;
            bar.end();
            draw(&run, &trainer, &bar);
            // A run that is killed has learnt something too.
            lessons.iter_mut().for_each(|lessons| drop(lessons.teach()));
            saved = Some(row.step);
        }
        last = Some(row);
        if config.train.patience > 0 && run.stale() >= config.train.patience {
            bar.note(format!("the last {} evaluations were no better than the best; stopping", run.stale()));
            break;
        }
    }
    if saved != Some(trainer.step_number()) {
        run.save(&mut trainer)?;
    }
    draw(&run, &trainer, &bar);
    drop(bar);
    let learnt = lessons.map(|mut lessons| lessons.teach()).unwrap_or_default();
    let interrupted = stop.load(Ordering::SeqCst) > 0 && trainer.step_number() < config.train.steps;
    finish(&run, &trainer, last.as_ref(), entropy)?;
    learnt.iter().filter_map(compared).for_each(note);
    drop(trainer);
    if interrupted {
        say(format!("stopped on request; continue with\n  {again}"))?;
    } else if last.is_some() {
        if let Some((step, loss)) = run.best() {
            say(format!("best     step {step}: {loss:.4} nats a token on the text for evaluation"))?;
        }
        sample(&run, &isolation, &config, &beginning, &devices, budgets)?;
    }
    Ok(0)
}

/// Says what has failed and what there is to go on from. When it was the data that changed, the model is as good as
/// before, so it is saved first unless it is `saved` at this step. `again` is the command that goes on.
fn fail(
    error: Error,
    failed: &str,
    run: &Run,
    trainer: &mut Trainer,
    saved: Option<u64>,
    again: &str,
) -> Error {
    if matches!(error, Error::Changed { .. })
        && saved != Some(trainer.step_number())
        && let Err(unsaved) = run.save(trainer)
    {
        note(format!("warning: {unsaved}"));
    }
    let kept = checkpoint::latest(run.path()).ok().flatten();
    let kept = kept.map_or("there is no checkpoint yet".into(), |p| {
        format!("the last checkpoint is {}; continue from it with: {again}", p.display())
    });
    note(format!("{failed} failed; {kept}"));
    error
}

/// Evaluates where it is due, and puts the loss into the row.
fn evaluate(
    trainer: &mut Trainer,
    config: &Config,
    row: &mut Row,
    evaluated: Option<Evaluated>,
    bar: &Progress,
) -> Result<()> {
    let Some(evaluated) = evaluated else { return Ok(()) };
    if !row.step.is_multiple_of(config.train.evaluate_every) && row.step != config.train.steps {
        return Ok(());
    }
    let watch = trainer.watch();
    let step = row.step;
    bar.begin(Doing::Evaluation(0, evaluated));
    let found = watch.block_on(trainer.evaluate(|done| bar.evaluating(done)))?;
    bar.end();
    let Some(found) = found else { return Ok(()) };
    row.valid_loss = Some(found.loss);
    bar.note(format!(
        "step {step}: {:.4} nats a token on the text for evaluation, perplexity {:.2}",
        found.loss, found.perplexity
    ));
    Ok(())
}

/// Sets what steps are said to take, and how that came about.
fn promise(run: &mut Run, trainer: &mut Trainer, replanner: Option<&Replanner>) {
    let Some(replanner) = replanner else { return };
    let (current, planning) = (replanner.current(), replanner.planning());
    trainer.predict(current.simulation.expected);
    run.predict(Prediction::of_plan(current, planning.names()), planning.profiles());
}

/// Says how well steps keep to their prediction, once; moves to another plan where the config allows it. Whether the
/// plan or its prediction has changed.
fn compare(
    replanner: &mut Replanner,
    trainer: &mut Trainer,
    row: &Row,
    may_move: Option<&Run>,
    all: &BTreeMap<usize, Device>,
    bar: &Progress,
) -> Result<bool> {
    let known = replanner.residual().is_some();
    let promised = replanner.current().simulation.expected;
    let verdict = match may_move {
        Some(_) => replanner.step(row.step_seconds, trainer.events())?,
        None => replanner.listen(row.step_seconds),
    };
    if let Some(off) = replanner.residual().filter(|_| !known) {
        let (promised, measured) = (1e3 * promised, 1e3 * promised * (1.0 + off));
        bar.note(format!(
            "a step was predicted to take {promised:.1} ms and takes {measured:.1} ms ({:+.1} %)",
            100.0 * off
        ));
    }
    match verdict {
        Verdict::Keep => Ok(false),
        Verdict::Corrected { seconds, off } => {
            bar.note(format!(
                "steps are {:+.1} % off their prediction; no other plan is better, so {:.1} ms are predicted from here",
                100.0 * off,
                1e3 * seconds
            ));
            Ok(true)
        }
        Verdict::Move { to, off, staying } => {
            let planning = replanner.planning();
            if let Some(run) = may_move {
                run.move_to(trainer, planning.plan(&to)?, &pick(all, &planning.devices(&to)))?;
                trainer.call(planning.called(&to));
            }
            let cuts = Layers::list(&to.cuts());
            bar.note(format!(
                "steps are {:+.1} % off their prediction; moved to devices {:?}, cuts {cuts}, {}: {:.1} ms predicted instead of {:.1} ms",
                100.0 * off,
                planning.devices(&to),
                to.schedule.name,
                1e3 * to.simulation.expected,
                1e3 * staying
            ));
            Ok(true)
        }
    }
}

/// A picture that cannot be written must not end a run.
fn draw(run: &Run, trainer: &Trainer, bar: &Progress) {
    if let Err(error) = run.draw(trainer) {
        bar.note(format!("warning: {error}"));
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
