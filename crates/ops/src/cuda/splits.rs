//! How attention's keys are divided among blocks.
//!
//! The rows of a step and the length of its longest sequence decide, never the load of the moment: a
//! recorded step divides as one launched kernel by kernel does.
//!
//! Not here: the launches (`attention`).

/// Key blocks of a split wherever the device is full anyway, and in deterministic mode.
const LONG: usize = 4;
/// Most splits of fewer: a head's partial results are added by one warp, one after the other.
const MOST: usize = 16;

/// Blocks that run at once: multiprocessors of the smallest card of an architecture that the released
/// models run on, times the blocks of a multiprocessor.
fn n_resident(arch: &str) -> usize {
    match arch {
        "sm_90a" => 114,
        "sm_100f" => 148,
        // 88 KB of shared memory: one block, two where there are 164 KB and more.
        "sm_80" => 108,
        _ => 128,
    }
}

/// Key blocks per split for `n_tiles` tiles (tokens times tiles of heads), each with up to
/// `key_blocks`: the fewest with which all splits still run at once.
pub(super) fn blocks_per_split(
    arch: &str,
    deterministic: bool,
    n_tiles: usize,
    key_blocks: usize,
) -> usize {
    let fits = |blocks: usize| {
        let n_splits = key_blocks.div_ceil(blocks);
        n_splits <= MOST && n_tiles * n_splits <= n_resident(arch)
    };
    if deterministic {
        return LONG;
    }
    [1, 2].into_iter().find(|&blocks| fits(blocks)).unwrap_or(LONG)
}

/// Splits that are more than [`LONG`] ones would be are this many at most, over all tiles.
pub(super) fn most_short_splits(arch: &str) -> usize {
    n_resident(arch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tokens_fill_the_device_and_many_do_not_pay_for_it() {
        // Flash on sm_90a: one tile of heads, 128 keys of the window and 512 chosen.
        let flash = |n_tokens: usize| blocks_per_split("sm_90a", false, n_tokens, 10);
        assert_eq!([1, 8, 16, 24, 256].map(flash), [1, 1, 2, 4, 4]);
        // Pro: two tiles, 1,024 chosen.
        let pro = |n_tokens: usize| blocks_per_split("sm_90a", false, 2 * n_tokens, 18);
        assert_eq!([1, 2, 4, 8].map(pro), [2, 2, 2, 4]);
        // A million tokens, 128 to an entry.
        assert_eq!(blocks_per_split("sm_90a", false, 1, 130), LONG);
        assert_eq!(blocks_per_split("sm_90a", true, 1, 10), LONG);
    }
}
