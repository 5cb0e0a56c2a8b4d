//! What ARCHITECTURE.md says holds everywhere and is absent on purpose, as far as text shows it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn architecture() -> String {
    std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap()
}

/// Every file below a folder, its path below it and its text.
fn files(folder: &str) -> Vec<(String, String)> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { collect(&path, files) } else { files.push(path) }
        }
    }
    let root = root().join(folder);
    let mut files = Vec::new();
    collect(&root, &mut files);
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
        (name, std::fs::read_to_string(path).unwrap())
    };
    files.iter().map(read).collect()
}

/// Every file of the library without comments and the tests at its end.
fn sources() -> Vec<(String, String)> {
    let code = |(name, text): (String, String)| {
        let before = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let lines = before.lines().filter(|line| !line.trim_start().starts_with("//"));
        (name, lines.collect::<Vec<_>>().join("\n"))
    };
    files("src").into_iter().map(code).collect()
}

/// The files in which any of `words` stands, but for those of which the name begins with one of `allowed`.
fn with(words: &[&str], allowed: &[&str]) -> Vec<String> {
    let is_free = |name: &str| !allowed.iter().any(|start| name.starts_with(start));
    let found = sources()
        .into_iter()
        .filter(|(name, text)| is_free(name) && words.iter().any(|word| text.contains(word)));
    found.map(|(name, _)| name).collect()
}

/// The words in backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// What each module of the crate names of the others, with the files in which it does.
fn uses() -> BTreeSet<(String, String, String)> {
    let mut all = BTreeSet::new();
    for (name, text) in sources() {
        let module = |path: &str| path.split(['/', '.']).next().unwrap_or_default().to_string();
        for path in text.split("crate::").skip(1).chain(text.split("polystage::").skip(1)) {
            let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
            assert!(end > 0, "{name}: one path for each module, so that this test can read it");
            all.insert((module(&name), path[..end].to_string(), name.clone()));
        }
        // `src/a.rs` and `src/a/mod.rs` are one step below the crate, which no other way leads to.
        let depth = name.trim_end_matches("/mod.rs").split('/').count();
        assert!(!text.contains(&"super::".repeat(depth)), "{name} reaches the crate's modules by `super`");
    }
    all
}

// --- layers -----------------------------------------------------------------------------------------------------------

/// The list is that of ARCHITECTURE.md.
#[test]
fn a_module_uses_only_what_stands_before_it_in_the_list_of_layers() {
    let text = architecture();
    let list = text.split("In layer order:").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap();
    let layers = quoted(list);
    let level = |module: &str| layers.iter().position(|layer| *layer == module);
    for (name, _) in sources() {
        let module = name.split(['/', '.']).next().unwrap_or_default();
        assert!(module == "lib" || level(module).is_some(), "{module} is no layer of ARCHITECTURE.md");
    }
    for (module, used, file) in uses() {
        // The crate's own names, such as `Error`, come from a layer too.
        let known = level(&used).unwrap_or_else(|| panic!("{file} names crate::{used}, which is no module"));
        assert!(Some(known) <= level(&module), "{file}: `{module}` stands before `{used}`, which it uses");
    }
}

#[test]
fn what_is_computed_and_when_and_how_do_not_see_each_other() {
    let islands: [(&str, &[&str]); 4] = [
        ("graph", &["error"]),
        ("schedule", &["error"]),
        ("gpu", &["error"]),
        // A plan is made of data: neither models nor devices.
        ("plan", &["error", "layers", "mesh", "size", "schedule", "folder"]),
    ];
    for (module, used, file) in uses() {
        if let Some((_, allowed)) = islands.iter().find(|(island, _)| *island == module) {
            assert!(used == module || allowed.contains(&&*used), "{file} uses `{used}`");
        }
    }
    assert_eq!(with(&["wgpu::"], &["gpu/"]), Vec::<String>::new(), "only `gpu` names wgpu");
}

#[test]
fn the_code_map_names_what_there_is() {
    for row in
        architecture().lines().filter(|line| line.starts_with("| `src/") || line.starts_with("| `shaders/"))
    {
        let mut words = quoted(row).into_iter();
        let place = root().join(words.next().unwrap());
        assert!(place.exists(), "{row}");
        if !place.is_dir() {
            continue;
        }
        let below = files(place.strip_prefix(root()).unwrap().to_str().unwrap());
        let parts: BTreeSet<&str> = below.iter().flat_map(|(name, _)| name.split(['/', '.'])).collect();
        let is_name = |word: &&str| {
            word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_/".contains(c))
        };
        let named: BTreeSet<&str> = words.filter(is_name).map(|word| word.trim_end_matches('/')).collect();
        for word in &named {
            assert!(parts.contains(word), "there is no {word} in {}", place.display());
        }
        // Of these a file is an op, or a verb.
        if ["reference", "ops", "cli", "shaders"].iter().any(|folder| place.ends_with(folder)) {
            continue;
        }
        for (file, _) in below {
            let part = file.split(['/', '.']).next().unwrap_or_default();
            assert!(
                part == "mod" || named.contains(part),
                "the map does not name {part} of {}",
                place.display()
            );
        }
    }
}

// --- devices ----------------------------------------------------------------------------------------------------------

#[test]
fn only_a_link_moves_data_between_devices() {
    // `ops/bench.rs` measures one device's two directions.
    assert_eq!(
        with(&["copy_mapped("], &["gpu/buffer.rs", "pipeline/link.rs", "ops/bench.rs"]),
        Vec::<String>::new()
    );
}

#[test]
fn only_one_file_builds_shader_text() {
    let words = ["ShaderSource", "create_compute_pipeline", "@compute", "@group("];
    assert_eq!(with(&words, &["gpu/kernel.rs"]), Vec::<String>::new());
}

#[test]
fn no_shader_uses_atomics() {
    for (name, text) in files("shaders") {
        let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
        assert!(!code.iter().any(|line| line.contains("atomic")), "{name}");
    }
}

#[test]
fn only_explicit_wrappers_block() {
    let wrappers = ["gpu/device.rs", "pipeline/launch.rs", "pipeline/watch.rs"];
    // Native from end to end.
    let conveniences = ["profile/", "train/run.rs", "train/prove.rs", "generate/language.rs", "cli/"];
    let allowed = [&wrappers[..], &conveniences].concat();
    assert_eq!(with(&["block_on", "thread::sleep", "park_timeout"], &allowed), Vec::<String>::new());
}

// --- the surroundings -------------------------------------------------------------------------------------------------

#[test]
fn nothing_prints_below_cli_and_nothing_reads_the_environment_below_main() {
    assert_eq!(
        with(&["println!(", "print!(", "eprint", "dbg!(", "io::stderr("], &["cli/"]),
        Vec::<String>::new()
    );
    // A helper process answers on its standard output.
    assert_eq!(with(&["io::stdout("], &["cli/", "text/helper.rs"]), Vec::<String>::new());
    assert_eq!(with(&["env::var", "var_os(", "args_os("], &["main.rs"]), Vec::<String>::new());
}

#[test]
fn no_trait_is_defined_and_statics_are_constants_or_what_signals_need() {
    assert_eq!(with(&["trait ", "thread_local!", "static mut "], &[]), Vec::<String>::new());
    let mut found = Vec::new();
    for (name, text) in sources() {
        let names = text.lines().filter_map(|line| line.trim_start().strip_prefix("static "));
        found.extend(names.map(|line| format!("{name} {}", line.split(':').next().unwrap_or_default())));
    }
    found.sort_unstable();
    let known = [
        "cli/fault.rs BEFORE",
        "cli/fault.rs SAID",
        "cli/train/steps.rs WARNED",
        "gpu/mod.rs START",
        "ops/matmul.rs HEADERS",
    ];
    assert_eq!(found, known);
}

#[test]
fn only_one_file_opens_what_is_read_and_refuses_pipes_devices_and_folders() {
    let words = ["read_to_string(", "fs::read(", "File::open(", "Mmap::"];
    // What the kernel says of memory lies below `folder`.
    assert_eq!(with(&words, &["folder/files.rs", "gpu/adapter.rs"]), Vec::<String>::new());
}

#[test]
fn what_is_written_is_renamed_into_place_and_metrics_alone_are_appended_to() {
    let words = ["fs::write(", "File::create(", "File::options(", "OpenOptions::new("];
    // The lock of a run, and its metrics.
    assert_eq!(with(&words, &["folder/files.rs", "train/run.rs"]), Vec::<String>::new());
}

#[test]
fn programs_of_other_people_run_in_text_alone() {
    assert_eq!(with(&["tokenizers::", "minijinja"], &["text/"]), Vec::<String>::new());
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    for (name, text) in files("src") {
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("unsafe {")) {
            let said = lines[at.saturating_sub(6)..=at].iter().any(|line| line.contains("SAFETY:"));
            assert!(said, "{name} {}: {line}", at + 1);
        }
    }
}

/// The modules of the library in the order in which ARCHITECTURE.md has them.
fn layers() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, order) = text.split_once("stands above it. ").unwrap();
    let order = order.split("\n\n").next().unwrap();
    order.split('`').skip(1).step_by(2).map(String::from).collect()
}

#[test]
fn a_module_uses_only_what_stands_above_it() {
    let layers = layers();
    let place = |module: &str| layers.iter().position(|layer| layer == module);
    for (name, text) in sources() {
        let own = name.split(['/', '.']).next().unwrap();
        if own == "lib" {
            continue;
        }
        let place_of_own = place(own).unwrap_or_else(|| panic!("{own} has no place in ARCHITECTURE.md"));
        for used in text.split("crate::").skip(1) {
            let used = used.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            // What is not a module stands in the library's own file.
            let Some(used_place) = place(used) else { continue };
            assert!(used_place <= place_of_own, "{name} uses {used}, which stands below {own}");
        }
    }
}
