//! A pool that its caller is a thread of.
//!
//! Who hands a pass to threads that sleep, and sleeps until it is done, waits for two wake-ups per
//! decoded token: a tenth of its time for a small model. So a thread that runs passes, one after the
//! other, becomes a member of a pool of its own.

use std::cell::OnceCell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuilder};

/// Threads that such pools have besides their callers.
static OTHERS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Ends with the thread. `None` where the system gives no more threads.
    static OWN: OnceCell<Option<ThreadPool>> = const { OnceCell::new() };
}

/// Runs `work` on a thread of a pool: this one, as soon as it has a pool of as many threads as others
/// have.
pub(super) fn enter<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return work();
    }
    let is_member = OWN.with(|own| own.get_or_init(with_this_thread).is_some());
    if is_member { work() } else { rayon::scope(|_| work()) }
}

/// The other threads exist before the pool does: a pool that finds out too late that there are none
/// has taken this thread already, and does not give it back.
fn with_this_thread() -> Option<ThreadPool> {
    let n_threads = rayon::current_num_threads();
    let mut others = Vec::new();
    for index in 1..n_threads {
        let (place, given) = mpsc::channel::<ThreadBuilder>();
        let run = move || {
            if let Ok(place) = given.recv() {
                place.run();
            }
            OTHERS.fetch_sub(1, Ordering::Relaxed);
        };
        std::thread::Builder::new().name(format!("pass-{index}")).spawn(run).ok()?;
        OTHERS.fetch_add(1, Ordering::Relaxed);
        others.push(place);
    }
    let mut others = others.into_iter();
    let pool = ThreadPoolBuilder::new().num_threads(n_threads).use_current_thread();
    let pool = pool.spawn_handler(|place| {
        let sent = others.next().and_then(|other| other.send(place).ok());
        sent.ok_or_else(|| io::Error::other("a thread that has just begun is gone"))
    });
    pool.build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::awake::keep_awake;
    use std::time::{Duration, Instant};

    #[test]
    fn a_pool_ends_with_its_thread_also_if_a_pass_had_nothing_to_wait_for() {
        rayon::ThreadPoolBuilder::new().num_threads(3).build_global().expect("the first pool");
        let passes = || {
            for _ in 0..3 {
                enter(|| keep_awake(|| assert_eq!(rayon::current_num_threads(), 3)));
            }
            OTHERS.load(Ordering::Relaxed)
        };
        assert_eq!(std::thread::spawn(passes).join().expect("no panic"), 2);
        let begun = Instant::now();
        while OTHERS.load(Ordering::Relaxed) > 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "threads are left");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
