//! Tensor and expert parallelism: which rank owns which part of a weight.
//!
//! `world = tp * ep`. Rank `r` has TP rank `r % tp` and EP rank `r / tp`. Attention is sharded by
//! head over the TP group and repeated in every EP group; routed experts are placed over EP groups
//! by contiguous ranges of ids and, inside a group, sliced along their intermediate width.
//!
//! Invariant: no rank ever holds part of a 128-wide quantisation block. What does not divide into
//! whole blocks is not sliced: an expert then goes whole to one TP rank, a shared expert is
//! replicated.

use std::ops::Range;

/// Channels of one quantisation block along either side of an FP8 weight.
pub const QUANT_BLOCK: usize = 128;

/// How many ranks share the model, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParallelConfig {
    /// Ranks that share each attention layer.
    pub tensor: usize,
    /// Groups over which the routed experts are placed.
    pub expert: usize,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self { tensor: 1, expert: 1 }
    }
}

impl ParallelConfig {
    /// Number of ranks.
    #[must_use]
    pub const fn world(self) -> usize {
        self.tensor * self.expert
    }

    /// The place of rank `index` in this configuration.
    ///
    /// # Errors
    /// [`ParallelError::RankOutOfRange`] unless `index < world`.
    pub const fn rank(self, index: usize) -> Result<Rank, ParallelError> {
        if index < self.world() {
            Ok(Rank { config: self, index })
        } else {
            Err(ParallelError::RankOutOfRange { index, world: self.world() })
        }
    }
}

/// The set of ranks a collective runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The TP ranks of one EP group: they share attention.
    Tensor,
    /// All ranks: they share the routed experts.
    World,
}

/// One rank's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rank {
    config: ParallelConfig,
    index: usize,
}

impl Rank {
    /// The only rank of an unsharded model.
    #[must_use]
    pub const fn solo() -> Self {
        Self { config: ParallelConfig { tensor: 1, expert: 1 }, index: 0 }
    }

    /// Position among all ranks.
    #[must_use]
    pub const fn index(self) -> usize {
        self.index
    }

    /// The configuration this rank belongs to.
    #[must_use]
    pub const fn config(self) -> ParallelConfig {
        self.config
    }

    /// Position inside the TP group.
    #[must_use]
    pub const fn tensor(self) -> usize {
        self.index % self.config.tensor
    }

    /// Which EP group the rank belongs to.
    #[must_use]
    pub const fn expert(self) -> usize {
        self.index / self.config.tensor
    }

    /// This TP rank's part of `n` equal things (heads, groups, vocabulary rows).
    ///
    /// # Errors
    /// [`ParallelError::Indivisible`] naming `what` if `n` is no multiple of the TP size.
    pub fn tensor_shard(self, what: &'static str, n: usize) -> Result<Range<usize>, ParallelError> {
        let parts = self.config.tensor;
        if !n.is_multiple_of(parts) {
            return Err(ParallelError::Indivisible { what, n, parts });
        }
        let len = n / parts;
        Ok(self.tensor() * len..(self.tensor() + 1) * len)
    }

    /// This TP rank's slice of an expert's intermediate width, or `None` if slicing would cut a
    /// 128-wide block.
    #[must_use]
    pub fn intermediate_shard(self, width: usize) -> Option<Range<usize>> {
        let parts = self.config.tensor;
        (width.is_multiple_of(parts) && (width / parts).is_multiple_of(QUANT_BLOCK)).then(|| {
            let len = width / parts;
            self.tensor() * len..(self.tensor() + 1) * len
        })
    }

    /// The experts this rank computes and its slice of their intermediate width.
    ///
    /// # Errors
    /// [`ParallelError::Indivisible`] if the experts do not divide over the groups.
    pub fn expert_shard(
        self,
        n_experts: usize,
        width: usize,
    ) -> Result<ExpertShard, ParallelError> {
        let place = |part: usize, parts: usize| {
            if !n_experts.is_multiple_of(parts) {
                return Err(ParallelError::Indivisible {
                    what: "routed experts",
                    n: n_experts,
                    parts,
                });
            }
            let len = n_experts / parts;
            Ok(part * len..(part + 1) * len)
        };
        match self.intermediate_shard(width) {
            Some(channels) => {
                Ok(ExpertShard { experts: place(self.expert(), self.config.expert)?, channels })
            }
            None => Ok(ExpertShard {
                experts: place(self.index, self.config.world())?,
                channels: 0..width,
            }),
        }
    }
}

/// The part of a layer's routed experts that one rank computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertShard {
    /// Expert ids on this rank.
    pub experts: Range<usize>,
    /// Intermediate channels of each of them on this rank.
    pub channels: Range<usize>,
}

/// A model cannot be split this way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
pub enum ParallelError {
    #[error("rank {index} does not exist: there are {world} ranks")]
    RankOutOfRange { index: usize, world: usize },
    #[error("{n} {what} cannot be shared equally by {parts} ranks")]
    Indivisible { what: &'static str, n: usize, parts: usize },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_narrower_than_a_block_per_rank_is_placed_whole() {
        let config = ParallelConfig { tensor: 2, expert: 2 };
        let shard = config.rank(3).unwrap().expert_shard(8, 128).unwrap();
        assert_eq!(shard, ExpertShard { experts: 6..8, channels: 0..128 });
    }

    #[test]
    fn a_wide_expert_is_sliced_inside_its_group() {
        let config = ParallelConfig { tensor: 2, expert: 2 };
        let shard = config.rank(1).unwrap().expert_shard(8, 512).unwrap();
        assert_eq!(shard, ExpertShard { experts: 0..4, channels: 256..512 });
    }

    #[test]
    fn what_does_not_divide_is_refused_by_name() {
        let rank = ParallelConfig { tensor: 3, expert: 1 }.rank(0).unwrap();
        let error = rank.tensor_shard("output groups", 8).unwrap_err();
        assert_eq!(error.to_string(), "8 output groups cannot be shared equally by 3 ranks");
    }
}
