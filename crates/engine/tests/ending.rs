//! Cancellation and shutdown.

use std::time::Duration;

use fathom_core::FinishReason;
use fathom_engine::stats::PhaseCounts;
use fathom_engine::{EngineConfig, EngineState, GenerateError, SubmitError, TokenEvent};

use crate::support::{Ending, config, gated, greedy, hashed, hashed_answer, prompt, read};

#[test]
fn dropping_a_stream_cancels_its_request_within_one_step() {
    let (engine, gate) = gated(config());
    let dropped = engine.submit(greedy(prompt(1, 3), 1000)).unwrap();
    gate.wait();
    drop(dropped);
    gate.open();
    // If it were still running, this request would share a step with it and wait at the gate twice.
    let other = engine.submit(greedy(prompt(2, 3), 1)).unwrap();
    gate.wait();
    assert_eq!(engine.stats().ended.cancelled, PhaseCounts { decode: 1, ..Default::default() });
    assert_eq!(engine.stats().requests_running, 0, "gauges are those of the last step");
    gate.open();
    assert_eq!(read(other).0, hashed_answer(&prompt(2, 3), 1));
    assert_eq!(engine.stats().kv.blocks_used, 0);
}

#[test]
fn a_request_that_waits_can_be_cancelled_too() {
    let (engine, gate) = gated(EngineConfig { max_num_seqs: 1, ..config() });
    let running = engine.submit(greedy(prompt(1, 3), 2)).unwrap();
    gate.wait();
    drop(engine.submit(greedy(prompt(2, 3), 5)).unwrap());
    gate.open();
    gate.wait();
    assert_eq!(engine.stats().ended.cancelled, PhaseCounts { queued: 1, ..Default::default() });
    assert_eq!(engine.stats().requests_waiting, 0);
    gate.open();
    assert_eq!(read(running).0, hashed_answer(&prompt(1, 3), 2));
}

#[test]
fn a_cancelled_stream_tells_the_exact_usage() {
    let (engine, gate) = gated(config());
    let mut stream = engine.submit(greedy(prompt(1, 3), 1000)).unwrap();
    for _ in 0..3 {
        gate.wait();
        gate.open();
        assert!(matches!(stream.blocking_recv(), Some(TokenEvent::Token { .. })));
    }
    gate.wait();
    stream.cancel();
    gate.open();
    let (tokens, ending) = read(stream);
    assert_eq!(tokens.len(), 1, "the step that was running still delivers");
    let Ending::Finished(FinishReason::Cancelled, usage) = ending else { panic!("{ending:?}") };
    assert_eq!(usage.completion_tokens, 4);
}

#[tokio::test]
async fn shutdown_lets_running_requests_end_and_refuses_new_ones() {
    let (engine, gate) = gated(config());
    let stream = engine.submit(greedy(prompt(1, 3), 5)).unwrap();
    gate.wait();
    engine.begin_shutdown(Duration::from_secs(60));
    assert_eq!(engine.health().state, EngineState::Draining);
    let refused = engine.submit(greedy(prompt(2, 3), 1)).unwrap_err();
    assert_eq!(refused, SubmitError::ShuttingDown);
    drop(gate);
    engine.shutdown(Duration::from_secs(60)).await;
    assert_eq!(engine.health().state, EngineState::Stopped);
    let (tokens, ending) = tokio::task::spawn_blocking(|| read(stream)).await.unwrap();
    assert_eq!(tokens, hashed_answer(&prompt(1, 3), 5));
    assert!(matches!(ending, Ending::Finished(FinishReason::Length, _)));
}

#[tokio::test]
async fn what_is_not_done_when_the_drain_ends_fails_with_that_reason() {
    let (engine, gate) = gated(EngineConfig { max_num_seqs: 1, ..config() });
    let running = engine.submit(greedy(prompt(1, 3), 1000)).unwrap();
    gate.wait();
    let waiting = engine.submit(greedy(prompt(2, 3), 5)).unwrap();
    engine.begin_shutdown(Duration::ZERO);
    drop(gate);
    engine.shutdown(Duration::from_secs(60)).await;
    for stream in [running, waiting] {
        let (_, ending) = tokio::task::spawn_blocking(|| read(stream)).await.unwrap();
        assert_eq!(ending, Ending::Failed(GenerateError::ShuttingDown));
    }
    assert_eq!(engine.stats().ended.shutdown, 2);
}

#[test]
fn an_engine_that_nobody_can_reach_stops() {
    let engine = hashed();
    let shared = engine.clone();
    let stream = engine.submit(greedy(prompt(1, 3), 5)).unwrap();
    drop((engine, shared));
    // The stream alone keeps it going.
    assert_eq!(read(stream).0, hashed_answer(&prompt(1, 3), 5));
}

#[test]
fn a_request_that_is_not_started_in_time_fails_with_the_time_it_waited() {
    let config =
        EngineConfig { max_num_seqs: 1, queue_timeout: Duration::from_nanos(1), ..config() };
    let (engine, gate) = gated(config);
    let first = engine.submit(greedy(prompt(1, 3), 2)).unwrap();
    drop(gate);
    // Even the first one is planned later than a nanosecond after it came.
    let Ending::Failed(GenerateError::QueueTimeout { waited }) = read(first).1 else {
        panic!("it cannot have been started in time")
    };
    assert!(waited > Duration::from_nanos(1));
    assert_eq!(engine.stats().ended.queue_timeout, 1);
}
