//! What is said when a file that is read in place loses its bytes in the very moment in which they are read. Readers ask
//! before and after; between the two the system has no error to return, only a signal.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Whole, because a signal handler may not put texts together.
const LINE: &[u8] =
    b"error: a file was truncated, or could no longer be read, while it was in use; go on when nothing writes to it, or use a copy\n";

/// What happened on that signal before: the standard library tells overflowing stacks by it on some systems.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();
static SAID: AtomicBool = AtomicBool::new(false);

/// Ends the process with one line and status 1 where it would end with SIGBUS because mapped bytes are gone.
///
/// # Errors
/// [`Error::Failed`] where the system lets nobody catch the signal.
pub(super) fn explain_lost_files() -> Result<()> {
    let refused = || Error::failed("signals", std::io::Error::last_os_error().to_string());
    // SAFETY: both structures are plain data for which zeros are valid, and `explain` does only what a signal handler may.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
            return Err(refused());
        }
        let _ = BEFORE.set(before);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = explain as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        match libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(refused()),
        }
    }
}

extern "C" fn explain(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the system passes what it knows of the signal, and a handler may call all that is called here.
    unsafe {
        let code = (*info).si_code;
        if code == libc::BUS_ADRERR {
            if !SAID.swap(true, Ordering::SeqCst) {
                libc::write(2, LINE.as_ptr().cast(), LINE.len());
                libc::_exit(1);
            }
            // Another thread has met the same and is about to end all.
            loop {
                libc::pause();
            }
        }
        if code <= 0 {
            // Somebody sent it.
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
            return;
        }
        // Another fault, which comes again when this returns.
        let before = BEFORE.get().map_or(std::ptr::null(), std::ptr::from_ref);
        libc::sigaction(signal, before, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Runs one of the tests below in a process of its own.
    fn child(name: &str) -> std::process::Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = format!("cli::fault::tests::{name}");
        command.args(["--exact", &name, "--ignored", "--nocapture"]).output().unwrap()
    }

    #[test]
    #[ignore = "ends its process; the next test runs it"]
    fn lose_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 16).unwrap();
        // SAFETY: that the file is truncated is the point.
        let map = unsafe { memmap2::Mmap::map(file.as_file()) }.unwrap();
        explain_lost_files().unwrap();
        file.as_file().set_len(0).unwrap();
        // Of several threads only one may speak.
        std::thread::scope(|scope| {
            (0..4).for_each(|_| drop(scope.spawn(|| println!("{}", map[1 << 15]))));
        });
    }

    #[test]
    #[cfg_attr(not(target_os = "linux"), ignore = "other systems do not say why they send SIGBUS")]
    fn a_file_that_is_truncated_while_it_is_read_ends_the_process_with_one_line_and_status_1() {
        let output = child("lose_a_file");
        assert_eq!(output.status.code(), Some(1), "{:?}", output.status);
        assert_eq!(output.stderr, LINE);
    }

    #[test]
    #[ignore = "ends its process; the next test runs it"]
    fn be_sent_the_signal() {
        explain_lost_files().unwrap();
        // SAFETY: sends a signal to this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGBUS) };
        std::thread::sleep(std::time::Duration::from_secs(60));
    }

    #[test]
    #[cfg_attr(not(target_os = "linux"), ignore = "other systems do not say why they send SIGBUS")]
    fn a_signal_that_somebody_sends_ends_the_process_as_ever() {
        let output = child("be_sent_the_signal");
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{:?}", output.status);
    }
}
