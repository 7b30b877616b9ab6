//! The model behind a [`StepRunner`]: one worker per rank, each with its own weights and cache.
//!
//! A single rank runs on the engine's own thread. Several ranks run on a thread each, get the same
//! [`StepInput`] in the same order and meet in collectives.
//!
//! Invariants:
//! - a rank that fails or panics leaves its group, so that the others fail instead of waiting;
//! - all ranks hold the same cache, because none of it has a head dimension to divide: state is read
//!   from rank 0 and written to every rank;
//! - after a failure of the group nothing is trusted: [`StepRunner::reset`] makes new caches, new
//!   communicators and new threads over the same weights.
//!
//! Not here: what a step contains (`scheduler`), sampling ([`crate::sample`]), which rows of the MTP
//! block run when (`draft_rows`).

mod draft_rows;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use bytes::Bytes;
use fathom_core::{ParallelConfig, SamplingParams, TokenId};
use fathom_model::{ModelError, Transformer};
use fathom_ops::sample::{Beside, Chosen};
use fathom_ops::{BLOCK_TOKENS, CacheSpec, Communicator, LocalComm, Ops, Solo};

use self::draft_rows::DraftRows;
use crate::runner::{
    DraftInput, HostWork, RunnerCapacity, StateLayout, StateRef, StepError, StepInput, StepOutput,
    StepRunner,
};

/// One rank: its part of the weights, its cache, its end of the group.
struct Worker<O: Ops> {
    model: Arc<Transformer<O>>,
    cache: O::Cache,
    comm: Box<dyn Communicator>,
    /// Present if the MTP block drafts.
    drafts: Option<DraftRows>,
}

impl<O: Ops> Worker<O> {
    fn new(
        model: &Arc<Transformer<O>>,
        spec: &CacheSpec,
        comm: Box<dyn Communicator>,
    ) -> Result<Self, StepError> {
        let cache = model.new_cache(spec).map_err(|error| device(&error))?;
        Ok(Self { model: Arc::clone(model), cache, comm, drafts: DraftRows::new(spec) })
    }

    /// Restores, batch, captures; what rank 0 made of the wanted rows goes into `left`. What there is
    /// to do beside is done when a device has its work.
    fn run(
        &mut self,
        input: &StepInput,
        left: &mut StepOutput,
        host: &mut dyn HostWork,
    ) -> Result<(), StepError> {
        let ops = self.model.ops();
        for copy in &input.restores {
            ops.restore(&mut self.cache, copy.snapshot, copy.slot, copy.position)
                .map_err(|error| device(&error))?;
            if let Some(drafts) = &mut self.drafts {
                drafts.restore(copy.slot, copy.position);
            }
        }
        if input.batch.n_tokens() > 0 {
            let (batch, cache, comm) = (&input.batch, &mut self.cache, self.comm.as_ref());
            let output = self
                .model
                .forward(batch, cache, comm, self.drafts.is_some(), &mut fathom_model::NoProbe)
                .map_err(|error| device(&error))?;
            if let Some(tensor) = output.logits.filter(|_| comm.rank().index() == 0) {
                let rows = if ops.chooses_tokens() { host.choices() } else { Vec::new() };
                let rows: Vec<_> = rows.iter().map(|row| Some(row.as_ref()?.borrowed())).collect();
                let Chosen { choices, logits } = ops
                    .choose_rows(&tensor, &rows, &mut || host.rest())
                    .map_err(|error| device(&error))?;
                *left = StepOutput { choices, logits };
            } else {
                host.rest();
            }
            if let (Some(drafts), Some(x)) = (&mut self.drafts, &output.copies) {
                drafts
                    .follow(&self.model, batch, x, &input.captures, cache, comm)
                    .map_err(|error| device(&error))?;
            }
        }
        for copy in &input.captures {
            ops.capture(&mut self.cache, copy.slot, copy.position, copy.snapshot)
                .map_err(|error| device(&error))?;
        }
        Ok(())
    }
}

/// What a rank is told to do.
#[derive(Clone)]
enum Order {
    Step(Arc<StepInput>),
    Draft(Arc<Vec<DraftInput>>),
    Read(Arc<[StateRef]>),
    Write(Arc<Vec<(StateRef, Bytes)>>),
}

/// What a rank answers: rank 0 with the rows of a step, the others with none.
enum Done {
    Rows(StepOutput),
    Drafts(Vec<Vec<TokenId>>),
    State(Vec<Bytes>),
    Written,
}

impl<O: Ops> Worker<O> {
    fn obey(&mut self, order: &Order) -> Result<Done, StepError> {
        match order {
            Order::Step(input) => {
                let mut output = StepOutput::default();
                // On a thread of its own a rank has no host to ask: it hands back all logits.
                self.run(input, &mut output, &mut ()).map(|()| Done::Rows(output))
            }
            Order::Draft(input) => self.draft(input, &mut || ()).map(Done::Drafts),
            Order::Read(items) => self.read(items).map(Done::State),
            Order::Write(items) => self.write(items).map(|()| Done::Written),
        }
    }

    fn draft(
        &mut self,
        input: &[DraftInput],
        beside: &mut Beside<'_>,
    ) -> Result<Vec<Vec<TokenId>>, StepError> {
        let drafts = self.drafts.as_mut().ok_or_else(|| device(&ModelError::NoMtp))?;
        let (cache, comm) = (&mut self.cache, self.comm.as_ref());
        drafts.draft(&self.model, input, cache, comm, beside).map_err(|error| device(&error))
    }

    fn read(&self, items: &[StateRef]) -> Result<Vec<Bytes>, StepError> {
        let ops = self.model.ops();
        let read = |item: &StateRef| match *item {
            StateRef::Block(block) => ops.read_block(&self.cache, block),
            StateRef::Snapshot(snapshot) => ops.read_snapshot(&self.cache, snapshot),
        };
        items.iter().map(|item| read(item).map(Bytes::from).map_err(|e| device(&e))).collect()
    }

    fn write(&mut self, items: &[(StateRef, Bytes)]) -> Result<(), StepError> {
        let ops = self.model.ops();
        for (item, bytes) in items {
            match *item {
                StateRef::Block(block) => ops.write_block(&mut self.cache, block, bytes),
                StateRef::Snapshot(id) => ops.write_snapshot(&mut self.cache, id, bytes),
            }
            .map_err(|error| device(&error))?;
        }
        Ok(())
    }
}

/// A failure after which the cache may hold anything.
fn device(error: &dyn std::error::Error) -> StepError {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message.push_str(&format!(": {error}"));
        source = error.source();
    }
    StepError::Device { message }
}

/// Text of a panic, for the error event.
fn panicked(payload: &(dyn std::any::Any + Send)) -> StepError {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    let message = format!("a rank panicked: {}", text.as_deref().unwrap_or("without a message"));
    StepError::Device { message }
}

type Answer = Result<Done, StepError>;

/// A rank on a thread of its own. Dropping it ends the thread.
struct RankThread {
    orders: Option<mpsc::Sender<Order>>,
    answers: mpsc::Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl RankThread {
    fn spawn<O: Ops>(mut worker: Worker<O>) -> Result<Self, StepError> {
        let (orders, inbox) = mpsc::channel::<Order>();
        let (outbox, answers) = mpsc::channel();
        let name = format!("fathom-rank-{}", worker.comm.rank().index());
        let body = move || {
            for order in inbox {
                let obey = AssertUnwindSafe(|| worker.obey(&order));
                let outcome = catch_unwind(obey).unwrap_or_else(|payload| Err(panicked(&*payload)));
                let failed = outcome.is_err();
                // The engine may be gone already; then nobody needs the answer.
                let _ = outbox.send(outcome);
                if failed {
                    // Dropping the worker leaves the group: the other ranks stop waiting.
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(body).map_err(|error| {
            StepError::Device { message: format!("cannot start a rank's thread: {error}") }
        })?;
        Ok(Self { orders: Some(orders), answers, thread: Some(thread) })
    }
}

impl Drop for RankThread {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported as an answer; there is nothing more to learn from it here.
            let _ = thread.join();
        }
    }
}

/// How the ranks are run.
enum Group<O: Ops> {
    /// One rank, on the caller's thread. Boxed: a worker is large.
    Inline(Box<Worker<O>>),
    Threads(Vec<RankThread>),
    /// A reset failed half-way.
    Gone,
}

/// Runs steps through the model, on one rank or several.
pub struct RankRunner<O: Ops> {
    models: Vec<Arc<Transformer<O>>>,
    parallel: ParallelConfig,
    spec: CacheSpec,
    capacity: RunnerCapacity,
    group: Group<O>,
}

impl<O: Ops> std::fmt::Debug for RankRunner<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RankRunner")
            .field("parallel", &self.parallel)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl<O: Ops> RankRunner<O> {
    /// A runner over `models`, one per rank of `parallel` in rank order, each with a cache of
    /// `spec`. `max_model_len` is the longest sequence it should take.
    ///
    /// # Errors
    /// [`StepError::Device`] if the ranks cannot be started or their caches not be allocated.
    pub fn new(
        models: Vec<Transformer<O>>,
        parallel: ParallelConfig,
        spec: CacheSpec,
        max_model_len: u32,
    ) -> Result<Self, StepError> {
        let models: Vec<_> = models.into_iter().map(Arc::new).collect();
        let Some(first) = models.first().filter(|_| models.len() == parallel.world()) else {
            let (got, wanted) = (models.len(), parallel.world());
            let message = format!("{got} models were loaded for {wanted} ranks");
            return Err(StepError::Device { message });
        };
        let capacity = RunnerCapacity {
            n_slots: spec.n_slots as u32,
            n_blocks: spec.n_blocks as u32,
            n_snapshots: spec.n_snapshots as u32,
            vocab_size: first.config().vocab_size as u32,
            max_model_len,
        };
        let group = start(&models, parallel, &spec)?;
        Ok(Self { models, parallel, spec, capacity, group })
    }
}

impl<O: Ops> RankRunner<O> {
    /// Two passes of the MTP block for sequences of one token: all later ones are like one of them.
    fn warm_up_drafts(&mut self, n_sequences: usize) -> Result<(), StepError> {
        let sampling = Arc::new(SamplingParams::greedy(1));
        let input = |slot| {
            let sampling = Arc::clone(&sampling);
            DraftInput { slot, position: 1, token: 0, n_drafts: 2, sampling }
        };
        let input: Vec<_> = (0..n_sequences as u32).map(input).collect();
        self.draft(&Arc::new(input), &mut vec![Vec::new(); n_sequences], &mut || ())
    }
}

fn start<O: Ops>(
    models: &[Arc<Transformer<O>>],
    parallel: ParallelConfig,
    spec: &CacheSpec,
) -> Result<Group<O>, StepError> {
    if let [model] = models {
        return Ok(Group::Inline(Box::new(Worker::new(model, spec, Box::new(Solo))?)));
    }
    let comms = LocalComm::group(parallel).map_err(|error| device(&error))?;
    let ranks = models
        .iter()
        .zip(comms)
        .map(|(model, comm)| RankThread::spawn(Worker::new(model, spec, Box::new(comm))?));
    Ok(Group::Threads(ranks.collect::<Result<_, _>>()?))
}

/// Gives `ranks` an order, calls `beside` and waits for all of them; the answer is rank 0's.
fn command(ranks: &[RankThread], order: &Order, beside: &mut Beside<'_>) -> Answer {
    let gone = || StepError::Device { message: "a rank is gone".to_owned() };
    for rank in ranks {
        let orders = rank.orders.as_ref().ok_or_else(gone)?;
        orders.send(order.clone()).map_err(|_| gone())?;
    }
    beside();
    // Every rank answers or has dropped its end; the first failure is the cause.
    let answers: Vec<Answer> =
        ranks.iter().map(|rank| rank.answers.recv().unwrap_or_else(|_| Err(gone()))).collect();
    let mut first = None;
    for answer in answers {
        first.get_or_insert(answer?);
    }
    first.ok_or_else(gone)
}

fn reset_failed() -> StepError {
    StepError::Device { message: "the last reset failed".to_owned() }
}

impl<O: Ops> StepRunner for RankRunner<O> {
    fn capacity(&self) -> RunnerCapacity {
        self.capacity
    }

    fn warm_up(&mut self) -> Result<(), StepError> {
        let Some(model) = self.models.first() else { return Ok(()) };
        let cached = self.spec.n_blocks * BLOCK_TOKENS;
        let max_context = cached.min(self.capacity.max_model_len as usize);
        let steps = model.ops().warm_up_steps(self.spec.n_slots, max_context);
        let shortest = steps.first().map(|&(_, context)| context);
        for (n_sequences, context) in steps {
            let mut input = StepInput::default();
            input.batch.min_context = context as u32;
            for slot in 0..n_sequences as u32 {
                // Position 0 completes no entry: that all have one block does not matter.
                input.batch.push(slot, 0, &[0], &[0], true);
            }
            self.step(&Arc::new(input), &mut StepOutput::default())?;
            // Drafts see the window alone, so one context stands for all.
            if self.has_draft_model() && shortest == Some(context) {
                self.warm_up_drafts(n_sequences)?;
            }
        }
        Ok(())
    }

    fn runs_ahead(&self) -> bool {
        self.models.first().is_some_and(|model| model.ops().runs_ahead())
    }

    fn step(&mut self, input: &Arc<StepInput>, output: &mut StepOutput) -> Result<(), StepError> {
        self.step_beside(input, output, &mut ())
    }

    fn step_beside(
        &mut self,
        input: &Arc<StepInput>,
        output: &mut StepOutput,
        host: &mut dyn HostWork,
    ) -> Result<(), StepError> {
        let limits = (self.spec.n_slots, self.spec.n_blocks, self.capacity.vocab_size as usize);
        input
            .batch
            .validate(limits.0, limits.1, limits.2)
            .map_err(|error| StepError::Step { message: error.to_string() })?;
        output.clear();
        match &mut self.group {
            Group::Inline(worker) => {
                // A single rank waits for nobody.
                let model = Arc::clone(&worker.model);
                model.ops().enter(|| worker.run(input, output, host))
            }
            Group::Threads(ranks) => {
                let order = Order::Step(Arc::clone(input));
                if let Done::Rows(rows) = command(ranks, &order, &mut || host.rest())? {
                    *output = rows;
                }
                Ok(())
            }
            Group::Gone => Err(reset_failed()),
        }
    }

    fn max_drafts(&self) -> u32 {
        self.spec.spare_rows as u32
    }

    fn has_draft_model(&self) -> bool {
        self.spec.draft_width > 0
    }

    fn draft(
        &mut self,
        input: &Arc<Vec<DraftInput>>,
        drafts: &mut [Vec<TokenId>],
        beside: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        let made = match &mut self.group {
            Group::Inline(worker) => {
                let model = Arc::clone(&worker.model);
                model.ops().enter(|| worker.draft(input, beside))?
            }
            Group::Threads(ranks) => {
                match command(ranks, &Order::Draft(Arc::clone(input)), beside)? {
                    Done::Drafts(made) => made,
                    Done::Rows(_) | Done::State(_) | Done::Written => Vec::new(),
                }
            }
            Group::Gone => return Err(reset_failed()),
        };
        drafts.iter_mut().zip(made).for_each(|(draft, made)| draft.extend(made));
        Ok(())
    }

    fn state_layout(&self) -> Option<StateLayout> {
        let CacheSpec { layers, kv, index_keys, draft_width, .. } = &self.spec;
        let mut format = format!("{layers:?} {kv:?} {index_keys:?}");
        if *draft_width > 0 {
            format.push_str(&format!(" copies {draft_width}"));
        }
        Some(StateLayout {
            block_bytes: self.spec.block_bytes(),
            snapshot_bytes: self.spec.snapshot_bytes(),
            format,
        })
    }

    fn read_state(&mut self, items: &[StateRef], into: &mut Vec<Bytes>) -> Result<(), StepError> {
        let state = match &self.group {
            Group::Inline(worker) => worker.read(items)?,
            Group::Threads(ranks) => {
                match command(&ranks[..1], &Order::Read(items.into()), &mut || ())? {
                    Done::State(state) => state,
                    Done::Rows(_) | Done::Drafts(_) | Done::Written => Vec::new(),
                }
            }
            Group::Gone => return Err(reset_failed()),
        };
        into.extend(state);
        Ok(())
    }

    fn write_state(&mut self, items: &Arc<Vec<(StateRef, Bytes)>>) -> Result<(), StepError> {
        match &mut self.group {
            Group::Inline(worker) => worker.write(items),
            Group::Threads(ranks) => {
                command(ranks, &Order::Write(Arc::clone(items)), &mut || ()).map(drop)
            }
            Group::Gone => Err(reset_failed()),
        }
    }

    fn reset(&mut self) -> Result<(), StepError> {
        // The old caches must be gone before new ones are allocated.
        self.group = Group::Gone;
        self.group = start(&self.models, self.parallel, &self.spec)?;
        Ok(())
    }
}
