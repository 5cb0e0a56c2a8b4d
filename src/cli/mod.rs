//! The command line: one file a verb. Parses, calls the library, prints.
//!
//! What reaches the terminal passes through here: [`say`] and [`note`] are lines for people, in which names and paths
//! from anywhere do no harm; [`print`] and [`write`] are for what must stay as it is.

mod bench;
mod chat;
mod config;
mod devices;
mod eval;
mod export;
#[cfg(unix)]
mod fault;
mod finetune;
mod generate;
mod measuring;
mod merge;
mod placement;
mod plan;
mod planning;
mod progress;
mod recipe;
mod records;
mod schedule;
mod speaking;
mod trace;
mod train;
mod verify;

use std::io::Write;
use std::path::Path;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

use crate::error::{Error, Result, one_line};
use crate::folder::write_atomic;
use crate::gpu::{self, AdapterInfo, Device, OpenOptions, Without};
use crate::size;
use crate::text::Isolation;
use crate::train::config::Devices;

/// Trains one neural network across every GPU in this machine, whatever its vendor.
#[derive(Parser)]
#[command(
    name = "polystage",
    version,
    max_term_width = 110,
    after_help = "Example:\n  polystage train configs/tiny.toml\n\nThe exit status is 0, 1 (something failed) or 2 (bad input)."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Devices(devices::Arguments),
    Bench(bench::Arguments),
    Train(train::Arguments),
    Trace(trace::Arguments),
    Verify(verify::Arguments),
    Finetune(finetune::Arguments),
    Eval(eval::Arguments),
    Generate(generate::Arguments),
    Merge(merge::Arguments),
    Export(export::Arguments),
    Chat(chat::Arguments),
    Plan(plan::Arguments),
    Schedule(schedule::Arguments),
    Config(config::Arguments),
}

/// What the program takes from its surroundings, read once.
pub struct Environment {
    /// Folder in which measurements are kept.
    pub cache: Option<std::path::PathBuf>,
    /// Settings of drivers on which speed depends, in words.
    pub drivers: String,
    /// Whether colours are unwanted, even on a terminal.
    pub plain: bool,
    /// Where tokenizers and chat templates run.
    pub isolation: Isolation,
}

/// Runs the program; the status is 0, 1 (something failed) or 2 (bad input).
pub fn run(environment: &Environment) -> u8 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return answer(&error),
    };
    say_lost_devices_once();
    #[cfg(unix)]
    if let Err(error) = fault::explain_lost_files() {
        return fail(&error);
    }
    let result = match arguments.verb {
        Verb::Devices(a) => devices::run(&a),
        Verb::Bench(a) => bench::run(&a, environment),
        Verb::Train(a) => train::run(&a, environment),
        Verb::Trace(a) => trace::run(&a, environment.plain),
        Verb::Verify(a) => verify::run(&a),
        Verb::Finetune(a) => finetune::run(&a, environment),
        Verb::Eval(a) => eval::run(&a, environment),
        Verb::Generate(a) => generate::run(&a, environment),
        Verb::Merge(a) => merge::run(&a),
        Verb::Export(a) => export::run(&a),
        Verb::Chat(a) => chat::run(&a, environment),
        Verb::Plan(a) => plan::run(&a, environment),
        Verb::Schedule(a) => schedule::run(&a),
        Verb::Config(a) => config::run(&a),
    };
    match result {
        Ok(status) => status,
        Err(error) => fail(&error),
    }
}

/// Leaves a device that is lost to the error that says so, where it would print a panic too.
fn say_lost_devices_once() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !gpu::is_caught(panic) {
            usual(panic);
        }
    }));
}

/// Says why the program ends, and gives its status.
fn fail(error: &Error) -> u8 {
    note(format!("error: {error}"));
    if error.is_input() { 2 } else { 1 }
}

/// Arguments that are no order to do something: help and version as clap prints them, a mistake in one line.
fn answer(error: &clap::Error) -> u8 {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return 2;
    }
    if !error.use_stderr() {
        let printed = error.print().and_then(|()| std::io::stdout().flush());
        return heard(printed).map_or_else(|error| fail(&error), |_| 0);
    }
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let own =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let message = own.collect::<Vec<_>>().join("; ").replace(":;", ":");
    let program = Arguments::command();
    let verb = std::env::args().nth(1).filter(|verb| program.find_subcommand(verb).is_some());
    let verb = verb.map_or(String::new(), |verb| format!(" {verb}"));
    note(format!("{message}; see polystage{verb} --help"));
    2
}

/// Writes a file that the user named.
fn save(path: &Path, text: &str) -> Result<()> {
    // What takes its place would end a device or a pipe.
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(Error::config(path.to_string_lossy(), "cannot be written: it is not a regular file"));
    }
    write_atomic(path, text.as_bytes()).map_err(in_the_way)
}

/// An error about a path that the user has just named for something to be written there: a mistake if nothing can be,
/// unlike a disk that is full.
fn in_the_way(error: Error) -> Error {
    use std::io::ErrorKind::*;
    match error {
        Error::Io { path, source }
            if matches!(
                source.kind(),
                NotFound
                    | NotADirectory
                    | IsADirectory
                    | AlreadyExists
                    | PermissionDenied
                    | ReadOnlyFilesystem
                    | InvalidFilename
            ) =>
        {
            Error::config(path.to_string_lossy(), format!("cannot be written: {source}"))
        }
        other => other,
    }
}

/// The machine's adapters, or the error that says how to get one.
fn adapters() -> Result<Vec<AdapterInfo>> {
    let adapters = pollster::block_on(gpu::list(false));
    if adapters.is_empty() { Err(gpu::none_found()) } else { Ok(adapters) }
}

/// `auto` or `0,1,1`.
fn parse_devices(text: &str) -> Result<Devices> {
    if text.trim() == "auto" {
        return Ok(Devices::default());
    }
    let list: std::result::Result<Vec<usize>, _> = text.split(',').map(|part| part.trim().parse()).collect();
    list.map(Devices::List).map_err(|_| {
        Error::config("--devices", format!("{text:?} is not a list of adapter numbers such as 0,1 (or auto)"))
    })
}

/// What adapters are to do without.
#[derive(clap::Args)]
struct Features {
    /// Use adapters as if they did not have these, to compare or to get round a driver's mistake.
    #[arg(long, value_name = "FEATURES", value_delimiter = ',')]
    without: Vec<Feature>,
}

/// Of those the names.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Feature {
    /// 16-bit floats.
    F16,
    /// Operations among the invocations of a subgroup.
    Subgroups,
    /// Cooperative matrices.
    Coop,
}

impl Features {
    fn options(&self) -> OpenOptions {
        let without = |feature| self.without.contains(&feature);
        let without = Without {
            f16: without(Feature::F16),
            subgroups: without(Feature::Subgroups),
            cooperative: without(Feature::Coop),
        };
        OpenOptions { without, ..OpenOptions::default() }
    }

    /// What of it must be given again when a run goes on.
    fn again(&self) -> Vec<String> {
        let names = self
            .without
            .iter()
            .filter_map(|feature| Some(feature.to_possible_value()?.get_name().to_string()));
        let names: Vec<String> = names.collect();
        if names.is_empty() { names } else { vec!["--without".into(), names.join(",")] }
    }
}

/// Opens what `--devices` names, or every adapter.
fn open_named(devices: Option<&str>, adapters: &[AdapterInfo], features: &Features) -> Result<Vec<Device>> {
    let all = Devices::List(adapters.iter().map(|a| a.index).collect());
    open(&devices.map(parse_devices).transpose()?.unwrap_or(all), adapters, features)
}

/// One device of each adapter, in their order.
fn once_each(devices: &[Device]) -> Vec<&Device> {
    let mut list: Vec<&Device> = Vec::new();
    for device in devices {
        if list.iter().all(|known| known.info().index != device.info().index) {
            list.push(device);
        }
    }
    list
}

/// Opens what `devices` names.
fn open(devices: &Devices, adapters: &[AdapterInfo], features: &Features) -> Result<Vec<Device>> {
    let software: Vec<bool> = adapters.iter().map(|a| a.software).collect();
    let options = features.options();
    devices.resolve(&software)?.into_iter().map(|i| pollster::block_on(Device::open(i, options))).collect()
}

/// `6GiB` for each of these devices, or `0=6GiB,1=512MiB` by their numbers; none where nothing is said. A position in what is
/// returned is a device's number.
fn budgets(memory: Option<&str>, devices: &[usize]) -> Result<Budgets> {
    let refuse = |message: String| Error::config("--memory", message);
    let mut budgets = vec![None; devices.iter().max().map_or(0, |last| last + 1)];
    let mut host = None;
    for part in memory.into_iter().flat_map(|text| text.split(',')) {
        let (which, size) = match part.split_once('=') {
            Some((which, size)) => (Some(which.trim()), size),
            None => (None, part),
        };
        let bytes = size::parse(size).map_err(refuse)?;
        let Some(which) = which else {
            devices.iter().for_each(|&device| budgets[device] = Some(bytes));
            continue;
        };
        if which == "host" {
            host = Some(bytes);
            continue;
        }
        let Some(device) = which.parse().ok().filter(|number| devices.contains(number)) else {
            let mut numbers = devices.to_vec();
            numbers.sort_unstable();
            let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
            let message = format!(
                "{part:?}: {which:?} is no device that may be used; those are {} (a device's number is its position in \
                 --devices, of a machine file its position there), or host",
                numbers.join(", ")
            );
            return Err(refuse(message));
        };
        budgets[device] = Some(bytes);
    }
    Ok(Budgets { devices: budgets, host })
}

/// Bytes that may be used.
#[derive(Debug)]
struct Budgets {
    /// Of each device, by its number.
    devices: Vec<Option<u64>>,
    /// Of the host's memory, for the state of a model in training.
    host: Option<u64>,
}

/// Bytes for people.
fn show_bytes(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1024.0 * 1024.0 * 1024.0 => format!("{:.2} GiB", b / 1024.0 / 1024.0 / 1024.0),
        b if b >= 1024.0 * 1024.0 => format!("{:.1} MiB", b / 1024.0 / 1024.0),
        b if b >= 1024.0 => format!("{:.1} KiB", b / 1024.0),
        b => format!("{b} B"),
    }
}

/// Digits in groups of three.
fn show_count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Seconds for people: `1:34`, `1:02:03`.
fn clock(seconds: f64) -> String {
    let all = seconds.round() as u64;
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// Most characters of a line for people.
const LINE: usize = 2000;

/// A text for people in which no line does anything to a terminal or fills it.
fn harmless(text: impl std::fmt::Display) -> String {
    let lines: Vec<String> = text.to_string().split('\n').map(|line| one_line(line, LINE)).collect();
    lines.join("\n")
}

/// Prints a line for people, or several.
fn say(text: impl std::fmt::Display) -> Result<()> {
    print(harmless(text))
}

/// Prints a line, or several, as they are.
fn print(text: impl std::fmt::Display) -> Result<()> {
    write(&format!("{text}\n")).map(drop)
}

/// Writes a text as it is; false once nobody reads it any more.
fn write(text: &str) -> Result<bool> {
    let mut out = std::io::stdout();
    heard(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// What came of writing to standard output. A reader that has gone (as with `| head`) must not end the work; a disk that
/// is full must.
fn heard(written: std::io::Result<()>) -> Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::io("standard output")(error)),
    }
}

/// Says something beside the results, on standard error.
fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{}", harmless(text));
}

/// Ends the process without the drivers' own clean-up at exit, which hangs after a stall and crashes with some of them
/// while another thread still holds a device. Everything worth keeping is already on disk.
pub fn leave(status: u8) -> ! {
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    #[cfg(unix)]
    // SAFETY: _exit only ends the process.
    unsafe {
        libc::_exit(status as i32)
    }
    #[cfg(not(unix))]
    std::process::exit(status as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_a_clock_shows_them() {
        let shown = [0.4, 9.0, 94.2, 3599.6, 3723.0].map(clock);
        assert_eq!(shown, ["0:00", "0:09", "1:34", "1:00:00", "1:02:03"]);
    }

    #[test]
    fn memory_is_given_to_all_devices_or_by_number() {
        let gib = |n: u64| Some(n << 30);
        assert_eq!(budgets(None, &[0, 1]).unwrap().devices, [None, None]);
        assert_eq!(budgets(Some("6GiB"), &[0, 1]).unwrap().devices, [gib(6), gib(6)]);
        assert_eq!(budgets(Some("6GiB,1=2GiB"), &[0, 1]).unwrap().devices, [gib(6), gib(2)]);
        assert_eq!(budgets(Some("1=2GiB"), &[0, 1]).unwrap().devices, [None, gib(2)]);
        let capped = budgets(Some("6GiB,host=2GiB"), &[0]).unwrap();
        assert_eq!((capped.devices, capped.host), (vec![gib(6)], gib(2)));
        // Devices of a machine file, in another order than there.
        assert_eq!(budgets(Some("6GiB,0=2GiB"), &[2, 0]).unwrap().devices, [gib(2), None, gib(6)]);
        let message = budgets(Some("1=2GiB"), &[2, 0]).unwrap_err().to_string();
        assert!(message.contains("\"1\" is no device that may be used; those are 0, 2 ("), "{message}");
        for (text, says) in [
            ("1300", "1300 is 1300 bytes; write \"1300MiB\""),
            ("0=6", "6 is 6 bytes; write \"6GiB\""),
            ("2=6GiB", "\"2\" is no device that may be used; those are 0, 1 ("),
            ("x=6GiB", "\"x\" is no device"),
            ("lots", "\"lots\" is not a size"),
            ("", "\"\" is not a size"),
        ] {
            let message = budgets(Some(text), &[0, 1]).unwrap_err().to_string();
            assert!(message.starts_with("--memory: ") && message.contains(says), "{message}");
        }
    }

    #[test]
    #[ignore = "prints panics; the next test runs it"]
    fn lose_a_device_and_die() {
        say_lost_devices_once();
        for text in ["Error in Device::poll: Validation Error", "a mistake"] {
            std::panic::catch_unwind(|| panic!("{text}")).unwrap_err();
        }
    }

    #[test]
    fn a_lost_device_prints_no_panic_beside_its_error() {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let name = "cli::tests::lose_a_device_and_die";
        let output = command.args(["--exact", name, "--ignored", "--nocapture"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        assert!(said.contains("a mistake") && !said.contains("Device::poll"), "{said}");
    }

    #[test]
    fn lines_for_people_are_harmless_and_of_bearable_length() {
        assert_eq!(harmless("a\x1b[31m\nb\r"), "a\\u{1b}[31m\nb ");
        assert!(harmless("x".repeat(100_000)).len() < 2 * LINE);
    }
}
