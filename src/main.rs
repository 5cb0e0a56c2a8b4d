//! The native program: parse, run, report.

fn main() {
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
