//! The control tokens of DeepSeek-V4: their spelling, and their ids in one tokenizer.
//!
//! Spellings are model data: U+FF5C full-width bars and U+2581 lower blocks, byte for byte.
//! Ids are looked up by text, because they differ between tokenizers.
//!
//! Not here: where control tokens go in a prompt (`encode`) or what they mean in an answer
//! (`parse`).

use std::collections::HashMap;

use fathom_core::TokenId;

/// A quick-instruction task: a message that carries one is answered by a short side task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the model's own")]
pub enum Task {
    Action,
    Query,
    Authority,
    Domain,
    Title,
    ReadUrl,
}

impl Task {
    /// All tasks.
    pub const ALL: [Self; 6] =
        [Self::Action, Self::Query, Self::Authority, Self::Domain, Self::Title, Self::ReadUrl];

    /// The value of a message's `task` field.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Action => "action",
            Self::Query => "query",
            Self::Authority => "authority",
            Self::Domain => "domain",
            Self::Title => "title",
            Self::ReadUrl => "read_url",
        }
    }

    /// The task with this name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }
}

/// A control token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the spelling of each variant says what it is")]
pub enum Special {
    Bos,
    Eos,
    User,
    Assistant,
    LatestReminder,
    ThinkStart,
    ThinkEnd,
    /// Stands inside the angle brackets of every tool-call tag.
    Dsml,
    Task(Task),
    ExtractedUrl,
    FimBegin,
    FimHole,
    FimEnd,
}

impl Special {
    /// All control tokens.
    pub const ALL: [Self; 18] = [
        Self::Bos,
        Self::Eos,
        Self::User,
        Self::Assistant,
        Self::LatestReminder,
        Self::ThinkStart,
        Self::ThinkEnd,
        Self::Dsml,
        Self::Task(Task::Action),
        Self::Task(Task::Query),
        Self::Task(Task::Authority),
        Self::Task(Task::Domain),
        Self::Task(Task::Title),
        Self::Task(Task::ReadUrl),
        Self::ExtractedUrl,
        Self::FimBegin,
        Self::FimHole,
        Self::FimEnd,
    ];

    /// The token's text in `tokenizer.json`.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Bos => "<｜begin▁of▁sentence｜>",
            Self::Eos => "<｜end▁of▁sentence｜>",
            Self::User => "<｜User｜>",
            Self::Assistant => "<｜Assistant｜>",
            Self::LatestReminder => "<｜latest_reminder｜>",
            Self::ThinkStart => "<think>",
            Self::ThinkEnd => "</think>",
            Self::Dsml => "｜DSML｜",
            Self::Task(Task::Action) => "<｜action｜>",
            Self::Task(Task::Query) => "<｜query｜>",
            Self::Task(Task::Authority) => "<｜authority｜>",
            Self::Task(Task::Domain) => "<｜domain｜>",
            Self::Task(Task::Title) => "<｜title｜>",
            Self::Task(Task::ReadUrl) => "<｜read_url｜>",
            Self::ExtractedUrl => "<｜extracted_url｜>",
            Self::FimBegin => "<｜fim▁begin｜>",
            Self::FimHole => "<｜fim▁hole｜>",
            Self::FimEnd => "<｜fim▁end｜>",
        }
    }

    /// Whether a tokenizer without this token is refused. Only fill-in-the-middle and the token
    /// that no encoder writes may be missing.
    pub const fn is_required(self) -> bool {
        !matches!(self, Self::ExtractedUrl | Self::FimBegin | Self::FimHole | Self::FimEnd)
    }
}

/// The ids of the control tokens in one tokenizer.
///
/// Every token for which [`Special::is_required`] holds has an id.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    ids: HashMap<Special, TokenId>,
    /// By id: every sampled token is looked up here.
    by_id: Vec<(TokenId, Special)>,
}

impl SpecialTokens {
    /// Looks every control token up with `find`; fails with the first required one it lacks.
    pub(crate) fn resolve(
        mut find: impl FnMut(&'static str) -> Option<TokenId>,
    ) -> Result<Self, Special> {
        let mut tokens = Self::default();
        for special in Special::ALL {
            match find(special.text()) {
                Some(id) => {
                    tokens.ids.insert(special, id);
                    tokens.by_id.push((id, special));
                }
                None if special.is_required() => return Err(special),
                None => {}
            }
        }
        tokens.by_id.sort_unstable_by_key(|&(id, _)| id);
        Ok(tokens)
    }

    /// The token's id; `None` only if the tokenizer lacks a token that may be missing.
    pub fn get(&self, special: Special) -> Option<TokenId> {
        self.ids.get(&special).copied()
    }

    /// Which control token an id stands for, if any.
    pub fn of(&self, id: TokenId) -> Option<Special> {
        let at = self.by_id.binary_search_by_key(&id, |&(id, _)| id).ok()?;
        Some(self.by_id[at].1)
    }

    /// Beginning of sentence.
    pub fn bos(&self) -> TokenId {
        self.required(Special::Bos)
    }

    /// End of sentence: the model's own stop token, and its padding.
    pub fn eos(&self) -> TokenId {
        self.required(Special::Eos)
    }

    /// `<think>`.
    pub fn think_start(&self) -> TokenId {
        self.required(Special::ThinkStart)
    }

    /// `</think>`.
    pub fn think_end(&self) -> TokenId {
        self.required(Special::ThinkEnd)
    }

    /// The marker of tool-call tags.
    pub fn dsml(&self) -> TokenId {
        self.required(Special::Dsml)
    }

    /// Whether all three fill-in-the-middle tokens exist.
    pub fn supports_fim(&self) -> bool {
        [Special::FimBegin, Special::FimHole, Special::FimEnd]
            .iter()
            .all(|special| self.ids.contains_key(special))
    }

    fn required(&self, special: Special) -> TokenId {
        self.get(special).expect("resolve() refuses a tokenizer without a required token")
    }
}
