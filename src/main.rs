//! The native program: parse, run, report.

fn main() {
    #[cfg(target_os = "linux")]
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa complains once for every instance without it, as in a session without a desktop.
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) }
    }
    let status = polystage::cli::run();
    leave(status)
}

/// Ends the process without the drivers' own clean-up at exit, which hangs after a stall and crashes with some of them
/// while another thread still holds a device. Everything worth keeping is already on disk.
fn leave(status: u8) -> ! {
    use std::io::Write;
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    #[cfg(unix)]
    // SAFETY: _exit only ends the process.
    unsafe {
        libc::_exit(status as i32)
    }
    #[cfg(not(unix))]
    std::process::exit(status as i32)
}
