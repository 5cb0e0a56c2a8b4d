//! Tokenizers and chat templates in a process of their own.
//!
//! Both come with a model from anywhere and are programs for engines that can be made to overflow the stack, to take all
//! the memory, to panic or never to end. None of that can be undone in the process where it happens, so the native
//! program starts itself once more for each model: the helper reads the files, answers requests on standard input with
//! one line of JSON each, and has bounded memory. Whatever happens to it is an error of the request at hand; the next
//! request starts another.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::civil::DateTime;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chat::{ChatTemplate, Rendered};
use super::hugging_face::places;
use super::{Kind, Located, Special, Tokenizer};
use crate::error::{Error, Result};

/// The first argument of a helper; then comes the tokenizer's file or folder, and the date and time that templates are to
/// see.
pub const HELPER: &str = "--text-helper";
/// Seconds for one answer. The longest request takes a fraction of one.
const SECONDS: usize = 8;
/// Looks for an answer, a second.
const LOOKS: usize = 10;
/// Bytes of memory of a helper, and how many for each byte of the tokenizer's file, whose words it keeps in tables.
const MEMORY: u64 = 768 << 20;
const MEMORY_OF_FILE: u64 = 16;
/// Bytes of an answer; no honest one is as long.
const ANSWER: u64 = 512 << 20;

/// Where tokenizers and templates run.
#[derive(Clone, Debug)]
pub enum Isolation {
    /// In this process: for models that are trusted.
    None,
    /// In a process that this program starts. It must call [`serve`] when its first argument is [`HELPER`].
    Process(PathBuf),
}

/// Opens the tokenizer in a folder, or a `tokenizer.json`, and the chat template beside it if there is one. `now` is the
/// moment that templates see.
///
/// # Errors
/// [`Error::Checkpoint`] for a file that is missing, damaged, or does harm; [`Error::Failed`] where no helper can be
/// started.
pub fn open(path: &Path, now: DateTime, isolation: &Isolation) -> Result<(Tokenizer, Option<ChatTemplate>)> {
    match isolation {
        Isolation::None => {
            let tokenizer = Tokenizer::open(path)?;
            Ok((tokenizer, ChatTemplate::open(places(path).0, now)?))
        }
        Isolation::Process(program) => {
            let arguments = [HELPER.into(), path.into(), now.to_string().into()];
            let client = Client { program: program.clone(), arguments, process: Mutex::new(None) };
            let (process, Opened { special, vocabulary, has_template }) = client.start()?;
            *client.lock() = Some(process);
            let client = Arc::new(client);
            let template = has_template.then(|| ChatTemplate::of(client.clone()));
            Ok((Tokenizer { kind: Kind::There(client), special, vocabulary }, template))
        }
    }
}

#[derive(Serialize, Deserialize)]
enum Request<'a> {
    Encode(Vec<Cow<'a, str>>),
    Locate(Cow<'a, str>),
    Decode(Vec<u32>),
    Render(Vec<Value>, Value, bool),
    RenderWithSpans(Vec<Value>, Value),
}

/// What a helper says first.
#[derive(Serialize, Deserialize)]
struct Opened {
    special: Special,
    vocabulary: usize,
    has_template: bool,
}

#[derive(Serialize, Deserialize)]
enum Refusal {
    Checkpoint(PathBuf, String),
    Data(String),
}

impl Refusal {
    fn of(error: Error) -> Refusal {
        match error {
            Error::Checkpoint { path, message } => Refusal::Checkpoint(path, message),
            Error::Data { message } => Refusal::Data(message),
            other => Refusal::Data(other.to_string()),
        }
    }

    fn error(self) -> Error {
        match self {
            Refusal::Checkpoint(path, message) => Error::checkpoint(path, message),
            Refusal::Data(message) => Error::data(message),
        }
    }
}

// --- the side that asks -----------------------------------------------------------------------------------------------

/// A model's tokenizer and template, elsewhere.
#[derive(Debug)]
pub(super) struct Client {
    program: PathBuf,
    arguments: [OsString; 3],
    /// None before the first request, and after a helper was lost.
    process: Mutex<Option<Process>>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    requests: Sender<Vec<u8>>,
    answers: Receiver<Vec<u8>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Client {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        self.ask(&Request::Encode(texts.iter().map(|&text| text.into()).collect()), "the tokenizer")
    }

    pub(super) fn locate(&self, text: &str) -> Result<Located> {
        self.ask(&Request::Locate(text.into()), "the tokenizer")
    }

    pub(super) fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.ask(&Request::Decode(tokens.to_vec()), "the tokenizer")
    }

    pub(super) fn render(&self, messages: &[Value], tools: &Value, prompt: bool) -> Result<String> {
        self.ask(&Request::Render(messages.to_vec(), tools.clone(), prompt), "the chat template")
    }

    pub(super) fn render_with_spans(&self, messages: &[Value], tools: &Value) -> Result<Rendered> {
        self.ask(&Request::RenderWithSpans(messages.to_vec(), tools.clone()), "the chat template")
    }

    fn ask<T: for<'a> Deserialize<'a>>(&self, request: &Request, who: &str) -> Result<T> {
        let mut line = serde_json::to_vec(request).map_err(|e| Error::failed("helper", e.to_string()))?;
        line.push(b'\n');
        let mut place = self.lock();
        let process = match place.take() {
            Some(process) => process,
            None => self.start()?.0,
        };
        let lost = |why: &str| Error::data(format!("{who} cannot be used on this text: {why}"));
        let _ = process.requests.send(line);
        let answer = process.answer().map_err(lost)?;
        *place = Some(process);
        read(&answer)
    }

    /// Starts a helper, and what it says of the files.
    fn start(&self) -> Result<(Process, Opened)> {
        let failed = |what: String| Error::failed("the helper for tokenizers and chat templates", what);
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // Ctrl-C is for the program itself.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().map_err(|e| failed(format!("cannot be started: {e}")))?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("has no pipes".into()));
        };
        let (requests, inbox) = mpsc::channel::<Vec<u8>>();
        let (outbox, answers) = mpsc::channel();
        let mut process = Process { child, requests, answers };
        // A pipe may block for as long as the other side likes, which is why nobody else reads or writes it. The thread
        // ends with the helper or with the last of its requests.
        let started = std::thread::Builder::new().spawn(move || {
            let mut output = BufReader::new(output);
            loop {
                let mut line = Vec::new();
                let read = std::io::Read::take(&mut output, ANSWER).read_until(b'\n', &mut line);
                if read.is_err() || line.pop() != Some(b'\n') || outbox.send(line).is_err() {
                    return;
                }
                let Ok(request) = inbox.recv() else { return };
                if input.write_all(&request).and_then(|()| input.flush()).is_err() {
                    return;
                }
            }
        });
        started.map_err(|e| failed(format!("has no thread: {e}")))?;
        let answer = process.answer().map_err(|why| {
            let (folder, file) = places(Path::new(&self.arguments[1]));
            match process.child.try_wait() {
                Ok(Some(status)) if status.code().is_some_and(|code| code != 0) => {
                    failed(format!("ends at once ({status})"))
                }
                _ if file.exists() => Error::checkpoint(file, format!("cannot be used: {why}")),
                _ => Error::checkpoint(folder, format!("cannot be used: {why}")),
            }
        })?;
        Ok((process, read(&answer)?))
    }
}

fn read<T: for<'a> Deserialize<'a>>(answer: &[u8]) -> Result<T> {
    let answer: std::result::Result<T, Refusal> =
        serde_json::from_slice(answer).map_err(|e| Error::failed("helper", e.to_string()))?;
    answer.map_err(Refusal::error)
}

impl Process {
    /// The next answer, or why there is none.
    fn answer(&self) -> std::result::Result<Vec<u8>, &'static str> {
        // Counted in looks, because time in which this process is stopped too is not the helper's.
        for _ in 0..SECONDS * LOOKS {
            match self.answers.recv_timeout(Duration::from_millis(1000 / LOOKS as u64)) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err("it recurses without end, or wants more memory than there is for it");
                }
            }
        }
        Err("it does not come to an end")
    }
}

// --- the side that answers --------------------------------------------------------------------------------------------

/// Answers requests about the tokenizer and the template at `path` until standard input ends. For `main` of a program
/// that names itself in [`Isolation::Process`].
pub fn serve(path: &Path, now: DateTime) {
    // What is caught is an answer; nobody reads more.
    std::panic::set_hook(Box::new(|_| {}));
    let file = std::fs::metadata(places(path).1).map_or(0, |found| found.len());
    bound_memory(MEMORY + MEMORY_OF_FILE * file);
    let (send, requests) = mpsc::channel::<String>();
    std::thread::spawn(move || {
        let lines = std::io::stdin().lock().lines().map_while(std::io::Result::ok);
        lines.take_while(|line| send.send(line.clone()).is_ok()).for_each(drop);
        // Whoever asked has gone: nobody waits for what is being done.
        std::process::exit(0);
    });
    let opened = answer(|| open(path, now, &Isolation::None));
    let (tokenizer, template) = match opened {
        Ok(opened) => opened,
        Err(refusal) => {
            say(&Err::<Opened, _>(refusal));
            return requests.into_iter().for_each(drop);
        }
    };
    say(&Ok::<_, Refusal>(Opened {
        special: tokenizer.special.clone(),
        vocabulary: tokenizer.vocabulary,
        has_template: template.is_some(),
    }));
    let template = template.as_ref().ok_or("there is no chat template");
    let template = || template.map_err(Error::data);
    for request in requests {
        match serde_json::from_str::<Request>(&request) {
            Err(e) => say(&Err::<(), _>(Refusal::Data(e.to_string()))),
            Ok(Request::Encode(texts)) => {
                let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
                say(&answer(|| tokenizer.encode_whole(&texts)));
            }
            Ok(Request::Locate(text)) => say(&answer(|| tokenizer.locate_whole(&text))),
            Ok(Request::Decode(tokens)) => say(&answer(|| tokenizer.decode(&tokens))),
            Ok(Request::Render(messages, tools, prompt)) => {
                say(&answer(|| template()?.render(&messages, &tools, prompt)));
            }
            Ok(Request::RenderWithSpans(messages, tools)) => {
                say(&answer(|| template()?.render_with_spans(&messages, &tools)));
            }
        }
    }
}

fn answer<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, Refusal> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(Refusal::of),
        Err(_) => Err(Refusal::Data("a part of it contradicts itself".into())),
    }
}

fn say(answer: &impl Serialize) {
    let mut line = serde_json::to_vec(answer).unwrap_or_default();
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    if out.write_all(&line).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Lets this process have no more than so many bytes; an allocation beyond ends it. On systems that do not know such a
/// bound there is none.
fn bound_memory(bytes: u64) {
    #[cfg(unix)]
    {
        let limit = libc::rlimit { rlim_cur: bytes as libc::rlim_t, rlim_max: bytes as libc::rlim_t };
        // SAFETY: the call only reads `limit`.
        unsafe {
            libc::setrlimit(libc::RLIMIT_DATA, &limit);
        }
    }
    #[cfg(not(unix))]
    let _ = bytes;
}
