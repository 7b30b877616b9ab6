//! Recordings as the driver's device keeps them.
//!
//! Not here: what is recorded and when it may be replayed (`replay`).

use std::collections::HashMap;

use cudarc::driver::sys;

/// A graph that can be launched; the driver's pointer.
pub(super) struct Graph(pub(super) sys::CUgraphExec);

// SAFETY: the driver does not care which thread uses a graph, as long as only one does at a time;
// graphs are behind a mutex.
unsafe impl Send for Graph {}

#[derive(Default)]
pub(super) struct Recordings {
    pub(super) is_recording: bool,
    pub(super) graphs: HashMap<u64, Graph>,
    pub(super) next: u64,
    /// Given back while recording, when the driver would record that too.
    pub(super) to_free: Vec<u64>,
}
