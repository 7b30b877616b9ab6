//! Every error a client can get: its status, type and code, and how it is written on the wire.
//!
//! [`ErrorCode`] is the one table of the HTTP contract; nothing else in the project knows a status
//! or a type. An [`ApiError`] is a code with the message and the field it is about, and is written
//! as the envelope of the protocol the client speaks ([`Surface`]).
//!
//! Not here: what raises which error (the request parsers, and the server), and HTTP headers.

use serde::Serialize;

/// Longest piece of request content, in characters, that a message may repeat.
const MAX_QUOTED_CHARS: usize = 64;

/// Declares [`ErrorCode`] from the rows `variant, status, OpenAI type, code`.
macro_rules! error_codes {
    ($($variant:ident $status:literal $kind:literal $code:literal)*) => {
        /// What went wrong, as the machine-readable `code` of the envelope.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[expect(missing_docs, reason = "each variant is its code, and section 17 of the API says more")]
        pub enum ErrorCode { $($variant,)* }

        impl ErrorCode {
            /// All codes, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The HTTP status.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// The `type` of the OpenAI envelope.
            #[must_use]
            pub const fn kind(self) -> &'static str {
                match self { $(Self::$variant => $kind,)* }
            }

            /// The `code` of the OpenAI envelope.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }
        }
    };
}

error_codes! {
    InvalidJson                400 "invalid_request_error" "invalid_json"
    MissingRequiredParameter   400 "invalid_request_error" "missing_required_parameter"
    InvalidType                400 "invalid_request_error" "invalid_type"
    InvalidValue               400 "invalid_request_error" "invalid_value"
    EmptyArray                 400 "invalid_request_error" "empty_array"
    IntegerBelowMin            400 "invalid_request_error" "integer_below_min_value"
    IntegerAboveMax            400 "invalid_request_error" "integer_above_max_value"
    DecimalBelowMin            400 "invalid_request_error" "decimal_below_min_value"
    DecimalAboveMax            400 "invalid_request_error" "decimal_above_max_value"
    ArrayAboveMaxLength        400 "invalid_request_error" "array_above_max_length"
    StringAboveMaxLength       400 "invalid_request_error" "string_above_max_length"
    ConflictingParameters      400 "invalid_request_error" "conflicting_parameters"
    UnsupportedParameter       400 "invalid_request_error" "unsupported_parameter"
    UnknownParameter           400 "invalid_request_error" "unknown_parameter"
    InvalidMessageSequence     400 "invalid_request_error" "invalid_message_sequence"
    ImageInputNotSupported     400 "invalid_request_error" "image_input_not_supported"
    FileInputNotSupported      400 "invalid_request_error" "file_input_not_supported"
    AudioInputNotSupported     400 "invalid_request_error" "audio_input_not_supported"
    InvalidFunctionParameters  400 "invalid_request_error" "invalid_function_parameters"
    InvalidJsonSchema          400 "invalid_request_error" "invalid_json_schema"
    JsonKeywordMissing         400 "invalid_request_error" "json_keyword_missing"
    ContextLengthExceeded      400 "invalid_request_error" "context_length_exceeded"
    MissingApiKey              401 "authentication_error" "missing_api_key"
    InvalidApiKey              401 "authentication_error" "invalid_api_key"
    InsufficientBalance        402 "insufficient_balance_error" "insufficient_balance"
    ModelNotPermitted          403 "permission_error" "model_not_permitted"
    ModelNotFound              404 "invalid_request_error" "model_not_found"
    NotFound                   404 "invalid_request_error" "not_found"
    MethodNotAllowed           405 "invalid_request_error" "method_not_allowed"
    RequestTimeout             408 "timeout_error" "request_timeout"
    RequestTooLarge            413 "invalid_request_error" "request_too_large"
    UnsupportedMediaType       415 "invalid_request_error" "unsupported_media_type"
    UnsupportedContentEncoding 415 "invalid_request_error" "unsupported_content_encoding"
    UnsupportedSchema          422 "invalid_request_error" "unsupported_schema"
    SchemaTooComplex           422 "invalid_request_error" "schema_too_complex"
    RateLimitExceeded          429 "rate_limit_error" "rate_limit_exceeded"
    ConcurrencyLimitExceeded   429 "rate_limit_error" "concurrency_limit_exceeded"
    HeadersTooLarge            431 "invalid_request_error" "headers_too_large"
    InternalError              500 "server_error" "internal_error"
    QueueFull                  503 "overloaded_error" "queue_full"
    QueueTimeout               503 "overloaded_error" "queue_timeout"
    ModelLoading               503 "overloaded_error" "model_loading"
    ShuttingDown               503 "overloaded_error" "shutting_down"
}

impl ErrorCode {
    /// Whether the code says that a value has the wrong type or range, which
    /// `compat.invalid_parameter_status` may move from 400 to 422.
    #[must_use]
    pub const fn is_invalid_parameter(self) -> bool {
        matches!(
            self,
            Self::InvalidType
                | Self::InvalidValue
                | Self::IntegerBelowMin
                | Self::IntegerAboveMax
                | Self::DecimalBelowMin
                | Self::DecimalAboveMax
        )
    }

    /// The status and `type` on the Messages surface.
    #[must_use]
    pub const fn anthropic(self) -> (u16, &'static str) {
        let status = self.status();
        match (self, status) {
            (Self::QueueFull, _) => (529, "overloaded_error"),
            (_, 401) => (status, "authentication_error"),
            (_, 402) => (status, "billing_error"),
            (_, 403) => (status, "permission_error"),
            (_, 404) => (status, "not_found_error"),
            (_, 408) => (status, "timeout_error"),
            (_, 413) => (status, "request_too_large"),
            (_, 429) => (status, "rate_limit_error"),
            (_, 500) => (status, "api_error"),
            (_, 503) => (status, "overloaded_error"),
            _ => (status, "invalid_request_error"),
        }
    }
}

/// Which protocol's envelope an error is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Surface {
    /// `{"error": {message, type, param, code}}`: everywhere but on the Messages paths.
    #[default]
    OpenAi,
    /// `{"type": "error", "error": {type, message}, "request_id"}`.
    Anthropic,
}

/// A request that is refused or failed: what the client is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", .code.as_str())]
pub struct ApiError {
    /// Status, type and code.
    pub code: ErrorCode,
    /// One sentence naming the field and what it accepts.
    pub message: String,
    /// The field at fault, as `a.b[0].c`.
    pub param: Option<String>,
}

impl ApiError {
    /// An error about the request as a whole.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None }
    }

    /// An error about the field `param`.
    #[must_use]
    pub fn at(code: ErrorCode, param: impl ToString, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: Some(param.to_string()) }
    }

    /// The HTTP status on `surface`.
    #[must_use]
    pub const fn status(&self, surface: Surface) -> u16 {
        match surface {
            Surface::OpenAi => self.code.status(),
            Surface::Anthropic => self.code.anthropic().0,
        }
    }

    /// The envelope as one line of JSON.
    #[must_use]
    pub fn to_json(&self, surface: Surface, request_id: &str) -> String {
        let written = match surface {
            Surface::OpenAi => serde_json::to_string(&OpenAiBody {
                error: OpenAiError {
                    message: &self.message,
                    kind: self.code.kind(),
                    param: self.param.as_deref(),
                    code: self.code.as_str(),
                },
            }),
            Surface::Anthropic => serde_json::to_string(&AnthropicBody {
                kind: "error",
                error: AnthropicError { kind: self.code.anthropic().1, message: &self.message },
                request_id,
            }),
        };
        written.expect("an envelope holds strings only, which always serialise")
    }
}

#[derive(Serialize)]
struct OpenAiBody<'a> {
    error: OpenAiError<'a>,
}

#[derive(Serialize)]
struct OpenAiError<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

#[derive(Serialize)]
struct AnthropicBody<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    error: AnthropicError<'a>,
    request_id: &'a str,
}

#[derive(Serialize)]
struct AnthropicError<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    message: &'a str,
}

/// Request content as a message may repeat it: in backticks, cut after 60 characters, on one line.
#[must_use]
pub fn quoted(content: &str) -> String {
    let mut chars = content.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut shown: String = chars.by_ref().take(MAX_QUOTED_CHARS - 4).collect();
    if chars.next().is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}
