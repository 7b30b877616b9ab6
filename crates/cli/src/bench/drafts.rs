//! Speculative decoding against plain decoding: tokens per second, and acceptance by position.
//!
//! Two workloads: `repetitive`, a prompt that says the same again and again, decoded greedily, where the
//! text itself is a good guess; and `mixed`, a prompt of unrelated tokens, sampled at temperature 1.
//! Engines with and without drafts take turns, so that whatever else the machine does meets all; the
//! ratio in CPU time of the process holds on a busy machine, too, if one thread computes.
//!
//! Not here: whether the tokens are the same (the engine's tests; it is checked here once more).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fathom_core::{Numerics, ParallelConfig, Rank, SamplingParams};
use fathom_engine::{
    DraftMethod, EngineConfig, EngineHandle, GenerateRequest, RankRunner, SpeculationConfig,
    TokenEvent,
};
use fathom_model::{CacheRequest, LoadOptions, MemoryPlan, Transformer};
use fathom_ops::RowFormats;
use fathom_ops::cpu::CpuOps;
use fathom_weights::Checkpoint;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Turns of which the fastest counts.
const N_TURNS: usize = 3;

const N_PROMPT: u32 = 96;

/// What is generated.
pub(super) struct Load {
    /// Tokens per sequence.
    pub(super) n_tokens: u32,
    /// Sequences at once.
    pub(super) n_sequences: u32,
    /// Guesses per step, at most.
    pub(super) max_drafts: u32,
}

/// A way to decode.
struct Contestant {
    name: &'static str,
    engine: EngineHandle,
    /// Seconds of the fastest turn, and CPU seconds of the one that took least.
    seconds: f64,
    cpu_seconds: f64,
    tokens: Vec<Vec<u32>>,
}

/// Measures every draft method on both workloads.
pub(super) fn run(checkpoint: &Checkpoint, numerics: Numerics, load: &Load) -> Result<Value> {
    ensure!(load.n_tokens > 0 && load.n_sequences > 0, "there is nothing to generate");
    let methods = [
        ("off", DraftMethod::Off, true),
        ("ngram", DraftMethod::Ngram, true),
        ("ngram_always", DraftMethod::Ngram, false),
        ("mtp", DraftMethod::Mtp, true),
        ("mtp_always", DraftMethod::Mtp, false),
    ];
    let vocab_size = checkpoint.config().vocab_size as u32;
    let mut workloads = serde_json::Map::new();
    for name in ["repetitive", "mixed"] {
        let mut contestants = Vec::new();
        for (method_name, method, is_adaptive) in methods {
            if method == DraftMethod::Mtp && checkpoint.config().num_nextn_predict_layers == 0 {
                continue;
            }
            let speculation =
                SpeculationConfig { method, max_drafts: load.max_drafts, is_adaptive };
            let engine = start(checkpoint, numerics, load, speculation)?;
            contestants.push(Contestant {
                name: method_name,
                engine,
                seconds: f64::INFINITY,
                cpu_seconds: f64::INFINITY,
                tokens: Vec::new(),
            });
        }
        let requests: Vec<GenerateRequest> =
            (0..load.n_sequences).map(|number| request(name, number, load, vocab_size)).collect();
        for _ in 0..N_TURNS {
            for contestant in &mut contestants {
                let (start, cpu_start) = (Instant::now(), cpu_time());
                contestant.tokens = answers(&contestant.engine, &requests)?;
                let cpu = cpu_time().saturating_sub(cpu_start);
                contestant.seconds = contestant.seconds.min(start.elapsed().as_secs_f64());
                contestant.cpu_seconds = contestant.cpu_seconds.min(cpu.as_secs_f64());
            }
        }
        let mut results = serde_json::Map::new();
        for contestant in &contestants {
            ensure!(
                contestant.tokens == contestants[0].tokens,
                "{} changed the tokens, which is a bug",
                contestant.name
            );
            results.insert(contestant.name.to_owned(), report(contestant, &contestants[0]));
        }
        workloads.insert(name.to_owned(), results.into());
    }
    Ok(json!({
        "numerics": numerics.name(),
        "sequences": load.n_sequences,
        "tokens": load.n_tokens,
        "max_drafts": load.max_drafts,
        "workloads": workloads,
    }))
}

/// CPU time of the process so far. The engines that wait use none.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn report(of: &Contestant, plain: &Contestant) -> Value {
    let stats = of.engine.stats();
    let n_tokens: usize = of.tokens.iter().map(Vec::len).sum();
    let per_step = stats.completion_tokens as f64 / stats.step_seconds.count().max(1) as f64;
    let drafted = stats.drafts.drafted.iter().zip(stats.drafts.accepted);
    let acceptance: Vec<f64> = drafted
        .take_while(|&(&drafted, _)| drafted > 0)
        .map(|(&drafted, accepted)| accepted as f64 / drafted as f64)
        .collect();
    json!({
        "tokens_per_s": n_tokens as f64 / of.seconds,
        "speed_over_off": plain.seconds / of.seconds,
        "speed_over_off_by_cpu_time": plain.cpu_seconds / of.cpu_seconds,
        "tokens_per_step": per_step,
        "sequences_with_drafts": stats.drafts.drafts,
        "accepted_by_position": acceptance,
    })
}

fn start(
    checkpoint: &Checkpoint,
    numerics: Numerics,
    load: &Load,
    speculation: SpeculationConfig,
) -> Result<EngineHandle> {
    let options = LoadOptions { mtp: speculation.method == DraftMethod::Mtp };
    let model =
        Transformer::load(CpuOps::new(numerics), checkpoint, Rank::solo(), options, &mut |_| ())
            .context("loading the model")?;
    let max_model_len = N_PROMPT + load.n_tokens + 1;
    let plan = MemoryPlan::new(CacheRequest {
        layers: model.cache_layers().to_vec(),
        formats: RowFormats::smallest(numerics),
        max_model_len: max_model_len as usize,
        max_num_seqs: load.n_sequences as usize,
        spare_rows: speculation.max_drafts as usize,
        draft_width: model.draft_width(),
        budget_bytes: None,
    })?;
    let (parallel, spec) = (ParallelConfig::default(), plan.into_spec());
    let runner = RankRunner::new(vec![model], parallel, spec, max_model_len)?;
    let config = EngineConfig { speculation, prefix_cache: false, ..EngineConfig::default() };
    Ok(EngineHandle::start(Box::new(runner), config)?)
}

fn request(workload: &str, number: u32, load: &Load, vocab_size: u32) -> GenerateRequest {
    let (period, temperature) = if workload == "repetitive" { (12, 0.0) } else { (N_PROMPT, 1.0) };
    let token = |at: u32| (at % period + 7 * number).wrapping_mul(2_654_435_761) % vocab_size;
    let sampling = SamplingParams {
        temperature,
        ignore_eos: true,
        ..SamplingParams::sampled(load.n_tokens, u64::from(number))
    };
    GenerateRequest::new((0..N_PROMPT).map(token).collect(), sampling)
}

fn answers(engine: &EngineHandle, requests: &[GenerateRequest]) -> Result<Vec<Vec<u32>>> {
    let mut streams = Vec::new();
    for request in requests {
        let (prompt, sampling) = (request.prompt.clone(), request.sampling.clone());
        streams.push(engine.submit(GenerateRequest::new(prompt, sampling))?);
    }
    let mut answers = Vec::new();
    for mut stream in streams {
        let mut tokens = Vec::new();
        loop {
            match stream.blocking_recv().context("a stream ends with a final event")? {
                TokenEvent::Token { id, .. } => tokens.push(id),
                TokenEvent::Finished { .. } => break,
                TokenEvent::Failed(error) => bail!(error),
            }
        }
        answers.push(tokens);
    }
    Ok(answers)
}
