//! Models that are called by their names on the Hugging Face hub and are not here. This program downloads nothing; it
//! says what does.

use std::path::Path;

/// What is wrong with a path to a model where there is nothing, and what to do.
pub fn absent(path: &Path) -> String {
    match repository(path) {
        Some((_, name)) if Path::new(name).is_dir() => format!("does not exist, but {name} does; give that"),
        Some((owner, name)) => format!(
            "does not exist here; if it is a model's name on the Hugging Face hub, download it with `hf download \
             {owner}/{name} --local-dir {name}` (pip install huggingface_hub) and give {name}"
        ),
        None => "does not exist; give a run, checkpoint or model folder".into(),
    }
}

/// Owner and name, if it can be called so on the hub: `owner/name`, where `owner` is no folder here.
fn repository(path: &Path) -> Option<(&str, &str)> {
    let (owner, name) = path.to_str()?.split_once('/')?;
    let is_name = |part: &str| {
        let plain = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        plain && part.len() <= 96 && part.starts_with(|c: char| c.is_ascii_alphanumeric())
    };
    // A config's name that is mistyped is no model's.
    let is_file = name.ends_with(".toml") || name.ends_with(".safetensors");
    (is_name(owner) && is_name(name) && !is_file && !Path::new(owner).exists()).then_some((owner, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_a_name_on_the_hub_is_taken_for_one() {
        let command = "`hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B`";
        assert!(absent(Path::new("Qwen/Qwen2.5-0.5B")).contains(command));
        for other in
            ["model", "./model", "../a/b", "a/b/c", "/a/b", "a/", "a/b c", "a/b.toml", "a/--b", "src/nothing"]
        {
            assert!(!absent(Path::new(other)).contains("hf download"), "{other}");
        }
    }
}
