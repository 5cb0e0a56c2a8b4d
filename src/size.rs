//! Sizes in bytes as people write them: `24GiB`, `1.5 GB`, `512m`.

/// Units, those that are not powers of two last. A letter alone is short for the binary unit.
const UNITS: [(&str, u64); 13] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("T", 1 << 40),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];
/// Without a unit, what is smaller was not meant as bytes.
const LEAST_BARE: u64 = 1_000_000;
/// A smaller number without a unit is more likely to be meant as GiB than as MiB.
const LEAST_MIB: f64 = 256.0;
/// Above any memory and any file.
const MOST: u64 = 1_000_000_000_000_000_000;

/// Reads a size. The error says what is wrong and what to write: it follows the name of what was read.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = (&text[..end], text[end..].trim());
    let refuse = || {
        format!("{text:?} is not a size such as 5GB or 24GiB; units: B, KiB, MiB, GiB, TiB, KB, MB, GB, TB")
    };
    let number: f64 = digits.parse().map_err(|_| refuse())?;
    let factor = match UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
        Some(&(_, factor)) => factor,
        None if unit.is_empty() => 1,
        None => return Err(refuse()),
    };
    // Whole numbers to the byte.
    let whole = digits.parse().ok().and_then(|whole: u64| whole.checked_mul(factor));
    let bytes = whole.unwrap_or((number * factor as f64) as u64);
    if bytes > MOST {
        return Err(format!("{text:?} is more than any machine has; write a size such as 24GiB"));
    }
    if bytes == 0 {
        return Err(format!("{text:?} is no room at all; write a size such as 24GiB"));
    }
    if unit.is_empty() && bytes < LEAST_BARE {
        let meant = if number < LEAST_MIB { "GiB" } else { "MiB" };
        return Err(format!(
            "{text} is {text} bytes; write \"{text}{meant}\", or \"{text}B\" if that is meant"
        ));
    }
    Ok(bytes)
}

/// A size as text that [`parse`] reads: in the largest binary unit of which it is a whole multiple.
pub(crate) fn text(bytes: u64) -> String {
    let unit = UNITS[..4].iter().find(|(_, unit)| bytes > 0 && bytes.is_multiple_of(*unit));
    unit.map_or(format!("{bytes}B"), |(name, unit)| format!("{}{name}", bytes / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_the_units_that_people_write() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            (" 1.5 gib ", 3 << 29),
            ("512M", 512 << 20),
            ("5GB", 5_000_000_000),
            ("20kb", 20_000),
            ("1300B", 1300),
            ("1000000", 1_000_000),
            ("9007199254740993", 9_007_199_254_740_993),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        assert_eq!([24 << 30, 3 << 29, 1000].map(text), ["24GiB", "1536MiB", "1000B"]);
    }

    #[test]
    fn a_number_that_was_not_meant_as_bytes_is_refused_with_what_was_meant() {
        for (text, meant) in [("23", "\"23GiB\""), ("23.5", "\"23.5GiB\""), ("1300", "\"1300MiB\"")] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(meant) && message.contains(&format!("{text} bytes")), "{message}");
        }
        for text in
            ["", "GiB", "15 gigs", "-1", "1e9", "1.2.3GiB", "nan", "24 i", "0", "0GiB", "999999999TiB"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
