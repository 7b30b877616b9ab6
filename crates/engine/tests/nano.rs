//! A real model behind the engine: the golden checkpoint, crowded, against the same model alone.

use std::path::Path;

use fathom_core::{Numerics, ParallelConfig, SamplingParams, TokenId, Usage};
use fathom_engine::sample::{RequestSampler, SampleScratch};
use fathom_engine::stats::TierCounts;
use fathom_engine::{
    EngineConfig, EngineHandle, EngineStats, GenerateRequest, RankRunner, SpeculationConfig,
    StepRunner, TierConfig,
};
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, NoProbe, Session, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{Backend, CacheSpec, IndexKeyFormat, KvFormat, RowFormats, Solo};
use fathom_weights::Checkpoint;

use crate::support::{Ending, read};

const EOS: TokenId = 1;

/// Loads every rank's part of the golden model, with its MTP block or without.
pub(crate) fn load(
    numerics: Numerics,
    parallel: ParallelConfig,
    mtp: bool,
) -> Vec<Transformer<CpuOps>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let options = LoadOptions { mtp };
    let rank = |index| {
        let rank = parallel.rank(index).unwrap();
        Transformer::load(CpuOps::new(numerics), &checkpoint, rank, options, &mut |_| {}).unwrap()
    };
    (0..parallel.world()).map(rank).collect()
}

/// Slots, blocks and snapshots of a cache.
pub(crate) struct Room(pub(crate) usize, pub(crate) usize, pub(crate) usize);

pub(crate) fn runner(
    numerics: Numerics,
    parallel: ParallelConfig,
    room: &Room,
) -> Box<dyn StepRunner> {
    runner_of(load(numerics, parallel, false), parallel, room, 0)
}

/// A runner over `models` that can take back `spare_rows` tokens.
pub(crate) fn runner_of(
    models: Vec<Transformer<CpuOps>>,
    parallel: ParallelConfig,
    room: &Room,
    spare_rows: usize,
) -> Box<dyn StepRunner> {
    let formats = RowFormats::smallest(models[0].ops().numerics());
    runner_with(models, parallel, room, spare_rows, formats)
}

fn runner_with(
    models: Vec<Transformer<CpuOps>>,
    parallel: ParallelConfig,
    room: &Room,
    spare_rows: usize,
    formats: RowFormats,
) -> Box<dyn StepRunner> {
    let spec = CacheSpec {
        layers: models[0].cache_layers().to_vec(),
        n_slots: room.0,
        n_blocks: room.1,
        n_snapshots: room.2,
        spare_rows,
        draft_width: models[0].draft_width(),
        kv: formats.kv(),
        index_keys: formats.index_keys(),
    };
    let max_len = (room.1 * fathom_ops::BLOCK_TOKENS) as u32;
    Box::new(RankRunner::new(models, parallel, spec, max_len).unwrap())
}

pub(crate) fn prompt(family: u32, n: u32) -> Vec<TokenId> {
    (0..n).map(|i| 2 + (i * 37 + i * i % 61 + family * 101) % 1000).collect()
}

/// Prompts around the boundaries of window, groups and blocks; some share their beginning.
fn requests() -> Vec<GenerateRequest> {
    let sampled = |seed, max_tokens| SamplingParams {
        top_p: 0.9,
        presence_penalty: 0.5,
        ..SamplingParams::sampled(max_tokens, seed)
    };
    [
        (prompt(0, 3), SamplingParams::greedy(40)),
        (prompt(1, 250), sampled(1, 30)),
        (prompt(1, 300), SamplingParams::greedy(20)),
        (prompt(1, 520), sampled(2, 24)),
        (prompt(1, 600), SamplingParams::greedy(12)),
        (prompt(2, 127), sampled(3, 20)),
        (prompt(1, 600), sampled(4, 12)),
        (prompt(3, 1), sampled(5, 30)),
    ]
    .map(|(prompt, sampling)| GenerateRequest::new(prompt, sampling))
    .into()
}

/// What the model answers to one request, prompt in one piece, no engine involved.
pub(crate) fn alone(model: &Transformer<CpuOps>, request: &GenerateRequest) -> Vec<TokenId> {
    let max_len = request.prompt.len() + request.sampling.max_tokens as usize;
    let mut session = Session::new(model, &Solo, max_len, 0).unwrap();
    let mut sampler = RequestSampler::new(request.sampling.clone(), &request.prompt, None);
    let mut scratch = SampleScratch::default();
    let mut next = request.prompt.clone();
    let mut answer = Vec::new();
    loop {
        let output = session.run(&next, Rows::Last, false, &mut NoProbe).unwrap();
        let mut logits = model.ops().download(&output.logits.unwrap()).unwrap();
        let position = session.position() as u32;
        let sampled = sampler.sample(&mut logits, position, &[EOS], &mut scratch).unwrap();
        answer.push(sampled.token);
        if sampled.end.is_some() || answer.len() == request.sampling.max_tokens as usize {
            return answer;
        }
        next = vec![sampled.token];
    }
}

pub(crate) fn crowded_config(budget: u32) -> EngineConfig {
    EngineConfig {
        eos_token_ids: vec![EOS],
        max_num_batched_tokens: budget,
        snapshot_interval: 256,
        ..EngineConfig::default()
    }
}

fn crowded(
    runner: Box<dyn StepRunner>,
    budget: u32,
    rounds: usize,
) -> (Vec<Vec<TokenId>>, EngineStats) {
    ask_all(&EngineHandle::start(runner, crowded_config(budget)).unwrap(), rounds)
}

/// Answers of an engine to all requests at once, `rounds` times over, and what it counted.
fn ask_all(engine: &EngineHandle, rounds: usize) -> (Vec<Vec<TokenId>>, EngineStats) {
    let mut answers = Vec::new();
    for _ in 0..rounds {
        let streams: Vec<_> =
            requests().into_iter().map(|request| engine.submit(request).unwrap()).collect();
        for stream in streams {
            let (tokens, ending) = read(stream);
            assert!(matches!(ending, Ending::Finished(..)), "{ending:?}");
            answers.push(tokens);
        }
    }
    (answers, engine.stats())
}

fn assert_as_alone(numerics: Numerics) {
    let models = load(numerics, ParallelConfig::default(), false);
    let expected: Vec<_> = requests().iter().map(|request| alone(&models[0], request)).collect();

    let roomy = runner(numerics, ParallelConfig::default(), &Room(8, 32, 16));
    let (answers, stats) = crowded(roomy, 2048, 2);
    assert_eq!(answers, [&expected[..], &expected[..]].concat());
    assert!(stats.cache.hits > 0, "{stats:?}");

    let tight = runner(numerics, ParallelConfig::default(), &Room(3, 4, 2));
    let (answers, stats) = crowded(tight, 50, 1);
    assert_eq!(answers, expected);
    assert!(stats.preemptions > 0 && stats.cache.hits > 0, "{stats:?}");
}

#[test]
fn bf16_tokens_do_not_depend_on_batch_chunks_cache_hits_or_preemption() {
    assert_as_alone(Numerics::Bf16);
}

#[test]
fn f32_tokens_do_not_depend_on_batch_chunks_cache_hits_or_preemption() {
    assert_as_alone(Numerics::F32);
}

#[test]
fn f32qat_tokens_do_not_depend_on_batch_chunks_cache_hits_or_preemption() {
    assert_as_alone(Numerics::F32Qat);
}

#[test]
fn two_ranks_give_the_same_tokens_crowded_and_roomy() {
    let parallel = ParallelConfig { tensor: 2, expert: 1 };
    let (roomy, _) = crowded(runner(Numerics::F32, parallel, &Room(8, 32, 0)), 2048, 1);
    let (tight, stats) = crowded(runner(Numerics::F32, parallel, &Room(3, 4, 2)), 50, 1);
    assert_eq!(roomy, tight);
    assert!(stats.preemptions > 0, "{stats:?}");
}

/// Asks an engine whose cache directory is `directory`, then stops it.
pub(crate) fn ask_and_stop(
    runner: Box<dyn StepRunner>,
    speculation: SpeculationConfig,
    directory: &Path,
    request: GenerateRequest,
) -> (Vec<TokenId>, Usage, TierCounts) {
    let config = EngineConfig {
        eos_token_ids: vec![EOS],
        max_num_batched_tokens: 512,
        speculation,
        tiers: TierConfig { directory: Some(directory.to_owned()), ..TierConfig::default() },
        ..EngineConfig::default()
    };
    let engine = EngineHandle::start(runner, config).unwrap();
    let (tokens, ending) = read(engine.submit(request).unwrap());
    let Ending::Finished(_, usage) = ending else { panic!("{ending:?}") };
    (tokens, usage, crate::tiers::stop(engine, std::time::Duration::ZERO))
}

/// Two turns of a conversation whose first prompt has `n_tokens` tokens, with a restart between.
fn assert_resumes_after_a_restart(numerics: Numerics, parallel: ParallelConfig, n_tokens: u32) {
    let start = || runner(numerics, parallel, &Room(2, n_tokens as usize / 256 + 3, 4));
    assert_same_after_a_restart(start, &SpeculationConfig::default(), n_tokens);
}

/// As above, over the runners that `start` makes.
pub(crate) fn assert_same_after_a_restart(
    start: impl Fn() -> Box<dyn StepRunner>,
    speculation: &SpeculationConfig,
    n_tokens: u32,
) {
    let directory = tempfile::tempdir().unwrap();
    let ask_and_stop = |runner, directory: &Path, request| {
        ask_and_stop(runner, speculation.clone(), directory, request)
    };
    let first = GenerateRequest::new(prompt(7, n_tokens), SamplingParams::greedy(20));
    let (answer, usage, _) = ask_and_stop(start(), directory.path(), first);
    assert_eq!(usage.cached_tokens, 0);

    let mut turn = prompt(7, n_tokens);
    turn.extend(answer);
    turn.extend(prompt(8, 30));
    let second = || GenerateRequest::new(turn.clone(), SamplingParams::sampled(20, 5));
    let (tokens, usage, counts) = ask_and_stop(start(), directory.path(), second());
    let n_blocks = (n_tokens - 1) / 256;
    assert_eq!(usage.cached_tokens, n_blocks * 256);
    assert_eq!((counts.loads, counts.disk_hits), (1, u64::from(n_blocks) + 1));
    let cold = tempfile::tempdir().unwrap();
    let (expected, usage, _) = ask_and_stop(start(), cold.path(), second());
    assert_eq!((tokens, usage.cached_tokens), (expected, 0));
}

#[test]
fn a_long_conversation_is_resumed_after_a_restart_without_prefill() {
    assert_resumes_after_a_restart(Numerics::Bf16, ParallelConfig::default(), 3000);
}

#[test]
fn what_was_cached_in_another_row_format_is_not_found() {
    let directory = tempfile::tempdir().unwrap();
    let (numerics, parallel) = (Numerics::Bf16, ParallelConfig::default());
    let ask = |kv, index_keys| {
        let formats = RowFormats::choose(numerics, Some(kv), Some(index_keys)).unwrap();
        let models = load(numerics, parallel, false);
        let runner = runner_with(models, parallel, &Room(1, 3, 4), 0, formats);
        let request = GenerateRequest::new(prompt(7, 300), SamplingParams::greedy(8));
        let speculation = SpeculationConfig::default();
        let (tokens, usage, _) = ask_and_stop(runner, speculation, directory.path(), request);
        (tokens, usage.cached_tokens)
    };
    let (tokens, cached) = ask(KvFormat::Fp8, IndexKeyFormat::Mxfp4);
    assert_eq!(cached, 0);
    for (kv, index_keys) in
        [(KvFormat::Fp8, IndexKeyFormat::Fp8), (KvFormat::Bf16, IndexKeyFormat::Mxfp4)]
    {
        assert_eq!(ask(kv, index_keys), (tokens.clone(), 0), "{kv} {index_keys}");
        assert_eq!(ask(kv, index_keys), (tokens.clone(), 256), "{kv} {index_keys}");
    }
}

#[test]
fn every_numeric_mode_and_several_ranks_resume_after_a_restart() {
    let two = ParallelConfig { tensor: 2, expert: 1 };
    assert_resumes_after_a_restart(Numerics::F32, two, 600);
    assert_resumes_after_a_restart(Numerics::F32Qat, ParallelConfig::default(), 600);
}
