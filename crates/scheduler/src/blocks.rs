//! KV blocks: who holds them, and which are free.
//!
//! A block is `BLOCK_TOKENS` consecutive cache positions of all layers. Here it is only a number
//! with a reference count. An unreferenced block is either *free* (content worthless) or *idle*
//! (content published in the prefix cache and kept until the memory is needed).
//!
//! Invariants:
//! - every block is referenced, idle or free, and only one of the three;
//! - idle blocks are taken least recently used first, and only when no block is free.
//!
//! Not here: what an idle block contains (`prefix_cache`), the bytes (the model's cache).

use crate::lru::LruList;

/// Reference counts of all KV blocks.
#[derive(Debug)]
pub(crate) struct BlockPool {
    references: Vec<u32>,
    free: Vec<u32>,
    idle: LruList,
}

/// A block that was just taken, and whether its old content was still published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) block: u32,
    pub(crate) was_idle: bool,
}

impl BlockPool {
    pub(crate) fn new(n_blocks: u32) -> Self {
        Self {
            references: vec![0; n_blocks as usize],
            // Low numbers first: a lightly used cache stays in few memory pages.
            free: (0..n_blocks).rev().collect(),
            idle: LruList::new(n_blocks),
        }
    }

    pub(crate) fn n_blocks(&self) -> u32 {
        self.references.len() as u32
    }

    /// Blocks that [`BlockPool::take`] could return.
    pub(crate) fn available(&self) -> u32 {
        self.free.len() as u32 + self.idle.len()
    }

    pub(crate) const fn n_idle(&self) -> u32 {
        self.idle.len()
    }

    pub(crate) fn is_idle(&self, block: u32) -> bool {
        self.idle.contains(block)
    }

    pub(crate) fn references(&self, block: u32) -> u32 {
        self.references[block as usize]
    }

    /// Takes a block for one holder.
    pub(crate) fn take(&mut self) -> Option<Taken> {
        let taken = match self.free.pop() {
            Some(block) => Taken { block, was_idle: false },
            None => Taken { block: self.idle.pop_oldest()?, was_idle: true },
        };
        self.references[taken.block as usize] = 1;
        Some(taken)
    }

    /// Adds a holder to a referenced or idle block.
    pub(crate) fn retain(&mut self, block: u32) {
        self.idle.remove(block);
        self.references[block as usize] += 1;
    }

    /// Removes a holder. The last one leaves the block idle if `keep`, else free.
    pub(crate) fn release(&mut self, block: u32, keep: bool) {
        let references = &mut self.references[block as usize];
        *references =
            references.checked_sub(1).expect("a block is released once per reference taken");
        if *references == 0 {
            if keep {
                self.idle.push_newest(block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// Gives up an idle block's content.
    pub(crate) fn forget(&mut self, block: u32) {
        if self.idle.contains(block) {
            self.idle.remove(block);
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_block_is_taken_only_when_none_is_free_and_the_oldest_goes_first() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<u32> = (0..3).map(|_| pool.take().unwrap().block).collect();
        assert_eq!(pool.take(), None);

        pool.release(blocks[1], true);
        pool.release(blocks[0], true);
        pool.release(blocks[2], false);
        assert_eq!(pool.available(), 3);

        assert_eq!(pool.take(), Some(Taken { block: blocks[2], was_idle: false }));
        assert_eq!(pool.take(), Some(Taken { block: blocks[1], was_idle: true }));
        assert_eq!(pool.take(), Some(Taken { block: blocks[0], was_idle: true }));
    }

    #[test]
    fn a_shared_block_is_free_only_after_its_last_holder() {
        let mut pool = BlockPool::new(1);
        let block = pool.take().unwrap().block;
        pool.retain(block);
        pool.release(block, false);
        assert_eq!((pool.references(block), pool.available()), (1, 0));
        pool.release(block, false);
        assert_eq!((pool.references(block), pool.available()), (0, 1));
    }

    #[test]
    #[should_panic(expected = "released once per reference")]
    fn releasing_a_free_block_is_a_bug() {
        BlockPool::new(1).release(0, false);
    }
}
