//! A model without sense: it says any token that its constraint allows, drawn at random.
//!
//! What comes back from a [`Walk`] went through the output parser, as a server's answers do. To
//! make answers end, the walk prefers tokens that close something once it has said enough.

use std::time::Duration;

use fathom_chat::grammar::{
    AnswerConstraint, AnswerRules, CallRules, Calls, Enforcement, Format, Grammar, GrammarCompiler,
    GrammarError, GrammarSpec, Start, ToolRule,
};
use fathom_chat::{
    End, Opening, OutputParser, ParsedMessage, ParserOptions, Special, Summary, Tokenizer, ToolSet,
};
use fathom_core::{TokenConstraint, TokenId};
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

use crate::support::tokenizer;

static COMPILER: LazyLock<GrammarCompiler> =
    LazyLock::new(|| GrammarCompiler::new(tokenizer(), 64));

pub(crate) fn compile(spec: &GrammarSpec) -> Result<Arc<Grammar>, GrammarError> {
    COMPILER.compile(spec, Duration::from_secs(60))
}

pub(crate) fn text(format: Format) -> GrammarSpec {
    GrammarSpec { format: Some(format), calls: None, start: Start::Answer }
}

pub(crate) fn json_schema(schema: &Value) -> GrammarSpec {
    text(Format::JsonSchema { schema: schema.clone(), strict: false })
}

/// A block of calls that must come.
pub(crate) fn forced(tools: &[(&str, Value)], single: bool) -> GrammarSpec {
    GrammarSpec { format: None, calls: Some(call_rules(tools, single)), start: Start::Answer }
}

pub(crate) fn call_rules(tools: &[(&str, Value)], single: bool) -> CallRules {
    let tools = tools.iter().map(|(name, parameters)| ToolRule {
        name: (*name).to_owned(),
        parameters: Some(parameters.clone()),
        enforcement: Enforcement::Lenient,
    });
    CallRules { tools: tools.collect(), single }
}

/// The functions that a parser knows for these tools.
pub(crate) fn functions(tools: &[(&str, Value)]) -> Vec<Value> {
    tools.iter().map(|(name, schema)| json!({"name": name, "parameters": schema})).collect()
}

/// Rules for an answer that begins with its text.
pub(crate) fn rules(grammar: Option<Arc<Grammar>>) -> AnswerRules {
    AnswerRules {
        opening: Opening::Content,
        reasoning_budget: None,
        must_answer: false,
        calls: Calls::Free,
        grammar,
    }
}

/// A counter-based generator: the same seed says the same.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((u128::from(mixed ^ (mixed >> 31)) * n as u128) >> 64) as usize
    }
}

/// What a walk came to.
pub(crate) struct Walk {
    pub(crate) ids: Vec<TokenId>,
    /// Whether it ended by itself.
    pub(crate) ended: bool,
    pub(crate) message: ParsedMessage,
    pub(crate) summary: Summary,
}

impl Walk {
    pub(crate) fn text(&self) -> String {
        tokenizer().decode(&self.ids)
    }
}

/// Walks under `rules` for up to `max_tokens`, saying `script` first where it is allowed to.
pub(crate) fn walk(
    rules: AnswerRules,
    tools: Option<&[Value]>,
    seed: u64,
    max_tokens: usize,
    script: &[TokenId],
) -> Walk {
    let tokenizer = tokenizer();
    let opening = rules.opening;
    let mut constraint = AnswerConstraint::new(rules, &tokenizer);
    let mut dice = Dice::new(seed);
    let mut ids = Vec::new();
    let mut ended = false;
    while ids.len() < max_tokens {
        let allowed = allowed(constraint.as_mut(), &tokenizer);
        assert!(!allowed.is_empty(), "nothing is allowed after {:?}", tokenizer.decode(&ids));
        let next = match script.get(ids.len()) {
            Some(next) => {
                assert!(
                    allowed.contains(next),
                    "{:?} is not allowed after {:?}",
                    tokenizer.decode(&[*next]),
                    tokenizer.decode(&ids)
                );
                *next
            }
            None => choose(&allowed, ids.len() > max_tokens / 4, &tokenizer, &mut dice),
        };
        ids.push(next);
        if next == tokenizer.special().eos() {
            ended = true;
            break;
        }
        if let Some(constraint) = &mut constraint {
            constraint.commit(next).unwrap();
        }
    }
    let tools = tools.map(ToolSet::from_functions);
    let options = ParserOptions { opening, tools, ..ParserOptions::default() };
    let mut parser = OutputParser::new(&tokenizer, options);
    let mut message = ParsedMessage::default();
    for &id in &ids {
        message.extend(parser.push(id));
    }
    let (deltas, summary) = parser.finish(if ended { End::Stop } else { End::Length });
    message.extend(deltas);
    Walk { ids, ended, message, summary }
}

/// What may come next, as the engine would see it.
pub(crate) fn allowed(
    constraint: Option<&mut AnswerConstraint>,
    tokenizer: &Tokenizer,
) -> Vec<TokenId> {
    let n = tokenizer.vocab_size();
    let mut mask = vec![u32::MAX; n.div_ceil(32)];
    if let Some(constraint) = constraint {
        if constraint.is_finished() {
            return vec![tokenizer.special().eos()];
        }
        constraint.fill_mask(&mut mask).unwrap();
    }
    let is_set = |id: &TokenId| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
    (0..n as TokenId).filter(is_set).collect()
}

fn choose(allowed: &[TokenId], enough: bool, tokenizer: &Tokenizer, dice: &mut Dice) -> TokenId {
    if enough {
        const CLOSING: [&str; 8] = ["\"", "}", "]", "</", "<", "/", ">", "."];
        let special = tokenizer.special();
        let closes = |id: &&TokenId| {
            special.of(**id).is_some_and(|s| s != Special::ThinkStart)
                || tokenizer
                    .token_bytes(**id)
                    .is_some_and(|bytes| CLOSING.iter().any(|c| c.as_bytes() == bytes))
        };
        let closing: Vec<&TokenId> = allowed.iter().filter(closes).collect();
        if !closing.is_empty() && dice.below(8) > 0 {
            return *closing[dice.below(closing.len())];
        }
    }
    allowed[dice.below(allowed.len())]
}

/// The tokens of a text in which control tokens are spelled out.
pub(crate) fn spelled(text: &str) -> Vec<TokenId> {
    tokenizer().encode_with_special(text).unwrap()
}
