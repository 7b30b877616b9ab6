//! Tool-call tags: the control token `｜DSML｜` with the text around it.
//!
//! A tag is `<` or `</`, the control token, a name, attributes and `>`. The model writes them
//! well formed when it is constrained to; unconstrained it may not, so every deviation has a
//! defined reading, and none lets a piece of a tag pass as text:
//!
//! - an opener or closer may lack its `>`; the missing `<` of a known name is forgiven;
//! - attributes end at `>`; an attribute list that goes wrong is swallowed up to there;
//! - an unknown name is swallowed with its `>` if that follows on the same line.
//!
//! The reading of a tag depends only on the text, not on where it was cut, because nothing is
//! decided before it must be.
//!
//! Not here: what tags mean where they stand (`answer`).

use super::lex::Lexeme;
use crate::special::Special;

/// An attribute list longer than this is no tag. Names have at most 64 characters.
const MAX_HEADER_BYTES: usize = 1024;
/// No known tag name is longer.
const MAX_NAME_BYTES: usize = 32;
/// An unknown tag is swallowed up to a `>` no further than this.
const MAX_UNKNOWN_BYTES: usize = 256;

/// A piece of an answer, tags recognised.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    /// Any control token but the marker of tags.
    Control(Special),
    Tag(Tag),
}

/// A tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) closes: bool,
    pub(super) kind: TagKind,
    /// The tag as written, for places where it is text after all.
    pub(super) raw: String,
    /// Tokens before the one that made it a tag.
    pub(super) token: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TagKind {
    Block,
    /// `self_closing` (`/>`) means a call without arguments.
    Invoke {
        name: String,
        self_closing: bool,
    },
    /// `string` is the attribute of that name; anything but `true` and `false` counts as missing.
    Parameter {
        name: String,
        string: Option<bool>,
        self_closing: bool,
    },
    /// A call or parameter whose attributes make no sense.
    Malformed,
    /// No tag of ours, or the bare marker.
    Unknown,
    /// The answer ends within the tag.
    Cut,
}

/// Assembles tags.
#[derive(Debug, Clone, Default)]
pub(super) struct Tagger {
    /// `<` or `</` at the end of the text so far: it may belong to a tag.
    angle: &'static str,
    header: Option<Header>,
}

#[derive(Debug, Clone)]
struct Header {
    /// What stood directly before the marker: nothing, `<` or `</`.
    lead: &'static str,
    text: String,
    token: u32,
}

impl Tagger {
    /// Takes a lexeme, whose token is the `token`-th, and hands out what it settles.
    pub(super) fn push(&mut self, lexeme: Lexeme<'_>, token: u32, mut emit: impl FnMut(Piece<'_>)) {
        match lexeme {
            Lexeme::Text(text) => self.push_text(text, &mut emit),
            Lexeme::Control(Special::Dsml) => {
                if let Some(header) = self.header.take() {
                    self.angle = trailing_angle(&header.text);
                    emit(Piece::Tag(header.into_interrupted(self.angle)));
                }
                let lead = std::mem::take(&mut self.angle);
                self.header = Some(Header { lead, text: String::new(), token });
            }
            Lexeme::Control(special) => {
                if let Some(header) = self.header.take() {
                    let tag = header.into_interrupted("");
                    let ends = special == Special::Eos;
                    emit(Piece::Tag(if ends { Tag { kind: TagKind::Cut, ..tag } } else { tag }));
                }
                self.release_angle(&mut emit);
                emit(Piece::Control(special));
            }
        }
    }

    /// Whether a tag could begin with `text`, whose marker is not complete.
    pub(super) fn could_begin_tag(&self, text: &str) -> bool {
        let begun = format!("{}{text}", self.angle);
        let marker = Special::Dsml.text();
        self.header.is_none()
            && ["<", "</"].iter().any(|lead| format!("{lead}{marker}").starts_with(&begun))
    }

    /// Ends the answer.
    pub(super) fn finish(&mut self, mut emit: impl FnMut(Piece<'_>)) {
        if let Some(header) = self.header.take() {
            emit(Piece::Tag(Tag { kind: TagKind::Cut, ..header.into_interrupted("") }));
        }
        self.release_angle(&mut emit);
    }

    fn push_text(&mut self, text: &str, emit: &mut impl FnMut(Piece<'_>)) {
        let Some(header) = &mut self.header else {
            self.push_plain(text, emit);
            return;
        };
        header.text.push_str(text);
        let Some((used, kind)) = header.scan() else { return };
        let header = self.header.take().expect("it was scanned just now");
        let rest = header.text[used..].to_owned();
        emit(Piece::Tag(header.into_tag(used, kind)));
        self.push_plain(&rest, emit);
    }

    fn push_plain(&mut self, text: &str, emit: &mut impl FnMut(Piece<'_>)) {
        if text.is_empty() {
            return;
        }
        // `<` may be waiting for the `/` of `</`.
        let joined;
        let text = if self.angle.is_empty() {
            text
        } else {
            joined = format!("{}{text}", self.angle);
            &joined
        };
        self.angle = trailing_angle(text);
        let settled = &text[..text.len() - self.angle.len()];
        if !settled.is_empty() {
            emit(Piece::Text(settled));
        }
    }

    fn release_angle(&mut self, emit: &mut impl FnMut(Piece<'_>)) {
        let angle = std::mem::take(&mut self.angle);
        if !angle.is_empty() {
            emit(Piece::Text(angle));
        }
    }
}

fn trailing_angle(text: &str) -> &'static str {
    if text.ends_with("</") {
        "</"
    } else if text.ends_with('<') {
        "<"
    } else {
        ""
    }
}

impl Header {
    /// A tag whose text ends before the tag does; `next` at its end belongs to what follows.
    fn into_interrupted(self, next: &str) -> Tag {
        let used = self.text.len() - next.len();
        // The text was scanned when it came, so nothing but an unfinished tag is left.
        let kind = match scan_end(&self.text[..used], self.closes()) {
            Some(kind) => kind,
            None => TagKind::Malformed,
        };
        self.into_tag(used, kind)
    }

    fn into_tag(self, used: usize, kind: TagKind) -> Tag {
        let raw = format!("{}{}{}", self.lead, Special::Dsml.text(), &self.text[..used]);
        Tag { closes: self.closes(), kind, raw, token: self.token }
    }

    fn closes(&self) -> bool {
        self.lead == "</"
    }

    /// How much of the text belongs to the tag and what it is; `None` while more is needed.
    fn scan(&self) -> Option<(usize, TagKind)> {
        // Only this much is ever looked at, so that the outcome does not depend on how much of
        // the text came at once.
        let limit = self.text.floor_char_boundary(MAX_HEADER_BYTES);
        match scan(&self.text[..limit], self.lead) {
            Scan::Tag(used, kind) => Some((used, kind)),
            Scan::More if self.text.len() < MAX_HEADER_BYTES => None,
            Scan::More => {
                let used = self.text[..limit].find('\n').unwrap_or(limit);
                Some((used, TagKind::Malformed))
            }
        }
    }
}

enum Scan {
    Tag(usize, TagKind),
    More,
}

fn name_len(text: &str) -> usize {
    text.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count()
}

fn is_block(name: &str) -> bool {
    matches!(name, "tool_calls" | "toolcalls" | "tool")
}

/// Reads what follows the marker.
fn scan(text: &str, lead: &str) -> Scan {
    let len = name_len(text);
    if len == text.len() && len <= MAX_NAME_BYTES {
        return Scan::More;
    }
    let name = &text[..len];
    let rest = &text[len..];
    let kind = match name {
        _ if is_block(name) => TagKind::Block,
        "invoke" | "parameter" if lead != "</" => return scan_attributes(name, text),
        "invoke" => TagKind::Invoke { name: String::new(), self_closing: false },
        "parameter" => {
            TagKind::Parameter { name: String::new(), string: None, self_closing: false }
        }
        _ => return scan_unknown(name, rest, lead),
    };
    let after = rest.trim_start_matches([' ', '\t']);
    if after.is_empty() {
        return Scan::More;
    }
    let used = if after.starts_with('>') { text.len() - after.len() + 1 } else { len };
    Scan::Tag(used, kind)
}

/// What a tag is if the text ends here without settling it.
fn scan_end(text: &str, closes: bool) -> Option<TagKind> {
    let name = text.trim_end_matches([' ', '\t']);
    match name {
        _ if is_block(name) => Some(TagKind::Block),
        "invoke" if closes => Some(TagKind::Invoke { name: String::new(), self_closing: false }),
        "parameter" if closes => {
            Some(TagKind::Parameter { name: String::new(), string: None, self_closing: false })
        }
        _ => None,
    }
}

fn scan_unknown(name: &str, rest: &str, lead: &str) -> Scan {
    if lead.is_empty() || name.is_empty() {
        // The marker alone, perhaps in an answer about it.
        return Scan::Tag(0, TagKind::Unknown);
    }
    let window = &rest[..rest.floor_char_boundary(MAX_UNKNOWN_BYTES)];
    match window.find(['>', '<', '\n']) {
        Some(at) if window.as_bytes()[at] == b'>' => {
            Scan::Tag(name.len() + at + 1, TagKind::Unknown)
        }
        None if rest.len() < MAX_UNKNOWN_BYTES => Scan::More,
        _ => Scan::Tag(name.len(), TagKind::Unknown),
    }
}

/// Reads the attributes of an opening `invoke` or `parameter`.
fn scan_attributes(tag: &str, text: &str) -> Scan {
    let mut at = tag.len();
    let mut name: Option<String> = None;
    let mut string = None;
    let mut any = false;
    loop {
        let rest = text[at..].trim_start_matches([' ', '\t']);
        at = text.len() - rest.len();
        let self_closing = rest.starts_with("/>");
        if rest.starts_with('>') || self_closing {
            at += if self_closing { 2 } else { 1 };
            let kind = match (tag, name) {
                ("invoke", Some(name)) if !name.is_empty() => {
                    TagKind::Invoke { name, self_closing }
                }
                ("parameter", Some(name)) => TagKind::Parameter { name, string, self_closing },
                _ => TagKind::Malformed,
            };
            return Scan::Tag(at, kind);
        }
        if let Some(value) = rest.strip_prefix(NAME) {
            any = true;
            let Some(end) = name_end(value) else { return Scan::More };
            name = Some(value[..end].to_owned());
            at += NAME.len() + end + 1;
        } else if let Some(value) = rest.strip_prefix(STRING) {
            any = true;
            let Some(end) = value.find('"') else { return Scan::More };
            string = match &value[..end] {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            };
            at += STRING.len() + end + 1;
        } else if NAME.starts_with(rest) || STRING.starts_with(rest) || "/>".starts_with(rest) {
            return Scan::More;
        } else if any {
            return Scan::Tag(at, TagKind::Malformed);
        } else {
            // No attribute at all: what follows the tag's name is text.
            return Scan::Tag(tag.len(), TagKind::Malformed);
        }
    }
}

const NAME: &str = "name=\"";
const STRING: &str = "string=\"";

/// Where the name in `value` ends: at the first quote that an end of tag or another attribute
/// follows, because names may contain quotes. `None` while more text is needed.
fn name_end(value: &str) -> Option<usize> {
    for (at, _) in value.match_indices('"') {
        let after = &value[at + 1..];
        let rest = after.trim_start_matches([' ', '\t']);
        let ends = [">", "/>", NAME, STRING];
        if ends.iter().any(|end| rest.starts_with(end)) {
            return Some(at);
        }
        if ends.iter().any(|end| end.starts_with(rest)) {
            return None;
        }
    }
    None
}
