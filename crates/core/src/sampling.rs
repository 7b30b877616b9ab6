//! How the next token of a request is chosen.

use crate::TokenId;

/// Checked sampling parameters of one choice; ranges are those of the HTTP contract.
///
/// The random number of position `p` is a pure function of (`seed`, `choice`, `p`), so a request's
/// tokens do not depend on what else the server runs.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy: the highest logit, the lowest id on ties.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 0 keeps the most likely only.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 switches the filter off.
    pub top_k: u32,
    /// Drop tokens below this fraction of the most likely token's probability.
    pub min_p: f32,
    /// Subtracted per occurrence among the generated tokens.
    pub frequency_penalty: f32,
    /// Subtracted once if the token was generated before.
    pub presence_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Key of the counter-based generator. The server draws one when the client gives none.
    pub seed: u64,
    /// Which of the request's `n` choices this is; part of the generator's key.
    pub choice: u32,
    /// Added to the logits of single tokens before temperature.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Tokens that end the request, besides the end-of-sequence token.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// No end-of-sequence or stop token before this many tokens were generated.
    pub min_tokens: u32,
    /// Most tokens to generate, at least 1.
    pub max_tokens: u32,
    /// `Some(k)`: report the log-probability of each token and of the `k` most likely ones.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// Greedy decoding of at most `max_tokens` tokens, everything else off.
    #[must_use]
    pub fn greedy(max_tokens: u32) -> Self {
        Self { temperature: 0.0, ..Self::sampled(max_tokens, 0) }
    }

    /// Sampling from the model's own distribution (temperature 1, no filters) with `seed`.
    #[must_use]
    pub fn sampled(max_tokens: u32, seed: u64) -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            seed,
            choice: 0,
            logit_bias: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            min_tokens: 0,
            max_tokens,
            logprobs: None,
        }
    }
}

/// Log-probabilities reported for one sampled token.
///
/// Natural logarithm of the softmax of the *raw* logits: before bias, penalties, temperature,
/// filters and constraints.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The sampled token's log-probability.
    pub logprob: f32,
    /// The most likely tokens, descending, ties by lower id; as many as were asked for.
    pub top: Vec<(TokenId, f32)>,
}
