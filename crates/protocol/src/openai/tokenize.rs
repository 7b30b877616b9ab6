//! Tokens of a text or a conversation, and back.

use fathom_core::TokenId;
use serde::Serialize;

use super::{ChatRequest, Rules, check_unknown};
use crate::error::{ApiError, ErrorCode};
use crate::fields::{Fields, Path, integer, invalid_type};
use crate::json::Object;

/// What is to be tokenised.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizeRequest {
    /// A text.
    Text {
        /// The text.
        prompt: String,
        /// Whether control tokens spelled out in it become tokens.
        parse_special: bool,
        /// Whether the answer shows the tokens' texts.
        token_strs: bool,
    },
    /// A conversation, rendered as chat does.
    Chat {
        /// The request that chat would get.
        request: Box<ChatRequest>,
        /// Whether the answer shows the tokens' texts.
        token_strs: bool,
    },
}

impl TokenizeRequest {
    /// Reads a request body, whose `model` has been filled in if the client left it out.
    ///
    /// # Errors
    /// The first failed check, with its code and field.
    pub fn read(body: &Object, rules: &Rules) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body, Path::Root);
        let token_strs = fields.boolean("return_token_strs")?.unwrap_or(false);
        if fields.get("messages").is_some() {
            if fields.boolean("add_generation_prompt")? == Some(false) {
                let message =
                    "`add_generation_prompt` must be true: prompts end with an opened turn.";
                let code = ErrorCode::UnsupportedParameter;
                return Err(ApiError::at(code, "add_generation_prompt", message));
            }
            // Fields of this endpoint are no fields of chat, so what is unknown is judged here.
            let lax = Rules { reject_unknown: false, ..rules.clone() };
            let mut request = Box::new(ChatRequest::read(body, &lax)?);
            let own = ["return_token_strs", "add_generation_prompt"];
            request.unknown.retain(|name| !own.contains(&name.as_str()));
            check_unknown(&request.unknown, rules)?;
            return Ok(Self::Chat { request, token_strs });
        }
        let prompt = fields.required_string("prompt")?.to_owned();
        // V4's tokenizer adds nothing by itself, so both values mean the same.
        fields.boolean("add_special_tokens")?;
        let parse_special = fields.boolean("parse_special")?.unwrap_or(false);
        Ok(Self::Text { prompt, parse_special, token_strs })
    }
}

/// Reads the ids to be turned into text.
///
/// # Errors
/// The first failed check; an id outside the vocabulary is `invalid_value`.
pub fn read_detokenize(body: &Object, rules: &Rules) -> Result<Vec<TokenId>, ApiError> {
    let mut fields = Fields::new(body, Path::Root);
    fields.required("tokens")?;
    let path = Path::Root.key("tokens");
    let items = fields.array("tokens")?.expect("the field was there");
    let id = |item| integer(item).ok_or_else(|| invalid_type(&path, "an array of integers", item));
    let ids = items.iter().map(id).collect::<Result<Vec<i128>, _>>()?;
    super::check_token_ids(&path, &ids, rules.vocab_size)
}

/// Tokens of what was asked for.
#[derive(Debug, Clone, Serialize)]
pub struct Tokenized {
    /// Number of tokens.
    pub count: usize,
    /// The model's context.
    pub max_model_len: u32,
    /// Their ids.
    pub tokens: Vec<TokenId>,
    /// Their texts, with U+FFFD for partial characters; only if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// Text of the tokens that were sent.
#[derive(Debug, Clone, Serialize)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}
