//! For all mixtures of requests: tokens do not depend on what else runs.

use fathom_core::{SamplingParams, TokenId};
use fathom_engine::scripted::{Reply, hashed_token};
use fathom_engine::{
    DraftMethod, EngineConfig, EngineHandle, GenerateRequest, RunnerCapacity, ScriptedRunner,
    SpeculationConfig,
};
use proptest::prelude::*;

use crate::prophet::{self, Prophet};
use crate::support::{EOS, Ending, VOCABULARY, bounded, config, prompt, read};

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
fn runner(capacity: RunnerCapacity) -> Box<ScriptedRunner> {
    let script = |tokens: &[TokenId]| Reply::Spread(hashed_token(tokens, u32::MAX));
    Box::new(ScriptedRunner::new(capacity, script))
}

/// Who drafts.
#[derive(Debug, Clone)]
enum Drafts {
    None,
    /// The text so far, as many as seem worth it.
    Ngram,
    /// Somebody who knows what comes, wrong at some of all positions.
    Known {
        max_drafts: u32,
        right_of_8: usize,
    },
}

fn drafts() -> impl Strategy<Value = Drafts> {
    let known = (1..=8_u32, 0..=8_usize)
        .prop_map(|(max_drafts, right_of_8)| Drafts::Known { max_drafts, right_of_8 });
    prop_oneof![1 => Just(Drafts::None), 1 => Just(Drafts::Ngram), 3 => known]
}

fn engine(
    capacity: RunnerCapacity,
    config: EngineConfig,
    drafts: &Drafts,
    requests: &[GenerateRequest],
    answers: &[Vec<TokenId>],
) -> EngineHandle {
    let speculation = SpeculationConfig { max_drafts: 8, ..SpeculationConfig::default() };
    match *drafts {
        Drafts::None => EngineHandle::start(runner(capacity), config).unwrap(),
        Drafts::Ngram => {
            let speculation = SpeculationConfig { method: DraftMethod::Ngram, ..speculation };
            EngineHandle::start(runner(capacity), EngineConfig { speculation, ..config }).unwrap()
        }
        Drafts::Known { max_drafts, right_of_8 } => {
            let errs = move |seed: u64, at: usize| {
                (at * 13 + at / 8 + seed as usize % 8) % 8 >= right_of_8
            };
            let prophet = Prophet::new(requests, answers, VOCABULARY, errs);
            prophet::start(runner(capacity), prophet, max_drafts, config)
        }
    }
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
    #![proptest_config(bounded(48))]

    #[test]
    fn tokens_never_depend_on_what_else_runs(
        (capacity, config) in small(),
        requests in prop::collection::vec(request(), 1..12),
        drafts in drafts(),
    ) {
        let roomy = RunnerCapacity { n_slots: 1, n_blocks: 4, n_snapshots: 0, ..capacity };
        let config_alone = EngineConfig { max_num_batched_tokens: 4096, ..config.clone() };
        let alone = EngineHandle::start(runner(roomy), config_alone).unwrap();
        let alone = |request: &Request| read(alone.submit(request.generate()).unwrap()).0;
        let all_expected: Vec<Vec<TokenId>> = requests.iter().map(alone).collect();

        let generate: Vec<_> = requests.iter().map(Request::generate).collect();
        let crowded = engine(capacity, config, &drafts, &generate, &all_expected);
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

        for ((request, answer), expected) in requests.iter().zip(answers).zip(all_expected) {
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
