//! From text to tokens and back: our tokenizer against the `tokenizers` crate, in one thread.
//!
//! Run with `cargo xtask bench text`, which makes a vocabulary of V4's size and hands it over; or
//! with `cargo bench -p fathom-benches --bench text [-- --tokenizer FILE] [--out FILE]`, where the
//! demo model's small vocabulary is the default. Times are CPU time of the thread. Both sides take
//! turns on the same text, and ids are compared before anything is timed.
//!
//! - `encode`: code, English and Chinese of four sizes;
//! - `chat`: 100 KB of conversation, rendered and tokenised. Target: 10 times the throughput;
//! - `growing`: a conversation of a million tokens, whole and after one more turn;
//! - `hostile`: n and 2n bytes of text without places to cut. Target: no more than linear;
//! - `detokenise`: a thousand streams, one token each in turn.
//!
//! Not here: the network (`sse`), other programs (`cargo xtask bench text`).
#![expect(clippy::print_stdout, reason = "a benchmark reports on standard output")]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use fathom_benches::text::{chinese, conversation, english, hostile, rust};
use fathom_benches::{argument, cpu_ms, median, write_results};
use fathom_chat::{Detokenizer, Message, Tokenizer, TurnCache, render};
use serde_json::{Map, Value, json};

/// Our throughput on a chat must be this many times that of the `tokenizers` crate.
const TARGET: f64 = 10.0;
/// A text of twice the size may take this many times as long: two, and what caches make of it.
const LINEAR: f64 = 2.6;

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let nano = root.join("models/nano/tokenizer.json");
    let path = argument("--tokenizer").map_or(nano, PathBuf::from);
    let bytes = std::fs::read(&path).expect("a tokenizer.json that can be read");
    let tokenizer = Tokenizer::from_json(&bytes).expect("a tokenizer for V4");
    assert!(tokenizer.is_fast(), "the benchmark is about our own pipeline");
    println!("{} ids", tokenizer.vocab_size());

    let mut report = Map::new();
    report.insert("vocab_size".into(), tokenizer.vocab_size().into());
    report.insert("encode".into(), encode(&tokenizer));
    let (chat_report, reached) = chat(&tokenizer);
    report.insert("chat".into(), chat_report);
    report.insert("growing".into(), growing(&tokenizer));
    let (hostile_report, linear) = hostile_texts(&tokenizer);
    report.insert("hostile".into(), hostile_report);
    let reference = tokenizers::Tokenizer::from_bytes(&bytes).expect("as before");
    report.insert("detokenise".into(), detokenise(&tokenizer, &reference));
    write_results(&Value::Object(report));
    if reached && linear { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// CPU milliseconds of `a` and `b`, medians of `n` runs that alternate.
fn alternate(n: usize, mut a: impl FnMut(), mut b: impl FnMut()) -> (f64, f64) {
    let (mut a_ms, mut b_ms) = (Vec::new(), Vec::new());
    for _ in 0..n {
        let start = cpu_ms();
        a();
        let between = cpu_ms();
        b();
        a_ms.push(between - start);
        b_ms.push(cpu_ms() - between);
    }
    (median(a_ms), median(b_ms))
}

fn encode(tokenizer: &Tokenizer) -> Value {
    let mut rows = Vec::new();
    for (kind, text) in [("code", rust()), ("English", english()), ("Chinese", chinese())] {
        for (size, n_runs) in [(200, 400), (8 << 10, 60), (100 << 10, 9), (4 << 20, 1)] {
            let text = cut(&text, size);
            let ids = tokenizer.encode_plain(&text).expect("encodes");
            let expected = tokenizer.encode_plain_reference(&text).expect("encodes");
            assert!(ids == expected, "{kind}, {size} bytes: the ids differ");
            let (ours, reference) = alternate(
                n_runs,
                || drop(black_box(tokenizer.encode_plain(&text))),
                || drop(black_box(tokenizer.encode_plain_reference(&text))),
            );
            let mb_s = |ms: f64| text.len() as f64 / 1e3 / ms;
            println!(
                "encode {kind:8} {:9} bytes {:8} tokens  ours {:7.1} MB/s  tokenizers {:5.2} MB/s  \
                 {:5.1}x",
                text.len(),
                ids.len(),
                mb_s(ours),
                mb_s(reference),
                reference / ours
            );
            rows.push(json!({
                "kind": kind, "bytes": text.len(), "tokens": ids.len(), "mb_per_s": mb_s(ours),
                "tokenizers_mb_per_s": mb_s(reference), "ratio": reference / ours,
            }));
        }
    }
    rows.into()
}

/// `text`, repeated and cut to about `size` bytes.
fn cut(text: &str, size: usize) -> String {
    let mut all = text.repeat(size.div_ceil(text.len()));
    all.truncate(all.floor_char_boundary(size));
    all
}

fn chat(tokenizer: &Tokenizer) -> (Value, bool) {
    let conversation = conversation(100 << 10);
    let prompt = render(&conversation).expect("renders");
    let ids = prompt.token_ids(tokenizer).expect("encodes");
    assert!(ids == prompt.raw_token_ids(tokenizer).expect("encodes"), "the ids differ");
    let bytes = prompt.as_text().len();
    let (ours, reference) = alternate(
        15,
        || drop(black_box(prompt.token_ids(tokenizer))),
        || drop(black_box(prompt.raw_token_ids(tokenizer))),
    );
    let (rendering, _) = alternate(15, || drop(black_box(render(&conversation))), || ());
    let ratio = reference / ours;
    println!(
        "chat {bytes} bytes {} tokens  ours {ours:.2} ms, tokenizers {reference:.2} ms: {ratio:.1}x \
         (target {TARGET}x); rendering {rendering:.2} ms",
        ids.len()
    );
    let report = json!({
        "bytes": bytes, "tokens": ids.len(), "ms": ours, "tokenizers_ms": reference,
        "ratio": ratio, "target": TARGET, "render_ms": rendering,
    });
    (report, ratio >= TARGET)
}

/// A conversation of about a million tokens, without and with what was known before its last turn.
fn growing(tokenizer: &Tokenizer) -> Value {
    let mut long = conversation(4 << 20);
    let cache = TurnCache::new(64 << 20);
    let scope = cache.scope(&[]);
    let start = cpu_ms();
    let prompt = render(&long).expect("renders");
    let rendered = cpu_ms();
    let ids = cache.token_ids(&prompt, tokenizer, scope).expect("encodes");
    let (rendering, whole) = (rendered - start, cpu_ms() - rendered);

    long.messages.push(Message::assistant(cut(&english(), 1000)));
    long.messages.push(Message::user(cut(&rust(), 1000)));
    let start = cpu_ms();
    let prompt = render(&long).expect("renders");
    let rendered = cpu_ms();
    let grown = cache.token_ids(&prompt, tokenizer, scope).expect("encodes");
    let (rendering_again, again) = (rendered - start, cpu_ms() - rendered);
    assert!(grown == prompt.token_ids(tokenizer).expect("encodes"), "the ids differ");
    let n_new = grown.len() - ids.len();
    println!(
        "growing {} tokens: rendered in {rendering:.1} ms, tokenised in {whole:.1} ms; \
         {n_new} more: {rendering_again:.1} and {again:.1} ms",
        ids.len()
    );
    json!({
        "tokens": ids.len(), "render_ms": rendering, "tokenise_ms": whole, "new_tokens": n_new,
        "render_again_ms": rendering_again, "tokenise_again_ms": again,
    })
}

fn hostile_texts(tokenizer: &Tokenizer) -> (Value, bool) {
    let mut rows = Vec::new();
    let mut linear = true;
    for (name, text) in hostile() {
        let (once, twice) = (cut(&text, 1 << 20), cut(&text, 2 << 20));
        let (once_ms, twice_ms) = alternate(
            3,
            || drop(black_box(tokenizer.encode_plain(&once))),
            || drop(black_box(tokenizer.encode_plain(&twice))),
        );
        let growth = twice_ms / once_ms;
        let mb_s = once.len() as f64 / 1e3 / once_ms;
        println!(
            "hostile {name:28} 1 MiB {once_ms:6.1} ms ({mb_s:5.1} MB/s), 2 MiB {twice_ms:6.1} ms: \
             {growth:.2}x"
        );
        linear &= growth <= LINEAR;
        rows.push(json!({"text": name, "ms": once_ms, "mb_per_s": mb_s, "growth": growth}));
    }
    (rows.into(), linear)
}

fn detokenise(tokenizer: &Tokenizer, reference: &tokenizers::Tokenizer) -> Value {
    const N_STREAMS: usize = 1000;
    const N_TOKENS: usize = 50;
    let ids = tokenizer.encode_plain(&cut(&english(), 8 << 10)).expect("encodes");
    let token = |stream: usize, step: usize| ids[(stream * 7 + step) % ids.len()];
    let mut ours: Vec<Detokenizer> =
        (0..N_STREAMS).map(|_| Detokenizer::new(tokenizer, false)).collect();
    let mut theirs: Vec<_> = (0..N_STREAMS).map(|_| reference.decode_stream(true)).collect();
    let (mut our_bytes, mut their_bytes) = (0, 0);
    let start = cpu_ms();
    for step in 0..N_TOKENS {
        for (stream, detokenizer) in ours.iter_mut().enumerate() {
            our_bytes += black_box(detokenizer.push(token(stream, step))).len();
        }
    }
    let between = cpu_ms();
    for step in 0..N_TOKENS {
        for (stream, decoder) in theirs.iter_mut().enumerate() {
            let text = decoder.step(token(stream, step)).expect("decodes");
            their_bytes += black_box(text).map_or(0, |text| text.len());
        }
    }
    let end = cpu_ms();
    assert!(our_bytes == their_bytes, "both say the same");
    let per_token_ns = |ms: f64| ms * 1e6 / (N_STREAMS * N_TOKENS) as f64;
    let (ours, theirs) = (per_token_ns(between - start), per_token_ns(end - between));
    println!("detokenise {ours:.0} ns per token, tokenizers {theirs:.0}: {:.1}x", theirs / ours);
    json!({"ns_per_token": ours, "tokenizers_ns_per_token": theirs, "ratio": theirs / ours})
}
