//! Specifications to grammars, once each: compilation within a budget, and a bounded cache.
//!
//! Invariants:
//! - a compilation is bounded by the engine's own limits on size and work, and nobody waits for
//!   one longer than its budget; a late one goes on, and whoever asks next finds its outcome;
//! - grammars and refusals are remembered, the least recently used is forgotten first;
//! - answers that follow the same grammar share no state: a fault in one cannot reach another.
//!
//! Not here: what follows one answer (`constraint`).

use std::collections::HashMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use llguidance::Matcher;
use llguidance::api::{GrammarInit, GrammarWithLexer, TopLevelGrammar};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::dsml::{self, Block};
use super::vocabulary::Vocabulary;
use super::{Enforcement, Fault, Format, GrammarError, GrammarSpec, Part, gbnf, schema, text};
use crate::tokenizer::Tokenizer;

/// Compilations that may run at once: they are short, and the cores are for the model.
const MAX_RUNNING: usize = 4;
/// The engine follows a schema by recursion, up to 128 levels and every reference; a thread that
/// does so touches no more of its stack than it needs.
const STACK_BYTES: usize = 256 << 20;
/// Matchers that are kept warm between answers, per grammar.
const MAX_IDLE: usize = 4;
/// Longest grammar or expression a client may send, in bytes.
const MAX_SOURCE_BYTES: usize = 64 * 1024;
/// Deepest nesting of brackets in it, and most lines: the engine follows both by recursion.
const MAX_NESTING: usize = 100;
const MAX_LINES: usize = 2000;
/// Longest piece of the engine's message that an error repeats, in characters.
const MAX_REASON_CHARS: usize = 120;

/// Compiles specifications for one tokenizer.
pub struct GrammarCompiler {
    tokenizer: Tokenizer,
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
    shared: Arc<Shared>,
}

/// What a compiler shares with its threads.
struct Shared {
    cache: Mutex<Cache>,
    running: Mutex<usize>,
    ended: Condvar,
}

/// A compilation's place among those that may run; given back when it ends, in whatever way.
struct Turn(Arc<Shared>);

impl Turn {
    /// Waits for a place, but no longer than `budget`.
    fn take(shared: &Arc<Shared>, budget: Duration) -> Option<Self> {
        let running = lock(&shared.running);
        let is_full = |running: &mut usize| *running >= MAX_RUNNING;
        let waited = shared.ended.wait_timeout_while(running, budget, is_full);
        let (mut running, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return None;
        }
        *running += 1;
        Some(Self(Arc::clone(shared)))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *lock(&self.0.running) -= 1;
        self.0.ended.notify_one();
    }
}

type Outcome = Result<Arc<Grammar>, GrammarError>;

/// What was compiled, by hash of its specification.
struct Cache {
    capacity: usize,
    /// With the time of its last use.
    entries: HashMap<[u8; 32], (Outcome, u64)>,
    clock: u64,
}

impl Cache {
    fn get(&mut self, key: &[u8; 32]) -> Option<Outcome> {
        self.clock += 1;
        let (outcome, used) = self.entries.get_mut(key)?;
        *used = self.clock;
        Some(outcome.clone())
    }

    fn insert(&mut self, key: [u8; 32], outcome: Outcome) {
        self.clock += 1;
        if self.entries.len() >= self.capacity && !self.entries.contains_key(&key) {
            let oldest = self.entries.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.entries.remove(&oldest);
            }
        }
        self.entries.insert(key, (outcome, self.clock));
    }
}

/// A compiled specification, ready to be followed by any number of answers.
pub struct Grammar {
    /// `[vocab_size / 32]`: tokens that its masks never allow, whatever it says.
    hidden: Vec<u32>,
    /// What of its specification is not enforced.
    ignored: Vec<String>,
    matchers: Mutex<Matchers>,
}

struct Matchers {
    prototype: Matcher,
    /// Used and reset: their lexers know more states than the prototype's.
    idle: Vec<Matcher>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// A matcher at the beginning.
    pub(super) fn matcher(&self) -> Matcher {
        let mut matchers = lock(&self.matchers);
        matchers.idle.pop().unwrap_or_else(|| matchers.prototype.deep_clone())
    }

    /// What of its specification is not enforced, for the log: keywords of schemas that are not
    /// strict, by the engine's names for them.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Takes a matcher back that an answer no longer needs.
    pub(super) fn give_back(&self, mut matcher: Matcher) {
        if matcher.is_error() || matcher.reset().is_err() {
            return;
        }
        let mut matchers = lock(&self.matchers);
        if matchers.idle.len() < MAX_IDLE {
            matchers.idle.push(matcher);
        }
    }

    /// `[vocab_size / 32]`: tokens that are never allowed.
    pub(super) fn hidden(&self) -> &[u32] {
        &self.hidden
    }
}

impl GrammarCompiler {
    /// A compiler that remembers up to `capacity` specifications.
    pub fn new(tokenizer: Tokenizer, capacity: usize) -> Self {
        Self {
            tokenizer,
            vocabulary: OnceLock::new(),
            shared: Arc::new(Shared {
                cache: Mutex::new(Cache {
                    capacity: capacity.max(1),
                    entries: HashMap::new(),
                    clock: 0,
                }),
                running: Mutex::new(0),
                ended: Condvar::new(),
            }),
        }
    }

    /// Prepares what all compilations need, so that the first does not wait for it. Takes up to a
    /// second.
    ///
    /// # Errors
    /// [`GrammarError`] if no grammar can be compiled for this tokenizer at all.
    pub fn warm(&self) -> Result<(), GrammarError> {
        self.vocabulary().map(|_| ())
    }

    /// The grammar of `spec`, compiled now if it is not known. Blocks for up to `budget`, and as
    /// long again while others are being compiled.
    ///
    /// # Errors
    /// [`GrammarError`]; [`Fault::TooComplex`] if the budget is not enough, [`Fault::Busy`] if its
    /// turn did not come.
    pub fn compile(
        &self,
        spec: &GrammarSpec,
        budget: Duration,
    ) -> Result<Arc<Grammar>, GrammarError> {
        let key = key(spec);
        if let Some(known) = lock(&self.shared.cache).get(&key) {
            return known;
        }
        let vocabulary = self.vocabulary()?;
        let failed = |fault, reason: String| GrammarError { fault, part: Part::Whole, reason };
        let late = |reason| failed(Fault::TooComplex, reason);
        let busy = |reason| failed(Fault::Busy, reason);
        let turn = Turn::take(&self.shared, budget)
            .ok_or_else(|| busy("too many others are being compiled".to_owned()))?;
        let (sender, outcome) = channel();
        let spec = spec.clone();
        let work = move || {
            let outcome = compile(&vocabulary, spec);
            lock(&turn.0.cache).insert(key, outcome.clone());
            // Whoever asked may have given up.
            let _ = sender.send(outcome);
        };
        std::thread::Builder::new()
            .name("fathom-grammar".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(work)
            .map_err(|error| busy(format!("no thread could be started: {error}")))?;
        match outcome.recv_timeout(budget) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => {
                Err(late(format!("it did not compile within {} ms", budget.as_millis())))
            }
            // The thread panicked, which the engine's own code may do on odd input.
            Err(RecvTimeoutError::Disconnected) => {
                Err(late("the compiler gave up on it".to_owned()))
            }
        }
    }

    fn vocabulary(&self) -> Result<Arc<Vocabulary>, GrammarError> {
        let build = || Vocabulary::new(&self.tokenizer).map(Arc::new);
        self.vocabulary.get_or_init(build).clone().map_err(|reason| GrammarError {
            fault: Fault::Unsupported,
            part: Part::Whole,
            reason: format!("the tokenizer has no grammars: {}", brief(&reason)),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is consistent between any two statements that change it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(spec: &GrammarSpec) -> [u8; 32] {
    Sha256::digest(format!("{spec:?}")).into()
}

fn compile(vocabulary: &Arc<Vocabulary>, mut spec: GrammarSpec) -> Outcome {
    let mut source = Source::new(&mut spec, vocabulary)?;
    let parser = match vocabulary.factory.create_parser(source.grammar()) {
        Ok(parser) => parser,
        Err(error) => {
            // Somebody's schema is at fault. Whose is worth knowing, and may be forgiven.
            source.find_fault(vocabulary, &error.to_string())?;
            let parser = vocabulary.factory.create_parser(source.grammar());
            parser.map_err(|error| fault(Part::Whole, &error.to_string(), Fault::Unsupported))?
        }
    };
    let mut prototype = Matcher::new(Ok(parser));
    if let Some(error) = prototype.get_error() {
        return Err(fault(Part::Whole, &error, Fault::Unsupported));
    }
    let mut hidden = vocabulary.controls.clone();
    if spec.calls.is_some() {
        let dsml = vocabulary.dsml;
        hidden[dsml as usize / 32] &= !(1 << (dsml % 32));
    }
    let mut ignored = source.ignored;
    ignored.extend(prototype.grammar_warnings().iter().map(|warning| brief(warning)));
    let matchers = Mutex::new(Matchers { prototype, idle: Vec::new() });
    Ok(Arc::new(Grammar { hidden, ignored, matchers }))
}

/// A specification in the engine's terms.
struct Source {
    main: String,
    /// The text's format, by the name `body`.
    body: Option<Body>,
    block: Block,
    /// Tools whose schema may be given up.
    forgiving: Vec<String>,
    ignored: Vec<String>,
}

enum Body {
    Json { document: Value, strict: bool },
    Text(String),
}

impl Source {
    fn new(spec: &mut GrammarSpec, vocabulary: &Vocabulary) -> Result<Self, GrammarError> {
        let mut block = Block::default();
        let mut starts = Vec::new();
        if spec.format.is_some() {
            starts.push("@body".to_owned());
        }
        if let Some(calls) = &mut spec.calls {
            starts.push(dsml::entry(spec.start, vocabulary.dsml));
            block = loop {
                match dsml::block(calls, vocabulary.dsml) {
                    Ok(block) => break block,
                    Err(error) => {
                        let tool = calls.tools.iter_mut().find(|tool| {
                            tool.enforcement == Enforcement::BestEffort
                                && error.part == Part::Tool(tool.name.clone())
                        });
                        let Some(tool) = tool else { return Err(error) };
                        tool.enforcement = Enforcement::Off;
                    }
                }
            };
        }
        let main = format!("start: {}\n{}", starts.join(" | "), block.rules);
        let body = spec.format.as_ref().map(body).transpose()?;
        let tools = spec.calls.iter().flat_map(|calls| &calls.tools);
        let forgiving = tools.filter(|tool| tool.enforcement == Enforcement::BestEffort);
        let forgiving = forgiving.map(|tool| tool.name.clone()).collect();
        Ok(Self { main, body, block, forgiving, ignored: Vec::new() })
    }

    fn grammar(&self) -> TopLevelGrammar {
        let named = |name: &str, grammar: GrammarWithLexer| GrammarWithLexer {
            name: Some(name.to_owned()),
            ..grammar
        };
        let mut grammars = vec![named("main", GrammarWithLexer::from_lark(self.main.clone()))];
        if let Some(body) = &self.body {
            grammars.push(named("body", body.grammar()));
        }
        for (index, (document, origin)) in self.block.documents.iter().enumerate() {
            let document = schema::with_options(document, origin.strict);
            grammars
                .push(named(&format!("j{index}"), GrammarWithLexer::from_json_schema(document)));
        }
        TopLevelGrammar { grammars, max_tokens: None }
    }

    /// Tells whose schema made `error`, and makes it weaker if it need not hold in full.
    fn find_fault(&mut self, vocabulary: &Vocabulary, error: &str) -> Result<(), GrammarError> {
        let limits = vocabulary.factory.limits();
        let alone = |grammar: GrammarWithLexer| {
            let init = GrammarInit::Serialized(TopLevelGrammar::from_grammar(grammar));
            init.validate(None, limits.clone()).into_error()
        };
        let json = |document: &Value, strict| {
            GrammarWithLexer::from_json_schema(schema::with_options(document, strict))
        };
        // The schema without what cannot be stated, if that helps.
        let relaxed = |document: &Value, strict: bool| {
            let relaxed = schema::relaxed(document);
            (!strict && alone(json(&relaxed, false)).is_none()).then_some(relaxed)
        };
        let mut found = false;
        if let Some(body) = &mut self.body
            && let Some(error) = alone(body.grammar())
        {
            match body {
                Body::Text(_) => return Err(fault(Part::Format, &error, Fault::Malformed)),
                Body::Json { document, strict } => match relaxed(document, *strict) {
                    Some(relaxed) => *document = relaxed,
                    None => return Err(fault(Part::Format, &error, Fault::Unsupported)),
                },
            }
            self.ignored.push(brief(&error));
            found = true;
        }
        for (document, origin) in &mut self.block.documents {
            let Some(error) = alone(json(document, origin.strict)) else { continue };
            *document = match relaxed(document, origin.strict) {
                Some(relaxed) => relaxed,
                None if self.forgiving.contains(&origin.tool) => {
                    Value::Object(serde_json::Map::new())
                }
                None => {
                    let part = Part::Tool(origin.tool.clone());
                    return Err(fault(part, &error, Fault::Unsupported));
                }
            };
            self.ignored.push(format!("{}: {}", origin.tool, brief(&error)));
            found = true;
        }
        if found { Ok(()) } else { Err(fault(Part::Whole, error, Fault::Unsupported)) }
    }
}

impl Body {
    fn grammar(&self) -> GrammarWithLexer {
        match self {
            Self::Json { document, strict } => {
                GrammarWithLexer::from_json_schema(schema::with_options(document, *strict))
            }
            Self::Text(lark) => GrammarWithLexer::from_lark(lark.clone()),
        }
    }
}

fn body(format: &Format) -> Result<Body, GrammarError> {
    let json =
        |schema: &Value, strict| Body::Json { document: schema::document(schema, schema), strict };
    Ok(match format {
        Format::JsonObject => json(&schema::any_object(), false),
        Format::JsonSchema { schema, strict } => json(schema, *strict),
        Format::Regex(expression) => {
            check_source(expression)?;
            let malformed = |reason: String| GrammarError {
                fault: Fault::Malformed,
                part: Part::Format,
                reason: brief(&reason),
            };
            let expression = text::expression(expression).map_err(malformed)?;
            Body::Text(format!("start: {expression}"))
        }
        Format::Choice(texts) => {
            let texts: Vec<String> = texts.iter().map(|one| text::literal(one)).collect();
            Body::Text(format!("start: CHOICE\nCHOICE: {}", texts.join(" | ")))
        }
        Format::Grammar(grammar) => {
            check_source(grammar)?;
            Body::Text(if gbnf::is_gbnf(grammar) {
                gbnf::to_lark(grammar).map_err(|reason| GrammarError {
                    fault: Fault::Malformed,
                    part: Part::Format,
                    reason: brief(&reason),
                })?
            } else {
                grammar.clone()
            })
        }
    })
}

/// Refuses what the engine would follow too deep.
fn check_source(source: &str) -> Result<(), GrammarError> {
    let refuse =
        |reason: String| Err(GrammarError { fault: Fault::TooComplex, part: Part::Format, reason });
    if source.len() > MAX_SOURCE_BYTES {
        let len = source.len();
        return refuse(format!("it has {len} bytes, at most {MAX_SOURCE_BYTES} are accepted"));
    }
    if source.lines().count() > MAX_LINES {
        return refuse(format!("it has more than {MAX_LINES} lines"));
    }
    let mut depth = 0usize;
    for byte in source.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return refuse(format!("its brackets nest more than {MAX_NESTING} deep"));
        }
    }
    Ok(())
}

/// The engine's message as an error: about the size of what it was given, or `otherwise`.
fn fault(part: Part, message: &str, otherwise: Fault) -> GrammarError {
    const SIZE: [&str; 6] =
        ["too big", "too large", "too complex", "limit", "exceeded", "Unable to determine"];
    let is_size = SIZE.iter().any(|sign| message.contains(sign));
    let fault = if is_size { Fault::TooComplex } else { otherwise };
    GrammarError { fault, part, reason: brief(message) }
}

/// The first line of a message, cut.
fn brief(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    line.chars().take(MAX_REASON_CHARS).filter(|character| !character.is_control()).collect()
}
