//! No user starves another, and nobody starves.

use fathom_core::RequestId;
use fathom_scheduler::SchedulerConfig;

use crate::model_engine::{Engine, Request, prompt};

fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_batched_tokens: 512,
        max_num_seqs: 4,
        prefix_cache: false,
        ..SchedulerConfig::new(2048, 64, 0)
    }
}

/// Number of `ids` that end before `last` does.
fn ended_before(engine: &mut Engine, ids: &[RequestId], last: RequestId) -> usize {
    while !engine.ended.contains_key(&last) {
        assert!(engine.step());
    }
    ids.iter().filter(|id| engine.ended.contains_key(id)).count()
}

#[test]
fn one_request_of_a_quiet_user_does_not_wait_for_a_hundred_of_a_busy_one() {
    let mut engine = Engine::new(config());
    let busy: Vec<RequestId> =
        (0..100).map(|_| engine.submit(Request::new(prompt(1, 400), 4).of("busy"))).collect();
    engine.step();
    let quiet = engine.submit(Request::new(prompt(2, 400), 4).of("quiet"));
    let before = ended_before(&mut engine, &busy, quiet);
    assert!(before <= 8, "{before} requests of the busy user ended first");
    engine.finish();
    engine.check_answers();
}

#[test]
fn users_with_equal_demand_get_equal_service_whatever_their_request_sizes() {
    let mut engine = Engine::new(config());
    // The same number of prompt tokens, in few long and many short prompts.
    for _ in 0..20 {
        engine.submit(Request::new(prompt(1, 2000), 1).of("long"));
    }
    for _ in 0..200 {
        engine.submit(Request::new(prompt(2, 200), 1).of("short"));
    }
    for _ in 0..80 {
        engine.step();
    }
    let served = |user: &str| -> u32 {
        let of_user = |id: &&RequestId| engine.requests[*id].user.as_deref() == Some(user);
        engine.ended.keys().filter(of_user).map(|id| engine.usage(*id).prompt_tokens).sum()
    };
    let (long, short) = (served("long"), served("short"));
    assert!(long.abs_diff(short) <= 3 * 2000, "{long} tokens against {short}");
    engine.finish();
    engine.check_answers();
}

#[test]
fn a_request_that_needs_most_of_the_cache_is_not_overtaken_for_ever() {
    let config = SchedulerConfig { n_blocks: 8, ..config() };
    let mut engine = Engine::new(config);
    for _ in 0..4 {
        engine.submit(Request::new(prompt(1, 250), 5).of("small"));
    }
    engine.step();
    let large = engine.submit(Request::new(prompt(2, 1900), 5).of("large"));
    let mut small = Vec::new();
    for _ in 0..300 {
        // A new small request whenever a step has run: they never run dry.
        small.push(engine.submit(Request::new(prompt(3, 250), 5).of("small")));
        engine.step();
        if engine.ended.contains_key(&large) {
            break;
        }
    }
    assert!(engine.ended.contains_key(&large), "the large request never ended");
    let before = small.iter().filter(|id| engine.ended.contains_key(id)).count();
    assert!(before <= 40, "{before} small requests ended first");
    engine.finish();
}
