//! Traffic in virtual time: what the scheduler promises to those who share a machine.

use std::time::Duration;

use fathom_engine::sim::roofline::{GPUS, MODELS, Machine, StepWork};
use fathom_engine::sim::trace::{TraceKind, chats_alone, clients};
use fathom_engine::sim::{Report, SimConfig, simulate};

/// Flash on two H200 at 0.6 of the roofline.
fn config() -> SimConfig {
    let gpu = *GPUS.iter().find(|gpu| gpu.name == "h200").unwrap();
    SimConfig {
        machine: Machine { model: MODELS[0], gpu, n_gpus: 2, efficiency: 0.6 },
        max_num_seqs: 128,
        max_num_batched_tokens: 2048,
        max_step_time: None,
        max_model_len: 1 << 20,
    }
}

fn run(config: &SimConfig, trace: TraceKind) -> Report {
    let report = simulate(config, &clients(trace, 1)).unwrap();
    let answers: u64 = report.classes.iter().map(|class| class.answers).sum();
    let turns: usize = clients(trace, 1).iter().map(|client| client.turns.len()).sum();
    assert_eq!((answers, report.timeouts), (turns as u64, 0), "every turn is answered");
    report
}

#[test]
fn a_million_tokens_delay_nobody_beyond_the_configured_chunk() {
    // The longest step that the token budget allows: all of it prefill, at the far end, beside as
    // many decodes as there are chats.
    let config = config();
    let mut work = StepWork::default();
    work.wants_logits = true;
    work.add(&config.machine.model, 1_000_000, config.max_num_batched_tokens, false);
    (0..48).for_each(|_| work.add(&config.machine.model, 8192, 1, true));
    let longest = config.machine.step_seconds(&work);

    let report = run(&config, TraceKind::Long);
    let (chats, million) = (report.class("chats").unwrap(), report.class("million").unwrap());
    assert_eq!(million.answers, 1);
    assert!(chats.tpot.p99 <= longest, "{:?}, a step takes {longest}", chats.tpot);
    assert!(chats.tpot.max <= longest, "{:?}, a step takes {longest}", chats.tpot);
    // The promise is worth something only if chats went on while the prompt was run.
    assert!(report.seconds > million.ttft.max && million.ttft.max > 20.0 * longest);

    let alone = simulate(&config, &chats_alone(1)).unwrap();
    let alone = alone.class("chats").unwrap();
    assert!(alone.tpot.p99 <= longest && alone.answers == chats.answers);
}

#[test]
fn a_limit_on_step_time_is_a_limit_on_gaps_between_tokens() {
    let limit = Duration::from_millis(60);
    let paced = SimConfig { max_num_batched_tokens: 8192, max_step_time: Some(limit), ..config() };
    let chats = |report: Report| *report.class("chats").map(|class| &class.tpot).unwrap();
    let with = chats(run(&paced, TraceKind::Long));
    assert!(with.p99 <= 1.25 * limit.as_secs_f64(), "{with:?}");
    let without = chats(run(&SimConfig { max_step_time: None, ..paced }, TraceKind::Long));
    assert!(without.p99 > 2.0 * with.p99, "{without:?} against {with:?}");
}

#[test]
fn agents_find_what_they_said_and_bursts_drain() {
    let agents = simulate(&config(), &clients(TraceKind::Agents, 1)[..4]).unwrap();
    assert_eq!(agents.class("agents").unwrap().answers, 400);
    assert!(agents.hit_rate() > 0.97, "{}", agents.hit_rate());
    // 64 requests at once on few slots: the last of them wait, all are answered.
    let few = SimConfig { max_num_seqs: 16, ..config() };
    let bursts = run(&few, TraceKind::Bursts);
    let requests = bursts.class("requests").unwrap();
    assert!(requests.ttft.max > 2.0 * requests.ttft.p50, "{requests:?}");
}

#[test]
fn the_same_trace_gives_the_same_report_and_another_seed_another() {
    let report = |seed| {
        let report = simulate(&config(), &clients(TraceKind::Poisson, seed)[..60]).unwrap();
        Report { scheduler_s: 0.0, ..report }
    };
    assert_eq!(report(1), report(1));
    assert_ne!(report(1), report(2));
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let small = SimConfig { machine: Machine { n_gpus: 1, ..config().machine }, ..config() };
    let error = simulate(&small, &[]).unwrap_err().to_string();
    assert!(error.starts_with("flash does not fit 1 x h200"), "{error}");
    let short = SimConfig { max_model_len: 4096, ..config() };
    let error = simulate(&short, &clients(TraceKind::Long, 1)).unwrap_err().to_string();
    assert!(error.contains("longer than a sequence may be (4096)"), "{error}");
}
