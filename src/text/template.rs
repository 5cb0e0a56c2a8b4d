//! A chat template, compiled and run in this process: a Jinja program in an engine with the same functions as
//! transformers'.
//!
//! How long it runs, what it writes and how deep values are that it shows is bounded here. What it can still do is fill
//! the memory with values, or the stack by ways that are not seen here; that is contained by the
//! [helper process](super::helper) alone.

use std::io::{Error as IoError, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use jiff::civil::DateTime;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, State, escape_formatter};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};

use crate::error::{Error, Result, one_line};

/// Steps of the engine for one text: far above any conversation's, and the end of a template that loops.
const FUEL: u64 = 2_000_000;
/// Bytes of a template, and of what stands between two braces of it: the engine recurses along a chain of operators.
const SOURCE: usize = 1 << 20;
const TAG: usize = 32 << 10;
/// Bytes of the text of a conversation.
const OUTPUT: usize = 64 << 20;
/// Lists in lists, and values in all that are looked at to know it.
const DEPTH: usize = 128;
const VALUES: usize = 1 << 20;
/// Bytes of the stack on which the engine works.
const STACK: usize = 128 << 20;

/// A compiled template, and the tokens that it may name.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    environment: Environment<'static>,
    tokens: Vec<(&'static str, String)>,
}

impl Engine {
    /// Compiles a template. `tokens` are the texts of `bos_token`, `eos_token`, `unk_token` and `pad_token`.
    pub(super) fn new(source: &str, tokens: &[(&'static str, &str)], now: DateTime) -> Result<Engine> {
        let mistake = |words: String| Error::data(format!("the chat template has a mistake: {words}"));
        if source.len() > SOURCE {
            return Err(mistake(format!("it has {} bytes; at most {SOURCE} are read", source.len())));
        }
        let source = without_generation_tags(source).map_err(mistake)?;
        let compile = move || {
            // As transformers sets up Jinja (`apply_chat_template`).
            let mut environment = Environment::new();
            environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
            environment.set_fuel(Some(FUEL));
            environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
            environment.set_formatter(|out, state, value| {
                shallow(value)?;
                escape_formatter(out, state, value)
            });
            environment.add_filter("tojson", to_json);
            environment.add_function("raise_exception", |message: String| -> Outcome<()> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            });
            environment.add_function("strftime_now", move |format: String| date(now, &format));
            environment.add_template_owned("chat", source)?;
            Ok(environment)
        };
        let environment = on_large_stack(|| guarded(compile).map_err(mistake))?;
        let tokens = tokens.iter().map(|&(name, text)| (name, text.to_string())).collect();
        Ok(Engine { environment, tokens })
    }

    /// The text of a conversation.
    pub(super) fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        generation_prompt: bool,
    ) -> Result<String> {
        let mut context = Map::new();
        context.insert("messages".into(), messages.into());
        if !tools.is_null() {
            context.insert("tools".into(), tools.clone());
        }
        context.insert("add_generation_prompt".into(), generation_prompt.into());
        for (name, text) in &self.tokens {
            context.insert((*name).into(), text.as_str().into());
        }
        let rendered = guarded(|| {
            let mut bounded = Bounded(Vec::new());
            self.environment.get_template("chat")?.render_captured_to(Serde(context), &mut bounded)?;
            String::from_utf8(bounded.0)
                .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        rendered.map_err(|words| Error::data(format!("the chat template refuses: {words}")))
    }
}

type Outcome<T> = std::result::Result<T, minijinja::Error>;

/// Does what the engine is asked for on a stack that is large enough for the bounds above.
pub(super) fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let started = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread = started.map_err(|e| Error::failed("chat template", format!("no thread for it: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(Error::data(GIVES_UP)))
    })
}

/// What the engine says in words, also where it panics.
fn guarded<T>(work: impl FnOnce() -> Outcome<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| words(&e)),
        Err(_) => Err(GIVES_UP.into()),
    }
}

/// What is said of a template on which the engine panics.
const GIVES_UP: &str = "the template engine gives up on it";

/// A text of at most [`OUTPUT`] bytes.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT {
            return Err(IoError::other(format!("it writes more than {OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Refuses values that contain themselves or are as deep as if they did: to show one would never end.
fn shallow(value: &minijinja::Value) -> Outcome<()> {
    let refuse = |what: &str| Err(minijinja::Error::new(ErrorKind::InvalidOperation, what.to_string()));
    let (mut open, mut seen) = (vec![(value.clone(), 0)], 0);
    while let Some((value, depth)) = open.pop() {
        let nested = match value.kind() {
            ValueKind::Seq => value.try_iter()?.collect::<Vec<_>>(),
            ValueKind::Map => value.try_iter()?.filter_map(|key| value.get_item(&key).ok()).collect(),
            _ => continue,
        };
        seen += nested.len();
        match () {
            () if depth >= DEPTH => return refuse("it shows a value that is too deep, or contains itself"),
            () if seen > VALUES => return refuse("it shows a value with too many parts"),
            () => open.extend(nested.into_iter().map(|value| (value, depth + 1))),
        }
    }
    Ok(())
}

/// A moment by C's `strftime`, in words of the C locale. Conversions that there are not stay as they are written, and so do
/// those that are to be filled up to an unusual width.
fn date(now: DateTime, format: &str) -> Outcome<String> {
    let config = Config::new().custom(PosixCustom::new()).lenient(true);
    let text = BrokenDownTime::from(now).to_string_with_config(&config, format);
    text.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// An error of the template engine on one line.
fn words(error: &minijinja::Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    one_line(&format!("{}{line}", error.detail().map_or(error.kind().to_string(), String::from)), 200)
}

/// transformers marks what the assistant says by `{% generation %} ... {% endgeneration %}`. The engine here does not
/// know that tag, so it becomes a condition that always holds. Refuses tags of a length that nobody writes.
fn without_generation_tags(source: &str) -> std::result::Result<String, String> {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find('{') {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let close = match tag.as_bytes().get(1) {
            Some(b'%') => "%}",
            Some(b'{') => "}}",
            Some(b'#') => "#}",
            _ => "{",
        };
        let Some(end) = tag.find(close) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + close.len());
        if tag.len() > TAG && close != "#}" {
            return Err(format!("a tag of {} bytes; at most {TAG} are read", tag.len()));
        }
        let word = tag.trim_matches(['{', '}', '%', '-', '+']).trim();
        match word {
            "generation" if close == "%}" => out.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" if close == "%}" => out.push_str(&tag.replacen(word, "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    if rest.len() > TAG && rest.starts_with('{') {
        return Err(format!("a tag of {} bytes that does not end", rest.len()));
    }
    Ok(out + rest)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which templates for tools expect. Unlike the
/// engine's own filter it escapes nothing for HTML and puts spaces after commas and colons.
fn to_json(
    _: &State,
    value: minijinja::Value,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    // Other options of Python's function are accepted and have no effect.
    let indent: Option<usize> = options.get("indent")?;
    shallow(&value)?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(32));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
    };
    let bad = |e: String| minijinja::Error::new(ErrorKind::BadSerialization, e);
    written.map_err(|e| bad(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| bad(e.to_string()))
}

/// Python's separators: a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}
