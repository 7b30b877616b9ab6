//! What a finished request reports: why it ended and how many tokens it used.

use crate::TokenId;

/// Why a request stopped producing tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model produced its end-of-sequence token.
    Eos,
    /// The model produced one of the request's own stop tokens.
    StopToken(TokenId),
    /// `max_tokens` was reached, or the context is full.
    Length,
    /// The client went away or the server cut the request; no further event follows.
    Cancelled,
}

/// Token counts of one request. Preemption and recomputation never change them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens whose cache entries were reused instead of computed.
    pub cached_tokens: u32,
    /// Tokens sampled, the stop token included.
    pub completion_tokens: u32,
}
