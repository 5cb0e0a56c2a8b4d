//! Machine files: every key is checked, and every complaint has a line.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Serialize, Serializer};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{MACHINE_KEYS, NEEDED, of};
use super::machine::{
    DeviceProfile, Evidence, LayerProfile, Link, LinkProfile, Machine, Rates, ShapeProfile,
};
use crate::error::{Error, Result, nearest};
use crate::folder::files::check_toml;
use crate::schedule::Jitter;
use crate::size;

/// Rates: from a hundred thousand times below a slow adapter to a thousand times above a fast one.
const RATE: RangeInclusive<f64> = 1e-4..=1e9;
/// Microseconds, up to a minute.
const MICROSECONDS: RangeInclusive<f64> = 0.0..=6e7;
/// Seconds of a layer, up to an hour.
const SECONDS: RangeInclusive<f64> = 0.0..=3600.0;
/// Host cores.
const CORES: RangeInclusive<f64> = 0.0..=65536.0;
/// How many times slower.
const SLOWDOWN: RangeInclusive<f64> = 1.0..=1000.0;
/// Steps of a measurement.
const STEPS: RangeInclusive<f64> = 0.0..=1e12;
/// Seconds since 1970, to the year 9999.
const UNIX_SECONDS: RangeInclusive<f64> = 0.0..=253_402_300_799.0;
/// Standard deviations as a part of a mean.
const SPREAD: RangeInclusive<f64> = 0.0..=1000.0;
/// The number of an adapter.
const ADAPTERS: RangeInclusive<f64> = 0.0..=255.0;
/// More devices than anyone plugs into one machine.
const MAX_DEVICES: usize = 16;

/// Of 10¹² operations on the data sheet, 10⁹ that portable WGSL reaches in training: a tenth.
const GFLOPS_OF_PEAK: f64 = 100.0;
/// Of the bandwidth on the data sheet, what kernels reach.
const BANDWIDTH_OF_PEAK: f64 = 0.75;
/// What a launch, a submission and a read-back take on a usual GPU.
const LAUNCH_US: f64 = 3.0;
const SUBMIT_US: f64 = 60.0;
const BARRIER_US: f64 = 200.0;
/// Between two cards through the host, over PCIe 4.0 x8.
const LINK: Link = Link { latency_us: 150.0, gb_s: 4.0, out_gb_s: Some(12.0), into_gb_s: Some(12.0) };

type Value<'t> = Spanned<DeValue<'t>>;

/// Reads a machine file.
pub(super) fn machine(text: &str, place: &str) -> Result<Machine> {
    check_toml(text, place)?;
    let file = File { text, place };
    let root = DeTable::parse(text)
        .map_err(|error| file.error(error.span().unwrap_or(0..0), &error.message().replace('\n', ", ")))?;
    let root = Section::new(&file, root.get_ref(), root.span(), String::new());
    let mut missing = Vec::new();
    root.check("", &mut missing)?;
    if let Some((span, _)) = missing.first() {
        let span = span.clone();
        let paths: Vec<String> = missing.into_iter().map(|(_, path)| path).collect();
        let are = if paths.len() == 1 { "is" } else { "are" };
        return Err(file.error(span, &format!("{} {are} missing", paths.join(", "))));
    }
    let devices = root.tables("devices")?.iter().map(device).collect::<Result<Vec<_>>>()?;
    if devices.is_empty() || devices.len() > MAX_DEVICES {
        let message = format!(
            "a machine needs [[devices]], at least one and at most {MAX_DEVICES}; it has {}",
            devices.len()
        );
        return Err(file.error(root.span, &message));
    }
    let cores = root.optional("cores", |v, path| file.number(v, path, CORES))?;
    let count = devices.len();
    let mut links: Vec<LinkProfile> = Vec::new();
    for section in root.tables("links")? {
        let end = |key| section.required(key, |v, path| file.index(v, path, count));
        let (from, to) = (end("from")?, end("to")?);
        if from == to {
            let message = format!("{} goes from device {from} to itself", section.path);
            return Err(file.error(section.span.clone(), &message));
        }
        if links.iter().any(|other| (other.from, other.to) == (from, to)) {
            let message = format!("{} is the second link from device {from} to {to}", section.path);
            return Err(file.error(section.span.clone(), &message));
        }
        links.push(LinkProfile { from, to, link: link(&section)? });
    }
    let names = || devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(" + ");
    Ok(Machine {
        gangs: Vec::new(),
        name: root.optional("name", |v, path| file.text(v, path))?.unwrap_or_else(names),
        cores,
        host_update_gb_s: root.optional("host_update_gb_s", |v, path| file.number(v, path, RATE))?,
        host_memory_gb_s: root.optional("host_memory_gb_s", |v, path| file.number(v, path, RATE))?,
        slowdown: root.optional("slowdown", |v, path| file.matrix(v, path, count))?.unwrap_or_default(),
        measured: evidence(&root)?,
        link: root.has("link").then(|| link(&root.table("link")?)).transpose()?.unwrap_or(LINK),
        links,
        devices,
    })
}

fn device(section: &Section) -> Result<DeviceProfile> {
    let file = section.file;
    let mut shapes: Vec<ShapeProfile> = Vec::new();
    for part in section.tables("shapes")? {
        let profile = shape(&part)?;
        if shapes.iter().any(|other| other.shape == profile.shape) {
            let message = format!("{} repeats the shape {:?}", part.path, profile.shape);
            return Err(file.error(part.span, &message));
        }
        shapes.push(profile);
    }
    Ok(DeviceProfile {
        name: section.required("name", |v, path| file.text(v, path))?,
        driver: section.optional("driver", |v, path| file.text(v, path))?.unwrap_or_default(),
        adapter: section
            .optional("adapter", |v, path| file.number(v, path, ADAPTERS))?
            .map(|index| index as usize),
        memory: section.optional("memory", |v, path| file.size(v, path))?,
        max_binding: section.optional("max_binding", |v, path| file.size(v, path))?,
        cores: section.optional("cores", |v, path| file.number(v, path, CORES))?.unwrap_or(0.0),
        copy_engine: section.optional("copy_engine", |v, path| file.flag(v, path))?.unwrap_or(false),
        jitter: section.has("jitter").then(|| jitter(&section.table("jitter")?)).transpose()?,
        measured: evidence(section)?,
        rates: rates(&section.table("rates")?)?,
        shapes,
        kernels: 0,
    })
}

fn rates(section: &Section) -> Result<Rates> {
    let file = section.file;
    let rate = |key| section.optional(key, |v, path| file.number(v, path, RATE));
    let time = |key, usual: f64| {
        section.optional(key, |v, path| file.number(v, path, MICROSECONDS)).map(|time| time.unwrap_or(usual))
    };
    // What is reached counts before what is on the data sheet.
    let reached = |key, peak, part: f64| match (rate(key)?, rate(peak)?) {
        (Some(rate), _) => Ok(rate),
        (None, peak) => Ok(peak.unwrap_or_default() * part),
    };
    Ok(Rates {
        matmul_gflops: reached("matmul_gflops", "peak_tflops", GFLOPS_OF_PEAK)?,
        memory_gb_s: reached("memory_gb_s", "peak_gb_s", BANDWIDTH_OF_PEAK)?,
        launch_us: time("launch_us", LAUNCH_US)?,
        submit_us: time("submit_us", SUBMIT_US)?,
        optimizer_gb_s: rate("optimizer_gb_s")?,
        norm_gb_s: rate("norm_gb_s")?,
        clear_gb_s: rate("clear_gb_s")?,
        barrier_us: time("barrier_us", BARRIER_US)?,
    })
}

fn jitter(section: &Section) -> Result<Jitter> {
    let number = |key, range: RangeInclusive<f64>| {
        section.required(key, |v, path| section.file.number(v, path, range))
    };
    Ok(Jitter { part: number("part", 0.0..=1.0)?, seconds: number("seconds", SECONDS)? })
}

fn shape(section: &Section) -> Result<ShapeProfile> {
    let file = section.file;
    let layers = section.table("layers")?;
    let mut profiles = BTreeMap::new();
    for kind in layers.table.keys().map(|key| key.get_ref().to_string()) {
        let layer = layers.table(&kind)?;
        let time = |key| layer.required(key, |v, path| file.number(v, path, SECONDS));
        let profile = LayerProfile {
            forward: time("forward")?,
            input: time("input")?,
            weight: time("weight")?,
            backward: layer.optional("backward", |v, path| file.number(v, path, SECONDS))?,
        };
        profiles.insert(kind, profile);
    }
    Ok(ShapeProfile {
        shape: section.required("shape", |v, path| file.text(v, path))?,
        submit_us: section.optional("submit_us", |v, path| file.number(v, path, MICROSECONDS))?,
        measured: evidence(section)?,
        layers: profiles,
    })
}

/// The section's `measured`, if it has it.
fn evidence(section: &Section) -> Result<Option<Evidence>> {
    if !section.has("measured") {
        return Ok(None);
    }
    let (section, file) = (section.table("measured")?, section.file);
    let number =
        |key, range: RangeInclusive<f64>| section.required(key, |v, path| file.number(v, path, range));
    Ok(Some(Evidence {
        unix_seconds: number("unix_seconds", UNIX_SECONDS)? as u64,
        steps: number("steps", STEPS)? as u64,
        spread: number("spread", SPREAD)?,
        others: section.optional("others", |v, path| file.number(v, path, 0.0..=1.0))?,
        trained: section.required("trained", |v, path| file.flag(v, path))?,
    }))
}

fn link(section: &Section) -> Result<Link> {
    let file = section.file;
    let maybe = |key| section.optional(key, |v, path| file.number(v, path, RATE));
    Ok(Link {
        latency_us: section.required("latency_us", |v, path| file.number(v, path, MICROSECONDS))?,
        gb_s: section.required("gb_s", |v, path| file.number(v, path, RATE))?,
        out_gb_s: maybe("out_gb_s")?,
        into_gb_s: maybe("into_gb_s")?,
    })
}

/// A text, and what errors call it.
struct File<'t> {
    text: &'t str,
    place: &'t str,
}

impl File<'_> {
    fn error(&self, span: std::ops::Range<usize>, message: &str) -> Error {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        Error::config(self.place, format!("line {}: {message}", before.matches('\n').count() + 1))
    }

    fn wrong<T>(&self, value: &Value, path: &str, wanted: &str) -> Result<T> {
        let given = value.get_ref().type_str();
        Err(self.error(value.span(), &format!("{path} must be {wanted}, not {given}")))
    }

    fn text(&self, value: &Value, path: &str) -> Result<String> {
        match value.get_ref().as_str() {
            Some(text) if text.chars().any(char::is_control) => {
                Err(self.error(value.span(), &format!("{path} must be one line without control characters")))
            }
            Some(text) => Ok(text.to_string()),
            None => self.wrong(value, path, "text in quotes"),
        }
    }

    fn flag(&self, value: &Value, path: &str) -> Result<bool> {
        value.get_ref().as_bool().map_or_else(|| self.wrong(value, path, "true or false"), Ok)
    }

    fn number(&self, value: &Value, path: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let number = match value.get_ref() {
            DeValue::Float(float) => float.as_str().replace('_', "").parse().ok(),
            DeValue::Integer(integer) => self.integer(integer).map(|whole| whole as f64),
            _ => None,
        };
        let Some(number) = number else { return self.wrong(value, path, "a number") };
        if range.contains(&number) {
            return Ok(number);
        }
        let message = format!("{path} = {number} must be between {} and {}", range.start(), range.end());
        Err(self.error(value.span(), &message))
    }

    fn integer(&self, integer: &toml::de::DeInteger) -> Option<i64> {
        i64::from_str_radix(&integer.as_str().replace('_', ""), integer.radix()).ok()
    }

    fn index(&self, value: &Value, path: &str, count: usize) -> Result<usize> {
        let number = value.get_ref().as_integer().and_then(|integer| self.integer(integer));
        let Some(number) = number else { return self.wrong(value, path, "the number of a device") };
        usize::try_from(number).ok().filter(|&index| index < count).ok_or_else(|| {
            let message =
                format!("{path} = {number} is no device: this machine has {count} (0 to {})", count - 1);
            self.error(value.span(), &message)
        })
    }

    fn size(&self, value: &Value, path: &str) -> Result<u64> {
        let given = match value.get_ref() {
            DeValue::Integer(integer) => match self.integer(integer) {
                Some(bytes) => bytes.to_string(),
                None => integer.as_str().to_string(),
            },
            DeValue::Float(float) => float.as_str().to_string(),
            DeValue::String(text) => text.to_string(),
            _ => return self.wrong(value, path, "a size such as \"24GiB\", or bytes"),
        };
        size::parse(&given).map_err(|message| self.error(value.span(), &format!("{path}: {message}")))
    }

    fn matrix(&self, value: &Value, path: &str, count: usize) -> Result<Vec<Vec<f64>>> {
        let rows = value.get_ref().as_array().filter(|rows| rows.len() == count);
        let wanted = format!("{count} rows of {count} numbers, one for each device");
        let Some(rows) = rows else { return self.wrong(value, path, &wanted) };
        let mut matrix = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let Some(numbers) = row.get_ref().as_array().filter(|numbers| numbers.len() == count) else {
                return self.wrong(row, &format!("{path}[{i}]"), &format!("{count} numbers"));
            };
            let read =
                |(j, number): (usize, &Value)| self.number(number, &format!("{path}[{i}][{j}]"), SLOWDOWN);
            matrix.push(numbers.iter().enumerate().map(read).collect::<Result<_>>()?);
        }
        Ok(matrix)
    }
}

/// One table of the file.
struct Section<'a, 't> {
    file: &'a File<'t>,
    table: &'a DeTable<'t>,
    span: std::ops::Range<usize>,
    /// As a user would write it: `devices[1].rates`; empty for the whole file.
    path: String,
}

/// A key, and the others that would do.
fn alternatives(path: &str, others: &[&str]) -> String {
    if others.is_empty() { path.to_string() } else { format!("{path} (or {})", others.join(" or ")) }
}

impl<'a, 't> Section<'a, 't> {
    fn new(
        file: &'a File<'t>,
        table: &'a DeTable<'t>,
        span: std::ops::Range<usize>,
        path: String,
    ) -> Section<'a, 't> {
        Section { file, table, span, path }
    }

    fn path_to(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Refuses a key that does not exist, here or in a table within, and collects those that are missing with the span
    /// of the table that lacks them. `kind` is this table's path in [`MACHINE_KEYS`].
    fn check(&self, kind: &str, missing: &mut Vec<(std::ops::Range<usize>, String)>) -> Result<()> {
        // Times are a table for each kind of layer, whatever its name.
        let is_map = kind == "devices.shapes.layers" && self.path.ends_with(".layers");
        let keys = of(MACHINE_KEYS, kind).unwrap_or_default();
        if let Some(stranger) =
            self.table.keys().find(|key| !is_map && !keys.contains(&key.get_ref().as_ref()))
        {
            let message = format!(
                "unknown key {}; did you mean {}?",
                self.path_to(stranger.get_ref()),
                self.path_to(nearest(stranger.get_ref(), keys.iter().copied()))
            );
            return Err(self.file.error(stranger.span(), &message));
        }
        for names in of(NEEDED, kind).unwrap_or_default().iter().filter(|_| !is_map) {
            if names.iter().any(|name| self.has(name)) {
                continue;
            }
            let within = format!("{kind}.{}", names[0]);
            // Of a table that is missing, what it would need.
            let all = of(NEEDED, &within).filter(|_| !within.ends_with(".layers")).unwrap_or(&[]);
            let path = self.path_to(names[0]);
            match all {
                [] => missing.push((self.span.clone(), alternatives(&path, &names[1..]))),
                all => missing.extend(all.iter().map(|names| {
                    let path = alternatives(&format!("{path}.{}", names[0]), &names[1..]);
                    (self.span.clone(), path)
                })),
            }
        }
        for (key, value) in self.table {
            let kind = match kind {
                "" => key.get_ref().to_string(),
                _ if is_map => kind.to_string(),
                _ => format!("{kind}.{}", key.get_ref()),
            };
            if of(MACHINE_KEYS, &kind).is_none() {
                continue;
            }
            // What has the wrong type is told when it is read.
            let path = self.path_to(key.get_ref());
            if let Some(table) = value.get_ref().as_table() {
                Section::new(self.file, table, value.span(), path.clone()).check(&kind, missing)?;
            }
            for (i, item) in value.get_ref().as_array().into_iter().flatten().enumerate() {
                if let Some(table) = item.get_ref().as_table() {
                    let section = Section::new(self.file, table, item.span(), format!("{path}[{i}]"));
                    section.check(&kind, missing)?;
                }
            }
        }
        Ok(())
    }

    fn optional<T>(
        &self,
        key: &str,
        read: impl FnOnce(&'a Value<'t>, &str) -> Result<T>,
    ) -> Result<Option<T>> {
        self.table.get(key).map(|value| read(value, &self.path_to(key))).transpose()
    }

    fn required<T>(&self, key: &str, read: impl FnOnce(&'a Value<'t>, &str) -> Result<T>) -> Result<T> {
        self.optional(key, read)?
            .ok_or_else(|| self.file.error(self.span.clone(), &format!("{} is missing", self.path_to(key))))
    }

    fn table(&self, key: &str) -> Result<Section<'a, 't>> {
        self.required(key, |value, path| match value.get_ref().as_table() {
            Some(table) => Ok(Section::new(self.file, table, value.span(), path.to_string())),
            None => self.file.wrong(value, path, "a table"),
        })
    }

    /// The tables of an array such as `[[devices]]`; none if it is not there.
    fn tables(&self, key: &str) -> Result<Vec<Section<'a, 't>>> {
        let Some(value) = self.table.get(key) else { return Ok(Vec::new()) };
        let path = self.path_to(key);
        let wanted = format!("a list of tables: write [[{path}]]");
        let Some(array) = value.get_ref().as_array() else { return self.file.wrong(value, &path, &wanted) };
        let mut sections = Vec::new();
        for (i, item) in array.iter().enumerate() {
            let Some(table) = item.get_ref().as_table() else { return self.file.wrong(item, &path, &wanted) };
            sections.push(Section::new(self.file, table, item.span(), format!("{path}[{i}]")));
        }
        Ok(sections)
    }
}

/// A size as text.
pub(super) fn write_size<S: Serializer>(
    size: &Option<u64>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    size.map(size::text).serialize(serializer)
}
