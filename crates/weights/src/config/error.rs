//! Why a `config.json` is refused.

/// A `config.json` does not describe a model that Fathom runs.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
#[non_exhaustive]
pub enum ConfigError {
    #[error("not valid JSON")]
    Json(#[source] serde_json::Error),
    #[error("the top level is {found}, expected an object")]
    NotAnObject { found: String },
    #[error("`{key}` is missing, expected {expected}; re-download the file of the release")]
    Missing { key: String, expected: String },
    #[error("`{key}` is {found}, expected {expected}")]
    WrongType { key: String, found: String, expected: String },
    #[error("`{key}` is {found}, expected {expected}")]
    OutOfRange { key: String, found: String, expected: String },
    #[error("`{key}` is {found}, but only {expected} is supported: {why}")]
    Unsupported { key: String, found: String, expected: String, why: &'static str },
    #[error("`{key}` is {found}, but `{other_key}` is {other}: remove the wrong one")]
    Conflict { key: String, found: String, other_key: String, other: String },
    #[error(
        "`compress_ratios` has {found} entries, expected {expected} \
         (num_hidden_layers + num_nextn_predict_layers)"
    )]
    RatioCount { found: usize, expected: usize },

    // Relatives of DeepSeek-V4 that this version does not run.
    #[error("`architectures` is {found}, expected DeepseekV4ForCausalLM: not a DeepSeek-V4 model")]
    OtherArchitecture { found: String },
    #[error("`model_type` is {found}, expected deepseek_v4: not a DeepSeek-V4 model")]
    OtherModel { found: String },
    #[error(
        "vision checkpoint not supported (`{key}` is {found}): use the text model DeepSeek-V4-Flash"
    )]
    Vision { key: String, found: String },
    #[error(
        "DeepSeek-V4.1 is not supported: different architecture and tool-call grammar \
         (`model_type` is {found}); use DeepSeek-V4-Flash or DeepSeek-V4-Pro"
    )]
    V41 { found: String },
    #[error(
        "re-quantised checkpoint not supported (`{key}` is {found}): \
         re-download the original checkpoint, which is FP8 with FP4 experts"
    )]
    Requantised { key: String, found: String },
    #[error(
        "expert-pruned checkpoint not supported (`{key}` is present): \
         re-download the original checkpoint with all its experts"
    )]
    Pruned { key: String },
}
