//! What ARCHITECTURE.md says is absent, as far as text shows it.

use std::path::{Path, PathBuf};

/// Every file of the library, its path below `src`.
fn sources() -> Vec<(String, String)> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { collect(&path, files) } else { files.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
        (name, std::fs::read_to_string(path).unwrap())
    };
    files.iter().map(read).collect()
}

/// The files in which any of `words` stands before the tests at a file's end, but for `allowed` beginnings of names.
fn with(words: &[&str], allowed: &[&str]) -> Vec<String> {
    let code = |text: &str| {
        let before = text.split("#[cfg(test)]").next().unwrap_or_default();
        let lines = before.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.collect::<Vec<_>>().join("\n")
    };
    let is_free = |name: &str| !allowed.iter().any(|start| name.starts_with(start));
    let found = sources().into_iter().filter(|(name, text)| {
        let text = code(text);
        is_free(name) && words.iter().any(|word| text.contains(word))
    });
    found.map(|(name, _)| name).collect()
}

#[test]
fn only_one_file_opens_what_is_read_and_refuses_pipes_devices_and_folders() {
    let words = ["read_to_string(", "fs::read(", "File::open("];
    // What the kernel says of memory lies below `folder`.
    assert_eq!(with(&words, &["folder/files.rs", "gpu/adapter.rs"]), Vec::<String>::new());
}

#[test]
fn nothing_prints_below_cli_and_nothing_reads_the_environment_below_main() {
    assert_eq!(with(&["println!(", "print!(", "eprint"], &["cli/"]), Vec::<String>::new());
    assert_eq!(with(&["env::var", "var_os("], &["main.rs"]), Vec::<String>::new());
}

#[test]
fn only_gpu_names_wgpu() {
    assert_eq!(with(&["wgpu::"], &["gpu/"]), Vec::<String>::new());
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
