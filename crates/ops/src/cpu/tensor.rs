//! Activations on the CPU: row-major f32, whatever the numeric mode.
//!
//! In mode `bf16` the values are bf16 values stored in f32; operators round where the official
//! code does, so nothing is lost and nothing is converted back and forth.
//!
//! A step makes and drops the same tensors in every layer, so their memory goes through a pool
//! ([`Values`]); operators that write every value take it as it is.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use rayon::prelude::*;

use fathom_core::num::round_bf16;

use crate::OpError;
use crate::cpu::simd::simd_fn;
use crate::error::check_len;

/// The values of a tensor. Large ones go back to a pool, for the next tensor: memory that comes from
/// the system is zeroed page by page, which costs as much as a whole product.
#[derive(Debug, Default)]
pub struct Values {
    /// May be longer: what is behind `len` is the last tensor's, so that nothing is written twice.
    memory: Vec<f32>,
    len: usize,
}

/// Memory of tensors that are gone.
static POOL: Mutex<Pool> = Mutex::new(Pool { free: Vec::new(), len: 0 });
/// Smaller tensors are left to the allocator: it keeps such memory at hand anyway.
const MIN_POOLED: usize = 4 * 1024;
/// Values that the pool holds at most: 256 MiB.
const MAX_POOLED: usize = 64 * 1024 * 1024;

struct Pool {
    free: Vec<Vec<f32>>,
    /// Values of all in `free`.
    len: usize,
}

impl Pool {
    /// The smallest that has room for `len` values, unless that would waste most of it.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let fits = |values: &Vec<f32>| (len..=2 * len).contains(&values.len());
        let free = self.free.iter().enumerate().filter(|(_, values)| fits(values));
        let (index, _) = free.min_by_key(|(_, values)| values.len())?;
        let values = self.free.remove(index);
        self.len -= values.len();
        Some(values)
    }

    /// Keeps `values`; what was there longest has to go when there is no room, and is handed back.
    fn give(&mut self, values: Vec<f32>) -> Vec<Vec<f32>> {
        self.len += values.len();
        self.free.push(values);
        let mut gone = Vec::new();
        while self.len > MAX_POOLED {
            let oldest = self.free.remove(0);
            self.len -= oldest.len();
            gone.push(oldest);
        }
        gone
    }
}

impl Values {
    /// `len` values, whatever they are: for an operator that writes every one. (NaN in a debug
    /// build, so that a test sees what was not written.)
    fn unset(len: usize) -> Self {
        let pooled = match POOL.lock() {
            Ok(mut pool) if len >= MIN_POOLED => pool.take(len),
            _ => None,
        };
        let mut values = Self { memory: pooled.unwrap_or_else(|| vec![0.0; len]), len };
        if cfg!(debug_assertions) {
            values.fill(f32::NAN);
        }
        values
    }

    /// All zeros.
    fn zeros(len: usize) -> Self {
        let mut values = Self::unset(len);
        values.fill(0.0);
        values
    }
}

impl Drop for Values {
    fn drop(&mut self) {
        if self.memory.len() >= MIN_POOLED {
            let memory = std::mem::take(&mut self.memory);
            // What has to go is freed after the lock.
            let gone = POOL.lock().map(|mut pool| pool.give(memory));
            drop(gone);
        }
    }
}

impl Clone for Values {
    fn clone(&self) -> Self {
        let mut values = Self::unset(self.len());
        values.copy_from_slice(self);
        values
    }
}

impl PartialEq for Values {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Values {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[..self.len]
    }
}

impl<'a> IntoIterator for &'a Values {
    type Item = &'a f32;
    type IntoIter = std::slice::Iter<'a, f32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<Vec<f32>> for Values {
    fn from(memory: Vec<f32>) -> Self {
        let len = memory.len();
        Self { memory, len }
    }
}

impl From<Values> for Vec<f32> {
    fn from(mut values: Values) -> Self {
        let mut memory = std::mem::take(&mut values.memory);
        memory.truncate(values.len);
        memory
    }
}

/// `[rows, cols]` activations.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostTensor {
    /// Rows.
    pub rows: usize,
    /// Values per row.
    pub cols: usize,
    /// Row-major values.
    pub data: Values,
}

impl HostTensor {
    /// All zeros.
    #[must_use]
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: Values::zeros(rows * cols) }
    }

    /// Values that are yet to be written, every one.
    pub(crate) fn unset(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: Values::unset(rows * cols) }
    }

    /// Takes `data` as `[rows, cols]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the length does not fit.
    pub fn from_vec(rows: usize, cols: usize, data: impl Into<Values>) -> Result<Self, OpError> {
        let data = data.into();
        check_len("tensor", "data", data.len(), rows * cols)?;
        Ok(Self { rows, cols, data })
    }

    /// One row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// One row, to write.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// Refuses a tensor that is not `[rows, cols]`.
    pub(crate) fn expect(
        &self,
        op: &'static str,
        arg: &'static str,
        rows: usize,
        cols: usize,
    ) -> Result<(), OpError> {
        check_len(op, arg, self.rows, rows)?;
        check_len(op, arg, self.cols, cols)
    }
}

simd_fn! {
    /// Rounds every value to bf16.
    pub(crate) fn round_to_bf16(values: &mut [f32]) {
        for value in values {
            *value = round_bf16(*value);
        }
    }
}

/// Values below which a loop over rows stays on the calling thread.
const INLINE_VALUES: usize = 16 * 1024;

/// Runs `body(row, out_row)` for every row of `out`, on all threads if there is enough to do.
pub(crate) fn for_each_row(out: &mut HostTensor, body: impl Fn(usize, &mut [f32]) + Sync) {
    if out.cols == 0 {
        return;
    }
    if out.rows < 2 || out.data.len() < INLINE_VALUES {
        out.data.chunks_exact_mut(out.cols).enumerate().for_each(|(row, out)| body(row, out));
    } else {
        out.data.par_chunks_exact_mut(out.cols).enumerate().for_each(|(row, out)| body(row, out));
    }
}

/// Rounds every value to bf16, on all threads if there is enough to do.
pub(crate) fn round_tensor(tensor: &mut HostTensor) {
    for_each_row(tensor, |_, row| round_to_bf16(row));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_gives_what_fits_best_and_never_mostly_unused_memory() {
        let mut pool = Pool { free: Vec::new(), len: 0 };
        for len in [100, 60, 40] {
            assert!(pool.give(vec![0.0; len]).is_empty());
        }
        let taken = |pool: &mut Pool, len| pool.take(len).map(|values| values.len());
        assert_eq!(taken(&mut pool, 41), Some(60));
        assert_eq!(taken(&mut pool, 41), None, "100 are more than twice as many");
        assert_eq!(taken(&mut pool, 50), Some(100));
        assert_eq!((pool.free.len(), pool.len), (1, 40));
    }

    #[test]
    fn a_full_pool_lets_go_of_the_oldest() {
        let mut pool = Pool { free: Vec::new(), len: 0 };
        let half = MAX_POOLED / 2;
        assert!(pool.give(vec![0.0; half]).is_empty());
        assert!(pool.give(vec![0.0; half - 1]).is_empty());
        let gone: Vec<usize> = pool.give(vec![0.0; 2]).iter().map(Vec::len).collect();
        assert_eq!((gone, pool.len), (vec![half], half + 1));
    }

    #[test]
    fn a_tensor_shows_nothing_of_the_one_that_had_its_memory() {
        let cols = 2 * MIN_POOLED;
        let mut old = HostTensor::unset(1, cols);
        old.data.fill(7.0);
        drop(old);
        let new = HostTensor::zeros(1, cols - 5);
        assert_eq!(new.data.len(), cols - 5);
        assert!(new.data.iter().all(|value| *value == 0.0));
        assert_eq!(new, new.clone());
        assert_eq!(Vec::from(new.data).len(), cols - 5);
    }
}
