//! `POST /v1/chat/completions`: from a body to a response or a stream of chunks.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use fathom_protocol::openai::response::{
    AssistantMessage, ChatCompletion, Choice, FinishDetails, FinishReason, FunctionBody,
    FunctionCall, LogprobEntry, Logprobs, Usage,
};
use fathom_protocol::openai::stream::{ChatChunk, ChunkChoice, Delta, DeltaWriter};
use fathom_protocol::openai::{self, ChatRequest, UsageInStream};
use fathom_protocol::{ApiError, Object, Surface, sse};

use super::deliver::{self, Frames};
use super::lower::Plan;
use super::raise::{ChatAnswer, Piece};
use super::{off_the_reactor, resolve};
use crate::app::{App, unix_seconds};
use crate::auth::Caller;
use crate::body::JsonBody;
use crate::error::Refusal;
use crate::generate::{Context, Ending, Generation, Update};
use crate::record::Record;
use crate::registry::ModelEntry;
use crate::routes;

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    uri: Uri,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, Refusal> {
    let read = {
        let (record, caller) = (Arc::clone(&record), caller.clone());
        move |app: &App, body| read(app, &record, &caller, &uri, body)
    };
    let Asked { plan, form, model, streams } = body.read(&app, read).await?;
    let turn = caller.begin(Instant::now())?;
    let n_bytes = plan.n_bytes();
    let prepared = off_the_reactor(&app, n_bytes, |app| plan.encode(&app)).await?;
    let form = Form { reasoning: prepared.shows_reasoning(), ..form };
    let ignored = prepared.ignored().to_vec();
    let n_prompt = prepared.n_prompt();
    let choices = prepared.submit(&app, "call_")?;
    let (own_app, own_record) = (Arc::clone(&app), Arc::clone(&record));
    let context = Context { app: own_app, record: own_record, model, turn, n_prompt, n_prompts: 1 };
    let generation = Generation::new(context, choices);
    let mut response = if streams {
        deliver::stream(&app, generation, Chunks::new(form))
    } else {
        let (own_app, own_record) = (Arc::clone(&app), Arc::clone(&record));
        let answer = async move { collect(&own_app, &own_record, generation, &form).await };
        deliver::wait(&app, &record, Surface::OpenAi, answer).await?
    };
    deliver::name_ignored(&mut response, &ignored);
    Ok(response)
}

/// A request that was read.
struct Asked {
    plan: Plan,
    form: Form,
    model: Arc<ModelEntry>,
    streams: bool,
}

/// Reads a body in the contract's order of checks.
fn read(
    app: &App,
    record: &Record,
    caller: &Caller,
    uri: &Uri,
    body: Object,
) -> Result<Asked, ApiError> {
    let resolved = resolve(app, record, caller, openai::model_name(&body)?)?;
    let model = Arc::clone(&resolved.model);
    let request = ChatRequest::read(&body, &app.config.rules(model.vocab_size()))?;
    drop(body);
    record.note_unknown(&request.unknown);
    if app.config.compat.require_beta_path && !routes::is_beta(uri) {
        refuse_beta_features(&request)?;
    }
    let streams = request.stream;
    let form = Form {
        id: format!("chatcmpl-{}", app.random.id()),
        created: unix_seconds(),
        model: request.model.clone(),
        fingerprint: model.fingerprint.clone(),
        usage: request.usage,
        logprobs: request.logprobs.is_some(),
        reasoning: false,
        alias: app.config.compat.reasoning_alias,
        usage_on_final: app.config.compat.usage_on_final_chunk,
        n: request.sampling.n,
    };
    let plan = Plan::new(request, &resolved, &app.config)?;
    Ok(Asked { plan, form, model, streams })
}

/// The hosted API knows these under `/beta` only.
fn refuse_beta_features(request: &ChatRequest) -> Result<(), ApiError> {
    let strict = request.tools.iter().position(|tool| tool.strict);
    let param = match strict {
        Some(i) => format!("tools[{i}].function.strict"),
        None if request.is_prefix() => format!("messages[{}].prefix", request.messages.len() - 1),
        None => return Ok(()),
    };
    Err(deliver::beta_only(param))
}

/// What every response and chunk of a request has in common.
struct Form {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    usage: UsageInStream,
    logprobs: bool,
    /// Whether the client is shown reasoning.
    reasoning: bool,
    alias: bool,
    usage_on_final: bool,
    n: u32,
}

impl Form {
    /// A chunk without choices.
    fn chunk(&self) -> ChatChunk<'_> {
        ChatChunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices: Vec::new(),
            usage: (self.usage != UsageInStream::None).then_some(None),
        }
    }
}

/// A choice while its pieces come in.
#[derive(Default)]
struct Draft {
    content: String,
    reasoning: String,
    /// Calls, and whether they are complete.
    calls: Vec<(FunctionCall, bool)>,
    content_logprobs: Vec<LogprobEntry>,
    reasoning_logprobs: Vec<LogprobEntry>,
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
        let Ending { finish_reason, stop_reason, details } = self.ending.unwrap_or(Ending {
            finish_reason: FinishReason::InsufficientSystemResource,
            stop_reason: None,
            details: FinishDetails::default(),
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
            finish_reason,
            stop_reason,
            finish_details: details.unless_plain(),
        }
    }
}

async fn collect(
    app: &App,
    record: &Record,
    generation: Generation<ChatAnswer>,
    form: &Form,
) -> Result<Response, ApiError> {
    let mut drafts: Vec<Draft> = (0..form.n).map(|_| Draft::default()).collect();
    let add = |update: Update<Piece>| {
        let draft = &mut drafts[update.index as usize];
        update.pieces.into_iter().for_each(|piece| draft.add(piece));
        draft.ending = update.ending;
    };
    let usage = deliver::gather(app, generation, add).await?;
    let choice = |(index, draft): (u32, Draft)| draft.into_choice(index, form);
    let completion = ChatCompletion {
        id: &form.id,
        object: "chat.completion",
        created: form.created,
        model: &form.model,
        choices: (0..form.n).zip(drafts).map(choice).collect(),
        usage,
        system_fingerprint: &form.fingerprint,
    };
    deliver::whole(record, &completion)
}

/// Writes chunks in the order the contract gives them.
struct Chunks {
    form: Form,
    deltas: DeltaWriter,
    /// Whether a choice has had its role chunk.
    begun: Vec<bool>,
    n_ended: u32,
}

impl Frames for Chunks {
    type Piece = Piece;

    fn update(&mut self, update: Update<Piece>, usage: Usage, events: &mut Vec<u8>) {
        let Update { index, pieces, ending } = update;
        let always = (self.form.usage == UsageInStream::Always).then_some(usage);
        if !std::mem::replace(&mut self.begun[index as usize], true) {
            let delta = Delta::Role { thinking: self.form.reasoning };
            self.chunk(ChunkChoice { index, delta, logprobs: None }, always, events);
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
            match (self.logprobs(piece), always) {
                // Nearly every chunk of a stream.
                (None, None) => self.deltas.append(index, &delta, events),
                (logprobs, always) => {
                    self.chunk(ChunkChoice { index, delta, logprobs }, always, events);
                }
            }
        }
        if let Some(Ending { finish_reason, stop_reason, details }) = ending {
            self.n_ended += 1;
            let last = self.n_ended == self.form.n && self.form.usage_on_final;
            let finish_details = details.unless_plain();
            let delta = Delta::End { finish_reason, stop_reason, finish_details };
            let choice = ChunkChoice { index, delta, logprobs: None };
            self.chunk(choice, last.then_some(usage).or(always), events);
        }
    }

    fn usage(&self, usage: Usage) -> Option<Vec<u8>> {
        let chunk = ChatChunk { usage: Some(Some(usage)), ..self.form.chunk() };
        (self.form.usage != UsageInStream::None).then(|| sse::event(&chunk))
    }
}

impl Chunks {
    fn new(form: Form) -> Self {
        let deltas = DeltaWriter::new(&form.chunk());
        Self { begun: vec![false; form.n as usize], deltas, form, n_ended: 0 }
    }

    fn chunk(&self, choice: ChunkChoice<'_>, usage: Option<Usage>, events: &mut Vec<u8>) {
        let mut chunk = self.form.chunk();
        chunk.choices = vec![choice];
        if usage.is_some() {
            chunk.usage = Some(usage);
        }
        events.append(&mut sse::event(&chunk));
    }

    fn logprobs(&self, piece: &Piece) -> Option<Logprobs> {
        let (content, reasoning_content) = match piece {
            Piece::Reasoning(_, entries) => (Vec::new(), Some(entries.clone())),
            Piece::Content(_, entries) => (entries.clone(), None),
            Piece::Call { .. } | Piece::Arguments { .. } | Piece::CallEnd { .. } => return None,
        };
        self.form.logprobs.then_some(Logprobs { content, reasoning_content, refusal: () })
    }
}
