//! A config as a file that explains itself: `polystage config`.

use toml::Value;

use super::Config;
use super::keys::{Absent, Key, TABLES, defaults};
use crate::error::Result;

/// Column where what is said of a value begins, if the value leaves room.
const COLUMN: usize = 40;

impl Config {
    /// Every key with its value, as a config: above it what it means, behind it its unit, and its default where it was
    /// changed. What the config leaves to the program is there as a comment.
    ///
    /// # Errors
    /// Those of [`defaults`].
    pub fn listing(&self) -> Result<String> {
        let (values, defaults) = (self.to_table(), defaults()?);
        let mut text = String::from(
            "# Every key of a config. Behind a value stand its unit and, where it was changed, its default. A key behind `#`\n\
             # is not set: what stands there is its default or, where that is said in words, an example.\n",
        );
        for table in TABLES {
            let set = values.get(table.name).and_then(Value::as_table);
            let mark = if set.is_some() { "" } else { "#" };
            text += &format!("\n# {}\n{mark}[{}]\n", table.about, table.name);
            for key in table.keys {
                let value = set.and_then(|set| set.get(key.name));
                let default = defaults.get(table.name).and_then(|table| table.get(key.name));
                text += &format!("# {}\n{}\n", key.about, line(key, value, default));
            }
        }
        Ok(text)
    }
}

/// A key with its value, or as a comment if it has none.
fn line(key: &Key, value: Option<&Value>, default: Option<&Value>) -> String {
    let (example, usual) = match key.absent {
        Absent::Refused(example) => (example.to_string(), "required".to_string()),
        Absent::Default => {
            let default = default.map(literal).unwrap_or_default();
            (default.clone(), format!("default: {default}"))
        }
        Absent::Otherwise { words, example } => (example.to_string(), format!("default: {words}")),
    };
    let is_changed = value.is_some() && value != default && !matches!(key.absent, Absent::Refused(_));
    let is_default = matches!(key.absent, Absent::Default) && !is_changed;
    let changed = if is_changed { "changed" } else { "" };
    let usual = if is_default { "" } else { usual.as_str() };
    let said: Vec<&str> = [key.unit, changed, usual].into_iter().filter(|word| !word.is_empty()).collect();
    let setting = match value {
        Some(value) => format!("{} = {}", key.name, literal(value)),
        None => format!("#{} = {example}", key.name),
    };
    match said.is_empty() {
        true => setting,
        false => format!("{setting:<COLUMN$}  # {}", said.join("; ")),
    }
}

/// A value in TOML. Small numbers are written as people write them, not as 0.00000001.
pub fn literal(value: &Value) -> String {
    match value {
        Value::Float(number) => format!("{number:?}"),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::config::smallest;

    fn parse(text: &str) -> Result<Config> {
        let of = |_: &str| {
            let model = Config::parse(&smallest(), &[], "test")?.model;
            Ok(crate::train::config::Described { model, adapter: None, weights: Default::default() })
        };
        Config::parse_with(text, &[], "test", of)
    }

    #[test]
    fn a_listing_is_a_config_with_the_same_values() {
        let all = smallest()
            + "epsilon = 1e-9\nminimum_learning_rate = 0.0\nweights = 'bf16-only'\n\
            [adapter]\ntargets = 'all-linear'\n[pipeline]\ncuts = [1, 2]\nrecompute = [0]\n";
        for text in [smallest(), all.replace("[train]", "valid = [\"a\\nb\"]\n[train]")] {
            let config = parse(&text).unwrap();
            assert_eq!(parse(&config.listing().unwrap()).unwrap(), config, "{text}");
        }
    }

    #[test]
    fn every_key_that_is_a_comment_can_be_set_by_taking_its_mark_away() {
        let listing = parse(&smallest()).unwrap().listing().unwrap();
        let commented = |line: &&str| line.starts_with('#') && !line.starts_with("# ");
        let lines: Vec<&str> = listing.lines().filter(commented).collect();
        let optional =
            TABLES.iter().flat_map(|t| t.keys).filter(|k| matches!(k.absent, Absent::Otherwise { .. }));
        // All of [adapter] is optional: its heading and three keys that have defaults.
        assert_eq!(lines.len(), optional.count() + 4, "{lines:?}");
        for line in lines.iter().filter(|line| !line.starts_with("#[")) {
            let is_adapters = TABLES[1].keys.iter().any(|key| line.starts_with(&format!("#{} ", key.name)));
            let listing =
                if is_adapters { listing.replace("#[adapter]", "[adapter]") } else { listing.clone() };
            let edited = listing.replace(line, &line[1..]);
            assert_ne!(edited, listing);
            parse(&edited).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn what_differs_from_its_default_is_marked_and_units_stand_behind_values() {
        let text = smallest() + "learning_rate = 3e-3\nevaluate_every = 100\n[output]\nkeep = 5\n";
        let listing = parse(&text).unwrap().listing().unwrap();
        let of = |name: &str| listing.lines().find(|line| line.starts_with(&format!("{name} = "))).unwrap();
        assert!(of("learning_rate").ends_with("# changed; default: 0.001"), "{listing}");
        assert!(of("keep").ends_with("# checkpoints; changed; default: 3"), "{listing}");
        assert!(of("evaluate_every").ends_with("# steps"), "{listing}");
        assert!(of("steps").ends_with("# steps; required"), "{listing}");
        assert_eq!(of("epsilon"), "epsilon = 1e-8");
        assert_eq!(listing.matches("default: 0.").count(), 2, "{listing}");
    }
}
