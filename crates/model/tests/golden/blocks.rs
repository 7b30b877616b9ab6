//! Block tables for tests: ids that do not follow one another.

use fathom_ops::BLOCK_TOKENS;

/// The blocks of one sequence.
#[derive(Debug, Clone)]
pub(crate) struct BlockList(Vec<u32>);

impl BlockList {
    /// `n` blocks: `first`, then every `stride`-th.
    pub(crate) fn strided(first: u32, stride: u32, n: u32) -> Self {
        Self((0..n).map(|i| first + i * stride).collect())
    }

    /// Those that hold the first `n_tokens` tokens.
    pub(crate) fn covering(&self, n_tokens: usize) -> &[u32] {
        &self.0[..n_tokens.div_ceil(BLOCK_TOKENS)]
    }

    pub(crate) fn all(&self) -> &[u32] {
        &self.0
    }
}
