//! What goes wrong hits whom it concerns and nobody else, and nobody waits for ever.

use std::sync::Arc;

use fathom_core::{ConstraintError, FinishReason, TokenConstraint, TokenId};
use fathom_engine::scripted::{Reply, hashed_token};
use fathom_engine::{
    EngineConfig, EngineHandle, EngineState, GenerateError, RunnerCapacity, ScriptedRunner,
    StepError, StepInput, StepOutput, StepRunner, SubmitError,
};

use crate::support::{
    Ending, VOCABULARY, capacity, config, gated, greedy, hashed, hashed_answer, prompt, read, start,
};

/// An engine that does `fault` at the first row whose sequence starts with token 96.
fn faulty(mut fault: impl FnMut() -> Reply + Send + 'static) -> EngineHandle {
    start(ScriptedRunner::new(capacity(), move |tokens| match tokens[0] {
        96 => fault(),
        _ => Reply::Token(hashed_token(tokens, VOCABULARY)),
    }))
}

fn bad() -> fathom_engine::GenerateRequest {
    greedy(vec![96, 5], 5)
}

fn assert_serves(engine: &EngineHandle) {
    let (tokens, ending) = read(engine.submit(greedy(prompt(1, 700), 20)).unwrap());
    assert_eq!(tokens, hashed_answer(&prompt(1, 700), 20));
    assert!(matches!(ending, Ending::Finished(FinishReason::Length, _)));
    assert_eq!(engine.stats().kv.blocks_used, 0);
}

#[test]
fn nan_logits_fail_one_request_and_are_counted() {
    let engine = faulty(|| Reply::NotANumber);
    let good = engine.submit(greedy(prompt(2, 50), 200)).unwrap();
    let (tokens, ending) = read(engine.submit(bad()).unwrap());
    assert!(tokens.is_empty());
    assert_eq!(ending, Ending::Failed(GenerateError::NonFiniteLogits { position: 2 }));
    assert_eq!(read(good).0, hashed_answer(&prompt(2, 50), 200));
    assert_eq!(engine.stats().ended.non_finite_logits, 1);
    assert_serves(&engine);
}

#[test]
fn a_panic_in_a_step_ends_its_requests_and_the_engine_goes_on() {
    let engine = faulty(|| panic!("planted"));
    let (_, ending) = read(engine.submit(bad()).unwrap());
    let message = "the device failed: planted".to_owned();
    assert_eq!(ending, Ending::Failed(GenerateError::StepFailed { message }));
    assert_eq!(engine.stats().failed_steps, 1);
    assert_eq!(engine.health().state, EngineState::Ready);
    assert_serves(&engine);
}

#[test]
fn a_lost_device_takes_running_requests_with_it_but_not_waiting_ones_nor_the_cache_content() {
    let (gate, mut pass) = crate::support::Gate::new();
    let runner = ScriptedRunner::new(capacity(), move |tokens| {
        pass();
        match tokens[0] {
            96 => Reply::LoseDevice,
            _ => Reply::Token(hashed_token(tokens, VOCABULARY)),
        }
    });
    let engine =
        EngineHandle::start(Box::new(runner), EngineConfig { max_num_seqs: 1, ..config() });
    let engine = engine.unwrap();
    let failing = engine.submit(bad()).unwrap();
    gate.wait();
    let waiting = engine.submit(greedy(prompt(2, 600), 5)).unwrap();
    drop(gate);
    assert!(matches!(read(failing).1, Ending::Failed(GenerateError::StepFailed { .. })));
    assert_eq!(read(waiting).0, hashed_answer(&prompt(2, 600), 5));
    // The scripted runner panics if it is made to read anything from before the loss.
    assert_serves(&engine);
}

#[test]
fn a_failed_step_ends_its_own_requests_only() {
    let engine = faulty(|| Reply::FailStep);
    let (_, ending) = read(engine.submit(bad()).unwrap());
    assert!(matches!(ending, Ending::Failed(GenerateError::StepFailed { .. })));
    assert_eq!(engine.stats().ended.step_failed, 1);
    assert_serves(&engine);
}

/// A runner that fails and cannot be brought back.
struct Broken {
    at_warm_up: bool,
}

impl StepRunner for Broken {
    fn capacity(&self) -> RunnerCapacity {
        capacity()
    }

    fn warm_up(&mut self) -> Result<(), StepError> {
        if self.at_warm_up {
            return Err(StepError::Device { message: "no memory".to_owned() });
        }
        Ok(())
    }

    fn step(&mut self, _: &Arc<StepInput>, _: &mut StepOutput) -> Result<(), StepError> {
        panic!("planted");
    }

    fn reset(&mut self) -> Result<(), StepError> {
        Err(StepError::Device { message: "gone for good".to_owned() })
    }
}

#[tokio::test]
async fn an_engine_that_cannot_go_on_says_so_and_leaves_no_stream_open() {
    let config = EngineConfig { max_num_seqs: 1, ..config() };
    let engine = EngineHandle::start(Box::new(Broken { at_warm_up: false }), config).unwrap();
    let streams: Vec<_> =
        (0..3).filter_map(|_| engine.submit(greedy(prompt(1, 3), 5)).ok()).collect();
    for stream in streams {
        let (_, ending) = tokio::task::spawn_blocking(|| read(stream)).await.unwrap();
        assert!(matches!(ending, Ending::Failed(_)));
    }
    engine.shutdown(std::time::Duration::ZERO).await;
    let reason = "the device failed: gone for good".to_owned();
    assert_eq!(engine.health().state, EngineState::Failed { reason: reason.clone() });
    let refused = engine.submit(greedy(prompt(1, 3), 5)).unwrap_err();
    assert_eq!(refused, SubmitError::Unhealthy { reason });
}

#[tokio::test]
async fn a_failed_warm_up_is_a_failed_engine() {
    let engine = EngineHandle::start(Box::new(Broken { at_warm_up: true }), config()).unwrap();
    let reason = "the device failed: no memory".to_owned();
    assert_eq!(engine.started().await, EngineState::Failed { reason });
}

/// Allows multiples of a number; may fail or panic.
struct Multiples {
    of: TokenId,
    n_left: u32,
    fault: Option<&'static str>,
}

impl TokenConstraint for Multiples {
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        match self.fault {
            Some("panic") => panic!("planted"),
            Some("nothing") => mask.fill(0),
            Some(message) => return Err(ConstraintError(message.to_owned())),
            None => {
                for token in (0..VOCABULARY).filter(|token| token % self.of != 0) {
                    mask[token as usize / 32] &= !(1 << (token % 32));
                }
            }
        }
        Ok(())
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        assert_eq!(token % self.of, 0);
        self.n_left -= 1;
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.n_left == 0
    }
}

fn constrained(fault: Option<&'static str>) -> fathom_engine::GenerateRequest {
    let mut request = greedy(prompt(3, 10), 50);
    request.sampling.ignore_eos = false;
    request.sampling.min_tokens = 20;
    request.constraint = Some(Box::new(Multiples { of: 5, n_left: 8, fault }));
    request
}

#[test]
fn a_constraint_decides_every_token_and_ends_the_answer_when_it_is_complete() {
    let engine = hashed();
    let (tokens, ending) = read(engine.submit(constrained(None)).unwrap());
    let (end, body) = tokens.split_last().unwrap();
    assert!(body.iter().all(|token| token % 5 == 0), "{body:?}");
    assert_eq!((body.len(), *end), (8, crate::support::EOS));
    assert!(matches!(ending, Ending::Finished(FinishReason::Eos, _)));
}

#[test]
fn a_constraint_that_fails_or_panics_fails_its_request_only() {
    let engine = hashed();
    let good = engine.submit(greedy(prompt(2, 50), 200)).unwrap();
    for (fault, message) in [("broken", "constraint: broken"), ("panic", "constraint: planted")] {
        let (_, ending) = read(engine.submit(constrained(Some(fault))).unwrap());
        let Ending::Failed(error) = ending else { panic!("{ending:?}") };
        assert_eq!(error.to_string(), message);
    }
    let (_, ending) = read(engine.submit(constrained(Some("nothing"))).unwrap());
    assert_eq!(ending, Ending::Failed(GenerateError::NothingAllowed { position: 10 }));
    assert_eq!(read(good).0, hashed_answer(&prompt(2, 50), 200));
    assert_eq!(engine.stats().ended.constraint, 3);
}

/// Allows one token; refuses to say so unless it was asked to prepare on another thread.
struct Ahead {
    n_left: u32,
    ready_on: Option<String>,
    panics: bool,
}

impl TokenConstraint for Ahead {
    fn prepare(&mut self) {
        assert!(!self.panics, "planted");
        self.ready_on = std::thread::current().name().map(str::to_owned);
    }

    fn needs_preparation(&self) -> bool {
        true
    }

    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        if self.ready_on.take().as_deref() != Some("fathom-mask") {
            return Err(ConstraintError("nothing was prepared".to_owned()));
        }
        mask.fill(0);
        mask[0] = 1 << 7;
        Ok(())
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        assert_eq!(token, 7);
        self.n_left -= 1;
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.n_left == 0
    }
}

#[test]
fn masks_are_made_ready_on_another_thread_while_the_model_runs() {
    let engine = hashed();
    let ask = |panics| {
        let mut request = greedy(prompt(3, 10), 50);
        request.sampling.ignore_eos = false;
        request.constraint = Some(Box::new(Ahead { n_left: 5, ready_on: None, panics }));
        read(engine.submit(request).unwrap())
    };
    let (tokens, ending) = ask(false);
    assert_eq!(tokens, [7, 7, 7, 7, 7, crate::support::EOS]);
    assert!(matches!(ending, Ending::Finished(FinishReason::Eos, _)));

    let (tokens, ending) = ask(true);
    assert!(tokens.is_empty());
    let Ending::Failed(error) = ending else { panic!("{ending:?}") };
    assert_eq!(error.to_string(), "constraint: the constraint was lost: it panicked");
    assert_eq!(ask(false).0.len(), 6);
}

#[test]
fn a_reader_that_never_reads_holds_up_nobody() {
    let (engine, gate) = gated(config());
    drop(gate);
    let unread = engine.submit(greedy(prompt(1, 3), 3000)).unwrap();
    let (tokens, _) = read(engine.submit(greedy(prompt(1, 700), 20)).unwrap());
    assert_eq!(tokens, hashed_answer(&prompt(1, 700), 20));
    assert_eq!(read(unread).0.len(), 3000);
}
