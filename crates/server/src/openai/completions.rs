//! `POST /v1/completions`: text to continue, or a gap to fill in.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use fathom_chat::grammar::{AnswerConstraint, AnswerRules};
use fathom_chat::{Opening, Prompt as Rendered};
use fathom_core::{TokenConstraint, TokenId};
use fathom_protocol::openai::completions::{
    CompletionRequest, Prompt, TextChoice, TextCompletion, TextLogprobs,
};
use fathom_protocol::openai::{self, UsageInStream, response::Usage};
use fathom_protocol::{ApiError, ErrorCode, Object, Surface, sse};

use super::constrain::Constraints;
use super::deliver::{self, Frames};
use super::run::Run;
use super::text::{TextAnswer, TextPiece};
use super::{off_the_reactor, resolve};
use crate::app::{App, unix_seconds};
use crate::auth::Caller;
use crate::body::JsonBody;
use crate::config::DefaultMaxTokens;
use crate::error::{self, Refusal};
use crate::generate::{Context, Ending, Generation, Update};
use crate::record::Record;
use crate::registry::{ModelEntry, Resolved};

/// Tokens of an answer whose request gives no limit, as at OpenAI.
const DEFAULT_MAX_TOKENS: u32 = 16;

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, Refusal> {
    let read = {
        let (record, caller) = (Arc::clone(&record), caller.clone());
        move |app: &App, body| read(app, &record, &caller, body)
    };
    let (request, resolved, form) = body.read(&app, read).await?;
    let model = Arc::clone(&resolved.model);
    let turn = caller.begin(Instant::now())?;
    let streams = request.stream;
    let n_bytes = n_bytes(&request);
    let work = move |app: Arc<App>| prepare(&app, &resolved, request);
    let (runs, rules) = off_the_reactor(&app, n_bytes, work).await?;
    let n_prompts = runs.len();
    let n_prompt = runs.iter().map(Run::n_prompt).sum();
    let mut choices = Vec::with_capacity(n_prompts);
    for run in runs {
        let sampling = run.sampling().clone();
        let answer = || {
            let (stop, ids) = (&sampling.stop, &sampling.stop_token_ids);
            let skip = sampling.skip_special_tokens;
            TextAnswer::new(&model.tokenizer, stop, ids, skip, form.logprobs)
        };
        let constraint = || {
            let constraint = AnswerConstraint::new(rules.clone(), &model.tokenizer)?;
            Some(Box::new(constraint) as Box<dyn TokenConstraint>)
        };
        choices.extend(run.submit(&app, "prompt", constraint, answer)?);
    }
    let (own_app, own_record) = (Arc::clone(&app), Arc::clone(&record));
    let context = Context { app: own_app, record: own_record, model, turn, n_prompt, n_prompts };
    let generation = Generation::new(context, choices);
    if streams {
        return Ok(deliver::stream(&app, generation, Chunks::new(form)));
    }
    let (own_app, own_record) = (Arc::clone(&app), Arc::clone(&record));
    let answer = async move { collect(&own_app, &own_record, generation, &form).await };
    Ok(deliver::wait(&app, &record, Surface::OpenAi, answer).await?)
}

/// Reads a body in the contract's order of checks.
fn read(
    app: &App,
    record: &Record,
    caller: &Caller,
    body: Object,
) -> Result<(CompletionRequest, Resolved, Form), ApiError> {
    let resolved = resolve(app, record, caller, openai::model_name(&body)?)?;
    let model = &resolved.model;
    let request = CompletionRequest::read(&body, &rules(app, model, &body))?;
    drop(body);
    record.note_unknown(&request.unknown);
    check_supported(&request, model)?;
    let form = Form {
        id: format!("cmpl-{}", app.random.id()),
        created: unix_seconds(),
        model: request.model.clone(),
        fingerprint: model.fingerprint.clone(),
        usage: request.usage,
        usage_on_final: app.config.compat.usage_on_final_chunk,
        logprobs: request.logprobs.is_some(),
        echo: request.prompts.iter().map(|prompt| echo(&request, prompt, model)).collect(),
        n: request.sampling.n,
    };
    Ok((request, resolved, form))
}

/// The rules of the endpoint: fill-in-the-middle has a lower cap of its own.
fn rules(app: &App, model: &ModelEntry, body: &Object) -> openai::Rules {
    let mut rules = app.config.rules(model.vocab_size());
    if body.get("suffix").is_some_and(|suffix| !suffix.is_null()) {
        rules.max_output_tokens = rules.max_output_tokens.min(app.config.fim.max_tokens);
    }
    rules
}

fn check_supported(request: &CompletionRequest, model: &ModelEntry) -> Result<(), ApiError> {
    let unsupported = |param: &str, message: &str| {
        Err(ApiError::at(ErrorCode::UnsupportedParameter, param, message))
    };
    if request.suffix.is_some() && !model.tokenizer.special().supports_fim() {
        let message = "`suffix` is not supported: this model's tokenizer has no tokens for it.";
        return unsupported("suffix", message);
    }
    if request.echo && request.logprobs.is_some() {
        let message = "`logprobs` covers generated tokens only and cannot be combined with `echo`.";
        return unsupported("logprobs", message);
    }
    Ok(())
}

/// A prompt's text, if its answers are to begin with it.
fn echo(request: &CompletionRequest, prompt: &Prompt, model: &ModelEntry) -> String {
    match prompt {
        _ if !request.echo => String::new(),
        Prompt::Text(text) => text.clone(),
        Prompt::Tokens(ids) => model.tokenizer.decode(ids),
    }
}

/// Bytes of text to tokenise; as good as endless if there is a grammar, which is never compiled on
/// the reactor.
fn n_bytes(request: &CompletionRequest) -> usize {
    if request.structured.is_some() {
        return usize::MAX;
    }
    let of_prompt = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
    };
    let suffix = request.suffix.as_ref().map_or(0, String::len);
    request.prompts.iter().map(of_prompt).sum::<usize>() + suffix
}

/// The prompts' tokens, and what all their answers must keep to.
fn prepare(
    app: &App,
    resolved: &Resolved,
    request: CompletionRequest,
) -> Result<(Vec<Run>, AnswerRules), ApiError> {
    let CompletionRequest { prompts, suffix, sampling, structured, logprobs, .. } = request;
    let model = &resolved.model;
    let constraints = Constraints::of_text(structured.as_ref(), &app.config);
    let rules = constraints.compile(&resolved.grammars, Opening::Content, None, false)?;
    let default = if suffix.is_some() { app.config.fim.max_tokens } else { DEFAULT_MAX_TOKENS };
    let default = DefaultMaxTokens::Tokens(default);
    let run = |prompt: Prompt| {
        let tokenizer = &model.tokenizer;
        let rendered = match (prompt, suffix.as_ref()) {
            (Prompt::Tokens(ids), _) => Ok(ids),
            (Prompt::Text(text), None) => Rendered::completion(&text).token_ids(tokenizer),
            (Prompt::Text(prefix), Some(suffix)) => {
                Rendered::fill_in_the_middle(&prefix, suffix).token_ids(tokenizer)
            }
        };
        let ids: Vec<TokenId> = rendered.map_err(|error| error::internal(&error))?;
        let (model, sampling) = (Arc::clone(model), sampling.clone());
        Run::new(model, ids, "prompt", sampling, logprobs, default, &app.config)
    };
    let runs = prompts.into_iter().map(run).collect::<Result<Vec<Run>, ApiError>>()?;
    Ok((runs, rules))
}

/// What every response and chunk of a request has in common.
struct Form {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    usage: UsageInStream,
    usage_on_final: bool,
    logprobs: bool,
    /// What each prompt's answers begin with.
    echo: Vec<String>,
    /// Answers to each prompt.
    n: u32,
}

impl Form {
    fn completion(
        &self,
        choices: Vec<TextChoice>,
        usage: Option<Option<Usage>>,
    ) -> TextCompletion<'_> {
        TextCompletion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage,
        }
    }

    /// How many answers there are: those to the first prompt come first.
    const fn n_choices(&self) -> u32 {
        self.echo.len() as u32 * self.n
    }

    /// What the answer number `index` begins with.
    fn echo(&self, index: u32) -> &str {
        &self.echo[(index / self.n) as usize]
    }

    /// A choice without text so far.
    fn choice(&self, index: u32) -> TextChoice {
        TextChoice {
            index,
            text: String::new(),
            logprobs: self.logprobs.then(TextLogprobs::default),
            finish_reason: None,
            stop_reason: None,
        }
    }
}

/// Adds pieces and an ending to a choice whose text begins at character `n_chars` of the answer.
fn add(choice: &mut TextChoice, update: Update<TextPiece>, n_chars: &mut usize) {
    for TextPiece { text, entries } in update.pieces {
        if let Some(logprobs) = &mut choice.logprobs {
            logprobs.extend(&entries, *n_chars);
        }
        *n_chars += text.chars().count();
        choice.text.push_str(&text);
    }
    if let Some(Ending { finish_reason, stop_reason, .. }) = update.ending {
        choice.finish_reason = Some(finish_reason);
        choice.stop_reason = stop_reason;
    }
}

async fn collect(
    app: &App,
    record: &Record,
    generation: Generation<TextAnswer>,
    form: &Form,
) -> Result<Response, ApiError> {
    let begin = |index| TextChoice { text: form.echo(index).to_owned(), ..form.choice(index) };
    let mut choices: Vec<TextChoice> = (0..form.n_choices()).map(begin).collect();
    let mut n_chars: Vec<usize> = choices.iter().map(|one| one.text.chars().count()).collect();
    let gathered = deliver::gather(app, generation, |update| {
        let index = update.index as usize;
        add(&mut choices[index], update, &mut n_chars[index]);
    });
    let usage = gathered.await?;
    deliver::whole(record, &form.completion(choices, Some(Some(usage))))
}

/// Writes the events of a stream.
struct Chunks {
    form: Form,
    /// Characters of each choice so far.
    n_chars: Vec<usize>,
    n_ended: u32,
}

impl Chunks {
    fn new(form: Form) -> Self {
        Self { n_chars: vec![0; form.n_choices() as usize], n_ended: 0, form }
    }
}

impl Frames for Chunks {
    type Piece = TextPiece;

    fn update(&mut self, update: Update<TextPiece>, usage: Usage, events: &mut Vec<u8>) {
        let ended = update.ending.is_some();
        let n_chars = &mut self.n_chars[update.index as usize];
        let mut choice = self.form.choice(update.index);
        if *n_chars == 0 {
            self.form.echo(choice.index).clone_into(&mut choice.text);
            *n_chars = choice.text.chars().count();
        }
        add(&mut choice, update, n_chars);
        self.n_ended += u32::from(ended);
        let last = ended && self.n_ended == self.form.n_choices() && self.form.usage_on_final;
        let usage = match self.form.usage {
            UsageInStream::Always => Some(Some(usage)),
            _ if last => Some(Some(usage)),
            UsageInStream::AtEnd => Some(None),
            UsageInStream::None => None,
        };
        events.append(&mut sse::event(&self.form.completion(vec![choice], usage)));
    }

    fn usage(&self, usage: Usage) -> Option<Vec<u8>> {
        let completion = self.form.completion(Vec::new(), Some(Some(usage)));
        (self.form.usage != UsageInStream::None).then(|| sse::event(&completion))
    }
}
