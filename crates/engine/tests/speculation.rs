//! Drafts decide how many tokens a step gives, never which, wherever tokens are chosen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fathom_core::{
    ConstraintError, FinishReason, SamplingParams, TokenConstraint, TokenId, TokenLogprob, Usage,
};
use fathom_engine::sample::{RequestSampler, SampleScratch};
use fathom_engine::scripted::{Reply, hashed_token};
use fathom_engine::{
    DraftMethod, DraftRequest, Drafter, EngineConfig, EngineHandle, GenerateError, GenerateRequest,
    ScriptedRunner, StartError, StepError, StepRunner, TokenEvent, TokenStream,
};
use fathom_ops::sample::{Beside, Choice, ChoiceScratch, RowChoice, choose_token};

use crate::chooser::Chooser;
use crate::prophet::{self, Prophet, always};
use crate::sampling::assert_follows;
use crate::support::{EOS, Ending, VOCABULARY, capacity, config, greedy, prompt, read};

/// A runner whose distributions are spread out: the draw matters.
fn spread() -> Box<ScriptedRunner> {
    let script = |tokens: &[TokenId]| Reply::Spread(hashed_token(tokens, u32::MAX));
    Box::new(ScriptedRunner::new(capacity(), script))
}

/// All events of a stream but the last, and how it ended, whatever was found in the cache.
type Answer = (Vec<(TokenId, Option<TokenLogprob>)>, Ending);

fn read_events(mut stream: TokenStream) -> Answer {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_recv().unwrap() {
            TokenEvent::Token { id, logprob } => tokens.push((id, logprob)),
            TokenEvent::Finished { reason, usage } => {
                let usage = Usage { cached_tokens: 0, ..usage };
                return (tokens, Ending::Finished(reason, usage));
            }
            TokenEvent::Failed(error) => return (tokens, Ending::Failed(error)),
        }
    }
}

fn ask_all(engine: &EngineHandle, requests: Vec<GenerateRequest>) -> Vec<Answer> {
    let streams: Vec<_> = requests.into_iter().map(|r| engine.submit(r).unwrap()).collect();
    streams.into_iter().map(read_events).collect()
}

fn ids(answers: &[Answer]) -> Vec<Vec<TokenId>> {
    answers.iter().map(|(tokens, _)| tokens.iter().map(|(id, _)| *id).collect()).collect()
}

/// Asks without speculation, then with a prophet that errs as told, and expects the same events.
fn assert_same_events(
    requests: impl Fn() -> Vec<GenerateRequest>,
    max_drafts: u32,
    errs: impl Fn(u64, usize) -> bool + Send + Sync + 'static,
) {
    let plain = EngineHandle::start(spread(), config()).unwrap();
    let expected = ask_all(&plain, requests());
    let errs = Arc::new(errs);
    let n_chosen = Arc::new(AtomicU64::new(0));
    let choosing = Box::new(Chooser::new(*spread(), &n_chosen));
    let runners: [Box<dyn StepRunner>; 2] = [spread(), choosing];
    for runner in runners {
        let errs = Arc::clone(&errs);
        let errs = move |seed, position| errs(seed, position);
        let prophet = Prophet::new(&requests(), &ids(&expected), VOCABULARY, errs);
        let engine = prophet::start(runner, prophet, max_drafts, config());
        assert_answers(&engine, requests(), &expected);
    }
    assert!(n_chosen.load(Ordering::Relaxed) > 0);
}

/// Asks, and expects these answers, with some drafts right and some wrong.
fn assert_answers(engine: &EngineHandle, requests: Vec<GenerateRequest>, expected: &[Answer]) {
    let answers = ask_all(engine, requests);
    for (index, (answer, expected)) in answers.iter().zip(expected).enumerate() {
        assert_eq!(answer, expected, "request {index}");
    }
    let counts = engine.stats().drafts;
    let (accepted, drafted): (u64, u64) =
        (counts.accepted.iter().sum(), counts.drafted.iter().sum());
    assert!(accepted > 0 && accepted < drafted, "{counts:?}");
    let n_tokens: usize = expected.iter().map(|(tokens, _)| tokens.len()).sum();
    assert_eq!(engine.stats().completion_tokens, n_tokens as u64, "tokens are counted once");
}

#[test]
fn rejects_at_every_offset_around_every_boundary_leave_no_trace() {
    for max_drafts in 1..=8 {
        // Boundaries of groups of 4 and 128 and of blocks; the seed says where drafts are wrong.
        let requests = move || {
            let lengths = [1, 120, 248, 376, 504].into_iter().flat_map(|n| [(n, 0.0), (n, 1.0)]);
            let of_length = |(n, temperature)| {
                (0..5).map(move |seed| {
                    let sampling = SamplingParams {
                        temperature,
                        ignore_eos: true,
                        ..SamplingParams::sampled(24, seed)
                    };
                    GenerateRequest::new(prompt(seed as u32, n), sampling)
                })
            };
            lengths.flat_map(of_length).collect()
        };
        assert_same_events(requests, max_drafts, |seed, position| position as u64 % 5 == seed);
    }
}

/// Allows tokens of alternating parity; complete after some of them.
struct Alternating {
    n_left: u32,
    committed: Vec<TokenId>,
}

impl TokenConstraint for Alternating {
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        let odd = self.committed.len() % 2 == 1;
        mask.iter_mut().for_each(|word| *word &= if odd { 0xAAAA_AAAA } else { 0x5555_5555 });
        Ok(())
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        assert_eq!(token as usize % 2, self.committed.len() % 2, "only allowed tokens arrive");
        self.committed.push(token);
        self.n_left -= 1;
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.n_left == 0
    }
}

#[test]
fn penalties_bias_masks_minimum_ends_and_logprobs_are_those_of_plain_decoding() {
    let plain = |seed| SamplingParams { ignore_eos: true, ..SamplingParams::sampled(60, seed) };
    let requests = || {
        let mut requests: Vec<GenerateRequest> = [
            SamplingParams { logprobs: Some(5), ..plain(1) },
            SamplingParams { repetition_penalty: 1.5, presence_penalty: 1.0, ..plain(2) },
            SamplingParams { frequency_penalty: 2.0, temperature: 0.0, ..plain(3) },
            SamplingParams { logit_bias: vec![(7, 9.0), (8, 9.0)], ..plain(4) },
            SamplingParams { ignore_eos: false, min_tokens: 30, max_tokens: 400, ..plain(5) },
            SamplingParams { stop_token_ids: vec![3, 4, 5, 6], min_tokens: 7, ..plain(6) },
            SamplingParams { top_k: 4, top_p: 0.8, min_p: 0.1, temperature: 1.4, ..plain(7) },
            SamplingParams { choice: 3, logprobs: Some(0), ..plain(8) },
        ]
        .map(|sampling| GenerateRequest::new(prompt(2, 20), sampling))
        .into();
        let mut constrained = GenerateRequest::new(prompt(3, 30), plain(9));
        constrained.sampling.ignore_eos = false;
        constrained.sampling.max_tokens = 100;
        constrained.constraint = Some(Box::new(Alternating { n_left: 41, committed: Vec::new() }));
        requests.push(constrained);
        requests
    };
    for (max_drafts, every) in [(3, 7), (5, 3), (8, 11)] {
        assert_same_events(requests, max_drafts, move |_, position| position % every == 0);
    }
}

#[test]
fn an_end_inside_accepted_drafts_is_the_end() {
    // The prophet sees past the end: its drafts go on where the answer must not.
    let request = || {
        let mut request = greedy(prompt(1, 10), 12);
        request.sampling.stop_token_ids = vec![40];
        request
    };
    let script = |tokens: &[TokenId]| Reply::Token(30 + tokens.len() as u32);
    let runner = || Box::new(ScriptedRunner::new(capacity(), script));
    let text: Vec<TokenId> = (40..80).collect();
    for (stops, n_tokens) in [(true, 1), (false, 12)] {
        let mut asked = request();
        if !stops {
            asked.sampling.stop_token_ids.clear();
        }
        let prophet =
            Prophet::new(&[request()], std::slice::from_ref(&text), VOCABULARY, |_, _| false);
        let engine = prophet::start(runner(), prophet, 8, config());
        let (tokens, ending) = read(engine.submit(asked).unwrap());
        let Ending::Finished(reason, usage) = ending else { panic!("{ending:?}") };
        assert_eq!((tokens.len(), usage.completion_tokens), (n_tokens, n_tokens as u32));
        assert_eq!(reason == FinishReason::Length, !stops);
    }
}

#[test]
fn a_broken_row_after_a_rejected_draft_harms_nobody_and_an_accepted_one_is_noticed() {
    let request = || greedy(prompt(1, 10), 12);
    let truth = |tokens: &[TokenId]| 20 + tokens.len() as u32;
    let answer: Vec<TokenId> = (30..42).collect();
    for broken_from in [usize::MAX, 17] {
        let script = move |tokens: &[TokenId]| {
            let is_true = tokens[10..].iter().zip(30..).all(|(&token, truth)| token == truth);
            if is_true && tokens.len() < broken_from {
                Reply::Token(truth(tokens))
            } else {
                Reply::NotANumber
            }
        };
        let prophet =
            Prophet::new(&[request()], std::slice::from_ref(&answer), VOCABULARY, |_, at| {
                at % 4 == 3
            });
        let runner = Box::new(ScriptedRunner::new(capacity(), script));
        let engine = prophet::start(runner, prophet, 4, config());
        let (tokens, ending) = read(engine.submit(request()).unwrap());
        if broken_from == usize::MAX {
            assert!(matches!(ending, Ending::Finished(..)), "{ending:?}");
            assert_eq!(tokens, answer);
        } else {
            assert_eq!(ending, Ending::Failed(GenerateError::NonFiniteLogits { position: 17 }));
            assert_eq!(tokens, answer[..7]);
        }
    }
}

/// What a request with `params` would choose at `position` if `logits` were the target's and it had no
/// history: how drafts are chosen.
fn guess(params: &SamplingParams, logits: &mut [f32], position: u32) -> TokenId {
    let row = RowChoice { params, position, seen: &[], mask: None, forbidden: &[] };
    match choose_token(&row, logits, &mut ChoiceScratch::default()) {
        Choice::Token(token, _) => token,
        other => panic!("{other:?}"),
    }
}

/// Guesses from the right distribution, but with its own noise: right as often as chance has it.
struct OwnNoise {
    logits: Vec<f32>,
    seed: u64,
}

impl Drafter for OwnNoise {
    fn draft(
        &mut self,
        requests: &[DraftRequest<'_>],
        _: &mut dyn StepRunner,
        drafts: &mut [Vec<TokenId>],
        _: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        for (request, draft) in requests.iter().zip(drafts) {
            for position in 0..request.n_drafts {
                let params = SamplingParams::sampled(1, self.seed);
                let position = request.tokens.len() as u32 + position;
                draft.push(guess(&params, &mut self.logits.clone(), position));
                self.seed += 1;
            }
        }
        Ok(())
    }
}

#[test]
fn tokens_after_accepted_and_rejected_drafts_follow_the_models_distribution() {
    // The same distribution at every position.
    let runner = || Box::new(ScriptedRunner::new(capacity(), |_| Reply::Spread(5)));
    let request = |seed| {
        let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::sampled(6, seed) };
        GenerateRequest::new(prompt(1, 4), sampling)
    };
    let plain = EngineHandle::start(runner(), config()).unwrap();
    let mut asked = request(0);
    asked.sampling.logprobs = Some(VOCABULARY);
    let (tokens, _) = read_events(plain.submit(asked).unwrap());
    let mut logits = vec![0.0; VOCABULARY as usize];
    for &(token, logprob) in &tokens[0].1.as_ref().unwrap().top {
        logits[token as usize] = logprob;
    }
    let probabilities: Vec<f64> = logits.iter().map(|logprob| f64::from(*logprob).exp()).collect();

    let config = EngineConfig { speculation: always(DraftMethod::Off, 3), ..config() };
    let drafter = Box::new(OwnNoise { logits, seed: 1 << 40 });
    let engine = EngineHandle::start_with_drafter(runner(), drafter, config).unwrap();
    let mut counts = vec![vec![0; VOCABULARY as usize]; 6];
    for batch in 0..30 {
        let requests = (0..100).map(|seed| request(batch * 100 + seed)).collect();
        for answer in ids(&ask_all(&engine, requests)) {
            for (counts, token) in counts.iter_mut().zip(answer) {
                counts[token as usize] += 1;
            }
        }
    }
    // Tokens too rare to be counted one by one are counted together.
    let lumped = |values: &dyn Fn(usize) -> f64| {
        let (often, rare): (Vec<usize>, Vec<usize>) =
            (0..probabilities.len()).partition(|&token| probabilities[token] > 0.003);
        let mut lumped: Vec<f64> = often.into_iter().map(values).collect();
        lumped.push(rare.into_iter().map(values).sum());
        lumped
    };
    let expected = lumped(&|token| probabilities[token]);
    for counts in counts {
        let counts = lumped(&|token| f64::from(counts[token]));
        let counts: Vec<u32> = counts.into_iter().map(|count| count as u32).collect();
        assert_follows(&expected, &counts);
    }
    let drafts = engine.stats().drafts;
    let share = drafts.accepted[0] as f64 / drafts.drafted[0] as f64;
    let by_chance: f64 = probabilities.iter().map(|p| p * p).sum();
    assert!((share - by_chance).abs() < 0.02, "{share} accepted, by chance {by_chance}");
}

#[test]
fn repetitive_text_is_found_by_its_own_words() {
    let script = |tokens: &[TokenId]| Reply::Token(10 + (tokens.len() as u32 * 5) % 35);
    let config = EngineConfig { speculation: always(DraftMethod::Ngram, 4), ..config() };
    let engine =
        EngineHandle::start(Box::new(ScriptedRunner::new(capacity(), script)), config).unwrap();
    let (tokens, _) = read(engine.submit(greedy(prompt(1, 5), 100)).unwrap());
    let expected: Vec<TokenId> = (5..105).map(|n| 10 + n * 5 % 35).collect();
    assert_eq!(tokens, expected);
    let stats = engine.stats();
    // Seven tokens until the text repeats, and three of context.
    assert!(stats.drafts.accepted[3] >= 15, "{:?}", stats.drafts);
    assert!(stats.decode_requests.count() < 40, "steps are saved");
}

/// Fails as told.
struct Broken {
    panics: bool,
}

impl Drafter for Broken {
    fn draft(
        &mut self,
        _: &[DraftRequest<'_>],
        _: &mut dyn StepRunner,
        _: &mut [Vec<TokenId>],
        _: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        assert!(!self.panics, "planted");
        Err(StepError::Device { message: "planted".to_owned() })
    }
}

#[test]
fn a_drafter_that_fails_or_panics_ends_running_requests_and_the_engine_goes_on() {
    for panics in [false, true] {
        let config = EngineConfig { speculation: always(DraftMethod::Off, 2), ..config() };
        let engine =
            EngineHandle::start_with_drafter(spread(), Box::new(Broken { panics }), config)
                .unwrap();
        for _ in 0..2 {
            let (tokens, ending) = read(engine.submit(greedy(prompt(1, 5), 10)).unwrap());
            assert_eq!(tokens.len(), 1);
            assert!(matches!(ending, Ending::Failed(GenerateError::StepFailed { .. })));
        }
        let (tokens, ending) = read(engine.submit(greedy(prompt(1, 5), 1)).unwrap());
        assert!(matches!(ending, Ending::Finished(..)), "nothing to draft: {ending:?}");
        assert_eq!(tokens.len(), 1);
    }
}

#[test]
fn drafts_of_a_model_that_has_none_are_refused_at_the_start() {
    let config = EngineConfig { speculation: always(DraftMethod::Mtp, 2), ..config() };
    let refused = EngineHandle::start(spread(), config).err().unwrap();
    assert!(matches!(refused, StartError::NoDraftModel), "{refused}");
}

#[test]
fn a_guess_with_the_targets_logits_is_the_targets_choice() {
    let mut scratch = SampleScratch::default();
    for seed in 0..50 {
        let params = SamplingParams {
            logit_bias: vec![(5, 2.0)],
            top_p: 0.9,
            temperature: 0.8,
            ..SamplingParams::sampled(1, seed)
        };
        let logits: Vec<f32> = (0..VOCABULARY)
            .map(|token| (hashed_token(&[token, seed as u32], 60)) as f32 / 9.0)
            .collect();
        let guessed = guess(&params, &mut logits.clone(), seed as u32);
        let mut sampler = RequestSampler::new(params, &[], None);
        let sampled =
            sampler.sample(&mut logits.clone(), seed as u32, &[EOS], &mut scratch).unwrap();
        assert_eq!(guessed, sampled.token);
    }
}
