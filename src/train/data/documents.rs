//! Text files and records as tokens.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::corpus::{Part, map};
use super::records::{Partial, Record};
use super::{BadLines, Corpus, RecordFormat, bin, paths};
use crate::error::{Error, Result};
use crate::text::Tokenizer;
use crate::text::chat::{ChatTemplate, Rendered};

/// Bytes of a file of records after which what was read is let go of.
const PIECE: usize = 32 << 10;
/// Bytes of texts that are tokenised together, on all cores.
const TOGETHER: usize = 512 << 10;
/// Bytes of tokens in one part: parts do not grow, so tokens take no more memory than they need.
const PART: usize = 1 << 20;
/// Lines that were skipped and are described.
const DESCRIBED: usize = 10;

/// How files become tokens.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// For everything but files of tokens.
    pub tokenizer: &'a Tokenizer,
    /// For records of messages.
    pub template: Option<&'a ChatTemplate>,
    /// How records are written.
    pub format: &'a RecordFormat,
    /// Whether a file of text ends in the token that says so. Records always do.
    pub ends: bool,
}

impl Reader<'_> {
    /// Reads the files that `patterns` name, as [`Corpus::open`] finds them. By its name a file is
    ///
    /// - `.jsonl`, `.ndjson`: records, one JSON object a line, with `text`; `prompt` and `completion`, of which the
    ///   completion counts; `messages`, or `conversations` in ShareGPT's form, of which the assistant's answers count; or
    ///   `instruction`, `input` and `output` (Alpaca), of which the output counts,
    /// - `.bin`: tokens in llm.c's layout,
    /// - anything else: text, one document a file.
    ///
    /// After each record comes the token that ends a text, after each file of text if `ends` says so. Text of bytes is the
    /// exception: its files follow each other as they are, mapped and not copied.
    ///
    /// # Errors
    /// [`Error::Data`] as [`Corpus::open`] says, for text that is not UTF-8, for a line that is no record (with the
    /// file and the number of the line), and for a damaged file of tokens.
    pub fn open(&self, patterns: &[String], bases: &[PathBuf]) -> Result<Corpus> {
        let mut corpus = Corpus::empty();
        corpus.padding = self.tokenizer.eos().unwrap_or(0);
        let largest = self.tokenizer.vocabulary() as u32 - 1;
        let (bytes, trained) = (Vec::new(), Vec::new());
        let mut builder =
            Builder { corpus, bytes, trained, records: false, masked: false, width: self.width(), largest };
        for path in paths::find(patterns, bases)? {
            let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
            match extension.as_str() {
                "jsonl" | "ndjson" => self.records(&mut builder, &path)?,
                "bin" => builder.whole(|corpus| bin::append(corpus, &path))?,
                _ if self.tokenizer.is_bytes() => {
                    let file = map(&path)?;
                    builder.whole(|corpus| {
                        corpus.push(Part::new(file, 0, 1), 255);
                        Ok(())
                    })?;
                }
                _ => self.text(&mut builder, &path)?,
            }
        }
        builder.finish().or_no_text(patterns)
    }

    /// Bytes of a stored token.
    fn width(&self) -> usize {
        match self.tokenizer.vocabulary() {
            0..=0x100 => 1,
            0x101..=0x1_0000 => 2,
            _ => 4,
        }
    }

    // --- text -------------------------------------------------------------------------------------------------------------

    fn text(&self, builder: &mut Builder, path: &Path) -> Result<()> {
        let file = map(path)?;
        if file.is_empty() {
            return Ok(());
        }
        builder.begin();
        builder.push(self.tokenizer.start(), true);
        let encoded = self.tokenizer.encode_pieces(&file, |piece, tokens| {
            file.unchanged()?;
            builder.push(tokens, true);
            file.release(piece);
            Ok(())
        });
        encoded.map_err(|error| match error {
            Error::Data { message } => Error::data(format!("{}: {message}", path.display())),
            other => other,
        })?;
        builder.push(self.tokenizer.eos().filter(|_| self.ends).as_slice(), true);
        Ok(())
    }

    // --- records ----------------------------------------------------------------------------------------------------------

    fn records(&self, builder: &mut Builder, path: &Path) -> Result<()> {
        let file = map(path)?;
        builder.records = true;
        // Texts that wait to be tokenised together, on all cores.
        let mut texts: Vec<String> = Vec::new();
        let mut waiting = 0;
        let mut at = 0;
        for (number, line) in file.split(|&byte| byte == b'\n').enumerate() {
            let start = at;
            at += line.len() + 1;
            if at / PIECE > start / PIECE {
                file.unchanged()?;
                file.release(start - start % PIECE..at.min(file.len()));
            }
            let line = if number == 0 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
            if line.trim_ascii().is_empty() {
                continue;
            }
            let problem = match Record::parse(line, self.format) {
                Ok(Record::Text(text)) => {
                    waiting += text.len();
                    texts.push(text);
                    if waiting > TOGETHER {
                        self.flush(builder, &mut texts)?;
                        waiting = 0;
                    }
                    continue;
                }
                Ok(Record::Partial(record)) => {
                    self.flush(builder, &mut texts)?;
                    waiting = 0;
                    match self.partial(&record) {
                        Ok(document) => {
                            builder.document(&document);
                            continue;
                        }
                        Err(Error::Data { message }) => message,
                        Err(other) => return Err(other),
                    }
                }
                Err(problem) => problem,
            };
            let described = format!("{} line {}: {problem}", path.display(), number + 1);
            if self.format.bad_lines == BadLines::Refuse {
                let help =
                    "correct it, or leave such lines out: data.bad_lines = \"skip\" (--skip-bad-lines)";
                return Err(Error::data(format!("{described}; {help}")));
            }
            let skipped = &mut builder.corpus.skipped;
            skipped.count += 1;
            if skipped.first.len() < DESCRIBED {
                skipped.first.push(described);
            }
        }
        file.unchanged()?;
        self.flush(builder, &mut texts)
    }

    /// Tokenises the texts that wait.
    fn flush(&self, builder: &mut Builder, texts: &mut Vec<String>) -> Result<()> {
        let slices: Vec<&str> = texts.iter().map(String::as_str).collect();
        for tokens in self.tokenizer.encode_all(&slices)? {
            builder.begin();
            builder.push(self.tokenizer.start(), true);
            builder.push(&tokens, true);
            builder.push(self.tokenizer.eos().as_slice(), true);
        }
        texts.clear();
        Ok(())
    }

    /// The tokens of a record of which only parts count, and for each whether it does.
    fn partial(&self, record: &Partial) -> Result<Vec<(u32, bool)>> {
        let mut document = Vec::new();
        let rendered = match record {
            Partial::Messages { messages, tools } => Some(self.render(messages, tools)?),
            Partial::Instruction { system, instruction, input, output } if self.template.is_some() => {
                let asked = [Some(instruction), input.as_ref()].into_iter().flatten().cloned();
                let asked = asked.collect::<Vec<_>>().join("\n\n");
                let system = system.iter().map(|text| json!({"role": "system", "content": text}));
                let turns = [
                    json!({"role": "user", "content": asked}),
                    json!({"role": "assistant", "content": output}),
                ];
                Some(self.render(&system.chain(turns).collect::<Vec<_>>(), &Value::Null)?)
            }
            _ => None,
        };
        let is_conversation = rendered.is_some();
        let (text, spans) = match (rendered, record) {
            (Some(rendered), _) => (rendered.text, rendered.spans),
            (None, record) => {
                document.extend(self.tokenizer.start().iter().map(|&token| (token, false)));
                let (prompt, completion) = record.halves();
                let text = format!("{prompt}{completion}");
                let span = prompt.len()..text.len();
                (text, vec![span])
            }
        };
        let (tokens, ends) = self.tokenizer.locate(&text)?;
        let counts = |end: usize| spans.iter().any(|span| span.start < end && end <= span.end);
        document.extend(tokens.iter().zip(ends).map(|(&token, end)| (token, counts(end))));
        // Templates end an answer with a mark of their own, often followed by a line feed.
        let marked =
            is_conversation && document.iter().rev().take(3).any(|&(token, _)| self.tokenizer.ends(token));
        let last = document.last().copied();
        if let Some(eos) = self.tokenizer.eos()
            && !marked
            && last.is_some_and(|(token, _)| token != eos)
        {
            document.push((eos, true));
        }
        Ok(document)
    }

    fn render(&self, messages: &[Value], tools: &Value) -> Result<Rendered> {
        let Some(template) = self.template else {
            let message = "has messages, and the model has no chat template (chat_template.jinja or chat_template in tokenizer_config.json)";
            return Err(Error::data(message));
        };
        template.render_with_spans(messages, tools)
    }
}

/// Collects documents.
struct Builder {
    corpus: Corpus,
    /// Tokens that are not in the corpus yet, `width` bytes each.
    bytes: Vec<u8>,
    /// The tokens that count, ascending and apart.
    trained: Vec<Range<usize>>,
    /// Whether there is a file of records.
    records: bool,
    /// Whether there is a document of which only parts count.
    masked: bool,
    width: usize,
    /// The largest token there can be.
    largest: u32,
}

impl Builder {
    /// Tokens so far.
    fn len(&self) -> usize {
        self.corpus.len() + self.bytes.len() / self.width
    }

    fn begin(&mut self) {
        self.corpus.documents.push(self.len());
    }

    fn push(&mut self, tokens: &[u32], trained: bool) {
        for token in tokens {
            if self.bytes.len() >= PART {
                self.flush();
            }
            if self.bytes.is_empty() {
                self.bytes.reserve_exact(PART);
            }
            self.bytes.extend(&token.to_le_bytes()[..self.width]);
        }
        self.count(tokens.len(), trained);
    }

    /// Says of the last tokens whether they count.
    fn count(&mut self, tokens: usize, trained: bool) {
        let range = self.len() - tokens..self.len();
        if !trained || range.is_empty() {
            return;
        }
        match self.trained.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.trained.push(range),
        }
    }

    /// Appends a document of which only parts count.
    fn document(&mut self, tokens: &[(u32, bool)]) {
        self.masked = true;
        self.begin();
        for run in tokens.chunk_by(|a, b| a.1 == b.1) {
            let ids: Vec<u32> = run.iter().map(|&(token, _)| token).collect();
            self.push(&ids, run[0].1);
        }
    }

    fn flush(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.shrink_to_fit();
        self.corpus.push(Part::new(bytes, 0, self.width), self.largest);
    }

    /// Appends a document that is used as it is in its file.
    fn whole(&mut self, append: impl FnOnce(&mut Corpus) -> Result<()>) -> Result<()> {
        self.flush();
        self.begin();
        let before = self.len();
        append(&mut self.corpus)?;
        if self.len() == before {
            self.corpus.documents.pop();
        }
        self.count(self.len() - before, true);
        Ok(())
    }

    fn finish(mut self) -> Corpus {
        self.flush();
        if self.masked {
            self.corpus.train_only(self.trained);
        }
        if !self.records {
            self.corpus.documents = Vec::new();
        }
        self.corpus
    }
}
