//! Token ids to text, one token at a time: whole characters only.
//!
//! A token may hold part of a character. Its bytes are kept until the character is complete, so
//! that what has been handed out is valid UTF-8 and never changes. The concatenation of all pieces
//! equals [`Tokenizer::decode`] (or [`Tokenizer::decode_skip_special`]) of all ids.
//!
//! Not here: what the text means (`parse`).

use fathom_core::TokenId;

use crate::tokenizer::Tokenizer;

/// Turns one sequence's tokens into text as they come.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    keep_special: bool,
    bytes: Utf8Assembler,
}

impl Detokenizer {
    /// With `keep_special`, tokens marked special in `tokenizer.json` appear in the text.
    pub fn new(tokenizer: &Tokenizer, keep_special: bool) -> Self {
        Self { tokenizer: tokenizer.clone(), keep_special, bytes: Utf8Assembler::default() }
    }

    /// The tokenizer whose ids this understands.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Text that this token completes; empty while a character is unfinished. An id that the
    /// tokenizer does not define adds nothing.
    pub fn push(&mut self, id: TokenId) -> String {
        let mut text = String::new();
        if !self.keep_special && self.tokenizer.is_skipped(id) {
            return text;
        }
        if let Some(bytes) = self.tokenizer.token_bytes(id) {
            self.bytes.push(bytes, &mut text);
        }
        text
    }

    /// Ends the text: an unfinished character becomes U+FFFD. The detokeniser can be used again.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.bytes.finish(&mut text);
        text
    }
}

/// Bytes to whole characters. Invalid bytes become U+FFFD exactly where `from_utf8_lossy` puts it.
#[derive(Debug, Clone, Default)]
struct Utf8Assembler {
    /// A valid beginning of one character: at most 3 bytes.
    incomplete: Vec<u8>,
}

impl Utf8Assembler {
    fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.incomplete.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            out.push_str(text);
            return;
        }
        self.incomplete.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.incomplete);
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    return;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(valid).expect("valid_up_to bounds it"));
                    let Some(n_bad) = error.error_len() else {
                        self.incomplete.extend_from_slice(after);
                        return;
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[n_bad..];
                }
            }
        }
    }

    fn finish(&mut self, out: &mut String) {
        if !self.incomplete.is_empty() {
            self.incomplete.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}
