//! Control tokens in text: for answers that come as text instead of token ids.
//!
//! A text may be cut anywhere. What could still become a control token's spelling is held back, so
//! the lexemes of a text do not depend on where it was cut.
//!
//! Not here: tags made of control tokens and text (`tags`).

use crate::special::Special;

/// A piece of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lexeme<'a> {
    Text(&'a str),
    Control(Special),
}

/// Finds control tokens by their spelling.
#[derive(Debug, Clone, Default)]
pub(super) struct Lexer {
    /// The beginning of some spelling: shorter than the longest.
    held: String,
}

impl Lexer {
    /// Takes more text and hands out what it settles.
    pub(super) fn push(&mut self, text: &str, mut emit: impl FnMut(Lexeme<'_>)) {
        let mut buffer = std::mem::take(&mut self.held);
        buffer.push_str(text);
        let mut text_from = 0;
        let mut at = 0;
        while let Some(found) = next_candidate(&buffer, at) {
            match spelled(&buffer[found..]) {
                Spelling::Whole(special) => {
                    if text_from < found {
                        emit(Lexeme::Text(&buffer[text_from..found]));
                    }
                    emit(Lexeme::Control(special));
                    at = found + special.text().len();
                    text_from = at;
                }
                Spelling::Begun => {
                    if text_from < found {
                        emit(Lexeme::Text(&buffer[text_from..found]));
                    }
                    self.held = buffer.split_off(found);
                    return;
                }
                Spelling::None => at = found + 1,
            }
        }
        if text_from < buffer.len() {
            emit(Lexeme::Text(&buffer[text_from..]));
        }
    }

    /// Ends the text and returns what was held back: it is text after all.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// First place at or after `from` where a spelling could begin: all begin with `<` or `｜`.
fn next_candidate(text: &str, from: usize) -> Option<usize> {
    const BAR: &[u8] = "｜".as_bytes();
    let bytes = &text.as_bytes()[from..];
    let begins = |&at: &usize| {
        bytes[at] == b'<' || (bytes[at] == BAR[0] && BAR.starts_with(prefix(&bytes[at..], 3)))
    };
    (0..bytes.len()).find(begins).map(|at| from + at)
}

fn prefix(bytes: &[u8], len: usize) -> &[u8] {
    &bytes[..len.min(bytes.len())]
}

enum Spelling {
    Whole(Special),
    /// The text ends before it can be decided.
    Begun,
    None,
}

fn spelled(text: &str) -> Spelling {
    let mut begun = false;
    for special in Special::ALL {
        if text.starts_with(special.text()) {
            return Spelling::Whole(special);
        }
        begun |= special.text().starts_with(text);
    }
    if begun { Spelling::Begun } else { Spelling::None }
}
