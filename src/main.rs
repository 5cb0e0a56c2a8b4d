//! The native program: parse, run, report. The only place that reads the environment.

use std::env::{var, var_os};
use std::path::PathBuf;

use polystage::cli::{Environment, leave, run};

fn main() {
    #[cfg(target_os = "linux")]
    if var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa complains once for every instance without it, as in a session without a desktop.
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) }
    }
    let folder = |name: &str, below: &str| var_os(name).map(|folder| PathBuf::from(folder).join(below));
    let cache = folder("POLYSTAGE_CACHE", "")
        .or_else(|| folder("XDG_CACHE_HOME", "polystage"))
        .or_else(|| folder("LOCALAPPDATA", "polystage"))
        .or_else(|| folder("HOME", ".cache/polystage"));
    let drivers = ["LP_NUM_THREADS", "MESA_VK_DEVICE_SELECT"]
        .map(|name| format!("{name}={}", var(name).unwrap_or_default()))
        .join(" ");
    // https://no-color.org
    let plain = var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    leave(run(&Environment { cache, drivers, plain }))
}
