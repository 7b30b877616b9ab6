//! What single plans look like.

use std::time::Duration;

use fathom_core::FinishReason;
use fathom_scheduler::{
    End, Outcome, Phase, RefuseError, SchedulerConfig, SequenceSpec, StepPlan, Work,
};

use crate::model_engine::{EOS, Engine, Request, alone, prompt};

fn config(budget: u32) -> SchedulerConfig {
    SchedulerConfig {
        max_num_batched_tokens: budget,
        max_num_seqs: 4,
        ..SchedulerConfig::new(4096, 64, 8)
    }
}

/// (request, position, tokens) of every entry.
fn entries(plan: &StepPlan) -> Vec<(u64, u32, u32)> {
    plan.entries.iter().map(|entry| (entry.id.0, entry.position, entry.n_tokens)).collect()
}

#[test]
fn decodes_come_first_and_prefill_gets_the_rest_of_the_budget() {
    let mut engine = Engine::new(config(300));
    engine.submit(Request::new(prompt(1, 10), 50));
    engine.step();
    engine.submit(Request::new(prompt(2, 1000), 50));
    engine.plan();
    assert_eq!(entries(&engine.plan), [(1, 10, 1), (2, 0, 256)]);
    assert_eq!(engine.plan.entries[0].work, Work::Decode);
    assert!(engine.plan.entries[0].wants_logits && !engine.plan.entries[1].wants_logits);
}

#[test]
fn chunks_end_on_block_boundaries_and_where_a_snapshot_is_due() {
    let mut engine = Engine::new(config(600));
    engine.submit(Request::new(prompt(1, 1100), 1));
    let mut chunks = Vec::new();
    while engine.plan() {
        chunks.extend(entries(&engine.plan));
        engine.run();
    }
    // 1024 is the last boundary an identical prompt could resume at.
    assert_eq!(chunks, [(1, 0, 512), (1, 512, 512), (1, 1024, 76)]);
}

#[test]
fn without_prefix_cache_a_prompt_that_fits_is_one_chunk() {
    let mut engine = Engine::new(SchedulerConfig { prefix_cache: false, ..config(2000) });
    engine.submit(Request::new(prompt(1, 1100), 1));
    engine.plan();
    assert_eq!(entries(&engine.plan), [(1, 0, 1100)]);
}

#[test]
fn a_budget_below_a_block_still_makes_progress() {
    let mut engine = Engine::new(config(100));
    engine.submit(Request::new(prompt(1, 300), 2));
    let mut chunks = Vec::new();
    while engine.plan() {
        chunks.extend(entries(&engine.plan));
        engine.run();
    }
    assert_eq!(chunks, [(1, 0, 100), (1, 100, 100), (1, 200, 56), (1, 256, 44), (1, 300, 1)]);
    engine.check_answers();
}

#[test]
fn prefill_can_be_limited_below_the_budget_from_step_to_step() {
    let mut engine = Engine::new(config(2000));
    engine.submit(Request::new(prompt(1, 1500), 1));
    let mut chunks = Vec::new();
    for limit in [0, 100, 300, 5000, 5000] {
        engine.scheduler.limit_prefill(limit);
        engine.plan();
        chunks.extend(entries(&engine.plan));
        engine.run();
    }
    assert_eq!(chunks, [(1, 0, 1), (1, 1, 100), (1, 101, 155), (1, 256, 1024), (1, 1280, 220)]);
    engine.check_answers();
}

#[test]
fn a_long_prompt_leaves_room_for_short_ones_of_the_same_user() {
    let mut engine = Engine::new(config(2048));
    engine.submit(Request::new(prompt(1, 4000), 1));
    engine.submit(Request::new(prompt(2, 30), 1));
    engine.plan();
    assert_eq!(entries(&engine.plan), [(1, 0, 1792), (2, 0, 30)]);
}

#[test]
fn a_long_prefill_does_not_make_a_step_longer_than_its_budget() {
    let mut engine = Engine::new(config(512));
    let chat = engine.submit(Request::new(prompt(1, 10), 40));
    engine.step();
    engine.submit(Request::new(prompt(2, 4000), 1));
    while !engine.ended.contains_key(&chat) {
        engine.plan();
        assert!(engine.plan.entries.iter().any(|entry| entry.id == chat), "no token is skipped");
        assert!(engine.plan.n_tokens() <= 512);
        engine.run();
    }
}

#[test]
fn an_urgent_request_takes_the_slot_of_a_less_urgent_one() {
    let mut engine = Engine::new(SchedulerConfig { max_num_seqs: 1, ..config(512) });
    let calm = engine.submit(Request::new(prompt(1, 20), 30).at(5));
    engine.step();
    engine.step();
    let urgent = engine.submit(Request::new(prompt(2, 20), 3).at(-5));
    engine.plan();
    assert_eq!(engine.plan.entries[0].id, urgent);
    engine.run();
    engine.finish();
    engine.check_answers();
    assert_eq!(engine.scheduler.stats().preemptions, 1);
    assert!(engine.usage(calm).completion_tokens > 0);
}

#[test]
fn the_youngest_is_preempted_when_blocks_run_out_and_loses_no_token() {
    // Two sequences of up to 3 blocks in a cache of 4.
    let config = SchedulerConfig {
        max_num_seqs: 2,
        max_num_batched_tokens: 512,
        ..SchedulerConfig::new(768, 4, 0)
    };
    let mut engine = Engine::new(config);
    let long = |family: &u32| alone(&prompt(*family, 300), 768).len() > 300;
    for family in (0..EOS).filter(long).take(2) {
        engine.submit(Request::new(prompt(family, 300), 468));
    }
    engine.finish();
    engine.check_answers();
    let stats = engine.scheduler.stats();
    assert!(stats.preemptions > 0);
    assert_eq!(stats.prompt_tokens, 600, "a resumed sequence is not counted again");
}

#[test]
fn a_request_waits_in_the_queue_no_longer_than_the_timeout() {
    let config =
        SchedulerConfig { max_num_seqs: 1, queue_timeout: Duration::from_secs(10), ..config(512) };
    let mut engine = Engine::new(config);
    engine.submit(Request::new(prompt(1, 20), 400));
    engine.step();
    engine.now = Duration::from_secs(3);
    let late = engine.submit(Request::new(prompt(2, 20), 5));
    engine.now = Duration::from_secs(13);
    engine.plan();
    assert!(!engine.ended.contains_key(&late));
    engine.run();
    engine.now = Duration::from_millis(13_001);
    engine.plan();
    assert_eq!(
        engine.ended[&late].end,
        End::QueueTimeout { waited: Duration::from_millis(10_001) }
    );
    assert_eq!(engine.ended[&late].phase, Phase::Queued);
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let mut engine = Engine::new(SchedulerConfig { queue_len: 1, ..config(512) });
    let mut submit = |prompt: Vec<u32>, number| {
        let spec = SequenceSpec {
            id: fathom_core::RequestId(number),
            prompt,
            max_tokens: 1,
            priority: 0,
            user: None,
            cache_salt: None,
        };
        engine.scheduler.submit(spec, Duration::ZERO).map(|_| ())
    };
    assert_eq!(submit(vec![], 1), Err(RefuseError::EmptyPrompt));
    let too_long = RefuseError::PromptTooLong { n_tokens: 4096, max_model_len: 4096 };
    assert_eq!(submit(prompt(1, 4096), 2), Err(too_long));
    assert_eq!(submit(prompt(1, 5), 3), Ok(()));
    assert_eq!(submit(prompt(1, 5), 4), Err(RefuseError::QueueFull { limit: 1 }));
}

#[test]
fn an_answer_ends_at_the_context_length_whatever_was_asked_for() {
    let mut engine = Engine::new(SchedulerConfig { max_model_len: 40, ..config(512) });
    let id = engine.submit(Request::new(prompt(1, 35), u32::MAX));
    engine.finish();
    let (end, usage) = (engine.ended[&id].end, engine.usage(id));
    assert_eq!(end, End::Finished(FinishReason::Length));
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (35, 5));
}

#[test]
fn a_failed_sequence_leaves_nothing_for_others_to_reuse() {
    let mut engine = Engine::new(config(2048));
    engine.submit(Request::new(prompt(1, 600), 5));
    engine.step();
    engine.plan();
    engine.scheduler.commit(&engine.plan, &[Outcome::failed()]);
    engine.collect();
    let again = engine.submit(Request::new(prompt(1, 600), 5));
    engine.finish();
    assert_eq!(engine.usage(again).cached_tokens, 0);
    assert_eq!(engine.ended[&fathom_core::RequestId(1)].end, End::Failed);
    engine.check_answers();
}

#[test]
fn a_snapshot_of_a_failed_sequence_is_not_kept_for_its_healthy_twin() {
    let mut engine = Engine::new(config(2048));
    let twins = [1, 2].map(|_| engine.submit(Request::new(prompt(1, 256), 3)));
    engine.plan();
    assert_eq!(engine.plan.captures.len(), 2, "both would keep a snapshot after the prompt");
    engine.run_corrupting(Some(twins[0]));
    let longer = engine.submit(Request::new(prompt(1, 400), 3));
    engine.finish();
    assert_eq!(engine.usage(longer).cached_tokens, 256);
    engine.check_answers();
}

#[test]
fn failing_everything_ends_running_waiting_and_planned_sequences_once() {
    let mut engine = Engine::new(SchedulerConfig { max_num_seqs: 2, ..config(512) });
    let done = engine.submit(Request::new(prompt(1, 20), 1));
    engine.step();
    for family in 0..4 {
        engine.submit(Request::new(prompt(family, 300), 10));
    }
    engine.plan();
    engine.scheduler.fail_all();
    engine.collect();
    engine.scheduler.audit().unwrap();
    assert!(engine.scheduler.is_empty());
    assert_eq!(engine.ended.len(), 5);
    let failed = engine.ended.values().filter(|ended| ended.end == End::Failed).count();
    assert_eq!((failed, engine.ended[&done].end), (4, End::Finished(FinishReason::Length)));
}
