//! `tokenizer.json`: text to token ids and back, with message text kept apart from control tokens.
//!
//! Two ways in: [`Tokenizer::encode_plain`] for text that came from outside, which can never
//! produce a control token whatever it spells, and [`Tokenizer::encode_with_special`], the raw
//! pipeline of the release, which turns every control token's spelling into its id.
//!
//! The plain way needs a tokenizer whose added vocabulary is empty: most of V4's markers are added
//! tokens with `special: false`, and the option that switches special tokens off leaves those on.
//!
//! The `tokenizers` crate reads the file and defines every id. Plain text, which is nearly all of a
//! prompt, goes through a pipeline of our own where the file describes the usual one ([`split`],
//! [`bpe`]): the same ids at about ten times the speed.
//!
//! Not here: splicing control tokens between texts (`encode::prompt`), incomplete UTF-8
//! (`detokenize`).

mod bpe;
mod split;
mod tables;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fathom_core::TokenId;
use serde_json::Value;
use tokenizers::{AddedVocabulary, DecoderWrapper};

use crate::special::{Special, SpecialTokens};
use bpe::Bpe;

pub(crate) use bpe::Scratch as EncodeScratch;

/// A `tokenizer.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum TokenizerError {
    #[error("tokenizer.json cannot be read: {reason}")]
    Malformed { reason: String },
    #[error(
        "tokenizer.json has no token `{token}`, which DeepSeek-V4 prompts need; \
         use the tokenizer.json of the checkpoint's own release"
    )]
    MissingToken { token: &'static str },
    #[error(
        "tokenizer.json encodes the control token `{token}` as {ids:?}, expected exactly one id"
    )]
    SplitToken { token: &'static str, ids: Vec<TokenId> },
    #[error("tokenizer.json has a decoder of kind {kind}, expected ByteLevel")]
    Decoder { kind: String },
    #[error("tokenizer.json gives `{token}` the id {id}, beyond the largest vocabulary supported")]
    IdOutOfRange { token: String, id: TokenId },
    #[error("text cannot be tokenised: {reason}")]
    Encode { reason: String },
}

/// Ids above this are taken for a damaged file rather than a vocabulary (V4 has 129,280).
const MAX_VOCAB: u32 = 1 << 24;

/// A tokenizer for DeepSeek-V4. Clones share one copy.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    instance: u64,
    /// The pipeline as the file describes it.
    raw: tokenizers::Tokenizer,
    /// The same without its added vocabulary.
    plain: tokenizers::Tokenizer,
    /// Our own way to the same ids as `plain`, if the file is of the usual kind.
    fast: Option<Bpe>,
    special: SpecialTokens,
    tokens: TokenTable,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError`] if the file is no byte-level tokenizer or lacks a control token.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let raw = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|source| TokenizerError::Malformed { reason: source.to_string() })?;
        if !matches!(raw.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            let kind = raw.get_decoder().map_or_else(|| "none".into(), |kind| format!("{kind:?}"));
            return Err(TokenizerError::Decoder { kind });
        }
        let special = SpecialTokens::resolve(|text| raw.token_to_id(text))
            .map_err(|missing| TokenizerError::MissingToken { token: missing.text() })?;
        let mut plain = raw.clone();
        plain.with_added_vocabulary(AddedVocabulary::new());
        let tokens = TokenTable::new(&raw)?;
        let json: Value = serde_json::from_slice(bytes)
            .map_err(|source| TokenizerError::Malformed { reason: source.to_string() })?;
        let fast = fast_pipeline(&json);
        static N_INSTANCES: AtomicU64 = AtomicU64::new(0);
        let instance = N_INSTANCES.fetch_add(1, Ordering::Relaxed);
        let tokenizer =
            Self { inner: Arc::new(Inner { instance, raw, plain, fast, special, tokens }) };
        for special in Special::ALL {
            let Some(id) = tokenizer.special().get(special) else { continue };
            let ids = tokenizer.encode_with_special(special.text())?;
            if ids != [id] {
                return Err(TokenizerError::SplitToken { token: special.text(), ids });
            }
        }
        Ok(tokenizer)
    }

    /// Token ids of text from outside. Whatever the text spells, no id is a control token.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the pipeline fails on this text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        // Text averages a little over three bytes per token.
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, &mut EncodeScratch::default(), &mut ids)?;
        Ok(ids)
    }

    /// Appends what [`Self::encode_plain`] gives.
    pub(crate) fn encode_into(
        &self,
        text: &str,
        scratch: &mut EncodeScratch,
        ids: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        match &self.inner.fast {
            Some(bpe) => split::split(text, |piece| bpe.encode(piece.as_bytes(), scratch, ids)),
            None => ids.extend(self.encode_plain_reference(text)?),
        }
        Ok(())
    }

    /// Tells this tokenizer and its clones from every other one in this process.
    pub(crate) fn instance(&self) -> u64 {
        self.inner.instance
    }

    /// What [`Self::encode_plain`] must give, by the `tokenizers` crate alone: for comparisons.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the pipeline fails on this text.
    pub fn encode_plain_reference(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        encode(&self.inner.plain, text)
    }

    /// Whether plain text goes through our own pipeline. It does not if the file describes
    /// another pre-tokenizer or model than DeepSeek's; then ids are the same, but slower.
    pub fn is_fast(&self) -> bool {
        self.inner.fast.is_some()
    }

    /// Token ids of text in which every spelling of a control token is that token: what the
    /// release does with a finished prompt.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the pipeline fails on this text.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        encode(&self.inner.raw, text)
    }

    /// The control tokens' ids.
    pub fn special(&self) -> &SpecialTokens {
        &self.inner.special
    }

    /// The bytes one token stands for; they need not be whole characters. `None` for an id that
    /// the tokenizer does not define (a model's vocabulary may be padded beyond it).
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.inner.tokens.bytes(id)
    }

    /// Whether the file marks the token `special`: those are what "skip special tokens" skips.
    /// `<think>` and the tool-call marker are not among them.
    pub fn is_skipped(&self, id: TokenId) -> bool {
        self.inner.tokens.is_skipped(id)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.inner.tokens.len()
    }

    /// The text of the tokens, control tokens included. Bytes that are no UTF-8 become U+FFFD;
    /// ids the tokenizer does not define are left out.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        self.decode_where(ids, |_| true)
    }

    /// Like [`Self::decode`], without the tokens for which [`Self::is_skipped`] holds.
    pub fn decode_skip_special(&self, ids: &[TokenId]) -> String {
        self.decode_where(ids, |id| !self.is_skipped(id))
    }

    fn decode_where(&self, ids: &[TokenId], keep: impl Fn(TokenId) -> bool) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|&&id| keep(id))
            .filter_map(|&id| self.token_bytes(id))
            .flatten()
            .copied()
            .collect();
        match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        }
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
    let encoding = tokenizer
        .encode_fast(text, false)
        .map_err(|source| TokenizerError::Encode { reason: source.to_string() })?;
    Ok(encoding.get_ids().to_vec())
}

/// Our own pipeline for a tokenizer.json that describes DeepSeek's: no normalizer, the three
/// splits, bytes, plain byte pairs.
fn fast_pipeline(json: &Value) -> Option<Bpe> {
    let is_off = |key: &str| json.get(key).is_none_or(Value::is_null);
    if !["normalizer", "truncation", "padding"].into_iter().all(is_off) {
        return None;
    }
    let pre_tokenizer = json.get("pre_tokenizer")?;
    let [splits @ .., bytes] = pre_tokenizer.get("pretokenizers")?.as_array()?.as_slice() else {
        return None;
    };
    let is_type = |json: &Value, name: &str| json.get("type").is_some_and(|kind| kind == name);
    let is_split = |split: &Value, pattern: &str| {
        let regex = split.get("pattern").and_then(|pattern| pattern.get("Regex")?.as_str());
        is_type(split, "Split")
            && split.get("behavior").is_some_and(|behavior| behavior == "Isolated")
            && split.get("invert") == Some(&Value::Bool(false))
            // The quote is escaped or not: the same expression.
            && regex.is_some_and(|regex| regex.replace("\\\"", "\"") == pattern)
    };
    let is_usual = is_type(pre_tokenizer, "Sequence")
        && splits.len() == split::PATTERNS.len()
        && splits.iter().zip(split::PATTERNS).all(|(split, pattern)| is_split(split, pattern))
        && is_type(bytes, "ByteLevel")
        && bytes.get("add_prefix_space") == Some(&Value::Bool(false))
        && bytes.get("use_regex") == Some(&Value::Bool(false));
    if !is_usual {
        return None;
    }
    let alphabet = byte_alphabet();
    Bpe::from_json(json.get("model")?, |text| token_text_in_alphabet(text, &alphabet))
}

/// The bytes of every token, in one buffer.
struct TokenTable {
    bytes: Vec<u8>,
    /// `[vocab_size + 1]` offsets into `bytes`.
    starts: Vec<u32>,
    kinds: Vec<TokenKind>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    Undefined,
    Ordinary,
    /// Marked `special` in the file.
    Skipped,
}

impl TokenTable {
    fn new(tokenizer: &tokenizers::Tokenizer) -> Result<Self, TokenizerError> {
        let mut texts: Vec<(TokenId, String, TokenKind)> = tokenizer
            .get_vocab(false)
            .into_iter()
            .map(|(text, id)| (id, text, TokenKind::Ordinary))
            .collect();
        // An added token overrides an entry of the model's vocabulary with the same id.
        texts.extend(tokenizer.get_added_tokens_decoder().into_iter().map(|(id, added)| {
            let kind = if added.special { TokenKind::Skipped } else { TokenKind::Ordinary };
            (id, added.content, kind)
        }));
        if let Some((id, text, _)) = texts.iter().find(|&&(id, ..)| id >= MAX_VOCAB) {
            return Err(TokenizerError::IdOutOfRange { token: text.clone(), id: *id });
        }
        let size = texts.iter().map(|&(id, ..)| id).max().map_or(0, |id| id as usize + 1);
        let mut table = vec![(Vec::new(), TokenKind::Undefined); size];
        let alphabet = byte_alphabet();
        for (id, text, kind) in texts {
            table[id as usize] = (token_text_to_bytes(&text, &alphabet), kind);
        }

        let mut bytes = Vec::new();
        let mut starts = Vec::with_capacity(size + 1);
        let mut kinds = Vec::with_capacity(size);
        for (token, kind) in table {
            starts.push(bytes.len() as u32);
            bytes.extend_from_slice(&token);
            kinds.push(kind);
        }
        starts.push(bytes.len() as u32);
        Ok(Self { bytes, starts, kinds })
    }

    fn len(&self) -> usize {
        self.kinds.len()
    }

    fn kind(&self, id: TokenId) -> TokenKind {
        self.kinds.get(id as usize).copied().unwrap_or(TokenKind::Undefined)
    }

    fn is_skipped(&self, id: TokenId) -> bool {
        self.kind(id) == TokenKind::Skipped
    }

    fn bytes(&self, id: TokenId) -> Option<&[u8]> {
        (self.kind(id) != TokenKind::Undefined).then(|| {
            let index = id as usize;
            &self.bytes[self.starts[index] as usize..self.starts[index + 1] as usize]
        })
    }
}

/// The byte that each character of a byte-level vocabulary stands for: printable Latin-1
/// characters are themselves, the other 68 bytes follow from U+0100 on, in order.
fn byte_alphabet() -> [Option<u8>; 0x144] {
    let mut alphabet = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if printable { usize::from(byte) } else { next };
        if !printable {
            next += 1;
        }
        alphabet[code] = Some(byte);
    }
    alphabet
}

/// The bytes of a vocabulary entry. A text with characters outside the alphabet is taken
/// literally, as the reference decoder does with added tokens.
fn token_text_to_bytes(text: &str, alphabet: &[Option<u8>; 0x144]) -> Vec<u8> {
    token_text_in_alphabet(text, alphabet).unwrap_or_else(|| text.as_bytes().to_vec())
}

fn token_text_in_alphabet(text: &str, alphabet: &[Option<u8>; 0x144]) -> Option<Vec<u8>> {
    text.chars().map(|character| alphabet.get(character as usize).copied().flatten()).collect()
}
