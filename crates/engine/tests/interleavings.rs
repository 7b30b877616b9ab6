//! For all mixtures of requests: tokens do not depend on what else runs.

use fathom_core::{SamplingParams, TokenId};
use fathom_engine::scripted::{Reply, hashed_token};
use fathom_engine::{EngineConfig, EngineHandle, GenerateRequest, RunnerCapacity, ScriptedRunner};
use proptest::prelude::*;

use crate::support::{EOS, Ending, VOCABULARY, config, prompt, read};

#[derive(Debug, Clone)]
struct Request {
    prompt: Vec<TokenId>,
    sampling: SamplingParams,
    priority: i32,
    user: Option<String>,
    /// Drop the stream after this many tokens.
    drop_after: Option<usize>,
}

impl Request {
    fn generate(&self) -> GenerateRequest {
        GenerateRequest {
            priority: self.priority,
            user: self.user.clone(),
            ..GenerateRequest::new(self.prompt.clone(), self.sampling.clone())
        }
    }
}

fn request() -> impl Strategy<Value = Request> {
    let sampling = (
        prop_oneof![Just(0.0), Just(0.7), Just(1.5)],
        prop_oneof![Just(1.0), Just(0.9)],
        prop_oneof![Just(0), Just(5_u32)],
        prop_oneof![Just(0.0), Just(1.5)],
        any::<u64>(),
        1..60_u32,
    )
        .prop_map(|(temperature, top_p, top_k, presence_penalty, seed, max_tokens)| {
            SamplingParams {
                temperature,
                top_p,
                top_k,
                presence_penalty,
                repetition_penalty: if presence_penalty > 0.0 { 1.3 } else { 1.0 },
                ..SamplingParams::sampled(max_tokens, seed)
            }
        });
    let drop_after = prop_oneof![3 => Just(None), 1 => (0..20_usize).prop_map(Some)];
    let user = prop_oneof![Just(None), Just(Some("a".to_owned()))];
    let prompt = (0..3_u32, prop_oneof![1..40_u32, 500..530_u32, 700..900_u32])
        .prop_map(|(family, n)| prompt(family, n));
    (prompt, sampling, -1..=1_i32, user, drop_after).prop_map(
        |(prompt, sampling, priority, user, drop_after)| Request {
            prompt,
            sampling,
            priority,
            user,
            drop_after,
        },
    )
}

/// A runner whose distributions are spread out: the draw matters.
fn engine(capacity: RunnerCapacity, config: EngineConfig) -> EngineHandle {
    let runner =
        ScriptedRunner::new(capacity, |tokens| Reply::Spread(hashed_token(tokens, u32::MAX)));
    EngineHandle::start(Box::new(runner), config).unwrap()
}

fn small() -> impl Strategy<Value = (RunnerCapacity, EngineConfig)> {
    (1..6_u32, 4..10_u32, 0..4_u32, prop_oneof![8..100_u32, 200..2000_u32]).prop_map(
        |(n_slots, n_blocks, n_snapshots, budget)| {
            let capacity = RunnerCapacity {
                n_slots,
                n_blocks,
                n_snapshots,
                vocab_size: VOCABULARY,
                max_model_len: 1000,
            };
            let config =
                EngineConfig { max_num_batched_tokens: budget, snapshot_interval: 256, ..config() };
            (capacity, config)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn tokens_never_depend_on_what_else_runs(
        (capacity, config) in small(),
        requests in prop::collection::vec(request(), 1..12),
    ) {
        let crowded = engine(capacity, config.clone());
        let streams: Vec<_> =
            requests.iter().map(|request| crowded.submit(request.generate()).unwrap()).collect();
        let mut answers = Vec::new();
        for (request, mut stream) in requests.iter().zip(streams) {
            let mut tokens = Vec::new();
            if let Some(n) = request.drop_after {
                use fathom_engine::TokenEvent::Token;
                while tokens.len() < n && let Some(Token { id, .. }) = stream.blocking_recv() {
                    tokens.push(id);
                }
            } else {
                let (all, ending) = read(stream);
                tokens = all;
                prop_assert!(matches!(ending, Ending::Finished(..)), "{:?}", ending);
            }
            answers.push(tokens);
        }

        let roomy = RunnerCapacity { n_slots: 1, n_blocks: 4, n_snapshots: 0, ..capacity };
        let alone = engine(roomy, EngineConfig { max_num_batched_tokens: 4096, ..config });
        for (request, answer) in requests.iter().zip(answers) {
            let (expected, _) = read(alone.submit(request.generate()).unwrap());
            if request.drop_after.is_some() {
                prop_assert!(expected.starts_with(&answer));
            } else {
                prop_assert_eq!(&expected, &answer);
                let ended_early = expected.len() < request.sampling.max_tokens as usize;
                let full = request.prompt.len() + expected.len() == 1000;
                prop_assert!(full || ended_early == (expected.last() == Some(&EOS)) || !ended_early);
            }
        }
        let stats = crowded.stats();
        prop_assert_eq!(stats.failed_steps, 0);
    }
}
