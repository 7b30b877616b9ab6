//! Promises about an answer: what a client asks for is refused, or holds for whatever is said.

use std::fs;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use fathom_chat::grammar::{
    AnswerConstraint, AnswerRules, CallRules, Calls, Enforcement, Fault, Format, Grammar,
    GrammarCompiler, GrammarSpec, Start, ToolRule,
};
use fathom_chat::{
    AnswerEnd, End, Opening, OutputParser, ParsedMessage, ParserOptions, Special, Tokenizer,
    ToolSet,
};
use fathom_core::{TokenConstraint, TokenId};
use fathom_protocol::openai::{ChatRequest, ResponseFormat, Rules, Structured};
use serde_json::{Map, Value, json};

/// Tokens of one walk.
const MAX_TOKENS: usize = 160;
/// Time for a compilation on a machine that does other things, too.
const BUDGET: Duration = Duration::from_secs(30);
/// Processor time that one walk may take, in an unoptimised build.
const MAX_CPU: Duration = Duration::from_secs(20);
/// Memory of the whole process, in bytes: grammars that are remembered included.
const MAX_RESIDENT: u64 = 3 << 30;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = include_bytes!("../../../models/nano/tokenizer.json");
    Tokenizer::from_json(json).expect("the tokenizer of the tree is whole")
});
static COMPILER: LazyLock<GrammarCompiler> =
    LazyLock::new(|| GrammarCompiler::new(TOKENIZER.clone(), 16));

/// Any promise is refused with a reason, or kept: every answer that the masks allow is what was
/// asked for, or the beginning of it, and none takes long or much memory.
///
/// The first byte says what is asked for, the text up to a byte 0xFF is the schema, expression or
/// grammar, and the rest chooses the tokens of the answer.
///
/// # Panics
/// If one of these does not hold.
pub fn grammar(data: &[u8]) {
    let [kind, rest @ ..] = data else { return };
    let end = rest.iter().position(|byte| *byte == 0xff).unwrap_or(rest.len());
    let (source, choices) = rest.split_at(end);
    let Ok(source) = str::from_utf8(source) else { return };
    let Some(asked) = Asked::read(*kind, source) else { return };
    let grammar = match COMPILER.compile(&asked.spec, BUDGET) {
        Ok(grammar) => grammar,
        Err(error) => {
            assert!(!error.reason.is_empty(), "a refusal has a reason");
            assert!(error.fault != Fault::Busy, "nobody else compiles");
            let again = COMPILER.compile(&asked.spec, BUDGET);
            assert_eq!(again.expect_err("a refusal is remembered"), error);
            return;
        }
    };
    let began = cpu_time();
    asked.walk(&grammar, choices.get(1..).unwrap_or_default());
    let took = cpu_time().saturating_sub(began);
    assert!(took < MAX_CPU, "a walk of {MAX_TOKENS} tokens took {took:?}");
    assert!(resident() < MAX_RESIDENT, "{} bytes are in use", resident());
}

/// What is asked for.
struct Asked {
    spec: GrammarSpec,
    opening: Opening,
    /// The functions that the parser is told of, with whether their arguments must be valid.
    functions: Vec<Value>,
    /// Whether what is ignored is no licence to break the rest.
    strict: bool,
}

impl Asked {
    /// Reads a request as the server does; `None` if it is refused there.
    fn read(kind: u8, source: &str) -> Option<Self> {
        let structured = |field: &str, value: Value| json!({"structured_outputs": {field: value}});
        let schema = || serde_json::from_str::<Value>(source).ok();
        let tools = |strict: bool| {
            let function = json!({"name": "f", "parameters": schema()?, "strict": strict});
            let other = json!({"name": "other", "parameters": {"type": "object", "properties":
                {"n": {"type": "integer"}, "text": {"type": "string"}}, "required": ["n"]}});
            let tools = [function, other].map(|one| json!({"type": "function", "function": one}));
            Some(json!({"tools": tools}))
        };
        let mut body = match kind {
            b'o' => structured("json_object", true.into()),
            b'j' => structured("json", schema()?),
            b's' => json!({"response_format": {"type": "json_schema",
                "json_schema": {"name": "n", "strict": true, "schema": schema()?}}}),
            b'r' => structured("regex", source.into()),
            b'g' => structured("grammar", source.into()),
            b'c' => structured("choice", source.split('\n').collect()),
            b't' | b'm' | b'p' | b'a' => tools(false)?,
            b'u' => tools(true)?,
            _ => return None,
        };
        body["model"] = "m".into();
        body["messages"] = json!([{"role": "user", "content": "hi"}]);
        let request = ChatRequest::read(body.as_object()?, &Rules::default()).ok()?;
        let object = |schema: Map<String, Value>, strict| Format::JsonSchema {
            schema: Value::Object(schema),
            strict,
        };
        let format = match request.response_format {
            ResponseFormat::Text if kind == b'a' => Some(Format::JsonObject),
            ResponseFormat::Text => None,
            ResponseFormat::JsonObject | ResponseFormat::Structured(Structured::JsonObject) => {
                Some(Format::JsonObject)
            }
            ResponseFormat::JsonSchema { schema, strict, .. } => Some(object(schema, strict)),
            ResponseFormat::Structured(Structured::Json(schema)) => Some(object(schema, false)),
            ResponseFormat::Structured(Structured::Regex(regex)) => Some(Format::Regex(regex)),
            ResponseFormat::Structured(Structured::Choice(texts)) => Some(Format::Choice(texts)),
            ResponseFormat::Structured(Structured::Grammar(text)) => Some(Format::Grammar(text)),
        };
        let enforcement = match kind {
            b'u' => Enforcement::Strict,
            b'm' => Enforcement::BestEffort,
            _ => Enforcement::Lenient,
        };
        let rules = request.tools.iter().map(|tool| ToolRule {
            name: tool.name.clone(),
            parameters: tool.parameters().cloned().map(Value::Object),
            enforcement: if tool.name == "f" { enforcement } else { Enforcement::Lenient },
        });
        let calls = (!request.tools.is_empty())
            .then(|| CallRules { tools: rules.collect(), single: kind == b'u' });
        let (start, opening) = match kind {
            b'p' => (Start::ToolBlock, Opening::ToolBlock),
            b'm' => (Start::Marker, Opening::Content),
            _ => (Start::Answer, Opening::Content),
        };
        Some(Self {
            spec: GrammarSpec { format, calls, start },
            opening,
            functions: request.tools.into_iter().map(|t| Value::Object(t.function)).collect(),
            strict: matches!(kind, b's' | b'u'),
        })
    }

    /// Says what `choices` choose of what may be said, then what ends soonest, and checks it.
    fn walk(&self, grammar: &Arc<Grammar>, choices: &[u8]) {
        let tokenizer = &*TOKENIZER;
        let from_marker = self.spec.start == Start::Marker;
        let rules = AnswerRules {
            opening: self.opening,
            reasoning_budget: None,
            must_answer: false,
            calls: if from_marker { Calls::Constrained(Arc::clone(grammar)) } else { Calls::Free },
            grammar: (!from_marker).then(|| Arc::clone(grammar)),
        };
        let mut constraint = AnswerConstraint::new(rules, tokenizer).expect("there are rules");
        let mut ids = Vec::new();
        if from_marker {
            // The block that the model opens; before it the text is free.
            let block = tokenizer.encode_with_special("\n\n<｜DSML｜");
            for id in block.expect("the tokenizer has the marker") {
                constraint.commit(id).expect("a block may begin");
                ids.push(id);
            }
        }
        let mut chooser = Chooser { choices, position: 0, n_tokens: 0 };
        let mut ended = false;
        while ids.len() < MAX_TOKENS {
            let said = || tokenizer.decode(&ids);
            if chooser.odd() {
                constraint.prepare();
            }
            let Some(allowed) = allowed(&mut constraint, &said) else { break };
            assert!(!allowed.is_empty(), "nothing may come after {:?}", said());
            let next = chooser.choose(&allowed, tokenizer);
            ids.push(next);
            if next == tokenizer.special().eos() {
                ended = true;
                break;
            }
            let taken = constraint.commit(next);
            assert!(
                taken.is_ok(),
                "{taken:?} for what the mask allowed: {:?}",
                tokenizer.decode(&ids)
            );
        }
        self.check(grammar, &ids, ended);
    }

    /// Checks an answer as the server's parser reads it.
    fn check(&self, grammar: &Grammar, ids: &[TokenId], ended: bool) {
        let tokenizer = &*TOKENIZER;
        let tools = self.spec.calls.is_some().then(|| ToolSet::from_functions(&self.functions));
        let options = ParserOptions { opening: self.opening, tools, ..ParserOptions::default() };
        let mut parser = OutputParser::new(tokenizer, options);
        let mut message = ParsedMessage::default();
        ids.iter().for_each(|id| message.extend(parser.push(*id)));
        let (deltas, summary) = parser.finish(if ended { End::Stop } else { End::Length });
        message.extend(deltas);
        let said = tokenizer.decode(ids);
        let holds = self.strict || grammar.ignored().is_empty();

        for call in &message.tool_calls {
            let arguments = serde_json::from_str::<Value>(&call.arguments);
            let arguments = arguments.unwrap_or_else(|e| panic!("{e}: arguments of {said:?}"));
            assert!(arguments.is_object(), "arguments of {said:?} are no object");
            let rules = self.spec.calls.as_ref().expect("calls were asked for");
            let tool = rules.tools.iter().find(|tool| tool.name == call.name);
            let tool = tool.unwrap_or_else(|| panic!("{:?} is no tool", call.name));
            let is_enforced = tool.enforcement != Enforcement::BestEffort && holds;
            if let Some(schema) = tool.parameters.as_ref().filter(|_| is_enforced) {
                assert_valid(schema, &arguments, &said);
            }
        }
        let Some(format) = self.spec.format.as_ref().filter(|_| message.tool_calls.is_empty())
        else {
            assert!(!ended || summary.end == AnswerEnd::ToolCalls, "no call in {said:?}");
            return;
        };
        if !ended {
            return;
        }
        let content = &message.content;
        let json = || {
            let value = serde_json::from_str::<Value>(content);
            value.unwrap_or_else(|error| panic!("{error}: {content:?}"))
        };
        match format {
            Format::JsonObject => assert!(json().is_object(), "{content:?} is no object"),
            Format::JsonSchema { schema, .. } => {
                let value = json();
                if holds {
                    assert_valid(schema, &value, content);
                }
            }
            Format::Regex(expression) => {
                let pattern = json!({"pattern": format!("^(?:{expression})$")});
                assert_valid(&pattern, &content.as_str().into(), content);
            }
            Format::Choice(texts) => assert!(texts.contains(content), "{content:?} is no choice"),
            // What a language contains nobody else here can tell.
            Format::Grammar(_) => {}
        }
    }
}

/// Picks the tokens of a walk.
struct Chooser<'a> {
    choices: &'a [u8],
    position: usize,
    n_tokens: usize,
}

impl Chooser<'_> {
    fn odd(&self) -> bool {
        self.n_tokens % 2 == 1
    }

    /// Two bytes choose a token; without bytes it is one that closes something.
    fn choose(&mut self, allowed: &[TokenId], tokenizer: &Tokenizer) -> TokenId {
        const CLOSING: [&[u8]; 8] = [b"\"", b"}", b"]", b"</", b"<", b"/", b">", b"."];
        self.n_tokens += 1;
        if let Some([high, low]) = self.choices.get(self.position..self.position + 2) {
            self.position += 2;
            return allowed[usize::from(u16::from_be_bytes([*high, *low])) % allowed.len()];
        }
        let special = tokenizer.special();
        let closes = |id: &&TokenId| {
            special.of(**id).is_some_and(|one| one != Special::ThinkStart)
                || tokenizer.token_bytes(**id).is_some_and(|bytes| CLOSING.contains(&bytes))
        };
        // Not always the first of them, so that no walk runs in circles.
        let closing: Vec<TokenId> = allowed.iter().filter(closes).copied().collect();
        let from = if closing.is_empty() { allowed } else { &closing };
        from[self.n_tokens % from.len()]
    }
}

/// What may come next; `None` if the grammar gave up because it would take too much.
fn allowed(constraint: &mut AnswerConstraint, said: &dyn Fn() -> String) -> Option<Vec<TokenId>> {
    let n = TOKENIZER.vocab_size();
    if constraint.is_finished() {
        return Some(vec![TOKENIZER.special().eos()]);
    }
    let mut mask = vec![u32::MAX; n.div_ceil(32)];
    if let Err(error) = constraint.fill_mask(&mut mask) {
        let size = ["too complex", "too large", "limit", "too many"];
        assert!(size.iter().any(|sign| error.0.contains(sign)), "{error} after {:?}", said());
        return None;
    }
    let is_set = |id: &TokenId| mask[*id as usize / 32] >> (id % 32) & 1 == 1;
    Some((0..n as TokenId).filter(is_set).collect())
}

/// Asserts that another implementation finds the value valid, if it knows what to do with the
/// schema.
fn assert_valid(schema: &Value, value: &Value, said: &str) {
    let options = jsonschema::options()
        .with_draft(jsonschema::Draft::Draft202012)
        .should_validate_formats(true);
    let Ok(validator) = options.build(schema) else { return };
    assert!(validator.is_valid(value), "{value} is not valid for {schema}: {said:?}");
}

/// Processor time of this thread; zero where the system does not tell.
fn cpu_time() -> Duration {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = stat.split(' ').next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

/// Memory of this process in bytes; zero where the system does not tell.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Option<u64> = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0) * 4096
}
