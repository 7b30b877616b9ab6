//! Cost of a grammar mask over a vocabulary of 129,280 tokens, next to `llguidance` called directly.
//!
//! Run with `cargo bench -p fathom-benches --bench grammar`. Times are CPU time of the thread per
//! mask. The vocabulary is made here: bytes, words of this repository, made-up words, numbers,
//! punctuation and ideographs, as many as the released tokenizer has; it splits text like one, which
//! is what a mask costs. Each answer is followed token by token, masks of both sides alternating:
//!
//! - `json`: a nested schema, both sides with the same document; target: at most 1.2 times;
//! - `calls`: a strict tool call in the model's own tags, which only our side knows;
//! - `cold` is the first answer under a grammar, `warm` all later ones; target: p99 <= 200 us warm.

#![expect(clippy::print_stdout, reason = "a benchmark reports on standard output")]

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fathom_chat::grammar::{
    AnswerConstraint, AnswerRules, CallRules, Calls, Enforcement, Format, GrammarCompiler,
    GrammarSpec, Start, ToolRule,
};
use fathom_chat::{Opening, Special, Tokenizer};
use fathom_core::{TokenConstraint, TokenId};
use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

const VOCABULARY: usize = 129_280;
const N_WARM: usize = 30;

fn main() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(tokenizer.clone(), 8);
    let began = cpu_time();
    compiler.warm().expect("the vocabulary is whole");
    println!(
        "vocabulary  {} tokens, prepared in {:.0?}",
        tokenizer.vocab_size(),
        cpu_time() - began
    );
    let direct = direct(&tokenizer);
    let vocabulary = Vocabulary::new(&tokenizer);

    let answer = vocabulary.tokens(&answer().to_string());
    let spec = GrammarSpec {
        format: Some(Format::JsonSchema { schema: schema(), strict: true }),
        calls: None,
        start: Start::Answer,
    };
    let ours = || follow(&compiler, &spec, &tokenizer);
    let theirs = || {
        let mut document = schema();
        document["x-guidance"] =
            json!({"whitespace_pattern": r"\x20|\n[\x20\t]{0,32}", "lenient": false});
        let parser = direct.create_parser(TopLevelGrammar::from_json_schema(document));
        Matcher::new(parser)
    };
    compare("json", ours, theirs, &answer);

    let block = vocabulary.tokens(&call_block());
    let rule = ToolRule {
        name: "search".into(),
        parameters: Some(schema()),
        enforcement: Enforcement::Strict,
    };
    let spec = GrammarSpec {
        format: None,
        calls: Some(CallRules { tools: vec![rule], single: false }),
        start: Start::Answer,
    };
    let mut cold = Vec::new();
    measure(&mut follow(&compiler, &spec, &tokenizer), &block, &mut cold);
    let mut warm = Vec::new();
    for _ in 0..N_WARM {
        measure(&mut follow(&compiler, &spec, &tokenizer), &block, &mut warm);
    }
    report("calls cold", &mut cold);
    report("calls warm", &mut warm);
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// A schema as tools have them: nested objects, enumerations, numbers with bounds, arrays, texts.
fn schema() -> Value {
    let filter = json!({"type": "object", "properties": {
            "field": {"type": "string", "enum": ["title", "author", "year", "language", "body"]},
            "op": {"type": "string", "enum": ["eq", "ne", "lt", "gt", "contains"]},
            "value": {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}]}},
        "required": ["field", "op", "value"], "additionalProperties": false});
    json!({"type": "object", "properties": {
            "query": {"type": "string", "minLength": 1},
            "filters": {"type": "array", "items": filter, "maxItems": 20},
            "since": {"type": "string", "format": "date"},
            "limit": {"type": "integer", "minimum": 1, "maximum": 500},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "note": {"type": ["string", "null"]}},
        "required": ["query", "filters", "since", "limit", "score", "note"],
        "additionalProperties": false})
}

fn answer() -> Value {
    let filter =
        |field: &str, op: &str, value: Value| json!({"field": field, "op": op, "value": value});
    json!({
        "query": "scheduling of long prompts in a server with many short requests",
        "filters": [filter("year", "gt", json!(2024)), filter("language", "eq", json!("en")),
            filter("body", "contains", json!("block tables and the cache of prefixes"))],
        "since": "2024-02-29",
        "limit": 250,
        "score": 0.75,
        "note": "Prefer sources that measure; leave out what only repeats \"best practice\".\nThanks."
    })
}

fn call_block() -> String {
    let answer = answer();
    let tag = |name: &str, value: &Value| match value {
        Value::String(text) => {
            format!("<｜DSML｜parameter name=\"{name}\" string=\"true\">{text}</｜DSML｜parameter>")
        }
        value => format!(
            "<｜DSML｜parameter name=\"{name}\" string=\"false\">{value}</｜DSML｜parameter>"
        ),
    };
    let tags: Vec<String> =
        answer.as_object().into_iter().flatten().map(|(name, value)| tag(name, value)).collect();
    format!(
        "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"search\">\n{}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
        tags.join("\n")
    )
}

fn follow(
    compiler: &GrammarCompiler,
    spec: &GrammarSpec,
    tokenizer: &Tokenizer,
) -> AnswerConstraint {
    let grammar = compiler.compile(spec, Duration::from_secs(60)).expect("the schema is usual");
    let rules = AnswerRules {
        opening: Opening::Content,
        reasoning_budget: None,
        must_answer: false,
        calls: Calls::Free,
        grammar: Some(grammar),
    };
    AnswerConstraint::new(rules, tokenizer).expect("a grammar constrains")
}

/// CPU time of each mask of an answer.
fn measure(constraint: &mut AnswerConstraint, tokens: &[TokenId], times: &mut Vec<Duration>) {
    let mut mask = vec![0; VOCABULARY.div_ceil(32)];
    for &token in tokens {
        mask.fill(u32::MAX);
        let began = cpu_time();
        constraint.fill_mask(&mut mask).expect("the grammar goes on");
        times.push(cpu_time() - began);
        assert!(mask[token as usize / 32] >> (token % 32) & 1 == 1, "token {token} is not allowed");
        constraint.commit(token).expect("it was allowed");
    }
}

fn compare(
    name: &str,
    ours: impl Fn() -> AnswerConstraint,
    theirs: impl Fn() -> Matcher,
    tokens: &[TokenId],
) {
    let mut other = theirs();
    let (mut our_times, mut their_times) = (Vec::new(), Vec::new());
    for pass in 0..=N_WARM {
        let mut constraint = ours();
        let mut mask = vec![0; VOCABULARY.div_ceil(32)];
        for &token in tokens {
            let began = cpu_time();
            let direct = other.compute_mask().expect("the grammar goes on");
            their_times.push(cpu_time() - began);
            mask.fill(u32::MAX);
            let began = cpu_time();
            constraint.fill_mask(&mut mask).expect("the grammar goes on");
            our_times.push(cpu_time() - began);
            assert!(direct.is_allowed(token) && mask[token as usize / 32] >> (token % 32) & 1 == 1);
            other.consume_token(token).expect("it was allowed");
            constraint.commit(token).expect("it was allowed");
        }
        other.reset().expect("it can begin again");
        if pass == 0 || pass == N_WARM {
            let state = if pass == 0 { "cold" } else { "warm" };
            let their_mean = report(&format!("{name} {state} llguidance"), &mut their_times);
            let our_mean = report(&format!("{name} {state} fathom"), &mut our_times);
            println!("{name} {state} ratio of means {:.2}", our_mean / their_mean);
            our_times.clear();
            their_times.clear();
        }
    }
}

/// Prints a line of figures; returns the mean in microseconds.
fn report(name: &str, times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let at = |share: f64| us(times[((times.len() - 1) as f64 * share) as usize]);
    let mean = times.iter().map(|&time| us(time)).sum::<f64>() / times.len() as f64;
    let n = times.len();
    println!(
        "{name:24} {n:6} masks  mean {mean:7.1} us  p50 {:7.1}  p99 {:7.1}  max {:7.1}",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    mean
}

/// `llguidance` on its own, over the same tokens.
fn direct(tokenizer: &Tokenizer) -> ParserFactory {
    let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as TokenId)
        .map(|id| match (tokenizer.special().of(id), tokenizer.token_bytes(id)) {
            (Some(_), _) => [&[0xff][..], format!("<{id}>").as_bytes()].concat(),
            (None, bytes) => bytes.unwrap_or_default().to_vec(),
        })
        .collect();
    let info = TokRxInfo::new(words.len() as u32, tokenizer.special().eos());
    let trie = TokTrie::from(&info, &words);
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
        .expect("the vocabulary is whole");
    factory.quiet();
    factory
}

/// Text to tokens by the longest match: how it is split matters here, not by which merges.
struct Vocabulary {
    ids: HashMap<Vec<u8>, TokenId>,
    longest: usize,
}

impl Vocabulary {
    fn new(tokenizer: &Tokenizer) -> Self {
        let ids: HashMap<Vec<u8>, TokenId> = (0..tokenizer.vocab_size() as TokenId)
            .filter_map(|id| Some((tokenizer.token_bytes(id)?.to_vec(), id)))
            .collect();
        let longest = ids.keys().map(Vec::len).max().unwrap_or(1);
        Self { ids, longest }
    }

    fn tokens(&self, text: &str) -> Vec<TokenId> {
        let mut rest = text.as_bytes();
        let mut tokens = Vec::new();
        while !rest.is_empty() {
            let lengths = (1..=self.longest.min(rest.len())).rev();
            let (len, id) = lengths
                .filter_map(|len| Some((len, *self.ids.get(&rest[..len])?)))
                .next()
                .expect("every byte is a token");
            tokens.push(id);
            rest = &rest[len..];
        }
        tokens
    }
}

/// A byte-level tokenizer of the released one's size.
fn tokenizer() -> Tokenizer {
    let mut words: Vec<String> = (0..=255u8).map(|byte| alphabet(&[byte])).collect();
    let mut known: HashSet<String> = words.iter().cloned().collect();
    let room = VOCABULARY - Special::ALL.len();
    let mut add = |text: &str| {
        let word = alphabet(text.as_bytes());
        if words.len() < room && known.insert(word.clone()) {
            words.push(word);
        }
    };
    for number in 0..1000 {
        add(&number.to_string());
    }
    for n in 2..40 {
        add(&" ".repeat(n));
        add(&format!("\n{}", " ".repeat(n - 1)));
    }
    let marks = [
        "\"", ",", ":", "{", "}", "[", "]", "(", ")", ".", ";", "'", "/", "\\", "<", ">", "=", "-",
        "_", "\n", " ",
    ];
    for first in marks {
        for second in marks {
            add(&format!("{first}{second}"));
            marks.iter().for_each(|third| add(&format!("{first}{second}{third}")));
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = BTreeSet::new();
    read_words(&root.join("crates"), &mut found);
    for word in found {
        add(&format!(" {word}"));
        add(&word);
    }
    for code in 0x4e00..0x8e00 {
        char::from_u32(code).into_iter().for_each(|c| add(&c.to_string()));
    }
    // The rest is made up: syllables, most frequent first.
    const SYLLABLES: [&str; 40] = [
        "an", "be", "con", "de", "en", "for", "ge", "hol", "in", "ju", "ka", "lo", "me", "no",
        "or", "pre", "qui", "re", "st", "ti", "un", "ver", "wa", "xe", "ya", "zo", "ing", "ed",
        "ly", "er", "al", "ic", "ous", "able", "ment", "tion", "ist", "ism", "ful", "ness",
    ];
    for first in SYLLABLES {
        for second in SYLLABLES {
            for third in SYLLABLES {
                let word = format!("{first}{second}{third}");
                add(&format!(" {word}"));
                add(&word);
            }
        }
    }
    let mut filler = 0u32;
    while words.len() < room {
        let word = alphabet(format!("w{filler}").as_bytes());
        if known.insert(word.clone()) {
            words.push(word);
        }
        filler += 1;
    }
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), id.into())).collect();
    let added: Vec<Value> = Special::ALL
        .iter()
        .enumerate()
        .map(|(index, special)| {
            json!({"id": room + index, "content": special.text(), "special": false,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let json = json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    Tokenizer::from_json(json.to_string().as_bytes()).expect("the file has every control token")
}

/// Words of source files.
fn read_words(folder: &Path, found: &mut BTreeSet<String>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            read_words(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs" || kind == "md") {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| word.len() > 1);
            found.extend(words.map(str::to_owned));
        }
    }
}

/// Bytes in the alphabet of byte-level vocabularies: printable Latin-1 characters stand for
/// themselves, the others follow from U+0100 on.
fn alphabet(bytes: &[u8]) -> String {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let character = |&byte: &u8| {
        if printable(byte) {
            return char::from(byte);
        }
        let index = (0..byte).filter(|&other| !printable(other)).count() as u32;
        char::from_u32(0x100 + index).expect("U+0100 and on are characters")
    };
    bytes.iter().map(character).collect()
}
