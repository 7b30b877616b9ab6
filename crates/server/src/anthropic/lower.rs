//! What the Messages surface settles before a request goes the way of the chat surface: which model
//! a name means, and whether a request that says nothing thinks.

use fathom_protocol::{ApiError, ErrorCode};

use crate::app::App;
use crate::auth::Caller;
use crate::config::{AnthropicConfig, MessagesThinking};
use crate::record::Record;
use crate::registry::Resolved;

/// The model that a client means by `name`, if it may use it.
///
/// # Errors
/// `model_not_found` for a name that neither a model has nor a pattern matches.
pub(super) fn resolve(
    app: &App,
    record: &Record,
    caller: &Caller,
    name: &str,
) -> Result<Resolved, ApiError> {
    let config = &app.config.anthropic;
    let known = app.registry.resolve(name, &app.config.models);
    let mut resolved = match known {
        Err(unknown) if unknown.code == ErrorCode::ModelNotFound => {
            mapped(app, config, name).ok_or(unknown)?
        }
        known => known?,
    };
    if config.default_thinking == MessagesThinking::Off {
        resolved.thinks = resolved.thinks.or(Some(false));
    }
    record.note(|facts| facts.model = Some(resolved.model.canonical_id().to_owned()));
    caller.may_use(&resolved.model.ids)?;
    Ok(resolved)
}

/// The model that a name of Anthropic's leads to.
fn mapped(app: &App, config: &AnthropicConfig, name: &str) -> Option<Resolved> {
    let matches = |pattern: &str| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    };
    let fitting = config.model_map.iter().filter(|(pattern, _)| matches(pattern));
    let (_, target) = fitting.max_by_key(|(pattern, _)| pattern.len())?;
    let others = config.model_map.values().filter(|other| *other != target);
    let entries = app.registry.loaded();
    let sole = entries.first().filter(|_| entries.len() == 1).map(|entry| entry.canonical_id());
    let candidates = std::iter::once(target).chain(others).map(String::as_str).chain(sole);
    let mut found = candidates.filter_map(|id| app.registry.resolve(id, &app.config.models).ok());
    found.next()
}
