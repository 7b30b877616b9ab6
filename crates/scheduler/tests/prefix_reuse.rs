//! What is reused, what is not, and how it is counted.

use fathom_core::RequestId;
use fathom_scheduler::{BLOCK_TOKENS, CacheStats, SchedulerConfig};

use crate::model_engine::{Engine, Request, alone, prompt};

fn engine() -> Engine {
    engine_with(64, 16)
}

fn engine_with(n_blocks: u32, n_snapshots: u32) -> Engine {
    Engine::new(SchedulerConfig {
        max_num_batched_tokens: 2048,
        max_num_seqs: 4,
        ..SchedulerConfig::new(n_blocks * BLOCK_TOKENS, n_blocks, n_snapshots)
    })
}

fn complete(engine: &mut Engine, request: Request) -> RequestId {
    let id = engine.submit(request);
    engine.finish();
    engine.check_answers();
    id
}

fn cached(engine: &mut Engine, request: Request) -> u32 {
    let id = complete(engine, request);
    engine.usage(id).cached_tokens
}

fn stats(engine: &Engine) -> CacheStats {
    engine.scheduler.stats().cache
}

#[test]
fn an_identical_prompt_skips_all_but_the_last_block_boundary_before_its_end() {
    for (n_tokens, expected) in [(256, 0), (257, 256), (512, 256), (513, 512), (700, 512)] {
        let mut engine = engine();
        assert_eq!(cached(&mut engine, Request::new(prompt(1, n_tokens), 2)), 0);
        let again = cached(&mut engine, Request::new(prompt(1, n_tokens), 2));
        assert_eq!(again, expected, "prompt of {n_tokens}");
    }
}

#[test]
fn the_next_turn_of_a_conversation_skips_the_previous_answer_too() {
    let mut engine = engine();
    let mut tokens = prompt(1, 300);
    let mut expected = 0;
    for turn in 0..6 {
        let id = complete(&mut engine, Request::new(tokens.clone(), 150));
        assert_eq!(engine.usage(id).cached_tokens, expected, "turn {turn}");
        tokens.extend(&engine.output[&id]);
        // The last token of an answer is sampled but not run.
        expected = (tokens.len() as u32 - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
        tokens.extend(prompt(turn, 40));
    }
}

#[test]
fn requests_running_at_the_same_time_share_blocks() {
    let mut engine = engine();
    engine.submit(Request::new(prompt(1, 600), 100));
    for _ in 0..4 {
        engine.step();
    }
    let used = engine.scheduler.stats().blocks_used;
    engine.submit(Request::new(prompt(1, 600), 100));
    engine.step();
    assert_eq!(engine.scheduler.stats().blocks_used, used + 1);
    engine.finish();
    engine.check_answers();
}

#[test]
fn prompts_that_diverge_inside_a_block_do_not_share_it() {
    let mut engine = engine();
    complete(&mut engine, Request::new(prompt(1, 700), 2));
    let mut other = prompt(1, 700);
    other[300] ^= 1;
    assert_eq!(cached(&mut engine, Request::new(other.clone(), 2)), 0);
    // The first block is shared, but nobody had a reason to keep a snapshot at its end.
    assert_eq!(stats(&engine).miss_no_snapshot, 1);
    assert_eq!(cached(&mut engine, Request::new(other, 2)), 512);
}

#[test]
fn a_long_prompt_leaves_snapshots_along_the_way() {
    let config = SchedulerConfig {
        snapshot_interval: 1024,
        max_num_batched_tokens: 4096,
        ..SchedulerConfig::new(64 * BLOCK_TOKENS, 64, 16)
    };
    let mut engine = Engine::new(config);
    complete(&mut engine, Request::new(prompt(1, 3000), 2));
    let mut other = prompt(1, 3000);
    other[2100] ^= 1;
    assert_eq!(cached(&mut engine, Request::new(other, 2)), 2048);
}

#[test]
fn users_and_salts_never_share() {
    let mut engine = engine();
    let request = || Request::new(prompt(1, 600), 2);
    let salted = |salt: &str| Request { salt: Some(salt.to_owned()), ..request() };
    for request in [request(), request().of("a"), request().of("b"), salted("x"), salted("y")] {
        assert_eq!(cached(&mut engine, request.clone()), 0, "{request:?}");
        assert_eq!(cached(&mut engine, request), 512);
    }
    assert_eq!(stats(&engine).miss_salt, 4);
    assert_eq!(stats(&engine).miss_no_block, 1);
}

#[test]
fn users_share_if_the_operator_says_so() {
    let config =
        SchedulerConfig { isolate_users: false, ..SchedulerConfig::new(64 * BLOCK_TOKENS, 64, 16) };
    let mut engine = Engine::new(config);
    complete(&mut engine, Request::new(prompt(1, 600), 2).of("a"));
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 600), 2).of("b")), 512);
}

#[test]
fn the_least_recently_used_prefix_is_evicted_and_the_miss_says_so() {
    let mut engine = engine_with(8, 8);
    for family in [1, 2] {
        complete(&mut engine, Request::new(prompt(family, 700), 2));
    }
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 700), 2)), 512);
    // Needs five blocks: what is free, then the blocks of the second prompt.
    complete(&mut engine, Request::new(prompt(3, 1200), 2));
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 700), 2)), 512);
    assert_eq!(cached(&mut engine, Request::new(prompt(2, 700), 2)), 0);
    assert_eq!(stats(&engine).miss_evicted, 1);
}

#[test]
fn blocks_without_a_snapshot_are_no_hit() {
    let mut engine = engine_with(64, 1);
    complete(&mut engine, Request::new(prompt(1, 600), 2));
    complete(&mut engine, Request::new(prompt(2, 600), 2));
    // The only snapshot belongs to the second prompt now.
    assert_eq!(cached(&mut engine, Request::new(prompt(1, 600), 2)), 0);
    assert_eq!(stats(&engine).miss_no_snapshot, 1);
}

#[test]
fn a_long_answer_keeps_one_snapshot_of_its_own_progress() {
    let mut engine = engine();
    let (family, answer) = (0..50)
        .map(|family| (family, alone(&prompt(family, 300), 300 + 1200)))
        .max_by_key(|(_, answer)| answer.len())
        .unwrap();
    assert!(answer.len() > 600, "some answer is long: {}", answer.len());
    complete(&mut engine, Request::new(prompt(family, 300), 1200));
    // One at the end of the prompt, one at the end of the answer.
    assert_eq!(engine.scheduler.stats().snapshots_used, 2);
}

#[test]
fn every_look_up_is_a_hit_or_has_a_reason() {
    let mut engine = engine_with(8, 4);
    for turn in 0..30 {
        let n_tokens = 100 + turn / 4 % 3 * 300;
        complete(&mut engine, Request::new(prompt(turn % 4, n_tokens), 3));
    }
    let stats = stats(&engine);
    let misses = stats.miss_short
        + stats.miss_no_block
        + stats.miss_evicted
        + stats.miss_salt
        + stats.miss_no_snapshot;
    assert_eq!((stats.lookups, stats.hits + misses), (30, 30));
    assert!(stats.hits > 0 && stats.miss_short > 0 && stats.miss_evicted > 0);
    assert_eq!(stats.hit_tokens, engine.scheduler.stats().cached_prompt_tokens);
}
