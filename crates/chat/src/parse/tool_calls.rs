//! One tool call after another: parameters in, a JSON object of arguments out, as it comes.
//!
//! Invariants:
//! - the fragments of a call that was ended concatenate to one valid JSON object;
//! - a text value is handed out as it comes, all but a newline at its end; any other value is
//!   handed out when it is complete, because it may turn out to be no JSON;
//! - a key occurs once: the first one wins, the only rule a stream can honour.
//!
//! Not here: which tag begins or ends what (`answer`).

use std::collections::HashSet;

use serde_json::Value;

use super::Delta;
use super::schema::{Parameters, ToolSet, Types};
use crate::encode::json::{escape_into, to_python_json_string};

/// Parameters in which some models wrap the whole argument object.
const WRAPPERS: [&str; 2] = ["arguments", "input"];

/// Assembles calls.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls {
    tools: ToolSet,
    /// Whether calls are only recognised, not handed out.
    muted: bool,
    n_complete: u32,
    n_duplicates: u32,
    current: Option<Call>,
}

#[derive(Debug, Clone)]
struct Call {
    name: String,
    keys: HashSet<String>,
    /// Whether a first member was handed out, and with it the opening brace.
    opened: bool,
    /// Text outside parameters: perhaps the whole object.
    body: String,
    parameter: Option<Parameter>,
    /// A complete first parameter that may be the wrapper of all.
    wrapper: Option<Complete>,
}

/// The parameter under way.
#[derive(Debug, Clone)]
enum Parameter {
    /// A text, handed out as it comes. A newline at the end is held: if the closing tag is
    /// missing, it belongs to the tag that comes instead.
    Text { newline: bool },
    /// Anything else, kept until it is complete.
    Kept(Complete),
    /// A second value for a key, or one without a name.
    Skipped,
}

#[derive(Debug, Clone)]
struct Complete {
    key: String,
    /// The tag's `string` attribute.
    string: Option<bool>,
    value: String,
}

impl Calls {
    /// With no tools on offer calls are recognised but not handed out.
    pub(super) fn new(tools: Option<ToolSet>) -> Self {
        Self { muted: tools.is_none(), tools: tools.unwrap_or_default(), ..Self::default() }
    }

    pub(super) fn is_muted(&self) -> bool {
        self.muted
    }

    /// Calls that were ended.
    pub(super) fn n_complete(&self) -> u32 {
        self.n_complete
    }

    /// Parameters that were skipped because their call had that key already.
    pub(super) fn n_duplicates(&self) -> u32 {
        self.n_duplicates
    }

    /// Whether a call is under way.
    pub(super) fn is_open(&self) -> bool {
        self.current.is_some()
    }

    /// Begins a call.
    pub(super) fn begin(&mut self, name: String, out: &mut Vec<Delta>) {
        if !self.muted {
            out.push(Delta::ToolCallStart { index: self.n_complete, name: name.clone() });
        }
        self.current = Some(Call {
            name,
            keys: HashSet::new(),
            opened: false,
            body: String::new(),
            parameter: None,
            wrapper: None,
        });
    }

    /// Text between a call's tags.
    pub(super) fn push_body(&mut self, text: &str) {
        if let Some(call) = &mut self.current
            && call.keys.is_empty()
        {
            call.body.push_str(text);
        }
    }

    /// Begins a parameter of the current call.
    pub(super) fn begin_parameter(
        &mut self,
        key: &str,
        string: Option<bool>,
        out: &mut Vec<Delta>,
    ) {
        let Some(call) = &mut self.current else { return };
        if call.keys.contains(key) {
            self.n_duplicates += 1;
            call.parameter = Some(Parameter::Skipped);
            return;
        }
        let declared = self.tools.parameters(&call.name);
        let may_wrap = call.keys.is_empty()
            && WRAPPERS.contains(&key)
            && declared.is_some_and(|declared| !declared.declares(key));
        let mut fragment = String::new();
        if let Some(first) = call.wrapper.take() {
            // It was not the only one after all.
            call.write_complete(&first, declared, &mut fragment);
        }
        call.keys.insert(key.to_owned());
        if string == Some(true) && !may_wrap {
            call.write_key(key, &mut fragment);
            fragment.push('"');
            call.parameter = Some(Parameter::Text { newline: false });
        } else {
            let (key, value) = (key.to_owned(), String::new());
            call.parameter = Some(Parameter::Kept(Complete { key, string, value }));
        }
        self.hand_out(fragment, out);
    }

    /// Begins a value that belongs to no parameter.
    pub(super) fn skip_parameter(&mut self) {
        if let Some(call) = &mut self.current {
            call.parameter = Some(Parameter::Skipped);
        }
    }

    /// More of the current parameter's value.
    pub(super) fn push_value(&mut self, text: &str, out: &mut Vec<Delta>) {
        let Some(call) = &mut self.current else { return };
        match &mut call.parameter {
            Some(Parameter::Text { newline }) => {
                let mut fragment = String::new();
                if *newline && !text.is_empty() {
                    fragment.push_str("\\n");
                    *newline = false;
                }
                let settled = match text.strip_suffix('\n') {
                    Some(settled) => {
                        *newline = true;
                        settled
                    }
                    None => text,
                };
                escape_into(settled, &mut fragment);
                self.hand_out(fragment, out);
            }
            Some(Parameter::Kept(kept)) => kept.value.push_str(text),
            Some(Parameter::Skipped) | None => {}
        }
    }

    /// Ends the current parameter. Without its closing tag (`tagged` false) a newline at its end
    /// is the one that separates tags.
    pub(super) fn end_parameter(&mut self, tagged: bool, out: &mut Vec<Delta>) {
        let Some(call) = &mut self.current else { return };
        let mut fragment = String::new();
        match call.parameter.take() {
            Some(Parameter::Text { newline }) => {
                fragment.push_str(if newline && tagged { "\\n\"" } else { "\"" });
            }
            Some(Parameter::Kept(mut kept)) => {
                if !tagged && kept.value.ends_with('\n') {
                    kept.value.pop();
                }
                let declared = self.tools.parameters(&call.name);
                let may_wrap = call.keys.len() == 1
                    && WRAPPERS.contains(&kept.key.as_str())
                    && declared.is_some_and(|declared| !declared.declares(&kept.key));
                if may_wrap {
                    call.wrapper = Some(kept);
                } else {
                    call.write_complete(&kept, declared, &mut fragment);
                }
            }
            Some(Parameter::Skipped) | None => {}
        }
        self.hand_out(fragment, out);
    }

    /// Ends the current call: it is complete.
    pub(super) fn end(&mut self, out: &mut Vec<Delta>) {
        self.end_parameter(false, out);
        let Some(mut call) = self.current.take() else { return };
        let declared = self.tools.parameters(&call.name);
        let mut fragment = String::new();
        let body = call.body.trim();
        if let Some(wrapper) = call.wrapper.take() {
            match declared.and_then(|declared| wrapper.unwrapped(declared)) {
                Some(object) => fragment.push_str(&object),
                None => {
                    call.write_complete(&wrapper, declared, &mut fragment);
                    fragment.push('}');
                }
            }
        } else if call.opened {
            fragment.push('}');
        } else if call.keys.is_empty() && is_json_object(body) {
            fragment.push_str(body);
        } else {
            fragment.push_str("{}");
        }
        self.hand_out(fragment, out);
        if !self.muted {
            out.push(Delta::ToolCallEnd { index: self.n_complete });
            self.n_complete += 1;
        }
    }

    /// Gives the current call up: it is not complete. Whether there was one.
    pub(super) fn abandon(&mut self) -> bool {
        self.current.take().is_some() && !self.muted
    }

    fn hand_out(&self, fragment: String, out: &mut Vec<Delta>) {
        if fragment.is_empty() || self.muted {
            return;
        }
        out.push(Delta::ToolCallArguments { index: self.n_complete, fragment });
    }
}

impl Call {
    fn write_key(&mut self, key: &str, out: &mut String) {
        out.push_str(if self.opened { ", " } else { "{" });
        self.opened = true;
        out.push_str(&to_python_json_string(key));
        out.push_str(": ");
    }

    fn write_complete(
        &mut self,
        parameter: &Complete,
        declared: Option<&Parameters>,
        out: &mut String,
    ) {
        let types = declared.map(|declared| declared.types(&parameter.key));
        self.write_key(&parameter.key, out);
        if parameter.is_json(types) {
            out.push_str(&parameter.value);
        } else {
            out.push_str(&to_python_json_string(&parameter.value));
        }
    }
}

impl Complete {
    /// Whether the value stands for itself rather than for a text.
    fn is_json(&self, types: Option<Types>) -> bool {
        if self.string == Some(true) {
            return false;
        }
        let Ok(value) = serde_json::from_str::<Value>(&self.value) else { return false };
        // Without the attribute the schema decides, if it can: a text that happens to be JSON
        // stays a text where only a text is declared.
        match (self.string, types) {
            (None, Some(types)) => types.admit(&value) || !types.admit_text(),
            _ => true,
        }
    }

    /// The object this parameter wraps, if it holds nothing but declared parameters.
    fn unwrapped(&self, declared: &Parameters) -> Option<String> {
        let text = self.value.trim();
        match serde_json::from_str(text) {
            Ok(Value::Object(object)) if declared.fits(&object) => Some(text.to_owned()),
            _ => None,
        }
    }
}

fn is_json_object(text: &str) -> bool {
    text.starts_with('{') && matches!(serde_json::from_str(text), Ok(Value::Object(_)))
}
