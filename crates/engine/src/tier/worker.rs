//! The thread that does the disk tier's IO, and the queues in front of it.
//!
//! Reads go first: a request waits for them. Writes wait in a queue of bounded bytes and are refused
//! when it is full: the state then is not on disk, and no step has waited.
//!
//! Invariants:
//! - every accepted write is answered with `Stored` or `Gone`, every removal with `Removed`, every
//!   read with `Read`, as long as the thread lives; it ends on [`Drop`] or by a panic, which closes
//!   the channel of events;
//! - a state that turns out to be gone is reported before the read that found out.
//!
//! Not here: files (`disk`), what is worth writing (`tiers`).

use std::collections::VecDeque;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fathom_scheduler::{LoadId, StateKey};

use super::disk::DiskStore;

/// How long nothing is written after a write has failed: a full disk stays full for a while.
const PAUSE: Duration = Duration::from_secs(30);

/// How long queued writes may take when the engine stops.
const FLUSH: Duration = Duration::from_secs(10);

/// What happened on disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DiskEvent {
    /// A write is complete.
    Stored(StateKey),
    /// The state is not there: evicted, damaged, or never written.
    Gone(StateKey),
    /// A removal that was asked for is complete.
    Removed(StateKey),
    /// What was found of a load, with the items' numbers in it.
    Read(LoadId, Vec<(usize, Option<Bytes>)>),
}

/// Gauges and counters of the disk tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct DiskCounts {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) damaged: u64,
    pub(super) written_bytes: u64,
    pub(super) read_bytes: u64,
    pub(super) write_errors: u64,
}

#[derive(Debug)]
enum Chore {
    Write(StateKey, Bytes),
    Remove(StateKey),
    Touch(Vec<StateKey>),
}

#[derive(Debug, Default)]
struct Queues {
    reads: VecDeque<(LoadId, Vec<(usize, StateKey)>)>,
    chores: VecDeque<Chore>,
    /// Bytes of queued writes, and of the one being written.
    bytes: u64,
    counts: DiskCounts,
    /// The thread is to end, at the latest then.
    stop: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    queues: Mutex<Queues>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        // Nothing in the queues is half-done between two statements.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The disk tier as the engine's thread sees it. No call waits for IO, except [`Drop`].
#[derive(Debug)]
pub(super) struct DiskWorker {
    shared: Arc<Shared>,
    queue_bytes: u64,
    events: Receiver<DiskEvent>,
    thread: Option<JoinHandle<()>>,
}

impl DiskWorker {
    /// Starts the thread. At most `queue_bytes` wait to be written, unless a single write is larger.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn start(store: DiskStore, queue_bytes: u64) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.lock().counts = counts_of(&store, DiskCounts::default());
        let (sender, events) = mpsc::channel();
        let worker = Worker { store, shared: Arc::clone(&shared), events: sender, resume: None };
        let thread = std::thread::Builder::new()
            .name("fathom-cache".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self { shared, queue_bytes, events, thread: Some(thread) })
    }

    /// Queues a write. False: the queue is full, and nothing happens.
    pub(super) fn write(&self, state: StateKey, bytes: Bytes) -> bool {
        let mut queues = self.shared.lock();
        let len = bytes.len() as u64;
        if queues.bytes > 0 && queues.bytes + len > self.queue_bytes {
            return false;
        }
        queues.bytes += len;
        queues.chores.push_back(Chore::Write(state, bytes));
        self.shared.wake.notify_one();
        true
    }

    pub(super) fn read(&self, load: LoadId, items: Vec<(usize, StateKey)>) {
        self.shared.lock().reads.push_back((load, items));
        self.shared.wake.notify_one();
    }

    pub(super) fn remove(&self, state: StateKey) {
        self.shared.lock().chores.push_back(Chore::Remove(state));
        self.shared.wake.notify_one();
    }

    /// Notes uses, the last one of them the most recent.
    pub(super) fn touch(&self, states: Vec<StateKey>) {
        self.shared.lock().chores.push_back(Chore::Touch(states));
        self.shared.wake.notify_one();
    }

    /// The next event, waiting up to `timeout` for it.
    ///
    /// # Errors
    /// [`TryRecvError::Disconnected`] if the thread has ended.
    pub(super) fn event(&self, timeout: Duration) -> Result<DiskEvent, TryRecvError> {
        if timeout.is_zero() {
            return self.events.try_recv();
        }
        self.events.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => TryRecvError::Empty,
            RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
        })
    }

    pub(super) fn counts(&self) -> DiskCounts {
        self.shared.lock().counts
    }
}

impl Drop for DiskWorker {
    fn drop(&mut self) {
        self.shared.lock().stop = Some(Instant::now() + FLUSH);
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic closed the channel and was dealt with then.
            let _ = thread.join();
        }
    }
}

fn counts_of(store: &DiskStore, before: DiskCounts) -> DiskCounts {
    DiskCounts {
        files: store.n_files() as u64,
        bytes: store.used_bytes(),
        damaged: store.n_damaged(),
        ..before
    }
}

struct Worker {
    store: DiskStore,
    shared: Arc<Shared>,
    events: Sender<DiskEvent>,
    /// Nothing is written before this.
    resume: Option<Instant>,
}

enum Job {
    Read(LoadId, Vec<(usize, StateKey)>),
    Chore(Chore),
}

impl Worker {
    fn run(mut self) {
        while let Some(job) = self.next() {
            let mut written = 0;
            let mut counts = self.shared.lock().counts;
            let mut happened = Vec::new();
            match job {
                Job::Read(load, items) => self.read(load, items, &mut counts, &mut happened),
                Job::Chore(Chore::Write(state, bytes)) => {
                    written = bytes.len() as u64;
                    self.write(state, &bytes, &mut counts, &mut happened);
                }
                Job::Chore(Chore::Remove(state)) => {
                    self.store.remove(state);
                    happened.push(DiskEvent::Removed(state));
                }
                Job::Chore(Chore::Touch(states)) => {
                    states.into_iter().for_each(|state| self.store.touch(state));
                }
            }
            // Whoever hears of an event finds it counted.
            let mut queues = self.shared.lock();
            queues.counts = counts_of(&self.store, counts);
            queues.bytes -= written;
            drop(queues);
            for event in happened {
                // The engine's thread may be gone already; then nobody needs to know.
                let _ = self.events.send(event);
            }
        }
    }

    /// Waits for something to do. `None`: end.
    fn next(&self) -> Option<Job> {
        let mut queues = self.shared.lock();
        loop {
            if queues.stop.is_some_and(|latest| Instant::now() >= latest) {
                let lost = queues.chores.len();
                tracing::warn!(lost, "stopping before everything was written to the cache");
                return None;
            }
            if queues.stop.is_none()
                && let Some((load, items)) = queues.reads.pop_front()
            {
                return Some(Job::Read(load, items));
            }
            if let Some(chore) = queues.chores.pop_front() {
                return Some(Job::Chore(chore));
            }
            if queues.stop.is_some() {
                return None;
            }
            queues = self.shared.wake.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read(
        &mut self,
        load: LoadId,
        items: Vec<(usize, StateKey)>,
        counts: &mut DiskCounts,
        happened: &mut Vec<DiskEvent>,
    ) {
        let mut found = Vec::with_capacity(items.len());
        for (index, state) in items {
            let bytes = self.store.get(state);
            match &bytes {
                Some(bytes) => counts.read_bytes += bytes.len() as u64,
                None => happened.push(DiskEvent::Gone(state)),
            }
            found.push((index, bytes));
        }
        happened.push(DiskEvent::Read(load, found));
    }

    fn write(
        &mut self,
        state: StateKey,
        bytes: &[u8],
        counts: &mut DiskCounts,
        happened: &mut Vec<DiskEvent>,
    ) {
        if self.resume.is_some_and(|resume| Instant::now() < resume) {
            happened.push(DiskEvent::Gone(state));
            return;
        }
        self.resume = None;
        let mut evicted = Vec::new();
        let result = self.store.put(state, bytes, &mut evicted);
        happened.extend(evicted.into_iter().map(DiskEvent::Gone));
        match result {
            Ok(true) => {
                counts.written_bytes += bytes.len() as u64;
                happened.push(DiskEvent::Stored(state));
            }
            Ok(false) => happened.push(DiskEvent::Gone(state)),
            Err(error) => {
                tracing::warn!(
                    %error,
                    pause_s = PAUSE.as_secs(),
                    "writing to the cache directory failed: nothing is written for a while"
                );
                counts.write_errors += 1;
                self.resume = Some(Instant::now() + PAUSE);
                happened.push(DiskEvent::Gone(state));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;

    use fathom_scheduler::{BlockKey, StateKind};

    use super::super::directory::CacheDirectory;
    use super::super::disk::{Namespace, WriteFile, write_file};
    use super::*;

    const NAMESPACE: Namespace = Namespace { hash: 1, block_bytes: 4, snapshot_bytes: 8 };

    fn store(root: &Path, write: WriteFile) -> DiskStore {
        let directory = CacheDirectory::open(root).unwrap();
        DiskStore::open(directory, NAMESPACE, 1 << 20, write).unwrap()
    }

    fn block(key: u128) -> StateKey {
        StateKey { kind: StateKind::Block, key: BlockKey(key) }
    }

    fn next(worker: &DiskWorker) -> DiskEvent {
        worker.event(Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn writes_removals_and_reads_are_answered() {
        let root = tempfile::tempdir().unwrap();
        let worker = DiskWorker::start(store(root.path(), write_file), 100).unwrap();
        for key in [1, 2] {
            assert!(worker.write(block(key), Bytes::from_static(b"abcd")));
            assert_eq!(next(&worker), DiskEvent::Stored(block(key)));
        }
        worker.remove(block(2));
        assert_eq!(next(&worker), DiskEvent::Removed(block(2)));
        worker.read(LoadId(7), vec![(3, block(1)), (4, block(2))]);
        assert_eq!(next(&worker), DiskEvent::Gone(block(2)));
        let found = vec![(3, Some(Bytes::from_static(b"abcd"))), (4, None)];
        assert_eq!(next(&worker), DiskEvent::Read(LoadId(7), found));
        let counts = worker.counts();
        assert_eq!((counts.files, counts.written_bytes, counts.write_errors), (1, 8, 0));
    }

    #[test]
    fn what_is_queued_when_the_engine_stops_is_written() {
        let root = tempfile::tempdir().unwrap();
        let worker = DiskWorker::start(store(root.path(), write_file), 1 << 20).unwrap();
        for key in 0..200 {
            assert!(worker.write(block(key), Bytes::from_static(b"abcd")));
        }
        drop(worker);
        assert_eq!(store(root.path(), write_file).n_files(), 200);
    }

    #[test]
    fn a_full_queue_refuses_and_one_large_write_is_never_refused() {
        let root = tempfile::tempdir().unwrap();
        fn never(_: &Path, _: [&[u8]; 2]) -> io::Result<()> {
            std::thread::park_timeout(Duration::from_millis(200));
            Err(io::ErrorKind::StorageFull.into())
        }
        let worker = DiskWorker::start(store(root.path(), never), 3).unwrap();
        assert!(worker.write(block(1), Bytes::from_static(b"abcd")));
        assert!(!worker.write(block(2), Bytes::from_static(b"abcd")));
        assert_eq!(next(&worker), DiskEvent::Gone(block(1)));
    }

    #[test]
    fn after_a_failed_write_nothing_is_written_for_a_while_but_everything_answered() {
        fn full(_: &Path, _: [&[u8]; 2]) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        let root = tempfile::tempdir().unwrap();
        let worker = DiskWorker::start(store(root.path(), full), 100).unwrap();
        for key in 0..5 {
            assert!(worker.write(block(key), Bytes::from_static(b"abcd")));
            assert_eq!(next(&worker), DiskEvent::Gone(block(key)));
        }
        worker.remove(block(9));
        assert_eq!(next(&worker), DiskEvent::Removed(block(9)));
        assert_eq!(worker.counts().write_errors, 1);
    }

    #[test]
    fn a_panic_of_the_thread_closes_the_events() {
        fn panics(_: &Path, _: [&[u8]; 2]) -> io::Result<()> {
            panic!("planted")
        }
        let root = tempfile::tempdir().unwrap();
        let worker = DiskWorker::start(store(root.path(), panics), 100).unwrap();
        worker.write(block(1), Bytes::from_static(b"abcd"));
        let end = worker.event(Duration::from_secs(60));
        assert_eq!(end, Err(TryRecvError::Disconnected));
    }
}
