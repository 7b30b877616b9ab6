//! The fields that switch thinking on and off, set its effort and bound it.
//!
//! Four toggles and four effort fields mean the same thing; all are read, disagreement is refused,
//! and [`Thinking`] is what the client meant. Not here: defaults, aliases and what an effort renders
//! as, which belong to the served model (the server's `lower`).

use crate::error::{ApiError, ErrorCode, quoted};
use crate::fields::{Fields, Path, integer_in, invalid_value};

/// A requested reasoning effort, as the client spelled it.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "each variant is its name on the wire")]
pub enum Effort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    Xhigh,
    Max,
    Ultra,
}

impl Effort {
    const NAMES: [(&str, Self); 8] = [
        ("none", Self::None),
        ("minimal", Self::Minimal),
        ("low", Self::Low),
        ("medium", Self::Medium),
        ("high", Self::High),
        ("xhigh", Self::Xhigh),
        ("max", Self::Max),
        ("ultra", Self::Ultra),
    ];

    pub(crate) fn parse(path: &Path<'_>, name: &str) -> Result<Self, ApiError> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|&(_, effort)| effort).ok_or_else(|| {
            let names = Self::NAMES.map(|(known, _)| known).join(", ");
            invalid_value(
                path,
                format!("`{path}` is {}, but must be one of {names}.", quoted(name)),
            )
        })
    }
}

/// What the client said about thinking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Thinking {
    /// The explicit toggle, if there was one.
    pub toggle: Option<bool>,
    /// The first effort given.
    pub effort: Option<Effort>,
    /// Most reasoning tokens before `</think>` is forced, and the field that said so.
    pub budget: Option<(&'static str, u32)>,
    /// Leave the reasoning out of the response.
    pub hide: bool,
}

/// Thinking fields with the JSON types they must have, values unchecked.
pub(crate) struct RawThinking<'a> {
    kind: Option<&'a str>,
    /// The boolean toggles in order of rank, after `thinking.type`.
    toggles: [(&'static str, Option<bool>); 3],
    efforts: [(&'static str, Option<&'a str>); 4],
    budgets: [(&'static str, Option<i128>); 3],
    hide: bool,
}

impl<'a> RawThinking<'a> {
    pub(crate) fn read(
        fields: &mut Fields<'a>,
        unknown: &mut Vec<String>,
    ) -> Result<Self, ApiError> {
        let (mut kind, mut effort, mut budget) = (None, None, None);
        if let Some(object) = fields.object("thinking")? {
            let mut thinking = Fields::new(object, Path::Root.key("thinking"));
            kind = thinking.string("type")?;
            effort = thinking.string("effort")?;
            budget = thinking.integer("budget_tokens")?;
            thinking.report_unknown(unknown);
        }
        let (mut enabled, mut reasoning_effort, mut max_tokens, mut exclude) =
            (None, None, None, None);
        if let Some(object) = fields.object("reasoning")? {
            let mut reasoning = Fields::new(object, Path::Root.key("reasoning"));
            enabled = reasoning.boolean("enabled")?;
            reasoning_effort = reasoning.string("effort")?;
            max_tokens = reasoning.integer("max_tokens")?;
            exclude = reasoning.boolean("exclude")?;
            // The Responses surface asks for summaries here; reasoning is shown whole.
            reasoning.get("summary");
            reasoning.report_unknown(unknown);
        }
        let (mut template_thinking, mut enable_thinking, mut template_effort) = (None, None, None);
        if let Some(object) = fields.object("chat_template_kwargs")? {
            let mut kwargs = Fields::new(object, Path::Root.key("chat_template_kwargs"));
            template_thinking = kwargs.boolean("thinking")?;
            enable_thinking = kwargs.boolean("enable_thinking")?;
            template_effort = kwargs.string("reasoning_effort")?;
            kwargs.report_unknown(unknown);
        }
        let include = fields.boolean("include_reasoning")?;
        Ok(Self {
            kind,
            toggles: [
                ("chat_template_kwargs.thinking", template_thinking),
                ("chat_template_kwargs.enable_thinking", enable_thinking),
                ("reasoning.enabled", enabled),
            ],
            efforts: [
                ("reasoning_effort", fields.string("reasoning_effort")?),
                ("reasoning.effort", reasoning_effort),
                ("chat_template_kwargs.reasoning_effort", template_effort),
                ("thinking.effort", effort),
            ],
            budgets: [
                ("thinking_token_budget", fields.integer("thinking_token_budget")?),
                ("reasoning.max_tokens", max_tokens),
                ("thinking.budget_tokens", budget),
            ],
            hide: include == Some(false) || exclude == Some(true),
        })
    }

    /// Checks values, leaving the agreement of the toggles to [`RawThinking::agree`].
    pub(crate) fn check(&self) -> Result<Thinking, ApiError> {
        let toggle = match self.kind {
            Some("enabled" | "adaptive") => Some(true),
            Some("disabled") => Some(false),
            Some(other) => {
                let other = quoted(other);
                let accepted = "but must be one of enabled, disabled, adaptive";
                let message = format!("`thinking.type` is {other}, {accepted}.");
                return Err(ApiError::at(ErrorCode::InvalidValue, "thinking.type", message));
            }
            None => None,
        };
        let mut effort = None;
        for (name, value) in self.efforts {
            let Some(value) = value else { continue };
            effort = effort.or(Some(Effort::parse(&Path::Root.key(name), value)?));
        }
        let mut budget = None;
        for (name, value) in self.budgets {
            let Some(value) = value else { continue };
            // More than any output is no bound, and no error.
            let value = value.min(u32::MAX.into());
            let checked = integer_in(&Path::Root.key(name), value, 1, u32::MAX.into())?;
            budget = budget.or(Some((name, checked)));
        }
        let first = self.toggles.iter().find_map(|&(_, given)| given);
        Ok(Thinking { toggle: toggle.or(first), effort, budget, hide: self.hide })
    }

    /// Checks that the toggles agree.
    pub(crate) fn agree(&self, thinking: &Thinking) -> Result<(), ApiError> {
        let Some(toggle) = thinking.toggle else { return Ok(()) };
        for (name, given) in self.toggles {
            if given.is_some_and(|given| given != toggle) {
                let on_or_off = if toggle { "on" } else { "off" };
                let message =
                    format!("`{name}` contradicts a field that switches thinking {on_or_off}.");
                return Err(ApiError::at(ErrorCode::ConflictingParameters, name, message));
            }
        }
        Ok(())
    }
}
