//! The Responses surface: `POST /v1/responses`, stateless.
//!
//! A request goes the way of the chat surface; `raise` turns the pieces of its answer into items.
//! Nothing is remembered: what would need memory was refused when the request was read.

mod raise;

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use fathom_protocol::openai::model_name;
use fathom_protocol::responses::ResponsesRequest;
use fathom_protocol::{ApiError, Object, Surface};

use crate::app::{App, unix_seconds};
use crate::auth::Caller;
use crate::body::JsonBody;
use crate::error::Refusal;
use crate::generate::{Context, Generation};
use crate::openai::lower::Plan;
use crate::openai::{deliver, off_the_reactor, resolve};
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
    let ignored = prepared.ignored().to_vec();
    let n_prompt = prepared.n_prompt();
    let choices = prepared.submit(&app, "call_")?;
    let (own_app, own_record) = (Arc::clone(&app), Arc::clone(&record));
    let context = Context { app: own_app, record: own_record, model, turn, n_prompt, n_prompts: 1 };
    let generation = Generation::new(context, choices);
    let items = raise::Items::new(Arc::clone(&app), form);
    let mut response = if streams {
        deliver::stream(&app, generation, items)
    } else {
        let own = Arc::clone(&record);
        let answer = async move { raise::collect(&own, generation, items).await };
        deliver::wait(&app, &record, Surface::OpenAi, answer).await?
    };
    deliver::name_ignored(&mut response, &ignored);
    Ok(response)
}

/// A request that was read.
struct Asked {
    plan: Plan,
    form: raise::Form,
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
    let resolved = resolve(app, record, caller, model_name(&body)?)?;
    let model = Arc::clone(&resolved.model);
    let rules = app.config.rules(model.vocab_size());
    let ResponsesRequest { chat, echo, seal_reasoning } = ResponsesRequest::read(&body, &rules)?;
    drop(body);
    record.note_unknown(&chat.unknown);
    if app.config.compat.require_beta_path && !routes::is_beta(uri) {
        let strict = chat.tools.iter().position(|tool| tool.strict);
        if let Some(i) = strict {
            return Err(deliver::beta_only(format!("tools[{i}].strict")));
        }
    }
    let streams = chat.stream;
    let form = raise::Form {
        id: format!("resp_{}", app.random.id()),
        created_at: unix_seconds(),
        model: chat.model.clone(),
        echo,
        seal_reasoning,
    };
    let plan = Plan::new(chat, &resolved, &app.config)?;
    Ok(Asked { plan, form, model, streams })
}
