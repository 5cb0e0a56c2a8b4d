//! The native program: parse, run, report. The only place that reads the environment.

use std::env::{args_os, current_exe, var, var_os};
use std::path::PathBuf;

use polystage::cli::{Environment, leave, run};
use polystage::text::Isolation;
use polystage::text::helper::{HELPER, serve};

fn main() {
    let mut arguments = args_os().skip(1);
    if arguments.next().is_some_and(|first| first == HELPER) {
        let (path, now) = (arguments.next().unwrap_or_default(), arguments.next().unwrap_or_default());
        return serve(&PathBuf::from(path), now.to_string_lossy().parse().unwrap_or_default());
    }
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
    // The name stays good when the file is replaced while the program runs.
    let own = PathBuf::from("/proc/self/exe");
    let own = if own.exists() { Some(own) } else { current_exe().ok() };
    let isolation = own.map_or(Isolation::None, Isolation::Process);
    leave(run(&Environment { cache, drivers, plain, isolation }))
}
