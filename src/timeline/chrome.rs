//! A timeline as Chrome's trace format, which Perfetto opens, and back.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{DeviceName, Event, Timeline, Track, What};
use crate::error::{Error, Result};
use crate::schedule::{Action, Kind};

/// The tracks of a device in the order of their threads, and what the threads are called.
const TRACKS: [(Track, &str); 3] =
    [(Track::Compute, "compute"), (Track::Host, "host"), (Track::Copy, "copies")];

impl Timeline {
    /// Chrome's trace format (JSON), which Perfetto opens: a process a device, and in it a thread for compute, one for the
    /// host and one for copies, times in microseconds. Processes and threads are numbered from 1. Perfetto drops events that overlap on a thread, so each starts no sooner
    /// than the one before it ended; the exact times stand in the events' arguments, and
    /// [`Timeline::from_chrome_trace`] reads those.
    pub fn to_chrome_trace(&self) -> String {
        let mut lines = Vec::new();
        for rank in 0..self.ranks() {
            let pid = rank + 1;
            let meta =
                |name, tid, args| json!({"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args});
            let name = self.device(rank).to_string();
            lines.push(meta("process_name", 0, json!({ "name": name })));
            lines.push(meta("process_sort_index", 0, json!({ "sort_index": pid })));
            for (number, (track, what)) in TRACKS.into_iter().enumerate() {
                let tid = number + 1;
                lines.push(meta("thread_name", tid, json!({ "name": what })));
                lines.push(meta("thread_sort_index", tid, json!({ "sort_index": tid })));
                // Whole nanoseconds, so that rounding cannot make neighbours overlap.
                let mut until = i64::MIN;
                for event in self.track(rank, track) {
                    let start = ((event.start * 1e9).round() as i64).max(until);
                    until = ((event.end * 1e9).round() as i64).max(start);
                    lines.push(json!({
                        "name": event.what.to_string(), "cat": event.kind().name(), "ph": "X", "pid": pid, "tid": tid,
                        "ts": start as f64 / 1e3, "dur": (until - start) as f64 / 1e3, "args": arguments(event),
                    }));
                }
            }
        }
        let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
        let devices: Vec<DeviceName> = (0..self.ranks()).map(|rank| self.device(rank)).collect();
        format!(
            "{{\"displayTimeUnit\":\"ms\",\"otherData\":{},\"traceEvents\":[\n{}\n]}}\n",
            json!({ "polystage": { "step": self.step, "devices": devices } }),
            lines.join(",\n")
        )
    }

    /// Reads what [`Timeline::to_chrome_trace`] wrote, without loss: every usable event with its exact times, device
    /// after device, track after track, by start. `place` names the text in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] in one line for what is not JSON, not a trace of Polystage, or damaged.
    pub fn from_chrome_trace(text: &str, place: &str) -> Result<Timeline> {
        let refuse = |message: String| Error::config(place, message);
        let trace: Trace = serde_json::from_str(text).map_err(|error| {
            refuse(format!("is damaged or not a trace ({error}); `polystage train` writes a new one"))
        })?;
        let origin = trace.other.polystage.and_then(|origin| serde_json::from_value(origin).ok());
        let Some(Origin { devices, step }) = origin else {
            let message =
                "is a trace, but not one that this version of polystage wrote; `polystage train` writes one";
            return Err(refuse(message.into()));
        };
        let events = trace.events.into_iter().filter(|value| value["ph"] == "X").map(|value| {
            let name = value["name"].as_str().unwrap_or_default().to_string();
            read(value, devices.len()).ok_or_else(|| {
                refuse(format!("event {name:?} is damaged; `polystage train` writes a new trace"))
            })
        });
        let events = events.collect::<Result<_>>()?;
        Ok(Timeline { devices, events, step })
    }
}

#[derive(Deserialize)]
struct Trace {
    #[serde(rename = "otherData", default)]
    other: Other,
    #[serde(rename = "traceEvents")]
    events: Vec<Value>,
}

#[derive(Default, Deserialize)]
struct Other {
    polystage: Option<Value>,
}

/// What only a trace of Polystage has.
#[derive(Deserialize)]
struct Origin {
    devices: Vec<DeviceName>,
    step: Option<u64>,
}

/// What a label says: the only place where one is read. Traces of before have words for what begins and ends a step.
fn what(label: &str) -> Option<What> {
    Some(match label {
        "losses" => What::Losses,
        "clear" => What::CLEAR,
        "norm" => What::NORM,
        "step" => What::UPDATE,
        "tied gradient" => What::Action(Action::of_stage(0, Kind::R)),
        "tied weight" => What::Action(Action::of_stage(0, Kind::G)),
        action => What::Action(action.parse().ok()?),
    })
}

/// What Chrome's own fields do not say, or not exactly.
fn arguments(event: &Event) -> Value {
    let mut arguments = json!({ "start_seconds": event.start, "end_seconds": event.end });
    if let Some(microbatch) = event.microbatch() {
        arguments["microbatch"] = microbatch.into();
    }
    if event.bytes > 0 {
        arguments["bytes"] = event.bytes.into();
    }
    arguments
}

fn read(value: Value, devices: usize) -> Option<Event> {
    let position = |key: &str| usize::try_from(value[key].as_u64()?).ok()?.checked_sub(1);
    let (rank, &(track, _)) = (position("pid")?, TRACKS.get(position("tid")?)?);
    let arguments = &value["args"];
    let microbatch = match &arguments["microbatch"] {
        Value::Null => None,
        number => Some(usize::try_from(number.as_u64()?).ok()?),
    };
    let bytes = match &arguments["bytes"] {
        Value::Null => 0,
        number => number.as_u64()?,
    };
    let (start, end) = (arguments["start_seconds"].as_f64()?, arguments["end_seconds"].as_f64()?);
    let event = Event { rank, track, what: what(value["name"].as_str()?)?, start, end, bytes };
    // What follows from the label and the track is written for other programs.
    let agrees = value["cat"] == event.kind().name() && microbatch == event.microbatch();
    (rank < devices && event.is_usable() && agrees).then_some(event)
}
