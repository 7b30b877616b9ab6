//! Prefill and decode of one sequence, timed.
//!
//! Everything is run once before it is timed: the first pass touches memory-mapped weights, and
//! memory that later passes use again.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fathom_core::Numerics;
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, NoProbe, Session, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{Backend, Solo};
use fathom_weights::Checkpoint;
use serde_json::{Value, json};

/// Loads the main model, without its MTP block.
pub(super) fn load(checkpoint: &Checkpoint, numerics: Numerics) -> Result<Transformer<CpuOps>> {
    let (ops, rank) = (CpuOps::new(numerics), fathom_core::Rank::solo());
    let options = LoadOptions { mtp: false };
    Transformer::load(ops, checkpoint, rank, options, &mut |_| ()).context("loading the model")
}

/// Times a prefill of `ids`, and `n_decode` greedy tokens after the first `decode_after` of them:
/// the best of `rounds`, after one that does not count.
pub(super) fn prefill_and_decode(
    model: &Transformer<CpuOps>,
    ids: &[u32],
    decode_after: usize,
    n_decode: usize,
    rounds: usize,
) -> Result<Value> {
    ensure!(
        (1..=ids.len()).contains(&decode_after),
        "the prompt has {} tokens, decoding cannot start after {decode_after}",
        ids.len()
    );
    ensure!(rounds > 0, "nothing can be told from no rounds; --rounds is 1 or more");
    let mut session = Session::new(model, &Solo, ids.len().max(decode_after + n_decode), 0)?;
    let (mut prefill_s, mut decode_s) = (f64::INFINITY, f64::INFINITY);
    let mut tokens = Vec::new();
    for round in 0..=rounds {
        session.rewind(0);
        let start = Instant::now();
        step(&mut session, ids)?;
        let prefill = start.elapsed().as_secs_f64();
        session.rewind(0);
        tokens = vec![step(&mut session, &ids[..decode_after])?];
        let decode = decode(&mut session, &mut tokens, n_decode)?;
        if round > 0 {
            (prefill_s, decode_s) = (prefill_s.min(prefill), decode_s.min(decode));
        }
    }
    Ok(json!({
        "numerics": model.ops().numerics().name(),
        "prefill_tokens": ids.len(),
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": ids.len() as f64 / prefill_s,
        "decode_tokens": n_decode,
        "decode_s_per_token": decode_s / n_decode as f64,
        "decode_tokens_per_s": n_decode as f64 / decode_s,
        "tokens": tokens,
    }))
}

/// Appends `n` greedy tokens to `tokens` and returns the seconds that took.
pub(super) fn decode(
    session: &mut Session<'_, CpuOps>,
    tokens: &mut Vec<u32>,
    n: usize,
) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..n {
        let last = *tokens.last().context("there is no token to go on from")?;
        tokens.push(step(session, &[last])?);
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Runs `ids` as the engine would and returns the most likely next token, the lowest id on ties.
pub(super) fn step(session: &mut Session<'_, CpuOps>, ids: &[u32]) -> Result<u32> {
    let ops = *session.model().ops();
    let output = ops.enter(|| session.run(ids, Rows::Last, false, &mut NoProbe))?;
    let logits = output.logits.context("the last row was asked for")?;
    let mut best = 0;
    for (id, &logit) in logits.data.iter().enumerate() {
        if logit > logits.data[best] {
            best = id;
        }
    }
    Ok(u32::try_from(best)?)
}
