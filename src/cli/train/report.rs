//! What a run says of itself while it goes on and at its end.

use crate::cli::{say, show_bytes};
use crate::error::Result;
use crate::profile::Outcome;
use crate::train::checkpoint;
use crate::train::lessons::Lesson;
use crate::train::run::{LOSSES, Run, TIMELINE};
use crate::train::trainer::{Row, Trainer};

pub(super) fn finish(run: &Run, trainer: &Trainer, last: Option<&Row>, entropy: Option<f64>) -> Result<()> {
    let Some(row) = last else {
        return say(format!("nothing to do: step {} of the config is already done", trainer.step_number()));
    };
    let beside =
        entropy.map_or(String::new(), |entropy| format!("; the text's unigram entropy is {entropy:.4}"));
    say(format!(
        "step {}: loss {:.4} nats a token ({:.3} bits){beside}",
        row.step,
        row.loss,
        row.loss / std::f64::consts::LN_2
    ))?;
    for device in &row.devices {
        say(format!(
            "device {} ({}): busy {:.0} %, host {:.1} % of the last step, {} sent",
            device.device,
            device.adapter,
            100.0 * device.busy_fraction,
            100.0 * device.host_fraction,
            show_bytes(device.bytes_moved)
        ))?;
    }
    say(format!("losses   {}", run.path().join(LOSSES).display()))?;
    say(format!("timeline {}", run.path().join(TIMELINE).display()))?;
    match checkpoint::latest(run.path()) {
        Ok(Some(folder)) => say(format!("folder   {}", folder.display())),
        _ => Ok(()),
    }
}

/// How much longer or shorter than assumed a device's work must take to be worth a word.
const WORTH_SAYING: f64 = 0.1;

/// A device that is not what the plan took it for, and what follows.
pub(super) fn compared(lesson: &Lesson) -> Option<String> {
    let off = lesson.ratio - 1.0;
    if off.abs() <= WORTH_SAYING {
        return None;
    }
    let beside = |others: f64| format!("while other programs took {:.0} % of the cores", 100.0 * others);
    let loud = lesson.others.unwrap_or_default();
    let follows = match lesson.outcome {
        Outcome::Learnt(_) => "the next run plans with that".to_string(),
        Outcome::MeasuredAgain(then) => {
            format!("it was measured {}, so the next run measures it again", beside(then))
        }
        Outcome::Louder => {
            format!("it worked {}, so the next run plans with what was measured before", beside(loud))
        }
        Outcome::Unwritten => "the next run plans with what was measured before".to_string(),
    };
    Some(format!(
        "{} takes {:.0} % {} for its work than the plan assumed; {follows}",
        lesson.name,
        100.0 * off.abs(),
        if off > 0.0 { "longer" } else { "less time" }
    ))
}
