//! The grammar of a tool-call block, in the mask engine's notation.
//!
//! A block is a run of tags; the marker inside each is a control token, so a value can hold any
//! text and still ends where its closing tag begins. What stands between two markers is one or more
//! terminals, chosen so that no terminal is the beginning of another that may stand in its place:
//! the engine's lexer takes the longest and never goes back.
//!
//! Parameters come in any order, as the model likes, each at most once: a rule carries the set of
//! those that were given (64 bits), and the call may end when all required ones are among them.
//!
//! Undeclared parameters are only allowed where a tool declares none, or says that there are more:
//! agents reject what a model invents.
//!
//! Not here: what the tags mean to the reader (`parse`).

use std::sync::LazyLock;

use fathom_core::TokenId;
use serde_json::{Map, Value};

use super::text::{self, ANY, Split};
use super::{CallRules, Enforcement, Fault, GrammarError, Part, Start, ToolRule, schema};

/// Parameters one tool's rule can keep apart.
const MAX_PARAMETERS: usize = 63;
/// Keys of parameters that the schema does not name.
const FREE_KEY: &str = r#"/[^"<>\\\x00-\x1f\x7f]{1,64}/"#;
/// Names in tags longer than this are not recognised.
const MAX_KEY_BYTES: usize = 512;
/// Keywords that say something about several arguments at once.
const COMBINING: [&str; 6] = ["anyOf", "oneOf", "allOf", "not", "if", "dependentRequired"];
/// Parameters that the parser takes for a wrapper around all arguments if they are not declared.
const WRAPPERS: [&str; 2] = ["arguments", "input"];

/// A block's rules, and the documents they name.
#[derive(Debug, Default)]
pub(super) struct Block {
    /// Definitions; the rule `block` is what follows the first marker.
    pub(super) rules: String,
    /// Documents by index: the rules name them `@jN`.
    pub(super) documents: Vec<(Value, Document)>,
}

/// Where a document comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Document {
    /// Whether unknown keywords are errors.
    pub(super) strict: bool,
    /// The first tool that needs it.
    pub(super) tool: String,
}

/// How a grammar begins that leads to the rule `block`, or into the middle of it.
pub(super) fn entry(start: Start, dsml: TokenId) -> String {
    match start {
        Start::Answer => format!(r#""\n\n<" <[{dsml}]> block"#),
        Start::Marker => format!("<[{dsml}]> block"),
        Start::ToolBlock => format!(r#""<" <[{dsml}]> calls"#),
    }
}

/// The rules of a block.
///
/// # Errors
/// [`GrammarError`] if a tool that must be enforced cannot be.
pub(super) fn block(rules: &CallRules, dsml: TokenId) -> Result<Block, GrammarError> {
    let mut writer = Writer { block: Block::default(), dsml, n_terminals: 0 };
    let d = format!("<[{dsml}]>");
    writer.line(&format!(r#"block: "tool_calls>\n<" {d} calls"#));
    let names: Vec<String> = (0..rules.tools.len()).map(|i| format!("c{i}")).collect();
    writer.line(&format!("call: {}", names.join(" | ")));
    let end = format!(r#""\n</" {d} "tool_calls>""#);
    if rules.single {
        writer.line(&format!("calls: call {end}"));
    } else {
        writer.line(&format!(r#"calls: call ({end} | "\n<" {d} calls)"#));
    }
    for (index, tool) in rules.tools.iter().enumerate() {
        writer.tool(index, tool)?;
    }
    Ok(writer.block)
}

struct Writer {
    block: Block,
    dsml: TokenId,
    n_terminals: usize,
}

/// A parameter that may be given, and the ways to write its value.
struct Parameter<'a> {
    key: &'a str,
    split: Split,
}

impl Writer {
    fn line(&mut self, line: &str) {
        self.block.rules.push_str(line);
        self.block.rules.push('\n');
    }

    fn tool(&mut self, index: usize, tool: &ToolRule) -> Result<(), GrammarError> {
        let header = text::literal(&format!("invoke name=\"{}\">\n", tool.name));
        let anything = Value::Object(Map::new());
        let schema = match tool.enforcement {
            Enforcement::Off => &anything,
            _ => tool.parameters.as_ref().unwrap_or(&anything),
        };
        let branches = branches(schema);
        let mut alternatives = Vec::with_capacity(branches.len());
        for (branch, object) in branches.into_iter().enumerate() {
            let name = format!("{index}-{branch}");
            alternatives.push(self.arguments(&name, tool, object, schema)?);
        }
        let arguments = alternatives.join(" | ");
        self.line(&format!(r#"c{index}: {header} ({arguments}) "invoke>""#));
        Ok(())
    }

    /// Writes the rules of one way to fill in a tool's arguments, and returns their name.
    fn arguments(
        &mut self,
        name: &str,
        tool: &ToolRule,
        object: &Map<String, Value>,
        root: &Value,
    ) -> Result<String, GrammarError> {
        let d = format!("<[{}]>", self.dsml);
        let (chosen, n_required) = choose(tool, object, root)?;
        let mut next = Vec::with_capacity(chosen.len() + 1);
        for (bit, parameter) in chosen.iter().enumerate() {
            let rule = format!("p{name}-{bit}");
            let key = text::literal(&format!("parameter name=\"{}\" string=\"", parameter.key));
            self.parameter(&rule, &key, &parameter.split, tool, root);
            next.push(format!("{rule} r{name}::set_bit({bit}) %if bit_clear({bit})"));
        }
        let free = free_parameters(object);
        if let Some(schema) = free {
            let rule = format!("p{name}-free");
            let key = self.free_key(object);
            self.parameter(&rule, &key, &text::split(schema, root), tool, root);
            next.push(format!("{rule} r{name}::_"));
        }
        if next.is_empty() {
            self.line(&format!(r#"a{name}: ("\n</" | "</") {d}"#));
            return Ok(format!("a{name}"));
        }
        let all = match n_required {
            0 => String::new(),
            n => format!(" %if is_ones([0:{n}])"),
        };
        let more = match free {
            Some(_) => String::new(),
            None => format!(" %if bit_count_le(_, {})", chosen.len() - 1),
        };
        self.line(&format!(
            r#"a{name}::_: "\n</" {d}{all} | "</" {d}{all} | "<" {d} n{name}::_{more}"#
        ));
        self.line(&format!(r#"r{name}::_: "\n</" {d}{all} | "\n<" {d} n{name}::_{more}"#));
        self.line(&format!("n{name}::_: {}", next.join(" | ")));
        Ok(format!("a{name}::0x0"))
    }

    /// A parameter from its name to its closing tag. `key` ends within the attribute `string`.
    fn parameter(&mut self, rule: &str, key: &str, split: &Split, tool: &ToolRule, root: &Value) {
        let mut ways = Vec::new();
        if let Some(terminal) = self.text(&split.text) {
            ways.push(terminal);
        }
        for document in self.documents(&split.json, tool, root) {
            ways.push(format!(r#""false\">" @j{document} "</""#));
        }
        let (ways, dsml) = (ways.join(" | "), self.dsml);
        self.line(&format!(r#"{rule}: {key} ({ways}) <[{dsml}]> "parameter>""#));
    }

    /// A terminal for the head of a parameter that `object` does not declare, up to its value's
    /// kind. One terminal, because the heads of declared parameters begin like it.
    fn free_key(&mut self, object: &Map<String, Value>) -> String {
        let declared = object.get("properties").and_then(Value::as_object).into_iter().flatten();
        let declared = declared.map(|(key, _)| key.as_str()).chain(required_keys(object));
        let taken: Vec<String> = declared.chain(WRAPPERS).map(text::literal).collect();
        let name = format!("K{}", self.n_terminals);
        self.n_terminals += 1;
        let taken = taken.join(" | ");
        self.line(&format!(
            r#"{name}: "parameter name=\"" ({FREE_KEY} & ~({taken})) "\" string=\"""#
        ));
        name
    }

    /// A terminal for a value's text, from the end of its opening tag to the marker of the closing
    /// one. It begins within the tag because the engine is quick where a terminal goes on and slow
    /// where one begins.
    fn text(&mut self, ways: &[String]) -> Option<String> {
        let name = match ways {
            [] => return None,
            // All texts end in the same way, so any of them allows all.
            _ if ways.iter().any(|way| way == ANY) => {
                if !self.block.rules.contains("\nANY:") {
                    self.line(r#"ANY: "true\">" /(?s:.*)<\//"#);
                }
                return Some("ANY".to_owned());
            }
            _ => format!("T{}", self.n_terminals),
        };
        self.n_terminals += 1;
        self.line(&format!(r#"{name}: "true\">" ({}) "</""#, ways.join(" | ")));
        Some(name)
    }

    /// Indices of the documents for these schemas, added if they are new.
    fn documents(&mut self, schemas: &[Value], tool: &ToolRule, root: &Value) -> Vec<usize> {
        let strict = tool.enforcement == Enforcement::Strict;
        schemas
            .iter()
            .map(|schema| {
                let document = schema::document(schema, root);
                let known = &self.block.documents;
                let found = known
                    .iter()
                    .position(|(other, origin)| *other == document && origin.strict == strict);
                found.unwrap_or_else(|| {
                    let origin = Document { strict, tool: tool.name.clone() };
                    self.block.documents.push((document, origin));
                    self.block.documents.len() - 1
                })
            })
            .collect()
    }
}

/// What a parameter may be of which nothing is said.
static ANYTHING: Value = Value::Bool(true);

/// The ways to fill in a tool's arguments: several if the schema is a choice of objects.
fn branches(schema: &Value) -> Vec<&Map<String, Value>> {
    static EMPTY: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
    let object = plain(schema, schema);
    if let Some(Value::Array(list)) = object.and_then(|object| object.get("anyOf"))
        && object.is_some_and(|object| schema::says_only(object, &["anyOf", "type", "$defs"]))
    {
        let branches: Vec<_> = list.iter().filter_map(|one| plain(one, schema)).collect();
        if branches.len() == list.len() {
            return branches;
        }
    }
    vec![object.unwrap_or(&EMPTY)]
}

/// The object schema that `schema` is, or refers to.
fn plain<'a>(schema: &'a Value, root: &'a Value) -> Option<&'a Map<String, Value>> {
    let object = schema.as_object()?;
    match object.get("$ref") {
        Some(Value::String(target)) => schema::resolve(target, root)?.as_object(),
        _ => Some(object),
    }
}

fn required_keys(object: &Map<String, Value>) -> impl Iterator<Item = &str> {
    let list = object.get("required").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str)
}

/// The parameters that may be given, those that must be first, and how many those are.
fn choose<'a>(
    tool: &ToolRule,
    object: &'a Map<String, Value>,
    root: &'a Value,
) -> Result<(Vec<Parameter<'a>>, usize), GrammarError> {
    let unsupported = |reason: String| {
        let part = Part::Tool(tool.name.clone());
        GrammarError { fault: Fault::Unsupported, part, reason }
    };
    if tool.enforcement == Enforcement::Strict
        && let Some(keyword) = COMBINING.iter().find(|keyword| object.contains_key(**keyword))
    {
        let reason = format!("`{keyword}` beside properties cannot be enforced on arguments");
        return Err(unsupported(reason));
    }
    let properties = object.get("properties").and_then(Value::as_object);
    let declared = |key: &str| properties.and_then(|properties| properties.get(key));
    let undeclared = object.get("additionalProperties").unwrap_or(&ANYTHING);
    let mut chosen: Vec<Parameter<'a>> = Vec::new();
    for key in required_keys(object) {
        if chosen.iter().any(|other| other.key == key) {
            continue;
        }
        let split = text::split(declared(key).unwrap_or(undeclared), root);
        if split == Split::default() {
            return Err(unsupported(format!("no value is valid for the parameter {key:?}")));
        }
        if !is_writable(key) {
            return Err(unsupported(format!("the parameter name {key:?} cannot be written")));
        }
        chosen.push(Parameter { key, split });
    }
    let n_required = chosen.len();
    if n_required > MAX_PARAMETERS {
        let reason = format!("{n_required} parameters are required, at most {MAX_PARAMETERS} can");
        return Err(unsupported(reason));
    }
    for (key, schema) in properties.into_iter().flatten() {
        if chosen.len() == MAX_PARAMETERS {
            // The rest is optional, and left out.
            break;
        }
        if !is_writable(key) || chosen[..n_required].iter().any(|other| other.key == key) {
            continue;
        }
        let split = text::split(schema, root);
        if split != Split::default() {
            chosen.push(Parameter { key, split });
        }
    }
    Ok((chosen, n_required))
}

/// The schema of parameters that are not declared, if there may be any.
fn free_parameters(object: &Map<String, Value>) -> Option<&Value> {
    if object.contains_key("patternProperties") {
        return None;
    }
    let declares =
        object.get("properties").and_then(Value::as_object).is_some_and(|p| !p.is_empty());
    match object.get("additionalProperties") {
        Some(Value::Bool(false)) => None,
        Some(schema) => Some(schema),
        None => (!declares).then_some(&ANYTHING),
    }
}

/// Whether a tag can carry this name: names are not escaped.
fn is_writable(key: &str) -> bool {
    let is_plain = |c: char| !matches!(c, '"' | '<' | '>') && !c.is_control();
    key.len() <= MAX_KEY_BYTES && key.chars().all(is_plain)
}
