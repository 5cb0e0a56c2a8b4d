//! `scripts/setup.sh` where something is missing, with an `apt-get` that is none.
#![cfg(target_os = "linux")]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs the script where there are only these programs beside a few usual ones, and gives the calls of `apt-get` too.
fn setup(apt_get: &str) -> (Output, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let path = std::env::var_os("PATH").unwrap();
    let usual = |name: &str| -> PathBuf {
        std::env::split_paths(&path).map(|p| p.join(name)).find(|p| p.is_file()).expect(name)
    };
    for name in ["cat", "env", "grep", "id", "mktemp", "rm"] {
        symlink(usual(name), at(name)).unwrap();
    }
    let apt_get = format!("echo \"$@\" >> {}\n{apt_get}", at("calls").display());
    // Without `cc` something is missing; nobody waits, and no cargo is fetched.
    for (name, text) in
        [("apt-get", apt_get.as_str()), ("sudo", "exec \"$@\""), ("sleep", ""), ("cargo", ""), ("rustup", "")]
    {
        std::fs::write(at(name), format!("#!/bin/bash\n{text}\n")).unwrap();
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/setup.sh");
    let output =
        Command::new("/bin/bash").arg(script).arg("train").env("PATH", folder.path()).output().unwrap();
    let calls = std::fs::read_to_string(at("calls")).unwrap_or_default();
    (output, calls.lines().map(str::to_string).collect())
}

#[test]
fn while_another_program_holds_a_lock_of_apt_the_script_waits_and_tries_again() {
    let held = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1 (unattended-upgr)";
    let stub = format!("[ $(grep -c '' ${{0%/*}}/calls) -gt 3 ] || {{ echo '{held}' >&2; exit 100; }}");
    let (output, calls) = setup(&stub);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(calls[..4].iter().all(|call| call == "update"), "{calls:?}");
    assert!(calls.len() == 5 && calls[4].starts_with("install -y build-essential"), "{calls:?}");
    assert!(said.lines().count() == 1 && said.contains("waiting"), "{said}");
}

#[test]
fn any_other_failure_of_apt_ends_the_script_at_once_in_its_own_words() {
    let (output, calls) = setup("echo 'E: No space left' >&2; exit 100");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "E: No space left\n");
    assert_eq!(calls, ["update"]);
}
