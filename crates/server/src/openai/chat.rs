//! `POST /v1/chat/completions`: from a body to a response or a stream of chunks.
//!
//! Everything that can refuse the request happens before the status line; a stream that has begun
//! ends with `[DONE]` or with an error event, never silently.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, HeaderValue, Uri};
use axum::response::{IntoResponse, Response};
use fathom_engine::GenerateError;
use fathom_protocol::openai::response::{
    AssistantMessage, ChatCompletion, Choice, FinishReason, FunctionBody, FunctionCall, Logprobs,
    Usage,
};
use fathom_protocol::openai::stream::{ChatChunk, ChunkChoice, Delta};
use fathom_protocol::openai::{self, ChatRequest};
use fathom_protocol::{ApiError, ErrorCode, Surface, sse};

use super::lower::{Plan, Prepared};
use super::raise::{Ending, Piece};
use crate::app::{App, unix_seconds};
use crate::auth::Caller;
use crate::body::JsonBody;
use crate::error::{self, Refusal};
use crate::generate::{Context, Generation, Update};
use crate::record::Record;
use crate::routes;
use crate::sse::{Gone, Outbox, channel};

/// Text beyond which a prompt is made on a thread for blocking work: a few milliseconds' worth.
const INLINE_BYTES: usize = 4 * 1024;

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    uri: Uri,
    caller: Caller,
    JsonBody(body): JsonBody,
) -> Result<Response, Refusal> {
    let resolved = app.registry.resolve(openai::model_name(&body)?, &app.config.models)?;
    let model = Arc::clone(&resolved.model);
    record.note(|facts| facts.model = Some(model.canonical_id().to_owned()));
    caller.may_use(&model.ids)?;
    let request = ChatRequest::read(&body, &app.config.rules(model.vocab_size()))?;
    drop(body);
    if !request.unknown.is_empty() {
        tracing::debug!(request_id = %record.id, fields = ?request.unknown, "ignored fields");
    }
    if app.config.compat.require_beta_path && !routes::is_beta(&uri) {
        refuse_beta_features(&request)?;
    }
    let form = Form {
        id: format!("chatcmpl-{}", app.random.id()),
        created: unix_seconds(),
        model: request.model.clone(),
        fingerprint: model.fingerprint.clone(),
        stream: request.stream,
        include_usage: request.include_usage,
        logprobs: request.logprobs.is_some(),
        reasoning: false,
        alias: app.config.compat.reasoning_alias,
        usage_on_final: app.config.compat.usage_on_final_chunk,
        cut_is_an_ending: app.config.compat.insufficient_resource,
        n: request.sampling.n,
    };
    let plan = Plan::new(request, &resolved, &app.config)?;
    let turn = caller.begin(Instant::now())?;
    let prepared = encode(&app, plan).await?;
    let form = Form { reasoning: prepared.shows_reasoning(), ..form };
    let ignored = prepared.ignored().join(", ");
    let n_prompt = prepared.n_prompt();
    let choices = prepared.submit(&app)?;
    let context =
        Context { app: Arc::clone(&app), record: Arc::clone(&record), model, turn, n_prompt };
    let generation = Generation::new(context, choices);

    let mut response = if form.stream {
        let (outbox, response) = channel(&app.config.sse);
        let keep_alive = Duration::from_secs(app.config.sse.keepalive_s);
        app.tasks.spawn(stream(generation, outbox, form, keep_alive));
        response
    } else {
        let mut response = collect(generation, &form).await?;
        let elapsed = u64::try_from(record.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let name = HeaderName::from_static("openai-processing-ms");
        response.headers_mut().insert(name, HeaderValue::from(elapsed));
        response
    };
    if !ignored.is_empty() {
        let ignored = HeaderValue::from_str(&ignored).expect("field names are ASCII");
        response.headers_mut().insert(HeaderName::from_static("x-ignored-params"), ignored);
    }
    Ok(response)
}

/// Prompts of any length, without holding up the reactor for long ones.
async fn encode(app: &Arc<App>, plan: Plan) -> Result<Prepared, ApiError> {
    if plan.n_bytes() <= INLINE_BYTES {
        return plan.encode(&app.config);
    }
    let app = Arc::clone(app);
    let encoded = tokio::task::spawn_blocking(move || plan.encode(&app.config)).await;
    encoded.unwrap_or_else(|error| Err(error::internal(&error)))
}

/// The hosted API knows these under `/beta` only.
fn refuse_beta_features(request: &ChatRequest) -> Result<(), ApiError> {
    let strict = request.tools.iter().position(|tool| tool.strict);
    let param = match strict {
        Some(i) => format!("tools[{i}].function.strict"),
        None if request.is_prefix() => format!("messages[{}].prefix", request.messages.len() - 1),
        None => return Ok(()),
    };
    let message = format!("`{param}` is supported under /beta only.");
    Err(ApiError::at(ErrorCode::UnsupportedParameter, param, message))
}

/// What every response and chunk of a request has in common.
struct Form {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    stream: bool,
    include_usage: bool,
    logprobs: bool,
    /// Whether the client is shown reasoning.
    reasoning: bool,
    alias: bool,
    usage_on_final: bool,
    cut_is_an_ending: bool,
    n: u32,
}

/// A choice while its pieces come in.
#[derive(Default)]
struct Draft {
    content: String,
    reasoning: String,
    calls: Vec<(FunctionCall, bool)>,
    content_logprobs: Vec<openai::response::LogprobEntry>,
    reasoning_logprobs: Vec<openai::response::LogprobEntry>,
    ending: Option<Ending>,
}

impl Draft {
    fn add(&mut self, piece: Piece) {
        match piece {
            Piece::Reasoning(text, mut entries) => {
                self.reasoning.push_str(&text);
                self.reasoning_logprobs.append(&mut entries);
            }
            Piece::Content(text, mut entries) => {
                self.content.push_str(&text);
                self.content_logprobs.append(&mut entries);
            }
            Piece::Call { id, name, .. } => {
                let function = FunctionBody { name, arguments: String::new() };
                self.calls.push((FunctionCall { id, kind: "function", function }, false));
            }
            Piece::Arguments { index, text } => {
                if let Some((call, _)) = self.calls.get_mut(index as usize) {
                    call.function.arguments.push_str(&text);
                }
            }
            Piece::CallEnd { index } => {
                if let Some((_, complete)) = self.calls.get_mut(index as usize) {
                    *complete = true;
                }
            }
        }
    }

    fn into_choice(self, index: u32, form: &Form) -> Choice {
        let calls = self.calls.into_iter().filter(|(_, complete)| *complete);
        let tool_calls: Vec<FunctionCall> = calls.map(|(call, _)| call).collect();
        let ending = self.ending.unwrap_or(Ending {
            finish_reason: FinishReason::InsufficientSystemResource,
            stop_reason: None,
        });
        let silent = self.content.is_empty() && !tool_calls.is_empty();
        Choice {
            index,
            logprobs: form.logprobs.then_some(Logprobs {
                content: self.content_logprobs,
                reasoning_content: form.reasoning.then_some(self.reasoning_logprobs),
                refusal: (),
            }),
            message: AssistantMessage {
                role: "assistant",
                content: (!silent).then_some(self.content),
                reasoning: (form.reasoning && form.alias).then(|| self.reasoning.clone()),
                reasoning_content: form.reasoning.then_some(self.reasoning),
                tool_calls,
            },
            finish_reason: ending.finish_reason,
            stop_reason: ending.stop_reason,
        }
    }
}

async fn collect(mut generation: Generation, form: &Form) -> Result<Response, ApiError> {
    let mut drafts: Vec<Draft> = (0..form.n).map(|_| Draft::default()).collect();
    let mut add = |update: Update| {
        let draft = &mut drafts[update.index as usize];
        update.pieces.into_iter().for_each(|piece| draft.add(piece));
        draft.ending = update.ending;
    };
    loop {
        match generation.next().await {
            Ok(Some(update)) => add(update),
            Ok(None) => break,
            Err(failure) if form.cut_is_an_ending && is_cut(&failure) => {
                generation.cut().into_iter().for_each(&mut add);
                break;
            }
            Err(failure) => return Err(error::from_generate(&failure)),
        }
    }
    let choice = |(index, draft): (u32, Draft)| draft.into_choice(index, form);
    let completion = ChatCompletion {
        id: &form.id,
        object: "chat.completion",
        created: form.created,
        model: &form.model,
        choices: (0..form.n).zip(drafts).map(choice).collect(),
        usage: generation.usage(),
        system_fingerprint: &form.fingerprint,
    };
    let json = serde_json::to_string(&completion).map_err(|error| error::internal(&error))?;
    Ok(([(CONTENT_TYPE, "application/json")], json).into_response())
}

/// Whether the server cut the generation, as opposed to never starting it.
const fn is_cut(failure: &GenerateError) -> bool {
    matches!(failure, GenerateError::ShuttingDown | GenerateError::StepFailed { .. })
}

/// Writes a stream until its end, its failure, or its reader's departure.
async fn stream(mut generation: Generation, outbox: Outbox, form: Form, keep_alive: Duration) {
    let mut chunks =
        Chunks { form: &form, outbox: &outbox, begun: vec![false; form.n as usize], n_ended: 0 };
    loop {
        let event = tokio::select! {
            event = generation.next() => event,
            () = outbox.closed() => return,
            () = tokio::time::sleep(keep_alive) => {
                if outbox.send(sse::KEEP_ALIVE).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let sent = match event {
            Ok(Some(update)) => chunks.send(update, &generation).await,
            Ok(None) => break,
            Err(failure) if form.cut_is_an_ending && is_cut(&failure) => {
                let mut sent = Ok(());
                for update in generation.cut() {
                    sent = sent.and(chunks.send(update, &generation).await);
                }
                if sent.is_ok() {
                    break;
                }
                sent
            }
            Err(failure) => {
                let json = error::from_generate(&failure).to_json(Surface::OpenAi, "");
                // The client may be gone as well; either way this is the end.
                let _ = outbox.send(sse::raw_event(&json)).await;
                return outbox.end();
            }
        };
        if sent.is_err() {
            return;
        }
    }
    if form.include_usage && chunks.usage(generation.usage()).await.is_err() {
        return;
    }
    // The request is over before the client hears so: whoever asks next finds it gone.
    drop(generation);
    if outbox.send(sse::DONE).await.is_ok() {
        outbox.end();
    }
}

/// Writes chunks in the order the contract gives them.
struct Chunks<'a> {
    form: &'a Form,
    outbox: &'a Outbox,
    /// Whether a choice has had its role chunk.
    begun: Vec<bool>,
    n_ended: u32,
}

impl<'a> Chunks<'a> {
    async fn send(&mut self, update: Update, generation: &Generation) -> Result<(), Gone> {
        let Update { index, pieces, ending } = update;
        if !std::mem::replace(&mut self.begun[index as usize], true) {
            self.chunk(index, Delta::Role { thinking: self.form.reasoning }, None, None).await?;
        }
        for piece in &pieces {
            let alias = self.form.alias;
            let delta = match piece {
                Piece::Reasoning(text, _) => Delta::Reasoning { text, alias },
                Piece::Content(text, _) => Delta::Content(text),
                Piece::Call { index, id, name } => Delta::Call { index: *index, id, name },
                Piece::Arguments { index, text } => Delta::Arguments { index: *index, text },
                Piece::CallEnd { .. } => continue,
            };
            self.chunk(index, delta, self.logprobs(piece), None).await?;
        }
        let Some(Ending { finish_reason, stop_reason }) = ending else { return Ok(()) };
        self.n_ended += 1;
        let last = self.n_ended == self.form.n && self.form.usage_on_final;
        let usage = last.then(|| generation.usage());
        self.chunk(index, Delta::End { finish_reason, stop_reason }, None, usage).await
    }

    /// The chunk after the last, for clients that asked for usage.
    async fn usage(&self, usage: Usage) -> Result<(), Gone> {
        let chunk = ChatChunk { usage: Some(Some(usage)), ..self.empty() };
        self.outbox.send(sse::event(&chunk)).await
    }

    async fn chunk(
        &self,
        index: u32,
        delta: Delta<'_>,
        logprobs: Option<Logprobs>,
        usage: Option<Usage>,
    ) -> Result<(), Gone> {
        let mut chunk = self.empty();
        chunk.choices = vec![ChunkChoice { index, delta, logprobs }];
        if usage.is_some() {
            chunk.usage = Some(usage);
        }
        self.outbox.send(sse::event(&chunk)).await
    }

    fn logprobs(&self, piece: &Piece) -> Option<Logprobs> {
        let (content, reasoning_content) = match piece {
            Piece::Reasoning(_, entries) => (Vec::new(), Some(entries.clone())),
            Piece::Content(_, entries) => (entries.clone(), None),
            Piece::Call { .. } | Piece::Arguments { .. } | Piece::CallEnd { .. } => return None,
        };
        self.form.logprobs.then_some(Logprobs { content, reasoning_content, refusal: () })
    }

    fn empty(&self) -> ChatChunk<'a> {
        let form = self.form;
        ChatChunk {
            id: &form.id,
            object: "chat.completion.chunk",
            created: form.created,
            model: &form.model,
            system_fingerprint: &form.fingerprint,
            choices: Vec::new(),
            usage: form.include_usage.then_some(None),
        }
    }
}
