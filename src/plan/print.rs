//! An [`Explanation`] as text.

use std::fmt;
use std::ops::Range;

use super::explain::{Explanation, SharedBy, Waiting};
use super::text::{bytes, counted, grouped, layers_of, microbatches, percent, ranges, seconds, table};
use crate::layers::Layers;

/// A smaller part of a step is not worth a line.
const WORTH_SAYING: f64 = 0.005;

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "predicted: {} a step, {} tokens/s, bubble {}, {} after the last action",
            seconds(self.step_seconds),
            grouped(self.tokens_per_second),
            percent(self.bubble),
            seconds(self.update_seconds)
        )?;
        if self.jitter_seconds > WORTH_SAYING * self.step_seconds {
            writeln!(
                f,
                "{} of the step, because the devices' speeds wander and each waits for whichever is slow",
                seconds(self.jitter_seconds)
            )?;
        }
        writeln!(
            f,
            "{} with {} of {} on {}",
            name_of(&self.schedule, self.chunks),
            counted(self.microbatches, "microbatch"),
            counted(self.sequences, "sequence"),
            self.machine
        )?;
        let several = match self.shares.len() {
            1 if self.one_pipeline.is_none() => None,
            1 => Some("devices with the same layers take turns".to_string()),
            many => {
                let all = microbatches(&self.shares);
                Some(format!("{} beside each other, of {all}", counted(many, "pipeline")))
            }
        };
        if let Some(several) = several {
            write!(f, "{several}")?;
            match self.one_pipeline {
                Some(one) => writeln!(
                    f,
                    "; a single one would take {} longer, with a bubble of {}",
                    percent(one.slower),
                    percent(one.bubble)
                )?,
                None => writeln!(f)?,
            }
        }
        if let Some(axis) = &self.axis {
            writeln!(f, "{axis}")?;
        }
        if let Some(state) = &self.state {
            writeln!(f, "{state}")?;
        }
        writeln!(f)?;
        self.write_devices(f)?;
        self.write_links(f)?;
        if !self.left_out.is_empty() {
            writeln!(f, "\nleft out:")?;
            for unused in &self.left_out {
                let name = title(unused.adapter, &unused.name);
                writeln!(f, "  {} {name}: {}", unused.device, unused.reason)?;
            }
        }
        if !self.without.is_empty() {
            writeln!(f, "\nwhat each device is worth:")?;
            for without in &self.without {
                let what = match without.slower {
                    None => "nothing fits".to_string(),
                    Some(_) if without.is_needless() => "as fast".to_string(),
                    Some(slower) => format!("{} slower", percent(slower)),
                };
                writeln!(f, "  without device {} ({}): {what}", without.device, without.name)?;
            }
        }
        self.write_alternatives(f)?;
        let proof = if self.complete {
            "; no plan with a named schedule is faster"
        } else {
            "; too many to go through them all"
        };
        writeln!(
            f,
            "\n{} plans considered, {} simulated{proof}",
            grouped(self.considered as f64),
            grouped(self.evaluated as f64)
        )
    }
}

/// What stands beside a device's number.
fn title(adapter: Option<usize>, name: &str) -> String {
    adapter.map_or(name.to_string(), |adapter| format!("adapter {adapter}: {name}"))
}

fn name_of(schedule: &str, chunks: usize) -> String {
    if chunks == 1 { schedule.to_string() } else { format!("{schedule} ({chunks} stages a device)") }
}

impl Explanation {
    fn write_devices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head =
            ["", "device", "layers", "work", "compute", "start", "end", "others", "links", "memory", "of"];
        let mut rows = vec![head.map(String::from).to_vec()];
        let makespan = self.step_seconds - self.update_seconds - self.jitter_seconds;
        for share in &self.devices {
            let part = |seconds: f64| percent(seconds / makespan);
            let Waiting { warm_up, drain, imbalance, link, .. } = share.idle_seconds;
            let stages: Vec<Range<Layers>> =
                share.stages.iter().map(|stage| stage.first..stage.end).collect();
            rows.push(vec![
                share.device.to_string(),
                title(share.adapter, &share.name),
                format!("{} ({})", ranges(&stages), share.layers),
                percent(share.work),
                part(share.busy_seconds),
                part(warm_up),
                part(drain),
                part(imbalance),
                part(link),
                bytes(share.peak_bytes),
                share.budget.map_or("?".into(), bytes),
            ]);
        }
        write!(f, "{}", table(rows, &[3, 4, 5, 6, 7, 8, 9, 10]))?;
        let places = || self.devices.iter().flat_map(|share| &share.stages).map(|stage| stage.end);
        let halves = match places().any(|place| !place.is_whole()) {
            true => "; of a block that is cut, a is the attention and m the MLP",
            false => "",
        };
        writeln!(
            f,
            "layers: the first is the embedding, the last the head, and blocks lie between{halves}\ncompute, and idle at the start, at the end, waiting for others and for links: parts of the time to the last action\n"
        )?;
        for share in self.devices.iter().filter(|share| !share.why.is_empty()) {
            writeln!(f, "{} {}: {}", share.device, share.name, share.why.join("; "))?;
        }
        Ok(())
    }

    fn write_links(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut links = self.links.iter().filter(|link| link.bytes > link.shared).peekable();
        if links.peek().is_some() {
            writeln!(f, "\nlinks, each step:")?;
            let rows = links
                .map(|link| vec![format!("  {} -> {}", link.from, link.to), bytes(link.bytes - link.shared)]);
            write!(f, "{}", table(rows.collect(), &[1]))?;
        }
        if !self.host.is_empty() {
            writeln!(f, "\nto and from the host's memory, each step:")?;
            let rows = self.host.iter().map(|share| {
                vec![
                    format!("  {}", share.device),
                    format!("{} down", bytes(share.down)),
                    format!("{} up", bytes(share.up)),
                ]
            });
            write!(f, "{}", table(rows.collect(), &[1, 2]))?;
        }
        if !self.shared.is_empty() {
            writeln!(f, "\nbetween devices with the same layers, each step:")?;
            for SharedBy { devices, layers, gradients, weights } in &self.shared {
                let devices: Vec<String> = devices.iter().map(usize::to_string).collect();
                let layers: Vec<Range<Layers>> = layers.iter().map(|&(first, end)| first..end).collect();
                writeln!(
                    f,
                    "  {} (layers {}): {} of gradients to who owns the weights, {} of new weights back",
                    devices.join(", "),
                    ranges(&layers),
                    bytes(*gradients),
                    bytes(*weights)
                )?;
            }
        }
        Ok(())
    }

    fn write_alternatives(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.alternatives.is_empty() {
            return Ok(());
        }
        writeln!(f, "\nother plans:")?;
        let rows = self.alternatives.iter().map(|other| {
            let devices = other.devices.iter().copied().zip(other.layers.iter().copied());
            let repeats = match other.recompute.len() {
                0 => String::new(),
                count => format!("recompute in {count} of {} stages", other.chunks * other.devices.len()),
            };
            vec![
                format!("  +{}", percent(other.slower)),
                name_of(&other.schedule, other.chunks),
                microbatches(&other.shares),
                layers_of(devices),
                repeats,
            ]
        });
        write!(f, "{}", table(rows.collect(), &[0, 2]))
    }
}
