//! A real model with its MTP block behind the engine: same tokens as without, and drafts that do not
//! depend on how the sequence came to where it is.

use std::sync::Arc;

use fathom_core::{Numerics, ParallelConfig, SamplingParams, TokenId};
use fathom_engine::{
    DraftInput, DraftMethod, EngineConfig, EngineHandle, GenerateRequest, SnapshotCopy,
    SpeculationConfig, StepInput, StepOutput, StepRunner,
};
use fathom_model::session::Rows;
use fathom_model::{NoProbe, Session, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{Backend, Solo};

use crate::nano::{
    Room, alone, ask_and_stop, assert_same_after_a_restart, crowded_config, load, prompt, runner,
    runner_of,
};
use crate::prophet::{self, Prophet, always};
use crate::support::{Ending, read};

const DRAFTS: usize = 4;

fn solo() -> ParallelConfig {
    ParallelConfig::default()
}

fn mtp_runner(numerics: Numerics, parallel: ParallelConfig, room: &Room) -> Box<dyn StepRunner> {
    runner_of(load(numerics, parallel, true), parallel, room, DRAFTS)
}

fn drafting_engine(runner: Box<dyn StepRunner>, n_drafts: u32, budget: u32) -> EngineHandle {
    let speculation = always(DraftMethod::Mtp, n_drafts);
    EngineHandle::start(runner, EngineConfig { speculation, ..crowded_config(budget) }).unwrap()
}

/// Few requests that meet at block boundaries and share a beginning.
fn requests() -> Vec<GenerateRequest> {
    let sampled = |seed, max_tokens| SamplingParams {
        top_p: 0.9,
        presence_penalty: 0.5,
        ..SamplingParams::sampled(max_tokens, seed)
    };
    [
        (prompt(1, 250), sampled(1, 30)),
        (prompt(1, 520), sampled(2, 16)),
        (prompt(1, 300), SamplingParams::greedy(12)),
        (prompt(3, 1), sampled(5, 20)),
    ]
    .map(|(prompt, sampling)| GenerateRequest::new(prompt, sampling))
    .into()
}

/// Answers of an engine to all requests at once.
fn ask_all(engine: &EngineHandle, requests: Vec<GenerateRequest>) -> Vec<Vec<TokenId>> {
    let streams: Vec<_> = requests.into_iter().map(|r| engine.submit(r).unwrap()).collect();
    let tokens = |stream| {
        let (tokens, ending) = read(stream);
        assert!(matches!(ending, Ending::Finished(..)), "{ending:?}");
        tokens
    };
    streams.into_iter().map(tokens).collect()
}

/// The golden model's tokens with MTP drafts, roomy and tight, against the model alone.
fn assert_as_alone(numerics: Numerics) {
    let models = load(numerics, solo(), false);
    let expected: Vec<_> = requests().iter().map(|request| alone(&models[0], request)).collect();
    let roomy = drafting_engine(mtp_runner(numerics, solo(), &Room(8, 32, 16)), 4, 2048);
    for _ in 0..2 {
        assert_eq!(ask_all(&roomy, requests()), expected);
    }
    let stats = roomy.stats();
    assert!(stats.cache.hits > 0 && stats.drafts.drafted[3] > 0, "{stats:?}");

    let tight = drafting_engine(mtp_runner(numerics, solo(), &Room(3, 4, 2)), 2, 50);
    assert_eq!(ask_all(&tight, requests()), expected);
    let stats = tight.stats();
    assert!(stats.preemptions > 0 && stats.drafts.drafted[1] > 0, "{stats:?}");
}

#[test]
fn bf16_tokens_with_mtp_drafts_are_those_without() {
    assert_as_alone(Numerics::Bf16);
}

#[test]
fn f32_tokens_with_mtp_drafts_are_those_without() {
    assert_as_alone(Numerics::F32);
}

#[test]
fn f32qat_tokens_with_mtp_drafts_are_those_without() {
    assert_as_alone(Numerics::F32Qat);
}

#[test]
fn two_ranks_draft_the_same_and_give_the_same_tokens() {
    let parallel = ParallelConfig { tensor: 2, expert: 1 };
    let plain = runner(Numerics::F32, parallel, &Room(8, 32, 0));
    let plain = EngineHandle::start(plain, crowded_config(2048)).unwrap();
    let drafting = mtp_runner(Numerics::F32, parallel, &Room(3, 6, 2));
    let drafting = drafting_engine(drafting, 3, 60);
    assert_eq!(ask_all(&drafting, requests()), ask_all(&plain, requests()));
    assert!(drafting.stats().drafts.drafted[2] > 0, "{:?}", drafting.stats());
}

/// Answers of 20 tokens that cross multiples of 4, 128 and 256, each with drafts rejected at another
/// offset, all at once.
fn assert_rejects_leave_no_trace(numerics: Numerics) {
    let lengths = [(118, 0.0), (246, 1.0)];
    let of_length = |(n, temperature)| {
        (0..5).map(move |seed| {
            let sampling = SamplingParams {
                temperature,
                ignore_eos: true,
                ..SamplingParams::sampled(20, seed)
            };
            GenerateRequest::new(prompt(9, n), sampling)
        })
    };
    let requests: Vec<GenerateRequest> = lengths.into_iter().flat_map(of_length).collect();
    let models = load(numerics, solo(), false);
    // Greedy answers do not depend on the seed.
    let mut expected = vec![alone(&models[0], &requests[0]); 5];
    expected.extend(requests[5..].iter().map(|request| alone(&models[0], request)));
    let errs = |seed, position| position as u64 % 5 == seed;
    let prophet = Prophet::new(&requests, &expected, 1000, errs);
    let runner = runner_of(models, solo(), &Room(10, 20, 4), DRAFTS);
    let engine = prophet::start(runner, prophet, DRAFTS as u32, crowded_config(2048));
    assert_eq!(ask_all(&engine, requests), expected);
    let counts = engine.stats().drafts;
    assert!(counts.accepted[3] > 0 && counts.accepted[0] < counts.drafted[0], "{counts:?}");
}

#[test]
fn bf16_rejects_at_every_offset_around_every_boundary_leave_no_trace() {
    assert_rejects_leave_no_trace(Numerics::Bf16);
}

#[test]
fn f32_rejects_at_every_offset_around_every_boundary_leave_no_trace() {
    assert_rejects_leave_no_trace(Numerics::F32);
}

#[test]
fn f32qat_rejects_at_every_offset_around_every_boundary_leave_no_trace() {
    assert_rejects_leave_no_trace(Numerics::F32Qat);
}

/// Greedy drafts after `tokens`, computed with nothing but the model and one sequence.
fn drafts_by_hand(model: &Transformer<CpuOps>, tokens: &[TokenId]) -> Vec<TokenId> {
    let n = tokens.len() - 1;
    let mut session = Session::new(model, &Solo, tokens.len() + DRAFTS, DRAFTS).unwrap();
    let x = session.run(&tokens[..n], Rows::None, true, &mut NoProbe).unwrap().copies.unwrap();
    let mut step = session.draft(0, &tokens[1..], &x, Rows::Last, &mut NoProbe).unwrap();
    let mut drafts = Vec::new();
    loop {
        let logits = model.ops().download(step.logits.as_ref().unwrap()).unwrap();
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let token = logits.iter().position(|&logit| logit == most).unwrap() as TokenId;
        drafts.push(token);
        if drafts.len() == DRAFTS {
            return drafts;
        }
        let copies = step.copies.unwrap();
        let last = model.ops().shape(&copies).0 as u32 - 1;
        let x = model.ops().select_rows(&copies, &[last]).unwrap();
        let position = n + drafts.len() - 1;
        step = session.draft(position, &[token], &x, Rows::Last, &mut NoProbe).unwrap();
    }
}

/// A runner, driven by hand; slot `s` uses blocks `4 s ..`.
struct Driver {
    runner: Box<dyn StepRunner>,
}

impl Driver {
    fn new(models: Vec<Transformer<CpuOps>>) -> Self {
        Self { runner: runner_of(models, solo(), &Room(4, 16, 2), DRAFTS) }
    }

    fn step(
        &mut self,
        slot: u32,
        position: u32,
        tokens: &[TokenId],
        restore: Option<u32>,
        capture: Option<u32>,
    ) {
        let mut input = StepInput::default();
        let copy = |snapshot, position| SnapshotCopy { slot, snapshot, position };
        input.restores.extend(restore.map(|snapshot| copy(snapshot, position)));
        let end = position + tokens.len() as u32;
        input.captures.extend(capture.map(|snapshot| copy(snapshot, end)));
        let blocks: Vec<u32> = (4 * slot..4 * slot + end.div_ceil(256)).collect();
        input.batch.push(slot, position, tokens, &blocks, true);
        self.runner.step(&Arc::new(input), &mut StepOutput::default()).unwrap();
    }

    /// Drafts after `tokens`, all but the last of which have run in `slot`.
    fn draft(&mut self, slot: u32, tokens: &[TokenId]) -> Vec<TokenId> {
        let input = DraftInput {
            slot,
            position: tokens.len() as u32 - 1,
            token: tokens[tokens.len() - 1],
            n_drafts: DRAFTS as u32,
            sampling: Arc::new(SamplingParams::greedy(1)),
        };
        let mut drafts = [Vec::new()];
        self.runner.draft(&Arc::new(vec![input]), &mut drafts, &mut || ()).unwrap();
        let [draft] = drafts;
        draft
    }
}

fn both_modes(body: impl Fn(&Transformer<CpuOps>, Driver)) {
    for numerics in [Numerics::Bf16, Numerics::F32] {
        let [model] = <[_; 1]>::try_from(load(numerics, solo(), true)).unwrap();
        body(&model, Driver::new(load(numerics, solo(), true)));
    }
}

#[test]
fn drafts_do_not_depend_on_chunks_or_on_how_long_nobody_asked_for_any() {
    both_modes(|model, mut driver| {
        let text = prompt(4, 170);
        let expected = drafts_by_hand(model, &text);
        for (slot, chunk) in [(0, 169), (1, 100), (2, 13), (3, 1)] {
            let first = if chunk == 1 { 135 } else { 0 };
            if first > 0 {
                driver.step(slot, 0, &text[..first], None, None);
            }
            for (index, tokens) in text[first..169].chunks(chunk).enumerate() {
                driver.step(slot, (first + index * chunk) as u32, tokens, None, None);
            }
            assert_eq!(driver.draft(slot, &text), expected, "chunks of {chunk}");
        }
    });
}

#[test]
fn drafts_after_rejected_drafts_are_as_if_those_had_never_run() {
    both_modes(|model, mut driver| {
        let text = prompt(5, 200);
        let wrong = prompt(6, 200);
        let mut position = 120;
        driver.step(0, 0, &text[..position], None, None);
        // Of each step some drafts are accepted, from none to all; sometimes nobody drafts.
        for (turn, n_accepted) in [0, 2, 4, 1, 0, 3, 4, 0, 1, 2].into_iter().enumerate() {
            let known = &text[..=position];
            if turn % 3 != 1 {
                assert_eq!(driver.draft(0, known), drafts_by_hand(model, known), "turn {turn}");
            }
            let (end, right_end) = (position + 1 + DRAFTS, position + 1 + n_accepted);
            let tokens = [&text[position..right_end], &wrong[right_end..end]].concat();
            driver.step(0, position as u32, &tokens, None, None);
            position = right_end;
        }
    });
}

#[test]
fn a_resumed_sequence_drafts_as_a_cold_one_whatever_followed_the_prefix_before() {
    both_modes(|model, mut driver| {
        let producer = prompt(4, 300);
        let mut other = producer[..256].to_vec();
        other.extend(prompt(5, 20));
        assert_ne!(producer[256], other[256]);
        // The boundary is reached by a chunk, or by drafts that are accepted.
        driver.step(0, 0, &producer[..256], None, Some(0));
        driver.step(1, 0, &producer[..252], None, None);
        driver.draft(1, &producer[..253]);
        driver.step(1, 252, &producer[252..256], None, Some(1));
        driver.draft(1, &producer[..257]);
        let cold = [&other, &producer].map(|text| (text, drafts_by_hand(model, &text[..258])));
        for (snapshot, slot) in [(0, 2), (1, 3)] {
            // Blocks are not part of a snapshot: the prefix is run to have them.
            driver.step(slot, 0, &producer[..256], None, None);
            for (text, expected) in &cold {
                driver.step(slot, 256, &prompt(8, 9), None, None);
                driver.step(slot, 256, &text[256..257], Some(snapshot), None);
                assert_eq!(driver.draft(slot, &text[..258]), *expected);
            }
        }
    });
}

#[test]
fn a_conversation_with_mtp_drafts_is_resumed_after_a_restart() {
    let start = || mtp_runner(Numerics::Bf16, solo(), &Room(2, 5, 4));
    assert_same_after_a_restart(start, &always(DraftMethod::Mtp, 3), 600);
}

#[test]
fn files_written_without_the_mtp_block_are_misses_with_it_and_the_other_way_round() {
    let directory = tempfile::tempdir().unwrap();
    let ask = |mtp: bool| {
        let room = Room(2, 5, 4);
        let (runner, speculation) = if mtp {
            (mtp_runner(Numerics::F32, solo(), &room), always(DraftMethod::Mtp, 3))
        } else {
            (runner(Numerics::F32, solo(), &room), SpeculationConfig::default())
        };
        let request = GenerateRequest::new(prompt(7, 600), SamplingParams::greedy(10));
        let (tokens, usage, counts) = ask_and_stop(runner, speculation, directory.path(), request);
        assert_eq!((counts.disk_damaged, counts.disk_misses), (0, 0));
        (tokens, usage.cached_tokens)
    };
    let (tokens, cached) = ask(false);
    assert_eq!(cached, 0);
    for (mtp, cached) in [(true, 0), (true, 512), (false, 512)] {
        assert_eq!(ask(mtp), (tokens.clone(), cached));
    }
}

#[test]
fn sampled_drafts_share_the_noise_of_their_position() {
    // With a temperature so high that only noise decides, a draft that shares it is always right.
    let engine = drafting_engine(mtp_runner(Numerics::F32, solo(), &Room(2, 4, 0)), 3, 512);
    let sampling =
        SamplingParams { temperature: 1e6, ignore_eos: true, ..SamplingParams::sampled(40, 3) };
    let (tokens, ending) =
        read(engine.submit(GenerateRequest::new(prompt(1, 20), sampling)).unwrap());
    assert!(matches!(ending, Ending::Finished(..)));
    assert!(tokens.iter().any(|&token| token != tokens[0]) && tokens.len() == 40);
    let counts = engine.stats().drafts;
    assert_eq!(counts.accepted, counts.drafted, "{counts:?}");
}
