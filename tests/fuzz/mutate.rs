//! Inputs nearly like valid ones: changes of bytes, of lines, and of what most formats have in common (words, numbers,
//! quoted texts, brackets).

use std::ops::Range;

/// Most bytes of an input.
const MOST: usize = 256 << 10;

/// Numbers at which something ends or begins.
const NUMBERS: &str = "
    0 1 -1 2 3 7 16 127 128 255 256 1000 4096 32768 65535 65536 100000 1048576 16777216 1000000000 2147483647
    2147483648 -2147483648 4294967295 4294967296 9007199254740993 9223372036854775807 -9223372036854775808
    9223372036854775808 18446744073709551615 18446744073709551616 340282366920938463463374607431768211456 0.0 -0.0
    0.5 1e-9 1e-300 1e-400 1e9 1e18 1e300 1e400 -1e308 nan inf -inf NaN null true 0x10 1_000 00 1.";
/// The beginnings of nestings, and how each ends.
const NESTS: &[(&str, &str)] = &[
    ("[", "]"),
    ("{", "}"),
    ("(", ")"),
    ("{\"a\":", "}"),
    ("[[", "]]"),
    ("a.", ""),
    ("{a=", "}"),
    ("\"", "\""),
    ("-", ""),
    ("\n", ""),
    (" ", ""),
    ("*/", ""),
    ("(?:", ")*"),
    ("\\", ""),
    ("not ", ""),
    ("1+", ""),
];
/// Bytes that are no UTF-8 or do things.
const ODD: &[&[u8]] = &[
    b"\xff",
    b"\xc3",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\0",
    b"\r\n",
    b"\x1b[2J",
    b"\xef\xbb\xbf",
    "\u{202e}".as_bytes(),
    "é".as_bytes(),
    "e\u{301}\u{301}".as_bytes(),
    "👩‍👩‍👧".as_bytes(),
    "٣".as_bytes(),
    "ß".as_bytes(),
    "\u{2028}".as_bytes(),
    b"\\u0000",
    b"\\ud800",
    b"\\n",
    b"%",
    b"\t",
];
const BYTES: &[u8] = b"\0\x01\x7f\x80\xff\n\"'{}[]\\,:=.#%/*-0 ";

/// SplitMix64.
pub struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// From 1 to 2^bits, each power of two as likely as another.
    fn count(&mut self, bits: usize) -> usize {
        let most = 1 << self.below(bits + 1);
        1 + self.below(most)
    }
}

pub struct Mutator {
    random: Random,
    numbers: Vec<&'static str>,
    words: Vec<&'static str>,
}

impl Mutator {
    /// `words` mean something in the format.
    pub fn new(seed: u64, words: &'static str) -> Mutator {
        let (numbers, words) = (NUMBERS.split_whitespace().collect(), words.split_whitespace().collect());
        Mutator { random: Random(seed), numbers, words }
    }

    /// One of the pool, changed a few times.
    pub fn mutate(&mut self, pool: &[Vec<u8>]) -> Vec<u8> {
        let mut input = self.random.pick(pool).clone();
        let changes = self.random.count(3);
        for _ in 0..changes {
            let other = self.random.below(pool.len());
            self.change(&mut input, &pool[other]);
            input.truncate(MOST);
        }
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        match self.random.below(12) {
            0 => self.change_byte(input),
            1 => self.change_range(input, other),
            2 | 3 => self.change_line(input, other),
            4 => self.nest(input),
            5 => {
                let at = self.random.below(input.len() + 1);
                let odd = *self.random.pick(ODD);
                replace(input, at..at, odd);
            }
            _ => self.change_token(input, other),
        }
    }

    fn change_byte(&mut self, input: &mut Vec<u8>) {
        let at = self.random.below(input.len());
        let bit = 1 << self.random.below(8);
        let byte = *self.random.pick(BYTES);
        match self.random.below(5) {
            0 => input.insert(at, byte),
            1 => input.truncate(at),
            2 => {
                // A number as files of bytes have it.
                let number = [0, 1, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 63, u64::MAX][self.random.below(8)];
                let width = [2, 4, 8][self.random.below(3)];
                let at = if self.random.below(2) == 0 { at.min(32) / 4 * 4 } else { at };
                let end = input.len().min(at + width);
                replace(input, at.min(end)..end, &number.to_le_bytes()[..width]);
            }
            which => {
                if let Some(place) = input.get_mut(at) {
                    *place = if which == 3 { byte } else { *place ^ bit };
                }
            }
        }
    }

    fn change_range(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        let start = self.random.below(input.len());
        let end = input.len().min(start + self.random.count(9));
        match self.random.below(4) {
            0 => replace(input, start..end, b""),
            1 => self.repeat(input, start..end),
            2 => {
                let from = self.random.below(other.len());
                input.truncate(start);
                input.extend(&other[from.min(other.len())..]);
            }
            _ => {
                let from = self.random.below(other.len());
                let to = other.len().min(from + self.random.count(9));
                replace(input, start..start, &other[from.min(to)..to]);
            }
        }
    }

    fn change_line(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        let (own, others) = (lines(input), lines(other));
        let (line, from) = (self.random.pick(&own).clone(), self.random.pick(&others).clone());
        match self.random.below(5) {
            0 => replace(input, line, b""),
            1 => self.repeat(input, line),
            2 => replace(input, line, &other[from]),
            3 => replace(input, line.start..line.start, &other[from]),
            _ => {
                let swapped = self.random.pick(&own).clone();
                let text = input[swapped].to_vec();
                replace(input, line, &text);
            }
        }
    }

    fn change_token(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        let (own, others) = (tokens(input), tokens(other));
        if own.is_empty() {
            return input.extend(self.words.first().unwrap_or(&"0").as_bytes());
        }
        let token = self.random.pick(&own).clone();
        match self.random.below(10) {
            0..=2 => {
                let numbers = own
                    .iter()
                    .filter(|token| input[token.start].is_ascii_digit() || input[token.start] == b'-');
                let numbers: Vec<_> = numbers.cloned().collect();
                let place = if numbers.is_empty() { token } else { self.random.pick(&numbers).clone() };
                let number = *self.random.pick(&self.numbers);
                replace(input, place, number.as_bytes());
            }
            3 | 4 if !self.words.is_empty() => {
                let word = *self.random.pick(&self.words);
                let inside = self.random.below(3) == 0;
                replace(input, if inside { token.start..token.start } else { token }, word.as_bytes());
            }
            5 if !others.is_empty() => {
                let from = self.random.pick(&others).clone();
                replace(input, token, &other[from]);
            }
            6 => {
                let group = group(input, token.start);
                match self.random.below(3) {
                    0 => replace(input, group, b""),
                    1 => self.repeat(input, group),
                    _ => {
                        let inside = input[group].to_vec();
                        replace(input, token, &inside);
                    }
                }
            }
            7 => {
                // Long, and still in its quotes if it is quoted.
                let quoted = input[token.start] == b'"' && token.len() > 1;
                let inside = if quoted { token.start + 1..token.end - 1 } else { token };
                let byte = *self.random.pick(b"a0 /(");
                let long = vec![byte; self.random.count(16)];
                replace(input, inside, &long);
            }
            8 => replace(input, token, b""),
            _ => {
                let text = input[self.random.pick(&own).clone()].to_vec();
                replace(input, token, &text);
            }
        }
    }

    /// Repeats a range, seldom very often.
    fn repeat(&mut self, input: &mut Vec<u8>, range: Range<usize>) {
        let most = MOST / range.len().max(1);
        let bits = if self.random.below(8) == 0 { 14 } else { 3 };
        let times = self.random.count(bits).min(most);
        let text = input[range.clone()].repeat(times);
        replace(input, range.end..range.end, &text);
    }

    /// Puts a range between many brackets.
    fn nest(&mut self, input: &mut Vec<u8>) {
        let (open, close) = *self.random.pick(NESTS);
        let bits = if self.random.below(8) == 0 { 16 } else { 8 };
        let depth = self.random.count(bits);
        let own = tokens(input);
        let token = if own.is_empty() { 0..0 } else { self.random.pick(&own).clone() };
        let inside = if self.random.below(2) == 0 { group(input, token.start) } else { token };
        let text =
            [open.repeat(depth).as_bytes(), &input[inside.clone()], close.repeat(depth).as_bytes()].concat();
        replace(input, inside, &text);
    }
}

fn replace(input: &mut Vec<u8>, range: Range<usize>, with: &[u8]) {
    input.splice(range, with.iter().copied());
}

/// The lines, each with its line feed; at least one.
fn lines(input: &[u8]) -> Vec<Range<usize>> {
    let mut start = 0;
    let ends = input.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    let lines = ends.chain([input.len()]).map(|end| std::mem::replace(&mut start, end)..end);
    lines.collect()
}

/// Quoted texts, words, numbers, and single signs.
fn tokens(input: &[u8]) -> Vec<Range<usize>> {
    let (mut tokens, mut at) = (Vec::new(), 0);
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte) || byte >= 0x80;
    while at < input.len() {
        let start = at;
        at += 1;
        if input[start] == b'"' {
            while at < input.len() && input[at] != b'"' {
                at += if input[at] == b'\\' { 2 } else { 1 };
            }
            at = input.len().min(at + 1);
        } else if is_word(input[start]) {
            while at < input.len() && is_word(input[at]) {
                at += 1;
            }
        }
        if !input[start].is_ascii_whitespace() {
            tokens.push(start..at);
        }
    }
    tokens
}

/// From the first bracket at or behind a place to the one that closes it, or to the end.
fn group(input: &[u8], from: usize) -> Range<usize> {
    let opens = |byte: &u8| b"[{(".contains(byte);
    let Some(start) = input[from..].iter().position(opens).map(|at| from + at) else {
        return from..input.len();
    };
    let mut depth = 0;
    for (at, byte) in input.iter().enumerate().skip(start) {
        match byte {
            b'[' | b'{' | b'(' => depth += 1,
            b']' | b'}' | b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return start..at + 1;
        }
    }
    start..input.len()
}
