//! Traffic through the real scheduler in virtual time, on GPUs that reach a given part of their
//! roofline. Prints a table, or JSON.
//!
//! Not here: the simulation (`fathom_engine::sim`).

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fathom_engine::sim::roofline::{GPUS, MODELS, Machine};
use fathom_engine::sim::trace::{TraceKind, clients};
use fathom_engine::sim::{ClassReport, Percentiles, Report, SimConfig, simulate};
use serde_json::{Value, json};

#[derive(Debug, clap::Args)]
pub(super) struct SimArgs {
    /// Traffic: poisson, bursts, agents, or long (a prompt of a million tokens among chats)
    #[arg(long, default_value = "poisson")]
    trace: TraceKind,
    /// flash or pro
    #[arg(long, default_value = "flash")]
    model: String,
    /// a100, h100, h200 or b200
    #[arg(long, default_value = "h200")]
    gpu: String,
    /// Tensor-parallel GPUs
    #[arg(long, default_value_t = 2)]
    gpus: u32,
    /// Fraction of the roofline that is reached
    #[arg(long, default_value_t = 0.6)]
    efficiency: f64,
    /// Sequences that run at once
    #[arg(long, default_value_t = 256)]
    max_num_seqs: u32,
    /// Tokens that one step runs
    #[arg(long, default_value_t = 8192)]
    max_num_batched_tokens: u32,
    /// Milliseconds that prefill may make a step last; 0 for as long as its tokens take
    #[arg(long, default_value_t = 500)]
    max_step_ms: u64,
    /// Longest context
    #[arg(long, default_value_t = 1 << 20)]
    max_model_len: u32,
    /// Draws the traffic
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
}

/// Simulates, and returns what to print.
pub(super) fn run(args: &SimArgs) -> Result<String> {
    let known = |names: Vec<&str>| names.join(", ");
    let model = MODELS.iter().find(|model| model.name == args.model);
    let gpu = GPUS.iter().find(|gpu| gpu.name == args.gpu);
    let names = known(MODELS.iter().map(|model| model.name).collect());
    let model =
        *model.with_context(|| format!("there is no model `{}`, only {names}", args.model))?;
    let names = known(GPUS.iter().map(|gpu| gpu.name).collect());
    let gpu = *gpu.with_context(|| format!("there is no GPU `{}`, only {names}", args.gpu))?;
    ensure!(args.gpus > 0, "gpus is 0: at least one is needed");
    let efficiency = args.efficiency;
    ensure!(
        efficiency > 0.0 && efficiency <= 1.0,
        "efficiency is {efficiency}: it must be above 0 and at most 1"
    );
    let config = SimConfig {
        machine: Machine { model, gpu, n_gpus: args.gpus, efficiency },
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_step_time: (args.max_step_ms > 0).then(|| Duration::from_millis(args.max_step_ms)),
        max_model_len: args.max_model_len,
    };
    let report = simulate(&config, &clients(args.trace, args.seed))?;
    if args.json {
        return Ok(serde_json::to_string_pretty(&to_json(&report))? + "\n");
    }
    table(args, &report).context("writing the table")
}

fn table(args: &SimArgs, report: &Report) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        "{} on {} x {} at {} of the roofline: simulated, not measured",
        args.model, args.gpus, args.gpu, args.efficiency
    )?;
    writeln!(
        out,
        "{:<10} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "class", "answers", "ttft p50", "p90", "p99", "tpot p50", "p99", "max"
    )?;
    for ClassReport { class, answers, ttft, tpot } in &report.classes {
        let ms = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
        let times = [ttft.p50, ttft.p90, ttft.p99, tpot.p50, tpot.p99, tpot.max].map(ms);
        write!(out, "{class:<10} {answers:>8}")?;
        for time in times {
            write!(out, " {time:>9}")?;
        }
        writeln!(out)?;
    }
    writeln!(
        out,
        "throughput {:.0} answer tokens/s and {:.0} prompt tokens/s over {:.1} s, {} steps",
        report.answer_tokens as f64 / report.seconds,
        report.prompt_tokens as f64 / report.seconds,
        report.seconds,
        report.steps
    )?;
    writeln!(
        out,
        "cache      {:.1} % of prompt tokens hit; {} blocks, {} snapshots",
        report.hit_rate() * 100.0,
        report.blocks,
        report.snapshots
    )?;
    writeln!(
        out,
        "scheduler  {} preemptions, {} timeouts, {:.1} us of real time per step",
        report.preemptions,
        report.timeouts,
        report.scheduler_s / (report.steps as f64).max(1.0) * 1e6
    )?;
    Ok(out)
}

fn to_json(report: &Report) -> Value {
    let percentiles = |of: &Percentiles| json!({"n": of.n, "p50_s": of.p50, "p90_s": of.p90, "p99_s": of.p99, "max_s": of.max});
    let class = |of: &ClassReport| {
        let (ttft, tpot) = (percentiles(&of.ttft), percentiles(&of.tpot));
        json!({"class": of.class, "answers": of.answers, "ttft": ttft, "tpot": tpot})
    };
    json!({
        "classes": report.classes.iter().map(class).collect::<Vec<_>>(),
        "seconds": report.seconds,
        "steps": report.steps,
        "prompt_tokens": report.prompt_tokens,
        "cached_tokens": report.cached_tokens,
        "hit_rate": report.hit_rate(),
        "answer_tokens": report.answer_tokens,
        "answer_tokens_per_s": report.answer_tokens as f64 / report.seconds,
        "preemptions": report.preemptions,
        "timeouts": report.timeouts,
        "blocks": report.blocks,
        "snapshots": report.snapshots,
        "scheduler_s": report.scheduler_s,
    })
}
