//! The command with which a run goes on, to be copied.

use std::path::Path;

use super::Launch;
use crate::cli::planning::MachineArguments;

/// For a run in `out`: the verb and what it needs again, and what else no config keeps.
pub(super) fn command(verb: &[String], machine: &MachineArguments, launch: &Launch, out: &Path) -> String {
    let no_plan = launch.no_plan.then(|| "--no-plan".to_string());
    let run = ["--resume".to_string(), "--out".into(), out.display().to_string()];
    let words = verb.iter().cloned().chain(machine.again()).chain(no_plan).chain(run);
    words.fold("polystage".into(), |command, word| format!("{command} {}", quoted(&word)))
}

/// A word as a shell takes it for one.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_-./=,:+@%".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_are_quoted_where_a_shell_would_take_them_apart() {
        let shown = ["runs/a-1", "data.train=[\"a b\"]", "it's", "", "--set"].map(quoted);
        assert_eq!(shown, ["runs/a-1", "'data.train=[\"a b\"]'", "'it'\\''s'", "''", "--set"]);
    }
}
