//! DeepSeek's pre-tokenizer, by hand: text to the pieces that byte pairs are merged in.
//!
//! The tokenizer file states it as three regular expressions, applied one after the other: digits
//! in groups of up to three, runs of Chinese and kana, and one long alternative of words,
//! punctuation and spaces. A general regular expression engine spends most of a long prompt's
//! tokenisation there, and gives up on a million spaces in a row; this is one pass with one table
//! look-up per character.
//!
//! Tests compare it with the engine on random text.
//!
//! Not here: merging (`bpe`).

use std::sync::LazyLock;

/// The three expressions, as the file of the release spells them.
pub(super) const PATTERNS: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// What the expressions ask about a character.
#[derive(Clone, Copy)]
struct Class(u8);

impl Class {
    /// `\p{L}` or `\p{M}`.
    const WORD: u8 = 1;
    /// `\p{L}`, `\p{P}` or `\p{S}`: cannot stand before a word.
    const NO_PREFIX: u8 = 1 << 1;
    /// `\p{P}` or `\p{S}`.
    const PUNCTUATION: u8 = 1 << 2;
    /// `\p{N}`.
    const NUMBER: u8 = 1 << 3;
    /// `\s`.
    const SPACE: u8 = 1 << 4;
    /// `\r` or `\n`.
    const NEWLINE: u8 = 1 << 5;
    /// In the second expression's ranges.
    const CJK: u8 = 1 << 6;
    /// `[A-Za-z]`.
    const LATIN: u8 = 1 << 7;

    fn is(self, any: u8) -> bool {
        self.0 & any != 0
    }
}

/// Classes by code point: blocks of 256, equal ones stored once.
struct ClassTable {
    /// Those of ASCII, which most text is.
    ascii: [u8; 128],
    block_of: Vec<u16>,
    blocks: Vec<[u8; 256]>,
}

static TABLE: LazyLock<ClassTable> = LazyLock::new(ClassTable::new);

impl ClassTable {
    fn new() -> Self {
        let mut flat = vec![0u8; 0x11_0000];
        for (pattern, class) in [
            (r"[\p{L}\p{M}]", Class::WORD),
            (r"[\p{L}\p{P}\p{S}\r\n]", Class::NO_PREFIX),
            (r"[\p{P}\p{S}]", Class::PUNCTUATION),
            (r"\p{N}", Class::NUMBER),
            (r"\s", Class::SPACE),
            (r"[\r\n]", Class::NEWLINE),
            ("[一-龥぀-ゟ゠-ヿ]", Class::CJK),
            ("[A-Za-z]", Class::LATIN),
        ] {
            let class_set = regex_syntax::parse(pattern).expect("these classes are well formed");
            let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set)) =
                class_set.into_kind()
            else {
                unreachable!("each of these patterns is one character class");
            };
            for range in set.ranges() {
                for byte in &mut flat[range.start() as usize..=range.end() as usize] {
                    *byte |= class;
                }
            }
        }
        let ascii = *flat.first_chunk().expect("the table covers all of Unicode");
        let mut table = Self { ascii, block_of: Vec::new(), blocks: Vec::new() };
        let (blocks, _) = flat.as_chunks::<256>();
        for block in blocks {
            let known = table.blocks.iter().position(|other| other == block);
            let index = known.unwrap_or_else(|| {
                table.blocks.push(*block);
                table.blocks.len() - 1
            });
            table.block_of.push(u16::try_from(index).expect("there are 4,352 blocks"));
        }
        table
    }

    fn class(&self, character: char) -> Class {
        let code = character as usize;
        match self.ascii.get(code) {
            Some(&class) => Class(class),
            None => Class(self.blocks[usize::from(self.block_of[code >> 8])][code & 0xff]),
        }
    }

    /// Length in bytes of the characters that `text` begins with and `belongs` holds for.
    fn run_len(&self, text: &str, belongs: impl Fn(Class) -> bool) -> usize {
        let mut at = 0;
        while let Some(&byte) = text.as_bytes().get(at) {
            match self.ascii.get(usize::from(byte)) {
                Some(&class) if belongs(Class(class)) => at += 1,
                Some(_) => break,
                None => match text[at..].chars().next() {
                    Some(character) if belongs(self.class(character)) => {
                        at += character.len_utf8();
                    }
                    _ => break,
                },
            }
        }
        at
    }

    /// The third expression, on text that the first two left in one piece.
    fn split_run<'a>(&self, run: &'a str, emit: &mut impl FnMut(&'a str)) {
        let mut unmatched_from = 0;
        let mut at = 0;
        while at < run.len() {
            let rest = &run[at..];
            let len = self.match_len(rest);
            if len == 0 {
                // What nothing matches is a piece of its own, up to the next match.
                at += rest.chars().next().map_or(1, char::len_utf8);
                continue;
            }
            if unmatched_from < at {
                emit(&run[unmatched_from..at]);
            }
            emit(&run[at..at + len]);
            at += len;
            unmatched_from = at;
        }
        if unmatched_from < run.len() {
            emit(&run[unmatched_from..]);
        }
    }

    /// Length of the match at the beginning of `text`, 0 if there is none. `text` is not empty.
    fn match_len(&self, text: &str) -> usize {
        let mut characters = text.chars();
        let Some(first) = characters.next() else { return 0 };
        let class = self.class(first);
        let after_first = &text[first.len_utf8()..];
        let second = characters.next().map_or(Class(0), |second| self.class(second));

        // [!-~ punctuation][A-Za-z]+
        if first.is_ascii() && class.is(Class::PUNCTUATION) && second.is(Class::LATIN) {
            return 1 + self.run_len(after_first, |class| class.is(Class::LATIN));
        }
        // [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+
        if class.is(Class::WORD) || (!class.is(Class::NO_PREFIX) && second.is(Class::WORD)) {
            return first.len_utf8() + self.run_len(after_first, |class| class.is(Class::WORD));
        }
        // ` ?[\p{P}\p{S}]+[\r\n]*`
        if class.is(Class::PUNCTUATION) || (first == ' ' && second.is(Class::PUNCTUATION)) {
            let marks = self.run_len(after_first, |class| class.is(Class::PUNCTUATION));
            let len = first.len_utf8() + marks;
            return len + self.run_len(&text[len..], |class| class.is(Class::NEWLINE));
        }
        if !class.is(Class::SPACE) {
            return 0;
        }
        let spaces = &text[..self.run_len(text, |class| class.is(Class::SPACE))];
        // \s*[\r\n]+
        if let Some(last) = spaces.rfind(['\r', '\n']) {
            return last + 1;
        }
        // \s+(?!\S)|\s+
        if spaces.len() == text.len() {
            return spaces.len();
        }
        let last = spaces.chars().next_back().map_or(0, char::len_utf8);
        if last < spaces.len() { spaces.len() - last } else { spaces.len() }
    }
}

/// Calls `emit` with the pieces of `text`, in order; they concatenate to it.
pub(super) fn split<'a>(text: &'a str, mut emit: impl FnMut(&'a str)) {
    let table = &*TABLE;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let kind = table.class(first).0 & (Class::NUMBER | Class::CJK);
        let is_kind = |class: Class| class.0 & (Class::NUMBER | Class::CJK) == kind;
        if kind == Class::NUMBER {
            // No other expression has anything to say about digits.
            let len: usize = rest
                .chars()
                .take(3)
                .take_while(|&character| is_kind(table.class(character)))
                .map(char::len_utf8)
                .sum();
            let (piece, after) = rest.split_at(len);
            emit(piece);
            rest = after;
        } else {
            let (run, after) = rest.split_at(table.run_len(rest, is_kind));
            table.split_run(run, &mut emit);
            rest = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<&str> {
        let mut pieces = Vec::new();
        split(text, |piece| pieces.push(piece));
        pieces
    }

    #[test]
    fn words_take_one_space_and_spaces_leave_it() {
        assert_eq!(pieces("a  bc   d"), ["a", " ", " bc", "  ", " d"]);
        assert_eq!(pieces("don't $x"), ["don", "'t", " $", "x"]);
        assert_eq!(pieces("a \n\n  b "), ["a", " \n\n", " ", " b", " "]);
    }

    #[test]
    fn digits_come_in_threes_and_take_no_space() {
        assert_eq!(pieces("x 12345"), ["x", " ", "123", "45"]);
    }

    #[test]
    fn a_million_spaces_are_one_piece() {
        let spaces = " ".repeat(1_000_000);
        assert_eq!(pieces(&spaces), [spaces.as_str()]);
    }
}
