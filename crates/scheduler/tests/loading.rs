//! What comes back from lower tiers, and what happens when it does not.

use fathom_core::RequestId;
use fathom_scheduler::{BLOCK_TOKENS, SchedulerConfig};

use crate::lower_tier::Lower;
use crate::model_engine::{Engine, Request, prompt};

fn engine(n_blocks: u32, n_snapshots: u32, lower: Lower) -> Engine {
    let mut engine = Engine::new(SchedulerConfig {
        max_num_batched_tokens: 2048,
        max_num_seqs: 4,
        lower_tiers: true,
        ..SchedulerConfig::new(n_blocks * BLOCK_TOKENS, n_blocks, n_snapshots)
    });
    engine.lower = Some(lower);
    engine
}

fn complete(engine: &mut Engine, request: Request) -> RequestId {
    let id = engine.submit(request);
    engine.finish();
    engine.check_answers();
    engine.check_nothing_held();
    id
}

fn cached(engine: &mut Engine, request: Request) -> u32 {
    let id = complete(engine, request);
    engine.usage(id).cached_tokens
}

fn n_loaded(engine: &Engine) -> u32 {
    engine.lower.as_ref().unwrap().n_loaded
}

#[test]
fn a_prefix_survives_a_restart_in_a_lower_tier() {
    let mut engine = engine(64, 16, Lower::new(100, 2, 0));
    complete(&mut engine, Request::new(prompt(1, 700), 2));
    engine.restart();
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 700), 2)), 512);
    // Two blocks and the snapshot at their end.
    assert_eq!(n_loaded(&engine), 3);
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 700), 2)), 512);
    assert_eq!(n_loaded(&engine), 3, "what is on the device is not loaded again");
}

#[test]
fn the_next_turn_after_a_restart_skips_the_previous_answer_too() {
    let mut engine = engine(64, 16, Lower::new(100, 2, 0));
    let mut tokens = prompt(1, 300);
    for turn in 0..6 {
        let id = complete(&mut engine, Request::new(tokens.clone(), 150));
        tokens.extend(&engine.output[&id]);
        let expected = (tokens.len() as u32 - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
        tokens.extend(prompt(turn, 40));
        engine.restart();
        assert_eq!(cached(&mut engine, Request::new(tokens.clone(), 1)), expected, "turn {turn}");
    }
}

#[test]
fn an_evicted_prefix_comes_back_from_a_lower_tier() {
    let mut engine = engine(8, 8, Lower::new(100, 0, 0));
    for family in 1..5 {
        complete(&mut engine, Request::new(prompt(family, 1200), 2));
    }
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 1200), 2)), 1024);
    assert_eq!(n_loaded(&engine), 5);
}

#[test]
fn only_what_is_missing_is_loaded() {
    let mut engine = engine(64, 1, Lower::new(100, 0, 0));
    complete(&mut engine, Request::new(prompt(1, 600), 2));
    complete(&mut engine, Request::new(prompt(2, 600), 2));
    // The blocks of the first prompt are there; the only snapshot is the second one's.
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 600), 2)), 512);
    assert_eq!(n_loaded(&engine), 1);
}

#[test]
fn damaged_state_is_computed_again() {
    let mut engine = engine(64, 16, Lower::new(100, 1, 1));
    complete(&mut engine, Request::new(prompt(1, 700), 2));
    engine.restart();
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 700), 2)), 0);
    assert_eq!(n_loaded(&engine), 3);
}

#[test]
fn others_run_while_one_waits_for_its_load() {
    let mut engine = engine(64, 16, Lower::new(100, 1000, 0));
    complete(&mut engine, Request::new(prompt(1, 700), 2));
    engine.restart();
    let slow = engine.submit(Request::new(prompt(1, 700), 2));
    let quick = engine.submit(Request::new(prompt(2, 100), 5));
    for _ in 0..5 {
        engine.step();
    }
    assert!(engine.ended.contains_key(&quick) && !engine.ended.contains_key(&slow));
    engine.finish();
    engine.check_answers();
    assert_eq!(engine.usage(slow).cached_tokens, 512);
}

#[test]
fn requests_with_one_prefix_load_it_once() {
    let mut engine = engine(64, 16, Lower::new(100, 3, 0));
    complete(&mut engine, Request::new(prompt(1, 700), 2));
    engine.restart();
    let ids: Vec<_> = (0..4).map(|_| engine.submit(Request::new(prompt(1, 700), 20))).collect();
    engine.finish();
    engine.check_answers();
    assert_eq!(n_loaded(&engine), 3);
    assert!(ids.iter().all(|&id| engine.usage(id).cached_tokens == 512));
}

#[test]
fn a_load_outlives_who_asked_for_it() {
    let mut engine = engine(64, 16, Lower::new(100, 1000, 0));
    complete(&mut engine, Request::new(prompt(1, 700), 2));
    engine.restart();
    let id = engine.submit(Request::new(prompt(1, 700), 2));
    assert!(!engine.plan(), "the load is all there is");
    engine.scheduler.cancel(id);
    engine.collect();
    assert_eq!(engine.scheduler.n_loading(), 1);
    engine.finish_loads(true);
    engine.check_nothing_held();
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 700), 2)), 512);
    assert_eq!(n_loaded(&engine), 3);
}

#[test]
fn what_a_failed_request_computed_is_forgotten_below_too() {
    let mut engine = engine(64, 16, Lower::new(100, 0, 0));
    // The blocks of all chunks but the last are published and copied before that one fails.
    let id = engine.submit(Request::new(prompt(1, 3000), 2));
    while engine.plan() && !engine.plan.entries[0].wants_logits {
        engine.run();
    }
    assert!(engine.scheduler.stats().blocks_used > 8);
    engine.run_corrupting(Some(id));
    engine.plan();
    engine.restart();
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 3000), 2)), 0);
}
