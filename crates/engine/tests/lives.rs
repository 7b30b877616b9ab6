//! For all lives of a server: tokens do not depend on tiers, restarts, eviction or preemption.
//!
//! A life is an engine from its start to its stop, by choice in the middle of its requests; several
//! lives in a row may share a cache directory. Whatever is random (requests, chunk budgets, caches so
//! small that eviction and preemption are constant, clients that hang up, tiers on and off), every
//! request gets the tokens that it gets alone without any cache: from a scripted model, and bit for bit
//! from the golden checkpoint in every numeric mode.
//!
//! A few cases run by default. `PROPTEST_CASES=500 cargo nextest run -p fathom-engine lives` runs more.

use std::path::Path;
use std::time::Duration;

use fathom_core::{Numerics, ParallelConfig, SamplingParams, TokenId};
use fathom_engine::scripted::{Reply, hashed_token};
use fathom_engine::{
    EngineConfig, EngineHandle, GenerateRequest, RunnerCapacity, ScriptedRunner, StepRunner,
    TierConfig,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::nano::{self, Room};
use crate::support::{Ending, VOCABULARY, bounded, config, prompt, read};
use crate::tiers::stop;

#[derive(Debug, Clone)]
struct Asked {
    family: u32,
    n_prompt: u32,
    n_answer: u32,
    seed: u64,
    greedy: bool,
    /// Drop the stream after this many tokens.
    drop_after: Option<usize>,
}

impl Asked {
    fn generate(&self, prompt: fn(u32, u32) -> Vec<TokenId>) -> GenerateRequest {
        let mut sampling = SamplingParams::sampled(self.n_answer, self.seed);
        sampling.temperature = if self.greedy { 0.0 } else { 1.0 };
        GenerateRequest::new(prompt(self.family, self.n_prompt), sampling)
    }
}

#[derive(Debug, Clone)]
struct Life {
    requests: Vec<Asked>,
    /// Requests still running when the engine stops are failed.
    stops_early: bool,
    with_disk: bool,
    host_bytes: u64,
    disk_bytes: u64,
    n_slots: u32,
    n_blocks: u32,
    n_snapshots: u32,
    budget: u32,
}

/// How large the pieces of a model's state are, and how much of it a case can afford.
#[derive(Debug, Clone, Copy)]
struct Scale {
    /// Bytes of a block with its snapshot.
    state_bytes: u64,
    most_requests: usize,
    most_answer: u32,
}

fn asked(most_answer: u32) -> impl Strategy<Value = Asked> {
    let n_prompt = prop_oneof![2 => 1..40_u32, 2 => 500..530_u32, 1 => 600..760_u32];
    let drop_after = prop_oneof![4 => Just(None), 1 => (0..20_usize).prop_map(Some)];
    (0..3_u32, n_prompt, 1..most_answer, any::<u64>(), any::<bool>(), drop_after).prop_map(
        |(family, n_prompt, n_answer, seed, greedy, drop_after)| Asked {
            family,
            n_prompt,
            n_answer,
            seed,
            greedy,
            drop_after,
        },
    )
}

fn life(scale: Scale) -> impl Strategy<Value = Life> {
    let bytes = scale.state_bytes;
    let tiers = (
        any::<bool>(),
        prop_oneof![Just(0), Just(3 * bytes), Just(100 * bytes)],
        prop_oneof![Just(4 * bytes), Just(1000 * bytes)],
    );
    let requests = prop::collection::vec(asked(scale.most_answer), 1..scale.most_requests);
    let sizes = (1..4_u32, 4..10_u32, 0..4_u32, prop_oneof![8..100_u32, 200..2000_u32]);
    (requests, any::<bool>(), tiers, sizes).prop_map(
        |(requests, stops_early, (with_disk, host_bytes, disk_bytes), sizes)| {
            let (n_slots, n_blocks, n_snapshots, budget) = sizes;
            Life {
                requests,
                stops_early,
                with_disk,
                host_bytes,
                disk_bytes,
                n_slots,
                n_blocks,
                n_snapshots,
                budget,
            }
        },
    )
}

/// Tokens of an answer, and whether they are all of it.
type Answer = (Vec<TokenId>, bool);

/// Lives one life over `directory`; returns what its requests were answered.
fn live(
    life: &Life,
    directory: &Path,
    runner: Box<dyn StepRunner>,
    prompt: fn(u32, u32) -> Vec<TokenId>,
) -> Vec<Answer> {
    let config = EngineConfig {
        snapshot_interval: 256,
        max_num_batched_tokens: life.budget,
        tiers: TierConfig {
            host_bytes: life.host_bytes,
            directory: life.with_disk.then(|| directory.to_owned()),
            disk_bytes: life.disk_bytes,
        },
        ..config()
    };
    let engine = EngineHandle::start(runner, config).unwrap();
    let submit = |of: &Asked| engine.submit(of.generate(prompt)).unwrap();
    let mut streams: Vec<_> = life.requests.iter().map(submit).collect();
    let whole = |stream| {
        let (tokens, ending) = read(stream);
        (tokens, matches!(ending, Ending::Finished(..)))
    };
    let mut answers = Vec::new();
    if life.stops_early {
        stop(engine, Duration::from_millis(5));
    } else {
        answers.extend(life.requests.iter().zip(streams.drain(..)).map(|(of, mut stream)| {
            let Some(n) = of.drop_after else { return whole(stream) };
            let mut tokens = Vec::new();
            use fathom_engine::TokenEvent::Token;
            while tokens.len() < n
                && let Some(Token { id, .. }) = stream.blocking_recv()
            {
                tokens.push(id);
            }
            (tokens, false)
        }));
        let stats = engine.stats();
        assert_eq!(stats.failed_steps, 0);
        stop(engine, Duration::ZERO);
    }
    answers.extend(streams.into_iter().map(whole));
    answers
}

fn check(of: &Asked, (answer, is_whole): &Answer, expected: &[TokenId]) {
    if *is_whole {
        assert_eq!(answer, expected, "{of:?}");
    } else {
        assert!(expected.starts_with(answer), "{of:?}: {answer:?} where alone {expected:?}");
    }
}

/// A model whose distributions are spread out: the draw matters.
fn spread(capacity: RunnerCapacity) -> Box<dyn StepRunner> {
    let reply = |tokens: &[TokenId]| Reply::Spread(hashed_token(tokens, u32::MAX));
    Box::new(ScriptedRunner::new(capacity, reply))
}

proptest! {
    #![proptest_config(bounded(24))]

    #[test]
    fn tokens_never_depend_on_tiers_or_restarts(
        lives in prop::collection::vec(
            life(Scale { state_bytes: 1100, most_requests: 8, most_answer: 60 }),
            1..5,
        ),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let capacity = |n_slots, n_blocks, n_snapshots| RunnerCapacity {
            n_slots,
            n_blocks,
            n_snapshots,
            vocab_size: VOCABULARY,
            max_model_len: 1000,
        };
        let alone = EngineHandle::start(spread(capacity(1, 4, 0)), config()).unwrap();
        for life in lives {
            let runner = spread(capacity(life.n_slots, life.n_blocks, life.n_snapshots));
            let answers = live(&life, directory.path(), runner, prompt);
            for (of, answer) in life.requests.iter().zip(answers) {
                let (expected, _) = read(alone.submit(of.generate(prompt)).unwrap());
                check(of, &answer, &expected);
            }
        }
    }
}

/// The same on the golden checkpoint, compared with a session outside of any engine.
fn nano_lives(numerics: Numerics) {
    let scale = Scale { state_bytes: 500_000, most_requests: 4, most_answer: 12 };
    let models = nano::load(numerics, ParallelConfig::default(), false);
    let mut runner = TestRunner::new(bounded(1));
    let lives = prop::collection::vec(life(scale), 2..=2);
    let property = |lives: Vec<Life>| {
        let directory = tempfile::tempdir().unwrap();
        for life in lives {
            let room =
                Room(life.n_slots as usize, life.n_blocks as usize, life.n_snapshots as usize);
            let crowded = nano::runner(numerics, ParallelConfig::default(), &room);
            let answers = live(&life, directory.path(), crowded, nano::prompt);
            for (of, answer) in life.requests.iter().zip(answers) {
                check(of, &answer, &nano::alone(&models[0], &of.generate(nano::prompt)));
            }
        }
        Ok(())
    };
    runner.run(&lives, property).unwrap();
}

#[test]
fn bf16_tokens_never_depend_on_tiers_restarts_eviction_or_preemption() {
    nano_lives(Numerics::Bf16);
}

#[test]
fn f32_tokens_never_depend_on_tiers_restarts_eviction_or_preemption() {
    nano_lives(Numerics::F32);
}

#[test]
fn f32qat_tokens_never_depend_on_tiers_restarts_eviction_or_preemption() {
    nano_lives(Numerics::F32Qat);
}
