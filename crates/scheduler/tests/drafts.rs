//! Drafts: how many run, and what becomes of a step whose drafts are rejected.

use fathom_core::{FinishReason, TokenId};
use fathom_scheduler::{BLOCK_TOKENS, End, Outcome, SchedulerConfig, Work};

use crate::model_engine::{EOS, Engine, Request, alone, prompt};

const DRAFTS: u32 = 4;

fn config(budget: u32) -> SchedulerConfig {
    SchedulerConfig {
        max_num_batched_tokens: budget,
        max_num_seqs: 4,
        ..SchedulerConfig::new(4096, 64, 8)
    }
}

/// A prompt of `n` tokens whose answer has at least `least` tokens.
fn talkative(n: u32, least: usize) -> Vec<TokenId> {
    let long = |family: &u32| alone(&prompt(*family, n), n + least as u32).len() >= least;
    prompt((0..EOS).find(long).unwrap(), n)
}

/// An engine that drafts `n` tokens per step, all of them right or all of them wrong.
fn drafting(n_drafts: u32, wrong: bool, config: SchedulerConfig) -> Engine {
    let mut engine = Engine::new(config);
    engine.drafting = (n_drafts, if wrong { 8 } else { 0 });
    engine
}

/// (position, tokens, drafts) of the only entry of each of `n` steps.
fn steps(engine: &mut Engine, n: usize) -> Vec<(u32, u32, u32)> {
    let mut steps = Vec::new();
    for _ in 0..n {
        engine.plan();
        let [entry] = &engine.plan.entries[..] else { panic!("one sequence runs") };
        steps.push((entry.position, entry.n_tokens, entry.n_drafts));
        engine.run();
    }
    steps
}

#[test]
fn a_decode_runs_its_newest_token_and_goes_on_after_the_last_accepted_draft() {
    for wrong in [true, false] {
        let mut engine = drafting(DRAFTS, wrong, config(512));
        engine.submit(Request::new(talkative(10, 40), 40));
        let seen = steps(&mut engine, 6);
        assert_eq!(seen[0], (0, 10, 0), "a prompt has no drafts");
        for pair in seen[1..].windows(2) {
            let [(position, n_tokens, n_drafts), (next, ..)] = [pair[0], pair[1]];
            assert_eq!(n_tokens, 1 + n_drafts);
            assert_eq!(next, position + if wrong { 1 } else { n_tokens });
        }
        assert!(seen.iter().any(|&(_, _, n_drafts)| n_drafts > 1), "{seen:?}");
        engine.finish();
        engine.check_answers();
    }
}

#[test]
fn no_draft_runs_past_a_block_boundary_or_the_length_asked_for() {
    let mut engine = drafting(DRAFTS, false, config(512));
    engine.submit(Request::new(talkative(250, 12), 12));
    let mut ends = Vec::new();
    while engine.plan() {
        let entry = &engine.plan.entries[0];
        ends.push((entry.position, entry.position + entry.n_tokens));
        engine.run();
    }
    // The last token of an answer is not run.
    assert_eq!(ends.last().unwrap().1, 250 + 12 - 1, "{ends:?}");
    assert!(ends.iter().all(|&(start, end)| start / BLOCK_TOKENS == (end - 1) / BLOCK_TOKENS));
    engine.check_answers();
}

#[test]
fn drafts_leave_every_decode_its_token_and_prefill_half_of_the_rest() {
    let mut engine = drafting(0, false, config(20));
    for _ in 0..3 {
        engine.submit(Request::new(talkative(5, 40), 40));
    }
    for _ in 0..3 {
        engine.step();
    }
    engine.submit(Request::new(prompt(3, 100), 1));
    engine.plan();
    engine.run();
    let decodes: Vec<u32> = engine.plan.entries.iter().map(|entry| entry.index).collect();
    for &index in &decodes[..3] {
        engine.scheduler.want_drafts(index, 7);
        engine.drafts.insert(index, vec![0; 7]);
    }
    engine.plan();
    let n_drafts: Vec<u32> = engine.plan.entries.iter().map(|entry| entry.n_drafts).collect();
    // 20 tokens, 3 decodes: 8 of the other 17 may be drafts.
    assert_eq!(n_drafts, [7, 1, 0, 0]);
    assert_eq!(engine.plan.entries[3].work, Work::Prefill);
    assert_eq!(engine.plan.n_prefill_tokens(), 20 - 3 - 8);
}

#[test]
fn a_snapshot_at_a_boundary_reached_by_drafts_is_kept_only_if_they_were_accepted() {
    for (wrong, n_steps) in [(false, 1), (true, 3)] {
        let mut engine = Engine::new(config(512));
        let tokens = talkative(253, 30);
        let first = engine.submit(Request::new(tokens.clone(), 30));
        engine.step();
        let index = engine.plan.entries[0].index;
        let future = alone(&tokens, 253 + 30);
        // Positions 253, 254 and 255 end the block.
        let right = vec![future[1], future[2]];
        engine.drafts.insert(index, if wrong { vec![EOS, EOS] } else { right });
        engine.scheduler.want_drafts(index, 2);
        engine.plan();
        assert_eq!((engine.plan.n_tokens(), engine.plan.captures.len()), (3, 1));
        engine.run();
        for _ in 1..n_steps {
            assert_eq!(engine.scheduler.stats().snapshots_used, 0, "the boundary is not reached");
            engine.step();
        }
        assert_eq!(engine.scheduler.stats().snapshots_used, 1);
        engine.finish();

        let mut longer = tokens;
        longer.extend(&future[..10]);
        let second = engine.submit(Request::new(longer, 20));
        engine.finish();
        assert_eq!(engine.usage(second).cached_tokens, BLOCK_TOKENS);
        engine.check_answers();
        assert_eq!(engine.usage(first).completion_tokens, 30);
    }
}

#[test]
fn an_end_at_an_accepted_draft_is_where_the_sequence_ends() {
    let mut engine = Engine::new(config(512));
    engine.submit(Request::new(talkative(10, 40), 40));
    engine.step();
    let index = engine.plan.entries[0].index;
    engine.scheduler.want_drafts(index, 3);
    engine.plan();
    let outcomes = [Outcome::accepted(4), Outcome::last(5, FinishReason::Eos)];
    engine.scheduler.commit(&engine.plan, &outcomes);
    engine.collect();
    let ended = engine.ended.values().next().unwrap();
    assert_eq!(ended.end, End::Finished(FinishReason::Eos));
    assert_eq!(ended.usage.completion_tokens, 3);
}

#[test]
fn a_user_is_charged_for_tokens_and_not_for_guesses() {
    // "a" is charged 12 for its first prompt and 2 for each of 39 decoded tokens, 90 in all, however
    // many steps that took and whatever was guessed: more than 60 and less than 120.
    for (wrong, charged_to_b, next) in [(false, 60, "b"), (true, 120, "a")] {
        let mut engine =
            drafting(DRAFTS, wrong, SchedulerConfig { max_num_seqs: 1, ..config(512) });
        engine.submit(Request::new(talkative(12, 40), 40).of("a"));
        engine.submit(Request::new(prompt(1, charged_to_b), 1).of("b"));
        let [a, b] = ["a", "b"].map(|user| engine.submit(Request::new(prompt(2, 9), 1).of(user)));
        while !engine.ended.contains_key(&a) && !engine.ended.contains_key(&b) {
            assert!(engine.step());
        }
        assert_eq!(engine.ended.contains_key(&b), next == "b");
        assert_eq!(engine.n_accepted > 20, !wrong);
    }
}

#[test]
#[should_panic(expected = "only drafts are accepted")]
fn accepting_more_than_was_drafted_is_a_bug() {
    let mut engine = Engine::new(config(512));
    engine.submit(Request::new(prompt(1, 10), 40));
    engine.plan();
    engine.scheduler.commit(&engine.plan, &[Outcome::accepted(4), Outcome::token(5)]);
}
