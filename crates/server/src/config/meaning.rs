//! What requests mean on this server: `[models]`, `[thinking]`, `[reasoning]`, `[tools]`,
//! `[loop_detection]`, `[anthropic]`, `[cache]`, `[encoding]`, `[compat]`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fathom_protocol::openai::{Effort, TrailingAssistant};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Names that lead to a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// More names: alias to the id of a loaded model.
    pub aliases: BTreeMap<String, String>,
    /// Whether `deepseek-chat` and `deepseek-reasoner` lead to a model.
    pub legacy_aliases: bool,
    /// Whether the model list shows aliases too.
    pub list_aliases: bool,
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self { aliases: BTreeMap::new(), legacy_aliases: true, list_aliases: false }
    }
}

/// Thinking mode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ThinkingConfig {
    /// Whether requests that say nothing think.
    pub default: bool,
    /// What sampling parameters do in thinking mode.
    pub sampling: ThinkingSampling,
}

impl Default for ThinkingConfig {
    fn default() -> Self {
        Self { default: true, sampling: ThinkingSampling::Ignore }
    }
}

/// What sampling parameters do in thinking mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ThinkingSampling {
    /// Nothing, as in the hosted API; the release's recommendation is used.
    #[default]
    Ignore,
    /// What they say.
    Honor,
}

/// Reasoning effort and budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReasoningConfig {
    /// Overrides of the table from requested efforts to the model's three.
    pub effort_map: BTreeMap<Effort, ModelEffort>,
    /// Whether reasoning budgets are enforced.
    pub honor_budget: bool,
    /// Whether an answer must go on after its reasoning; otherwise a model that has nothing to say
    /// says nothing.
    pub require_answer: bool,
}

impl Default for ReasoningConfig {
    fn default() -> Self {
        Self { effort_map: BTreeMap::new(), honor_budget: true, require_answer: false }
    }
}

/// The efforts a model knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "each variant is its name")]
pub enum ModelEffort {
    Low,
    High,
    Max,
}

/// Tool calls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ToolsConfig {
    /// Whether arguments follow the schemas of tools that are neither strict nor forced, too.
    pub constrain_auto: bool,
}

impl Default for ToolsConfig {
    fn default() -> Self {
        Self { constrain_auto: true }
    }
}

/// Answers that repeat themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LoopConfig {
    /// What happens to an answer that says the same over and over.
    pub action: LoopAction,
    /// Longest run of tokens that is looked for again and again.
    pub max_period: usize,
    /// How often a run must follow itself.
    pub min_repeats: usize,
    /// How many tokens the repetitions must have together.
    pub min_tokens: usize,
}

impl Default for LoopConfig {
    fn default() -> Self {
        Self { action: LoopAction::Report, max_period: 64, min_repeats: 16, min_tokens: 256 }
    }
}

/// What happens to an answer that repeats itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoopAction {
    /// Nobody looks.
    Off,
    /// It is counted, and its ending says so.
    #[default]
    Report,
    /// It is ended as well.
    Stop,
}

/// The Messages surface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AnthropicConfig {
    /// Whether requests that say nothing think: as on every `model` surface, or `off` as at Anthropic.
    pub default_thinking: MessagesThinking,
    /// Names that no model has: pattern to the id of a model. A pattern may end in `*`; the longest
    /// that matches counts. If its model is not loaded, another of the map or the only one serves.
    pub model_map: BTreeMap<String, String>,
}

impl Default for AnthropicConfig {
    fn default() -> Self {
        let map = [("claude-opus*", "deepseek-v4-pro"), ("claude*", "deepseek-v4-flash")];
        Self {
            default_thinking: MessagesThinking::Model,
            model_map: map.map(|(from, to)| (from.to_owned(), to.to_owned())).into(),
        }
    }
}

/// Whether Messages requests that say nothing think.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MessagesThinking {
    /// As on every other surface.
    #[default]
    Model,
    /// They do not, as at Anthropic.
    Off,
}

/// Prefix cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Whether requests with different `user_id` share no cache entries.
    pub isolate_by_user: bool,
    /// Memory for the tokens of answers, which clients send back as text; in a cache directory, their
    /// file takes up to twice as much. 0 remembers none.
    pub remember_answers_mb: u32,
    /// The cache directory, in which answers are remembered through restarts: the engine's.
    #[serde(skip)]
    pub directory: Option<PathBuf>,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { isolate_by_user: true, remember_answers_mb: 64, directory: None }
    }
}

/// How messages become a prompt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EncodingConfig {
    /// Accept the encoding's own role `latest_reminder` and the message field `task`.
    pub extended_roles: bool,
    /// Read control tokens that message text spells as control tokens. Only where all text is
    /// trusted: whoever writes a message then writes the whole conversation.
    pub allow_special_in_content: bool,
}

/// Deviations from the contract that some clients or operators want.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches of the contract")]
pub struct CompatConfig {
    /// Refuse unknown fields.
    pub reject_unknown: bool,
    /// Status for unknown models: 404, or 400 as in the hosted API.
    pub unknown_model_status: u16,
    /// Status for values of a wrong type or range: 400, or 422.
    pub invalid_parameter_status: u16,
    /// What the role `developer` is.
    pub developer_role: DeveloperRole,
    /// Leave out tools that run on the hosted APIs' servers (web search and the like) instead of
    /// refusing the request: for agents that always send them.
    pub ignore_hosted_tools: bool,
    /// Accept tool calls and results in any order.
    pub lenient_tool_history: bool,
    /// What a last assistant message without `prefix` means.
    pub trailing_assistant: TrailingAssistant,
    /// Refuse tool history without its reasoning in thinking mode.
    pub require_reasoning_roundtrip: bool,
    /// Require the word "json" for `json_object`.
    pub require_json_keyword: bool,
    /// Accept `prefix` and `strict` under `/beta` only.
    pub require_beta_path: bool,
    /// Send reasoning as `reasoning` too.
    pub reasoning_alias: bool,
    /// Put usage on the last finish chunk of every stream.
    pub usage_on_final_chunk: bool,
    /// End cut generations with DeepSeek's own finish reason instead of an error.
    pub insufficient_resource: bool,
    /// What a forced tool choice does in thinking mode.
    pub forced_tool_in_thinking: ForcedToolInThinking,
    /// Send line ends while a whole answer is computed, as the hosted API does: proxies stay patient,
    /// but the status is 200 whatever comes.
    pub nonstream_keepalive: bool,
}

impl Default for CompatConfig {
    fn default() -> Self {
        Self {
            reject_unknown: false,
            unknown_model_status: 404,
            invalid_parameter_status: 400,
            developer_role: DeveloperRole::System,
            ignore_hosted_tools: false,
            lenient_tool_history: false,
            trailing_assistant: TrailingAssistant::NewTurn,
            require_reasoning_roundtrip: false,
            require_json_keyword: true,
            require_beta_path: false,
            reasoning_alias: false,
            usage_on_final_chunk: false,
            insufficient_resource: false,
            forced_tool_in_thinking: ForcedToolInThinking::Allow,
            nonstream_keepalive: false,
        }
    }
}

/// What a forced tool choice does in thinking mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ForcedToolInThinking {
    /// The model reasons, then calls.
    #[default]
    Allow,
    /// The request is refused, as the hosted API does.
    Reject,
    /// The model calls without reasoning.
    DisableThinking,
}

/// What the role `developer` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeveloperRole {
    /// Another name for `system`.
    #[default]
    System,
    /// An error.
    Reject,
}
