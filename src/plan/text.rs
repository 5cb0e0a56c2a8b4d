//! Numbers and tables for people.

use std::ops::Range;

use crate::layers::Layers;
use crate::mesh::Division;

/// `1.50 GiB`, `412 MiB`, `12 KiB`, `9 B`.
pub(crate) fn bytes(bytes: u64) -> String {
    let of = |unit: u64| bytes as f64 / unit as f64;
    match bytes {
        b if b >= 1 << 30 => format!("{:.2} GiB", of(1 << 30)),
        b if b >= 1 << 20 => format!("{:.0} MiB", of(1 << 20)),
        b if b >= 1 << 10 => format!("{:.0} KiB", of(1 << 10)),
        b => format!("{b} B"),
    }
}

/// `1.23 s`, `45.6 ms`, `789 us`.
pub(super) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} us", s * 1e6),
    }
}

/// `12.3 %`.
pub(super) fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

/// `12,345`.
pub(super) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Of several ranges that follow one another, one.
pub fn merged<T: PartialEq + Clone>(ranges: &[Range<T>]) -> Vec<Range<T>> {
    let mut merged: Vec<Range<T>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end.clone(),
            _ => merged.push(range.clone()),
        }
    }
    merged
}

/// `0-4, 9-11a`: the layers of these ranges, [`merged`].
pub fn ranges(ranges: &[Range<Layers>]) -> String {
    merged(ranges).iter().map(Layers::between).collect::<Vec<_>>().join(", ")
}

/// Columns as wide as their widest cell, two spaces apart; those named are flush right.
pub(super) fn table(rows: Vec<Vec<String>>, right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().enumerate().map(|(column, cell)| match right.contains(&column) {
            true => format!("{cell:>width$}", width = widths[column]),
            false => format!("{cell:<width$}", width = widths[column]),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Devices with their numbers of layers: `layers 0:4 1:8.5`.
pub fn layers_of(devices: impl IntoIterator<Item = (usize, Layers)>) -> String {
    let each = devices.into_iter().map(|(device, layers)| format!(" {device}:{layers}"));
    format!("layers{}", each.collect::<String>())
}

/// The microbatches of one pipeline or of several: `1 microbatch`, `5 + 3 microbatches`.
pub fn microbatches(shares: &[usize]) -> String {
    match shares {
        [one] => counted(*one, "microbatch"),
        _ => format!("{} microbatches", shares.iter().map(usize::to_string).collect::<Vec<_>>().join(" + ")),
    }
}

/// So many things: `1 sequence`, `2 sequences`, `4 microbatches`.
pub fn counted(n: usize, thing: &str) -> String {
    let end = match (n, thing.ends_with('h')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{} {thing}{end}", grouped(n as f64))
}

/// How every layer is divided among devices, in words; none where a device has whole ones.
pub fn divided(division: &Division) -> Option<String> {
    let by_token = if division.sequence { ", norms and sums by token" } else { "" };
    division.divides().then(|| {
        let (members, proportion) = (division.members(), division.proportion());
        format!("every layer divided among {members} devices, {proportion}{by_token}")
    })
}
