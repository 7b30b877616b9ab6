//! Keeps the threads of the pool awake through a forward pass.
//!
//! A decoded token is some hundreds of parallel loops of a few microseconds with serial code in
//! between. A pool thread that finds nothing to do goes to sleep after about as long, and waking it
//! costs more than its share of the next loop. While a pass runs, idle threads of its pool
//! therefore look for work in a loop, for a bounded time.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Passes that run now, in all pools.
static PASSES: AtomicUsize = AtomicUsize::new(0);

/// How often an idle thread looks for work before it may sleep after all: about 100 us.
const IDLE_ROUNDS: usize = 1000;
/// Pauses between two looks, so that the memory all threads look at is not contended.
const PAUSES: usize = 8;

thread_local! {
    /// This thread is in a pass or keeps itself awake: it must not begin to wait on top of that.
    static OCCUPIED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, which is on a thread of a pool, with the pool's other threads awake.
pub(super) fn keep_awake<R>(work: impl FnOnce() -> R) -> R {
    let _pass = Pass::begin();
    if rayon::current_num_threads() == 1 {
        return work();
    }
    rayon::spawn_broadcast(|_| look_for_work());
    work()
}

/// One running pass: also ended when its work panics.
struct Pass {
    was_occupied: bool,
}

impl Pass {
    fn begin() -> Self {
        PASSES.fetch_add(1, Ordering::Relaxed);
        Self { was_occupied: OCCUPIED.replace(true) }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        // This thread was called, too. What it never answers would pile up, and keep the pool alive.
        while rayon::yield_local() == Some(rayon::Yield::Executed) {}
        OCCUPIED.set(self.was_occupied);
        PASSES.fetch_sub(1, Ordering::Relaxed);
    }
}

fn look_for_work() {
    if OCCUPIED.replace(true) {
        return;
    }
    let mut idle = 0;
    while idle < IDLE_ROUNDS && PASSES.load(Ordering::Relaxed) > 0 {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => idle = 0,
            _ => idle += 1,
        }
        for _ in 0..PAUSES {
            std::hint::spin_loop();
        }
    }
    OCCUPIED.set(false);
}
