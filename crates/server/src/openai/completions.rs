//! `POST /v1/completions`: text to continue, or a gap to fill in.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use fathom_chat::Prompt as Rendered;
use fathom_core::TokenId;
use fathom_protocol::openai::completions::{
    CompletionRequest, Prompt, TextChoice, TextCompletion, TextLogprobs,
};
use fathom_protocol::openai::{self, response::Usage};
use fathom_protocol::{ApiError, ErrorCode, Surface, sse};

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
use crate::registry::ModelEntry;

/// Tokens of an answer whose request gives no limit, as at OpenAI.
const DEFAULT_MAX_TOKENS: u32 = 16;

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    caller: Caller,
    JsonBody(body): JsonBody,
) -> Result<Response, Refusal> {
    let model = resolve(&app, &record, &caller, openai::model_name(&body)?)?.model;
    let request = CompletionRequest::read(&body, &rules(&app, &model, &body))?;
    drop(body);
    record.note_unknown(&request.unknown);
    check_supported(&request, &model)?;
    let turn = caller.begin(Instant::now())?;
    let streams = request.stream;
    let form = Form {
        id: format!("cmpl-{}", app.random.id()),
        created: unix_seconds(),
        model: request.model.clone(),
        fingerprint: model.fingerprint.clone(),
        include_usage: request.include_usage,
        usage_on_final: app.config.compat.usage_on_final_chunk,
        logprobs: request.logprobs.is_some(),
        echo: echo(&request, &model),
        n: request.sampling.n,
    };
    let n_bytes = match (&request.prompt, &request.suffix) {
        (Prompt::Text(text), suffix) => text.len() + suffix.as_ref().map_or(0, String::len),
        (Prompt::Tokens(_), _) => 0,
    };
    let model_of_run = Arc::clone(&model);
    let run = off_the_reactor(&app, n_bytes, |app| prepare(&app, model_of_run, request)).await?;
    let n_prompt = run.n_prompt();
    let (sampling, logprobs) = (run.sampling().clone(), form.logprobs);
    let answer = || {
        let (stop, ids) = (&sampling.stop, &sampling.stop_token_ids);
        TextAnswer::new(&model.tokenizer, stop, ids, sampling.skip_special_tokens, logprobs)
    };
    let choices = run.submit(&app, "prompt", || None, answer)?;
    let context =
        Context { app: Arc::clone(&app), record: Arc::clone(&record), model, turn, n_prompt };
    let generation = Generation::new(context, choices);
    if streams {
        let n_chars = vec![0; form.n as usize];
        return Ok(deliver::stream(&app, generation, Chunks { form, n_chars, n_ended: 0 }));
    }
    let (own_app, own_record) = (Arc::clone(&app), Arc::clone(&record));
    let answer = async move { collect(&own_app, &own_record, generation, &form).await };
    Ok(deliver::wait(&app, &record, Surface::OpenAi, answer).await?)
}

/// The rules of the endpoint: fill-in-the-middle has a lower cap of its own.
fn rules(app: &App, model: &ModelEntry, body: &fathom_protocol::Object) -> openai::Rules {
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

/// The prompt's text, if the answer is to begin with it.
fn echo(request: &CompletionRequest, model: &ModelEntry) -> String {
    match &request.prompt {
        _ if !request.echo => String::new(),
        Prompt::Text(text) => text.clone(),
        Prompt::Tokens(ids) => model.tokenizer.decode(ids),
    }
}

fn prepare(app: &App, model: Arc<ModelEntry>, request: CompletionRequest) -> Result<Run, ApiError> {
    let fill_in = request.suffix.is_some();
    let rendered = match (request.prompt, request.suffix) {
        (Prompt::Tokens(ids), _) => Ok(ids),
        (Prompt::Text(text), None) => Rendered::completion(&text).token_ids(&model.tokenizer),
        (Prompt::Text(prefix), Some(suffix)) => {
            Rendered::fill_in_the_middle(&prefix, &suffix).token_ids(&model.tokenizer)
        }
    };
    let ids: Vec<TokenId> = rendered.map_err(|error| error::internal(&error))?;
    let default = if fill_in { app.config.fim.max_tokens } else { DEFAULT_MAX_TOKENS };
    let default = DefaultMaxTokens::Tokens(default);
    Run::new(model, ids, "prompt", request.sampling, request.logprobs, default, &app.config)
}

/// What every response and chunk of a request has in common.
struct Form {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    include_usage: bool,
    usage_on_final: bool,
    logprobs: bool,
    echo: String,
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
    let begin = |index| TextChoice { text: form.echo.clone(), ..form.choice(index) };
    let mut choices: Vec<TextChoice> = (0..form.n).map(begin).collect();
    let mut n_chars = vec![form.echo.chars().count(); choices.len()];
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

impl Frames for Chunks {
    type Piece = TextPiece;

    fn update(&mut self, update: Update<TextPiece>, usage: Usage, events: &mut Vec<u8>) {
        let ended = update.ending.is_some();
        let n_chars = &mut self.n_chars[update.index as usize];
        let mut choice = self.form.choice(update.index);
        if *n_chars == 0 {
            choice.text.clone_from(&self.form.echo);
            *n_chars = self.form.echo.chars().count();
        }
        add(&mut choice, update, n_chars);
        self.n_ended += u32::from(ended);
        let last = ended && self.n_ended == self.form.n && self.form.usage_on_final;
        let usage = if last { Some(Some(usage)) } else { self.form.include_usage.then_some(None) };
        events.append(&mut sse::event(&self.form.completion(vec![choice], usage)));
    }

    fn usage(&self, usage: Usage) -> Option<Vec<u8>> {
        let completion = self.form.completion(Vec::new(), Some(Some(usage)));
        self.form.include_usage.then(|| sse::event(&completion))
    }
}
