//! What the engine does while a device runs a step.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fathom_core::{ConstraintError, TokenConstraint, TokenId};
use fathom_engine::{
    EngineHandle, HostWork, RunnerCapacity, ScriptedRunner, StepError, StepInput, StepOutput,
    StepRunner, TokenEvent, TokenStream,
};
use fathom_ops::sample::{ChoiceScratch, choose_token};

use crate::support::{VOCABULARY, capacity, config, greedy, hashed_answer, prompt, read};

/// Tokens that had arrived when a step's work was handed to the device, and when the engine had done
/// what there was to do beside it.
type Arrivals = Vec<(usize, usize)>;

/// A runner that looks into the stream of its only request.
struct Watched {
    runner: ScriptedRunner,
    /// Leaves no time beside a step.
    is_silent: bool,
    stream: Arc<Mutex<Option<TokenStream>>>,
    tokens: Arc<Mutex<Vec<u32>>>,
    arrivals: Arc<Mutex<Arrivals>>,
}

impl Watched {
    fn arrived(&self) -> usize {
        // The test holds it until the request is submitted.
        let mut stream = self.stream.lock().unwrap();
        let mut tokens = self.tokens.lock().unwrap();
        while let Some(TokenEvent::Token { id, .. }) = stream.as_mut().unwrap().try_recv() {
            tokens.push(id);
        }
        tokens.len()
    }
}

impl StepRunner for Watched {
    fn capacity(&self) -> RunnerCapacity {
        self.runner.capacity()
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn step(&mut self, input: &Arc<StepInput>, output: &mut StepOutput) -> Result<(), StepError> {
        self.runner.step(input, output)
    }

    fn step_beside(
        &mut self,
        input: &Arc<StepInput>,
        output: &mut StepOutput,
        host: &mut dyn HostWork,
    ) -> Result<(), StepError> {
        self.step(input, output)?;
        let before = self.arrived();
        if !self.is_silent {
            host.rest();
        }
        let after = self.arrived();
        self.arrivals.lock().unwrap().push((before, after));
        Ok(())
    }

    fn reset(&mut self) -> Result<(), StepError> {
        self.runner.reset()
    }
}

/// Runs a request of four tokens; the tokens, and what had arrived in each step.
async fn watch(is_silent: bool) -> (Vec<u32>, Arrivals) {
    let (stream, tokens, arrivals) = (Arc::default(), Arc::default(), Arc::default());
    let runner = Watched {
        runner: ScriptedRunner::hashed(capacity()),
        is_silent,
        stream: Arc::clone(&stream),
        tokens: Arc::clone(&tokens),
        arrivals: Arc::clone(&arrivals),
    };
    let engine = EngineHandle::start(Box::new(runner), config()).unwrap();
    {
        let mut place = stream.lock().unwrap();
        *place = Some(engine.submit(greedy(prompt(1, 5), 4)).unwrap());
    }
    engine.shutdown(Duration::from_secs(60)).await;
    let mut stream = stream.lock().unwrap().take().unwrap();
    let mut tokens = tokens.lock().unwrap().clone();
    loop {
        match stream.try_recv() {
            Some(TokenEvent::Token { id, .. }) => tokens.push(id),
            Some(TokenEvent::Finished { .. }) => break,
            other => panic!("{other:?}"),
        }
    }
    let arrivals = arrivals.lock().unwrap().clone();
    (tokens, arrivals)
}

#[tokio::test]
async fn what_a_step_gave_is_sent_while_the_next_one_runs_and_the_last_at_once() {
    let (tokens, arrivals) = watch(false).await;
    assert_eq!(tokens, hashed_answer(&prompt(1, 5), 4));
    assert_eq!(arrivals, [(0, 0), (0, 1), (1, 2), (2, 3)]);
}

#[tokio::test]
async fn a_step_without_time_beside_it_holds_events_back_no_longer_than_it_runs() {
    let (tokens, arrivals) = watch(true).await;
    assert_eq!(tokens, hashed_answer(&prompt(1, 5), 4));
    assert_eq!(arrivals, [(0, 0), (0, 0), (1, 1), (2, 2)]);
}

/// A runner that chooses, and says when the model's work is under way.
struct Chooses {
    runner: ScriptedRunner,
    is_running: Arc<AtomicBool>,
}

impl StepRunner for Chooses {
    fn capacity(&self) -> RunnerCapacity {
        self.runner.capacity()
    }

    fn step(&mut self, input: &Arc<StepInput>, output: &mut StepOutput) -> Result<(), StepError> {
        self.runner.step(input, output)
    }

    fn step_beside(
        &mut self,
        input: &Arc<StepInput>,
        output: &mut StepOutput,
        host: &mut dyn HostWork,
    ) -> Result<(), StepError> {
        self.step(input, output)?;
        self.is_running.store(true, Ordering::Relaxed);
        let choices = host.choices();
        self.is_running.store(false, Ordering::Relaxed);
        let rows = output.logits.chunks_exact_mut(VOCABULARY as usize).zip(&choices);
        output.choices = rows
            .map(|(logits, choice)| {
                let row = choice.as_ref()?.borrowed();
                Some(choose_token(&row, logits, &mut ChoiceScratch::default()))
            })
            .collect();
        output.logits.clear();
        Ok(())
    }

    fn reset(&mut self) -> Result<(), StepError> {
        self.runner.reset()
    }
}

/// Allows one token, and says so only while the model runs.
struct WhileItRuns(Arc<AtomicBool>);

impl TokenConstraint for WhileItRuns {
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        if !self.0.load(Ordering::Relaxed) {
            return Err(ConstraintError("the model does not run".to_owned()));
        }
        mask.fill(0);
        mask[0] = 1 << 7;
        Ok(())
    }

    fn commit(&mut self, _: TokenId) -> Result<(), ConstraintError> {
        Ok(())
    }

    fn is_finished(&self) -> bool {
        false
    }
}

#[test]
fn masks_are_asked_for_when_the_model_runs() {
    let is_running = Arc::default();
    let runner = ScriptedRunner::hashed(capacity());
    let runner = Chooses { runner, is_running: Arc::clone(&is_running) };
    let engine = EngineHandle::start(Box::new(runner), config()).unwrap();
    let mut request = greedy(prompt(1, 5), 4);
    request.constraint = Some(Box::new(WhileItRuns(is_running)));
    let (tokens, ending) = read(engine.submit(request).unwrap());
    assert_eq!(tokens, [7; 4], "{ending:?}");
}
