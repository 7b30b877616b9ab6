//! A pool that its caller is a thread of.
//!
//! Who hands a pass to threads that sleep, and sleeps until it is done, waits for two wake-ups per
//! decoded token: a tenth of its time for a small model. So a thread that runs passes, one after the
//! other, becomes a member of a pool of its own.

use std::cell::OnceCell;

use rayon::{ThreadPool, ThreadPoolBuilder};

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

fn with_this_thread() -> Option<ThreadPool> {
    let n_threads = rayon::current_num_threads();
    let name = |index| format!("compute-{index}");
    let pool = ThreadPoolBuilder::new().num_threads(n_threads).thread_name(name);
    pool.use_current_thread().build().ok()
}
