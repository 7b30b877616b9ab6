//! Answers as later prompts hold them: the ids that were sampled, under the text that they mean.
//!
//! A client sends an answer back as text and JSON. Encoding that again need not give the sampled ids
//! (there are many ways to spell a text in tokens, and to lay out a tool call), and every token after
//! the first that differs is computed anew. An [`AnswerTurn`] pairs the ids with the turn that the
//! message renders to, so that [`Prompt::token_ids_recalling`] can put the former where the latter
//! stands. A client that changes anything sends a message that renders to something else.
//!
//! Not here: where pairs are kept, and for whom (the server).

use fathom_core::TokenId;

use crate::conversation::{Arguments, ToolCall};
use crate::encode::prompt::{Opening, Prompt, Turn};
use crate::encode::render::push_answer;
use crate::encode::strings::TOOL_CALLS_CLOSE;
use crate::parse::{End, OutputParser, ParsedMessage, ParserOptions, Phase};
use crate::special::Special;
use crate::tokenizer::Tokenizer;

/// An answer's tokens, and the turn they stand for.
#[derive(Debug, Clone)]
pub struct AnswerTurn {
    ids: Vec<TokenId>,
    rendered: Prompt,
}

impl AnswerTurn {
    /// The turn that an answer becomes if its message comes back unchanged. `opened` are the tokens
    /// of it that the prompt held already, `sampled` those that came; a stop token is none of them.
    /// An answer that was cut is closed as its message is. `options` are those it was read with.
    ///
    /// `None` if the ids do not say exactly what the message says: after a stop string, with a call
    /// that was dropped, with control tokens that a message cannot hold.
    #[must_use]
    pub fn new(
        tokenizer: &Tokenizer,
        options: &ParserOptions,
        opened: &[TokenId],
        sampled: &[TokenId],
    ) -> Option<Self> {
        let special = tokenizer.special();
        let mut parser = OutputParser::new(tokenizer, options.clone());
        let mut message = ParsedMessage::default();
        for &id in sampled {
            message.extend(parser.push(id));
        }
        let phase = parser.phase();
        let (deltas, summary) = parser.finish(End::Stop);
        message.extend(deltas);
        if summary.stop.is_some() || summary.dropped_call || summary.n_duplicate_parameters > 0 {
            return None;
        }
        let mut ids = [opened, sampled].concat();
        if ids.last() != Some(&special.eos()) {
            ids.extend(closing(tokenizer, &ids, phase)?);
        }
        let rendered = rendered(options.opening, message);
        let turn = Self { ids, rendered };
        turn.is_well_formed(tokenizer).then_some(turn)
    }

    /// The tokens, an end of sentence last.
    #[must_use]
    pub fn ids(&self) -> &[TokenId] {
        &self.ids
    }

    /// The turn as a prompt renders it.
    #[must_use]
    pub fn rendered(&self) -> Option<Turn<'_>> {
        self.rendered.answers().next()
    }

    /// Whether the ids are one answer and nothing beyond it: its reasoning ends where the rendered
    /// turn's does, it ends once, and what else is control belongs to calls.
    fn is_well_formed(&self, tokenizer: &Tokenizer) -> bool {
        let special = tokenizer.special();
        let Some((&last, before)) = self.ids.split_last() else { return false };
        let allowed = [Special::Dsml, Special::ThinkEnd];
        let controls = before.iter().filter_map(|&id| special.of(id));
        let ends = |id: &&TokenId| **id == special.think_end();
        let n_ends = before.iter().filter(ends).count();
        let n_rendered = usize::from(self.rendered.ends_reasoning());
        last == special.eos()
            && n_ends == n_rendered
            && controls.into_iter().all(|control| allowed.contains(&control))
    }
}

/// What an answer lacks that ended in `phase` without an end of sentence.
fn closing(tokenizer: &Tokenizer, ids: &[TokenId], phase: Phase) -> Option<Vec<TokenId>> {
    let mut rest = Prompt::default();
    if phase == Phase::ToolCalls {
        let line = ids.last().and_then(|&id| tokenizer.token_bytes(id))?.ends_with(b"\n");
        let close = if line { TOOL_CALLS_CLOSE.trim_start_matches('\n') } else { TOOL_CALLS_CLOSE };
        rest.push_template(close);
    }
    rest.push_control(Special::Eos);
    rest.token_ids(tokenizer).ok()
}

/// The turn that a prompt makes of `message`.
fn rendered(opening: Opening, message: ParsedMessage) -> Prompt {
    let ParsedMessage { reasoning, content, tool_calls, .. } = message;
    let call = |call: crate::parse::ParsedCall| ToolCall {
        id: String::new(),
        name: call.name,
        arguments: Arguments::Text(call.arguments),
    };
    let calls: Vec<ToolCall> = tool_calls.into_iter().map(call).collect();
    let mut prompt = Prompt::default();
    prompt.begin_answer();
    let reasoning = (opening == Opening::Reasoning).then_some(reasoning.as_str());
    push_answer(&mut prompt, reasoning, &content, &calls);
    prompt.push_control(Special::Eos);
    prompt.end_answer();
    prompt
}
