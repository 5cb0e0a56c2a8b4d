//! `polystage chat`.

use std::io::{BufRead, IsTerminal, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::{Value, json};

use super::speaking::{Speaker, speak};
use super::{Environment, leave, note, write};
use crate::error::{Error, Result};
use crate::generate::{Extent, Language};
use crate::text::chat::ChatTemplate;

/// Bytes of a line, far above what any context takes.
const LONGEST: u64 = 16 << 20;

/// What can be said to the program instead of the model.
const HELP: &str = "\
/reset   forget the conversation and begin again
/help    this list
/quit    leave, as Ctrl-D does; also /exit
Ctrl-C   end an answer; what was said of it stays in the conversation
A message that begins with / needs a space before it.";

/// Talks with a model, a line at a time.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  polystage chat SmolLM2-135M-Instruct --system \"You are brief.\"\n\nA line is a message; /help lists what else can be said. Ctrl-C ends an answer, /quit or Ctrl-D the program."
)]
pub(super) struct Arguments {
    #[command(flatten)]
    speaker: Speaker,
    /// What the model is told before the conversation.
    #[arg(long)]
    system: Option<String>,
    /// How long an answer may be, in tokens.
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    /// Tokens of the conversation that the devices keep, at most the model's context.
    #[arg(long, default_value_t = 4096)]
    context: usize,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let sampling = arguments.speaker.sampling()?;
    let language = arguments.speaker.language(environment)?;
    let Some(template) = &language.text().template else {
        return Err(language.error(
            "has no chat template (chat_template.jinja, or in tokenizer_config.json); use `polystage generate`",
        ));
    };
    if arguments.max_tokens == 0 {
        return Err(Error::config("--max-tokens", "0 leaves no room for an answer; it must be at least 1"));
    }
    let tokens = arguments.context.min(language.config().longest_sequence());
    let answer = arguments.max_tokens.min(tokens / 2);
    if answer == 0 {
        let message = format!("{tokens} tokens have no room for a question and an answer; give at least 2");
        return Err(Error::config("--context", message));
    }
    let extent = Extent { texts: 1, prompt: tokens - answer, tokens };
    let mut conversation = Conversation::new(&language, template, arguments.system.as_deref(), extent.prompt);
    let (mut generator, _) = arguments.speaker.launch(&language, extent)?;

    let interrupts = Interrupts::watch()?;
    let input = std::io::stdin();
    // A terminal shows what is typed; what comes from elsewhere is shown here, so that it reads the same.
    let ask = input.is_terminal();
    loop {
        if ask {
            write("> ")?;
        }
        let mut line = String::new();
        let read = input.lock().take(LONGEST).read_line(&mut line);
        let read =
            read.map_err(|e| Error::config("standard input", format!("cannot be read as text: {e}")))?;
        match read as u64 {
            0 => return Ok(0),
            LONGEST => {
                let message = format!("has a line of more than {LONGEST} bytes, which is no message");
                return Err(Error::config("standard input", message));
            }
            _ => {}
        }
        interrupts.heard();
        match line.trim_end() {
            text if text.trim().is_empty() => continue,
            "/quit" | "/exit" => return Ok(0),
            "/help" => {
                note(HELP);
                continue;
            }
            "/reset" => {
                conversation.reset();
                note("the conversation begins again");
                continue;
            }
            text if text.starts_with('/') => {
                let word = text.split_whitespace().next().unwrap_or_default();
                note(format!(
                    "{word} is not known; /help, /reset and /quit are (a message that begins with / needs a space before it)"
                ));
                continue;
            }
            text => conversation.add("user", text.trim()),
        }
        if !ask && !write(&format!("> {}\n", line.trim()))? {
            return Ok(0);
        }
        let Some(prompt) = conversation.fit()? else { continue };
        let mut open = true;
        interrupts.begin();
        let (said, _) =
            speak(&language, &mut generator, &[prompt], arguments.max_tokens, sampling, |_, piece| {
                open = write(piece)?;
                Ok(open && !interrupts.is_stopped())
            })?;
        let stopped = interrupts.end();
        if !open || !write("\n")? {
            return Ok(0);
        }
        if stopped {
            note("the answer was stopped");
        } else if !said[0].ended && said[0].tokens.len() < arguments.max_tokens {
            note("the context is full; the answer ends here, and the oldest turns will be left out");
        }
        conversation.add("assistant", &said[0].text);
    }
}

/// What Ctrl-C means: while an answer comes, its end; while a message is awaited, once a word about how to leave and then
/// the end of the program.
struct Interrupts(Arc<AtomicU8>);

/// A message is awaited; the same after a Ctrl-C; an answer comes; it is to end.
const AWAITED: u8 = 0;
const WARNED: u8 = 1;
const ANSWERING: u8 = 2;
const STOPPED: u8 = 3;

impl Interrupts {
    fn watch() -> Result<Interrupts> {
        let state = Arc::new(AtomicU8::new(AWAITED));
        let shared = state.clone();
        ctrlc::set_handler(move || {
            let after = |state| match state {
                AWAITED => Some(WARNED),
                ANSWERING => Some(STOPPED),
                _ => None,
            };
            match shared.fetch_update(Ordering::SeqCst, Ordering::SeqCst, after) {
                Ok(AWAITED) => note("\npress Ctrl-C again to leave, or enter a message"),
                Ok(_) => {}
                Err(_) => leave(130),
            }
        })
        .map_err(|e| Error::failed("signals", e.to_string()))?;
        Ok(Interrupts(state))
    }

    /// A message was entered.
    fn heard(&self) {
        self.0.store(AWAITED, Ordering::SeqCst);
    }

    /// An answer begins.
    fn begin(&self) {
        self.0.store(ANSWERING, Ordering::SeqCst);
    }

    fn is_stopped(&self) -> bool {
        self.0.load(Ordering::SeqCst) == STOPPED
    }

    /// An answer has ended; whether it was stopped.
    fn end(&self) -> bool {
        self.0.swap(AWAITED, Ordering::SeqCst) == STOPPED
    }
}

/// Messages, of which the oldest make room for the newest.
struct Conversation<'a> {
    language: &'a Language,
    template: &'a ChatTemplate,
    messages: Vec<Value>,
    /// How many of the first messages stay: that of the system.
    fixed: usize,
    /// Tokens that a prompt may have.
    room: usize,
}

impl<'a> Conversation<'a> {
    fn new(
        language: &'a Language,
        template: &'a ChatTemplate,
        system: Option<&str>,
        room: usize,
    ) -> Conversation<'a> {
        let messages: Vec<Value> =
            system.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
        Conversation { language, template, fixed: messages.len(), messages, room }
    }

    fn add(&mut self, role: &str, content: &str) {
        self.messages.push(json!({"role": role, "content": content}));
    }

    fn reset(&mut self) {
        self.messages.truncate(self.fixed);
    }

    fn render(&self, messages: &[Value]) -> Result<Vec<u32>> {
        let text = self.template.render(messages, &Value::Null, true)?;
        self.language.tokenizer().encode(&text, false)
    }

    /// The tokens up to where the next answer begins, once the oldest turns are gone that leave too little room. None,
    /// and a word about it, for a message that is too long by itself; it is forgotten.
    fn fit(&mut self) -> Result<Option<Vec<u32>>> {
        let Some(last) = self.messages.last() else { return Ok(None) };
        let alone = self.render(&[&self.messages[..self.fixed], std::slice::from_ref(last)].concat())?;
        if alone.len() > self.room {
            let (len, room) = (alone.len(), self.room);
            note(format!("this message makes {len} tokens, and there is room for {room}; it is left out"));
            self.messages.pop();
            return Ok(None);
        }
        let before = self.messages.len();
        loop {
            let tokens = self.render(&self.messages)?;
            if tokens.len() <= self.room {
                let left_out = before - self.messages.len();
                if left_out > 0 {
                    note(format!(
                        "the context is full; the oldest {left_out} messages are left out from here"
                    ));
                }
                return Ok(Some(tokens));
            }
            // A question and its answer.
            self.messages.drain(self.fixed..self.fixed + 2);
        }
    }
}
