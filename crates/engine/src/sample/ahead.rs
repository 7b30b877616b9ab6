//! Masks made ready while the model runs.
//!
//! What may come next is known as soon as the last token is, but it is needed only after the model
//! has run. A [`HeldConstraint`] is therefore lent to a thread for the time of the step
//! ([`MaskThreads`]) and taken back when its mask is asked for; if that is early, the engine waits.
//!
//! Threads start with the first constraint that needs them and end with the engine. A panic there
//! is that constraint's fault and is reported where its mask is asked for.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use fathom_core::{ConstraintError, TokenConstraint};

/// A constraint on its way back.
type Returned = Result<Box<dyn TokenConstraint>, ConstraintError>;

/// A constraint that may be with a thread.
pub(crate) struct HeldConstraint {
    place: Place,
}

enum Place {
    Here(Box<dyn TokenConstraint>),
    Away(Receiver<Returned>),
    /// It was lost, and why.
    Lost(ConstraintError),
}

impl HeldConstraint {
    pub(crate) const fn new(constraint: Box<dyn TokenConstraint>) -> Self {
        Self { place: Place::Here(constraint) }
    }

    /// The constraint, as soon as it is here.
    pub(crate) fn get(&mut self) -> Result<&mut (dyn TokenConstraint + 'static), ConstraintError> {
        if let Place::Away(back) = &self.place {
            let returned = back.recv().unwrap_or_else(|_| Err(lost("its thread ended")));
            self.place = returned.map_or_else(Place::Lost, Place::Here);
        }
        match &mut self.place {
            Place::Here(constraint) => Ok(constraint.as_mut()),
            Place::Lost(error) => Err(error.clone()),
            Place::Away(_) => Err(lost("it is with a thread")),
        }
    }

    /// Has the next mask made ready, if that takes work.
    pub(crate) fn prepare(&mut self, threads: &mut MaskThreads) {
        let Place::Here(constraint) = &self.place else { return };
        if !constraint.needs_preparation() {
            return;
        }
        let (back, returned) = channel();
        if let Place::Here(constraint) = std::mem::replace(&mut self.place, Place::Away(returned))
            && let Err(constraint) = threads.send(constraint, back)
        {
            // Without a thread the mask is made when it is asked for.
            self.place = Place::Here(constraint);
        }
    }
}

fn lost(why: &str) -> ConstraintError {
    ConstraintError(format!("the constraint was lost: {why}"))
}

struct Job {
    constraint: Box<dyn TokenConstraint>,
    back: Sender<Returned>,
}

/// The threads that make masks ready.
#[derive(Default)]
pub(crate) struct MaskThreads {
    jobs: Option<Sender<Job>>,
}

impl MaskThreads {
    fn send(
        &mut self,
        constraint: Box<dyn TokenConstraint>,
        back: Sender<Returned>,
    ) -> Result<(), Box<dyn TokenConstraint>> {
        let jobs = self.jobs.get_or_insert_with(start);
        jobs.send(Job { constraint, back }).map_err(|unsent| unsent.0.constraint)
    }
}

/// Starts threads that end when the returned end of their channel is dropped.
fn start() -> Sender<Job> {
    let (sender, jobs) = channel();
    let jobs = Arc::new(Mutex::new(jobs));
    // A mask takes a tenth of a millisecond and a step some tens: a few threads are enough.
    let n_cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    for _ in 0..(n_cores / 4).clamp(1, 8) {
        let jobs = Arc::clone(&jobs);
        let thread = thread::Builder::new().name("fathom-mask".to_owned());
        if let Err(error) = thread.spawn(move || work(&jobs)) {
            tracing::warn!(%error, "masks are not made ahead: no thread could be started");
        }
    }
    sender
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { mut constraint, back }) = job else { return };
        let prepared = catch_unwind(AssertUnwindSafe(move || {
            constraint.prepare();
            constraint
        }));
        // The request may have ended meanwhile.
        let _ = back.send(prepared.map_err(|_| lost("it panicked")));
    }
}
