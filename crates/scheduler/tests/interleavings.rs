//! For all interleavings: every request gets the tokens it would get alone.

use std::time::Duration;

use fathom_core::RequestId;
use fathom_scheduler::{SchedulerConfig, StepPlan};
use proptest::prelude::*;

use crate::lower_tier::Lower;
use crate::model_engine::{Engine, Request, prompt};

#[derive(Debug, Clone)]
enum Action {
    Submit(Request),
    /// Cancels a request between two steps.
    Cancel(usize),
    /// Cancels a request while its step runs.
    CancelInFlight(usize),
    Steps(u32),
    /// A step that computes garbage for one of its sequences, which sampling notices.
    Garbage(usize),
    /// A step whose execution fails.
    FailedStep,
    /// The device lost its memory.
    LostDevice,
    /// Everything stops; only lower tiers are as they were.
    Restart,
    Wait(u64),
}

fn request() -> impl Strategy<Value = Request> {
    let length = prop_oneof![3 => 1..300_u32, 2 => 500..530_u32, 2 => 700..1200_u32];
    let answer = prop_oneof![3 => 1..20_u32, 1 => 200..400_u32];
    let user = prop_oneof![Just(None), Just(Some("a")), Just(Some("b"))];
    let salt = prop_oneof![4 => Just(None), 1 => Just(Some("salt"))];
    (0..3_u32, length, answer, -1..=1_i32, user, salt).prop_map(
        |(family, length, answer, priority, user, salt)| Request {
            prompt: prompt(family, length),
            max_tokens: answer,
            priority,
            user: user.map(str::to_owned),
            salt: salt.map(str::to_owned),
        },
    )
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => request().prop_map(Action::Submit),
        2 => (0..40_usize).prop_map(Action::Cancel),
        1 => (0..40_usize).prop_map(Action::CancelInFlight),
        6 => (1..40_u32).prop_map(Action::Steps),
        1 => (100..300_u32).prop_map(Action::Steps),
        2 => (0..40_usize).prop_map(Action::Garbage),
        1 => Just(Action::FailedStep),
        1 => Just(Action::LostDevice),
        1 => Just(Action::Restart),
        1 => (1..30_u64).prop_map(Action::Wait),
    ]
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    // From "everything fits" down to "one long sequence fills the cache".
    let budget = prop_oneof![Just(8), 20..200_u32, 256..2000_u32];
    let memory = (6..20_u32, 0..6_u32, 1..4_u32);
    (1..8_u32, budget, memory, any::<bool>()).prop_map(
        |(max_num_seqs, budget, (n_blocks, n_snapshots, interval), prefix_cache)| SchedulerConfig {
            max_num_seqs,
            max_num_batched_tokens: budget,
            snapshot_interval: interval * 256,
            prefix_cache,
            queue_timeout: Duration::from_secs(60),
            ..SchedulerConfig::new(1500, n_blocks, n_snapshots)
        },
    )
}

fn lower() -> impl Strategy<Value = Option<Lower>> {
    let tier = (1..60_usize, 0..5_u32, prop_oneof![Just(0), Just(3), Just(20)]);
    prop::option::of(tier.prop_map(|(capacity, delay, damage)| Lower::new(capacity, delay, damage)))
}

/// Drafts per step at most, and wrong ones in eight.
fn drafting() -> impl Strategy<Value = (u32, u64)> {
    prop_oneof![Just((0, 0)), (1..=4_u32, prop_oneof![Just(0), Just(1), Just(4), Just(8)])]
}

/// Performs the actions, then lets everything end; returns the plans.
fn play(
    config: SchedulerConfig,
    lower: Option<Lower>,
    drafting: (u32, u64),
    actions: &[Action],
) -> (Engine, Vec<StepPlan>) {
    let mut engine = Engine::new(SchedulerConfig { lower_tiers: lower.is_some(), ..config });
    engine.lower = lower;
    engine.drafting = drafting;
    let mut plans = Vec::new();
    let id_of = |engine: &Engine, choice: usize| {
        RequestId(1 + (choice % engine.requests.len().max(1)) as u64)
    };
    for action in actions {
        match action {
            Action::Submit(request) => {
                engine.submit(request.clone());
            }
            Action::Cancel(choice) => {
                let id = id_of(&engine, *choice);
                engine.scheduler.cancel(id);
                engine.collect();
                engine.scheduler.audit().unwrap();
            }
            Action::CancelInFlight(choice) => {
                if engine.plan() {
                    let id = id_of(&engine, *choice);
                    engine.scheduler.cancel(id);
                    engine.run();
                    let known = engine.requests.contains_key(&id);
                    assert!(!known || engine.ended.contains_key(&id), "cancelled within one step");
                }
            }
            Action::Steps(n) => {
                for _ in 0..*n {
                    if !engine.plan() {
                        break;
                    }
                    plans.push(engine.plan.clone());
                    engine.run();
                    engine.finish_loads(false);
                }
            }
            Action::Garbage(choice) => {
                if engine.plan() {
                    let wanted = engine.plan.entries.iter().filter(|entry| entry.wants_logits);
                    let ids: Vec<RequestId> = wanted.map(|entry| entry.id).collect();
                    engine.run_corrupting(ids.get(choice % ids.len().max(1)).copied());
                }
            }
            Action::FailedStep => {
                if engine.plan() {
                    engine.device.run(&engine.scheduler, &engine.plan, &engine.drafts, None);
                    engine.scheduler.abort(&engine.plan);
                    engine.collect();
                    engine.scheduler.audit().unwrap();
                }
            }
            Action::LostDevice => {
                if engine.plan() {
                    engine.scheduler.abort(&engine.plan);
                }
                engine.scheduler.fail_running();
                engine.device = crate::model_engine::Device::new(engine.scheduler.limits());
                engine.collect();
                engine.scheduler.audit().unwrap();
            }
            Action::Restart => {
                let running = engine.requests.keys().filter(|id| !engine.ended.contains_key(id));
                let running: Vec<RequestId> = running.copied().collect();
                for id in running {
                    engine.scheduler.cancel(id);
                }
                engine.collect();
                engine.finish_loads(true);
                engine.restart();
            }
            Action::Wait(seconds) => engine.now += Duration::from_secs(*seconds),
        }
    }
    engine.finish();
    (engine, plans)
}

proptest! {
    // 256 cases, or as many as `PROPTEST_CASES` says.
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn tokens_never_depend_on_what_else_runs(
        config in config(),
        lower in lower(),
        drafting in drafting(),
        actions in prop::collection::vec(action(), 1..40),
    ) {
        let (engine, _) = play(config, lower, drafting, &actions);
        engine.check_answers();
        engine.check_nothing_held();
    }

    #[test]
    fn the_same_calls_give_the_same_plans(
        config in config(),
        lower in lower(),
        drafting in drafting(),
        actions in prop::collection::vec(action(), 1..15),
    ) {
        let (_, first) = play(config.clone(), lower.clone(), drafting, &actions);
        let (_, second) = play(config, lower, drafting, &actions);
        prop_assert_eq!(first, second);
    }
}
