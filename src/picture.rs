//! What all pictures share: SVG that stands alone, scales, and brings its own background, so that it can be read on
//! light and on dark pages.

use std::fmt::{Display, Write};

/// Width of every picture; heights differ.
pub(crate) const WIDTH: f64 = 1200.0;
/// Room left and right of what is drawn.
pub(crate) const MARGIN: f64 = 28.0;
/// Text that is read first.
pub(crate) const INK: &str = "#1f2933";
/// Text that explains.
pub(crate) const FAINT: &str = "#66717f";
/// Marks of axes across what is drawn.
pub(crate) const GRID: &str = "#d3d9e1";

/// Side of the square of a legend.
const SWATCH: f64 = 14.0;

/// The start of a picture of this height: background and title.
pub(crate) fn open(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\" \
         font-size=\"13\" fill=\"{INK}\">\n<title>{0}</title>\n\
         <rect x=\"0.5\" y=\"0.5\" width=\"{1}\" height=\"{2}\" rx=\"12\" fill=\"#ffffff\" stroke=\"{GRID}\"/>\n\
         <text x=\"{MARGIN}\" y=\"38\" font-size=\"19\" font-weight=\"600\">{0}</text>\n",
        escape(title),
        WIDTH - 1.0,
        height - 1.0,
    )
}

/// A square of a colour with its meaning; returns where the next one goes.
pub(crate) fn swatch(svg: &mut String, x: f64, y: f64, fill: impl Display, name: &str) -> f64 {
    let square = format!(
        "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{SWATCH}\" height=\"{SWATCH}\" rx=\"3\" fill=\"{fill}\"/>"
    );
    entry(svg, x, y, &square, name)
}

/// A sign of a legend, as wide and high as [`swatch`]'s, with its meaning; returns where the next one goes.
pub(crate) fn entry(svg: &mut String, x: f64, y: f64, sign: &str, name: &str) -> f64 {
    let _ =
        writeln!(svg, "{sign}<text x=\"{:.1}\" y=\"{}\" fill=\"{FAINT}\">{name}</text>", x + 20.0, y + 11.5);
    x + 44.0 + name.chars().map(breadth).sum::<f64>()
}

/// Roughly what a character takes of a line; fonts differ.
fn breadth(c: char) -> f64 {
    match c {
        'i' | 'j' | 'l' | ':' | ',' | '.' | '\'' => 3.6,
        ' ' | '-' | 'f' | 'r' | 't' => 5.0,
        'm' | 'w' | 'M' | 'W' => 11.5,
        _ => 7.9,
    }
}

/// Text for XML; a control character, which XML cannot hold, becomes U+FFFD.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The distance of about `count` marks on an axis of this length, which is above 0: 1, 2 or 5 times a power of ten.
pub(crate) fn round_step(length: f64, count: usize) -> f64 {
    let rough = length / count.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= rough * 0.999).unwrap_or(10.0)
}
