//! The Messages surface: `POST /v1/messages` and `POST /v1/messages/count_tokens`.
//!
//! `lower` finds the model a name means and what a request without `thinking` does; from there on
//! a request goes the way of the chat surface. `raise` turns the pieces of its answer into blocks.

mod lower;
mod raise;

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use fathom_protocol::anthropic::response::TokenCount;
use fathom_protocol::anthropic::{MessagesRequest, Purpose};
use fathom_protocol::openai::model_name;
use fathom_protocol::{ApiError, Object, Surface};

use crate::app::App;
use crate::auth::Caller;
use crate::body::JsonBody;
use crate::error::Refusal;
use crate::generate::{Context, Generation};
use crate::openai::deliver;
use crate::openai::lower::Plan;
use crate::openai::off_the_reactor;
use crate::record::Record;
use crate::registry::ModelEntry;

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
    let Asked { plan, form, model, max_tokens, streams } = body.read(&app, read).await?;
    let turn = caller.begin(Instant::now())?;
    let n_bytes = plan.n_bytes();
    let prepared = off_the_reactor(&app, n_bytes, |app| plan.encode(&app)).await?;
    let ignored = prepared.ignored().to_vec();
    let n_prompt = prepared.n_prompt();
    let room = model.engine.limits().max_model_len.saturating_sub(n_prompt);
    let form = raise::Form { context_cuts: max_tokens > room, ..form };
    let choices = prepared.submit(&app, "toolu_")?;
    let (own_app, own_record) = (Arc::clone(&app), Arc::clone(&record));
    let context = Context { app: own_app, record: own_record, model, turn, n_prompt, n_prompts: 1 };
    let generation = Generation::new(context, choices);
    let mut response = if streams {
        deliver::stream(&app, generation, raise::Events::new(form))
    } else {
        let own = Arc::clone(&record);
        let answer = async move { raise::collect(&own, generation, &form).await };
        deliver::wait(&app, &record, Surface::Anthropic, answer).await?
    };
    deliver::name_ignored(&mut response, &ignored);
    Ok(response)
}

/// A request that was read.
struct Asked {
    plan: Plan,
    form: raise::Form,
    model: Arc<ModelEntry>,
    max_tokens: u32,
    streams: bool,
}

/// Reads a body in the contract's order of checks.
fn read(app: &App, record: &Record, caller: &Caller, body: Object) -> Result<Asked, ApiError> {
    let resolved = lower::resolve(app, record, caller, model_name(&body)?)?;
    let model = Arc::clone(&resolved.model);
    let rules = app.config.rules(model.vocab_size());
    let request = MessagesRequest::read(&body, &rules, Purpose::Generate)?;
    drop(body);
    record.note_unknown(&request.chat.unknown);
    let MessagesRequest { chat, omit_thinking } = request;
    let streams = chat.stream;
    let max_tokens = chat.sampling.max_tokens.map_or(0, |(_, tokens)| tokens);
    let form = raise::Form {
        id: format!("msg_{}", app.random.id()),
        request_id: record.id.clone(),
        model: chat.model.clone(),
        omit_thinking,
        context_cuts: false,
    };
    let plan = Plan::new(chat, &resolved, &app.config)?;
    Ok(Asked { plan, form, model, max_tokens, streams })
}

pub(crate) async fn count_tokens(
    State(app): State<Arc<App>>,
    Extension(record): Extension<Arc<Record>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, Refusal> {
    let read = {
        let record = Arc::clone(&record);
        move |app: &App, body: Object| {
            let resolved = lower::resolve(app, &record, &caller, model_name(&body)?)?;
            let rules = app.config.rules(resolved.model.vocab_size());
            let request = MessagesRequest::read(&body, &rules, Purpose::Count)?;
            drop(body);
            record.note_unknown(&request.chat.unknown);
            Plan::new(request.chat, &resolved, &app.config)
        }
    };
    let plan = body.read(&app, read).await?;
    let n_bytes = plan.n_bytes();
    let ids = off_the_reactor(&app, n_bytes, move |app| plan.token_ids(&app)).await?;
    Ok(deliver::whole(&record, &TokenCount { input_tokens: ids.len() })?)
}
