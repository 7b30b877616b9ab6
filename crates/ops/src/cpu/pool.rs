//! A pool that its caller is a thread of.
//!
//! Who hands a pass to threads that sleep, and sleeps until it is done, waits for two wake-ups per
//! decoded token: a tenth of its time for a small model. So a thread that runs passes, one after the
//! other, becomes a member of a pool of its own.

use std::cell::OnceCell;
use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuilder};

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
    // The others end with the pool; nobody need wait for them.
    let make = || Some(with_this_thread(rayon::current_num_threads())?.0);
    let is_member = OWN.with(|own| own.get_or_init(make).is_some());
    if is_member { work() } else { rayon::scope(|_| work()) }
}

/// A pool of this thread and `n_threads - 1` others. These exist before the pool does: a pool that finds
/// out too late that there are none has taken this thread already, and does not give it back.
fn with_this_thread(n_threads: usize) -> Option<(ThreadPool, Vec<JoinHandle<()>>)> {
    let (mut places, mut others) = (Vec::new(), Vec::new());
    for index in 1..n_threads {
        let (place, given) = mpsc::channel::<ThreadBuilder>();
        let run = move || {
            if let Ok(place) = given.recv() {
                place.run();
            }
        };
        let named = std::thread::Builder::new().name(format!("pass-{index}"));
        others.push(named.spawn(run).ok()?);
        places.push(place);
    }
    let mut places = places.into_iter();
    let pool = ThreadPoolBuilder::new().num_threads(n_threads).use_current_thread();
    let pool = pool.spawn_handler(|builder| {
        let sent = places.next().and_then(|place| place.send(builder).ok());
        sent.ok_or_else(|| io::Error::other("a thread that has just begun is gone"))
    });
    Some((pool.build().ok()?, others))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::awake::keep_awake;
    use std::time::{Duration, Instant};

    #[test]
    fn a_pool_ends_with_its_thread_also_if_a_pass_had_nothing_to_wait_for() {
        let passes = || {
            let (pool, others) = with_this_thread(3).expect("two threads more");
            for _ in 0..3 {
                enter(|| keep_awake(|| assert_eq!(rayon::current_num_threads(), 3)));
            }
            drop(pool);
            others
        };
        let others = std::thread::spawn(passes).join().expect("no panic");
        assert_eq!(others.len(), 2);
        let begun = Instant::now();
        while !others.iter().all(JoinHandle::is_finished) {
            assert!(begun.elapsed() < Duration::from_secs(10), "threads are left");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
