//! Collectives between threads of one process.
//!
//! A group meets twice per collective: once when every rank has published its part, once when
//! every rank has read all parts. A rank that is dropped breaks the meeting instead of leaving the
//! others waiting.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use fathom_core::{Group, ParallelConfig, ParallelError, Rank};

use super::Communicator;
use crate::OpError;

/// One rank's end of a group of threads.
#[derive(Debug)]
pub struct LocalComm {
    rank: Rank,
    world: Arc<Meeting>,
    tensor: Arc<Meeting>,
}

impl LocalComm {
    /// The ends of all ranks of `config`, in rank order.
    ///
    /// # Errors
    /// [`ParallelError`] if the configuration has no ranks.
    pub fn group(config: ParallelConfig) -> Result<Vec<Self>, ParallelError> {
        let world = Arc::new(Meeting::new(config.world()));
        let tensor: Vec<_> =
            (0..config.expert).map(|_| Arc::new(Meeting::new(config.tensor))).collect();
        (0..config.world())
            .map(|index| {
                let rank = config.rank(index)?;
                let (world, tensor) = (Arc::clone(&world), Arc::clone(&tensor[rank.expert()]));
                Ok(Self { rank, world, tensor })
            })
            .collect()
    }

    /// The meeting of `group` and this rank's seat in it.
    fn seat(&self, group: Group) -> (&Meeting, usize) {
        match group {
            Group::World => (&self.world, self.rank.index()),
            Group::Tensor => (&self.tensor, self.rank.tensor()),
        }
    }
}

impl Drop for LocalComm {
    fn drop(&mut self) {
        self.world.leave();
        self.tensor.leave();
    }
}

impl Communicator for LocalComm {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn all_reduce_sum(&self, group: Group, values: &mut [f32]) -> Result<(), OpError> {
        let (meeting, seat) = self.seat(group);
        meeting.exchange("all-reduce", seat, values.to_vec(), |parts| {
            values.fill(0.0);
            for part in parts {
                values.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            }
        })
    }

    fn all_gather(&self, group: Group, values: &[f32]) -> Result<Vec<f32>, OpError> {
        let (meeting, seat) = self.seat(group);
        let mut all = Vec::new();
        meeting.exchange("all-gather", seat, values.to_vec(), |parts| all = parts.concat())?;
        Ok(all)
    }
}

/// A reusable barrier that carries one part per rank.
#[derive(Debug)]
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    parts: Vec<Vec<f32>>,
    /// Ranks that have published and not yet all read.
    published: usize,
    /// Ranks that have read the current parts.
    read: usize,
    is_broken: bool,
}

impl Meeting {
    fn new(n_ranks: usize) -> Self {
        let parts = vec![Vec::new(); n_ranks];
        let state = State { parts, published: 0, read: 0, is_broken: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        self.lock().is_broken = true;
        self.changed.notify_all();
    }

    /// Publishes `part`, waits for all ranks and lets `read` see every part.
    fn exchange(
        &self,
        op: &'static str,
        seat: usize,
        part: Vec<f32>,
        read: impl FnOnce(&[Vec<f32>]),
    ) -> Result<(), OpError> {
        // A fast rank may come back before the slow ones have left the previous meeting.
        let mut state = self.wait_until(op, self.lock(), |state| state.read == 0)?;
        state.parts[seat] = part;
        state.published += 1;
        self.changed.notify_all();
        let mut state = self.wait_until(op, state, |state| state.published == state.parts.len())?;
        read(&state.parts);
        state.read += 1;
        if state.read == state.parts.len() {
            (state.read, state.published) = (0, 0);
            self.changed.notify_all();
        }
        Ok(())
    }

    fn wait_until<'a>(
        &self,
        op: &'static str,
        state: MutexGuard<'a, State>,
        is_ready: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, OpError> {
        let state = self
            .changed
            .wait_while(state, |state| !is_ready(state) && !state.is_broken)
            .unwrap_or_else(PoisonError::into_inner);
        if is_ready(&state) { Ok(state) } else { Err(OpError::RankLost { op }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` on every rank and returns the results in rank order.
    fn on_all_ranks<T: Send>(
        config: ParallelConfig,
        body: impl Fn(LocalComm) -> T + Sync,
    ) -> Vec<T> {
        let comms = LocalComm::group(config).unwrap();
        std::thread::scope(|scope| {
            let threads: Vec<_> = comms.into_iter().map(|c| scope.spawn(|| body(c))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn a_sum_over_the_tp_group_leaves_the_other_group_alone() {
        let config = ParallelConfig { tensor: 2, expert: 2 };
        let sums = on_all_ranks(config, |comm| {
            let mut values = [comm.rank().index() as f32, 1.0];
            for _ in 0..100 {
                values = [comm.rank().index() as f32, 1.0];
                comm.all_reduce_sum(Group::Tensor, &mut values).unwrap();
            }
            values
        });
        assert_eq!(sums, [[1.0, 2.0], [1.0, 2.0], [5.0, 2.0], [5.0, 2.0]]);
    }

    #[test]
    fn a_gather_over_the_world_is_in_rank_order() {
        let config = ParallelConfig { tensor: 2, expert: 2 };
        let all = on_all_ranks(config, |comm| {
            comm.all_gather(Group::World, &[comm.rank().index() as f32]).unwrap()
        });
        assert_eq!(all, vec![vec![0.0, 1.0, 2.0, 3.0]; 4]);
    }

    #[test]
    fn a_rank_that_leaves_fails_the_others_instead_of_hanging_them() {
        let outcomes = on_all_ranks(ParallelConfig { tensor: 3, expert: 1 }, |comm| {
            if comm.rank().index() == 1 {
                return true;
            }
            let outcome = comm.all_reduce_sum(Group::World, &mut [1.0]);
            matches!(outcome, Err(OpError::RankLost { .. }))
        });
        assert_eq!(outcomes, [true, true, true]);
    }
}
