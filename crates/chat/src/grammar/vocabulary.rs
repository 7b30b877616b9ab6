//! A tokenizer's tokens as the mask engine sees them: a prefix tree of their bytes.
//!
//! Control tokens are in it under names that no text can spell (they begin with the byte 0xFF,
//! which UTF-8 never contains), so a grammar allows one only where it says so by id.
//!
//! Building the tree of 129,280 tokens takes a good part of a second, so it is done once per model
//! and off every request's path.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use fathom_core::TokenId;

use crate::tokenizer::Tokenizer;

/// Memory bound of one grammar's lexer: a state takes about 1 kB. Schemas of real tools stay below
/// a tenth of this.
const MAX_LEXER_STATES: usize = 50_000;

/// What grammars for one tokenizer share.
pub(super) struct Vocabulary {
    pub(super) factory: ParserFactory,
    /// `[vocab_size / 32]`, one bit per token: those that are no text, but for the end of sentence.
    pub(super) controls: Vec<u32>,
    pub(super) dsml: TokenId,
}

impl Vocabulary {
    /// Builds the tree; slow.
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, String> {
        let special = tokenizer.special();
        let eos = special.eos();
        let vocab_size = tokenizer.vocab_size();
        let mut words: Vec<Vec<u8>> = Vec::with_capacity(vocab_size);
        let mut controls = vec![0; vocab_size.div_ceil(32)];
        for id in 0..vocab_size as TokenId {
            let is_control = special.of(id).is_some() || tokenizer.is_skipped(id);
            words.push(match tokenizer.token_bytes(id) {
                Some(_) if is_control => [&[0xff][..], format!("<{id}>").as_bytes()].concat(),
                Some(bytes) => bytes.to_vec(),
                // Never allowed.
                None => Vec::new(),
            });
            if is_control && id != eos {
                controls[id as usize / 32] |= 1 << (id % 32);
            }
        }
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, eos), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
                .map_err(|error| error.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        // Errors reach logs; the text so far must not.
        limits.verbose_errors = false;
        Ok(Self { factory, controls, dsml: special.dsml() })
    }
}
