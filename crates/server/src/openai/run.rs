//! A prompt and its sampling parameters, ready for the engine: what chat and text completions have
//! in common.

use std::sync::Arc;

use fathom_core::{SamplingParams, TokenConstraint, TokenId};
use fathom_engine::{GenerateRequest, TokenStream};
use fathom_protocol::ApiError;
use fathom_protocol::openai::Sampling;

use crate::app::App;
use crate::config::{DefaultMaxTokens, ServerConfig};
use crate::error;
use crate::registry::ModelEntry;

/// Choices that differ in nothing but their number.
pub(super) struct Run {
    model: Arc<ModelEntry>,
    ids: Vec<TokenId>,
    sampling: Sampling,
    params: SamplingParams,
}

impl Run {
    /// Settles how many tokens a choice may have, now that the prompt's length is known. `param` is
    /// the field that holds the prompt.
    ///
    /// # Errors
    /// `context_length_exceeded`.
    pub(super) fn new(
        model: Arc<ModelEntry>,
        ids: Vec<TokenId>,
        param: &str,
        sampling: Sampling,
        logprobs: Option<u32>,
        default: DefaultMaxTokens,
        config: &ServerConfig,
    ) -> Result<Self, ApiError> {
        let max_model_len = model.engine.limits().max_model_len;
        let max_tokens = max_tokens(ids.len(), max_model_len, param, &sampling, default, config)?;
        let params = params(&sampling, max_tokens, logprobs);
        Ok(Self { model, ids, sampling, params })
    }

    pub(super) fn n_prompt(&self) -> u32 {
        u32::try_from(self.ids.len()).expect("a prompt that fits the context has a u32 of tokens")
    }

    pub(super) const fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Hands every choice to the engine, each with its own constraint and its own reader.
    ///
    /// # Errors
    /// The engine's refusal; choices accepted before it are cancelled.
    pub(super) fn submit<A>(
        self,
        app: &App,
        param: &str,
        constraint: impl Fn() -> Option<Box<dyn TokenConstraint>>,
        answer: impl Fn() -> A,
    ) -> Result<Vec<(TokenStream, A)>, ApiError> {
        let Self { model, ids, sampling, mut params } = self;
        if sampling.seed.is_none() {
            params.seed = app.random.draw();
        }
        let choice = |choice| {
            let request = GenerateRequest {
                prompt: ids.clone(),
                sampling: SamplingParams { choice, ..params.clone() },
                priority: sampling.priority,
                user: sampling.user_id.clone(),
                cache_salt: sampling.cache_salt.clone(),
                constraint: constraint(),
            };
            let submitted = model.engine.submit(request);
            let stream = submitted.map_err(|error| error::from_submit(&error, param))?;
            Ok((stream, answer()))
        };
        (0..sampling.n).map(choice).collect()
    }
}

/// How many tokens one choice may have.
fn max_tokens(
    n_prompt: usize,
    max_model_len: u32,
    param: &str,
    sampling: &Sampling,
    default: DefaultMaxTokens,
    config: &ServerConfig,
) -> Result<u32, ApiError> {
    let room = u32::try_from(n_prompt).ok().and_then(|n| max_model_len.checked_sub(n));
    let Some(room) = room.filter(|&room| room > 0) else {
        return Err(error::context_length(param, max_model_len, n_prompt, None));
    };
    let limits = &config.limits;
    match sampling.max_tokens {
        Some((field, asked)) if asked > room && !limits.clip_max_tokens => {
            Err(error::context_length(field, max_model_len, n_prompt, Some(asked)))
        }
        Some((_, asked)) => Ok(asked.min(room)),
        None => {
            let default = match default {
                DefaultMaxTokens::ModelMax => limits.max_output_tokens,
                DefaultMaxTokens::Tokens(tokens) => tokens.min(limits.max_output_tokens),
            };
            Ok(default.min(room))
        }
    }
}

fn params(sampling: &Sampling, max_tokens: u32, logprobs: Option<u32>) -> SamplingParams {
    #[expect(clippy::cast_possible_truncation, reason = "the engine samples in f32")]
    let or = |value: Option<f64>, default: f64| value.unwrap_or(default) as f32;
    SamplingParams {
        temperature: or(sampling.temperature, 1.0),
        top_p: or(sampling.top_p, 1.0),
        top_k: sampling.top_k.unwrap_or(0),
        min_p: or(sampling.min_p, 0.0),
        frequency_penalty: or(sampling.frequency_penalty, 0.0),
        presence_penalty: or(sampling.presence_penalty, 0.0),
        repetition_penalty: or(sampling.repetition_penalty, 1.0),
        logit_bias: sampling.logit_bias.clone(),
        stop_token_ids: sampling.stop_token_ids.clone(),
        ignore_eos: sampling.ignore_eos,
        min_tokens: sampling.min_tokens.unwrap_or(0).min(max_tokens),
        logprobs,
        ..SamplingParams::sampled(max_tokens, sampling.seed.map_or(0, i64::cast_unsigned))
    }
}
