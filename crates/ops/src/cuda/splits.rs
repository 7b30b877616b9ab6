//! How attention's keys are divided among blocks, and who adds up their partial results.
//!
//! The rows of a step and the length of its longest sequence decide, never the load of the moment: a
//! recorded step divides as one launched kernel by kernel does.
//!
//! Not here: the launches (`attention`).

/// Key blocks of a split wherever the device is full anyway, and in deterministic mode.
const LONG: usize = 4;
/// Most splits of fewer: a head's partial results are added by one warp, one after the other.
const MOST: usize = 16;
/// Most key blocks of a split whose partial results a cluster adds up: what Pro chooses, and its window.
/// One long sequence among short ones is not to keep all of them waiting.
const LONGEST: usize = 18;
/// Blocks of the clusters that there are kernels for; alone a block has nothing to add up.
const CLUSTERS: [usize; 4] = [1, 2, 4, 8];

/// Times, in halves of what a block takes for 64 keys (0.7 us): a block's beginning and end, the exchange
/// of a cluster, the launch of `attn_merge` with its reading.
const BLOCK: usize = 2;
const EXCHANGE: usize = 1;
const LAUNCH: usize = 3;
/// What the split that ends last takes for its count, and heads times splits (2 KB each, through the second-level
/// cache at 64 bytes per cycle) that it reads in such a half.
const COUNT: usize = 1;
const HEAD_SPLITS: usize = 32;

/// Heads of a block of the kernel for every architecture.
const HEAD_TILES: [usize; 3] = [4, 8, HEAD_TILE];
pub(super) const HEAD_TILE: usize = 16;

/// Who adds up the splits of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Merge {
    /// Another launch.
    Launch,
    /// Of each tile of heads the split that ends last.
    Last,
    /// The splits themselves, blocks of a cluster of this size; the last ones may have no keys.
    Cluster(usize),
}

/// Key blocks of a split, and who adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Division {
    pub(super) split_blocks: usize,
    pub(super) merge: Merge,
}

impl Division {
    /// Splits, with those that have no keys.
    pub(super) fn n_splits(self, key_blocks: usize) -> usize {
        match self.merge {
            Merge::Launch | Merge::Last => key_blocks.div_ceil(self.split_blocks),
            Merge::Cluster(cluster) => cluster,
        }
    }

    /// Splits whose partial results go through memory.
    pub(super) fn n_partial(self, key_blocks: usize) -> usize {
        if self.merge == Merge::Cluster(1) { 0 } else { self.n_splits(key_blocks) }
    }
}

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

/// Blocks that run at once in clusters of `cluster`, which lie within one of that card's eight parts.
fn n_in_clusters(cluster: usize) -> usize {
    if cluster == 1 { n_resident("sm_90a") } else { 8 * (14 / cluster) * cluster }
}

/// Splits for `n_tiles` tiles (tokens times tiles of heads), each with up to `key_blocks`.
pub(super) fn divide(
    arch: &str,
    deterministic: bool,
    n_tiles: usize,
    key_blocks: usize,
) -> Division {
    match (arch, deterministic) {
        ("sm_90a", true) => by_length(n_tiles, key_blocks),
        ("sm_90a", false) => by_time(n_tiles, key_blocks),
        (_, true) => Division { split_blocks: LONG, merge: Merge::Launch },
        (_, false) => {
            let fits = |blocks: usize| {
                let n_splits = key_blocks.div_ceil(blocks);
                n_splits <= MOST && n_tiles * n_splits <= n_resident(arch)
            };
            let split_blocks = [1, 2].into_iter().find(|&blocks| fits(blocks)).unwrap_or(LONG);
            Division { split_blocks, merge: Merge::Launch }
        }
    }
}

/// [`divide`] of `n_heads` heads of `rows` tokens for the kernel of every architecture, and heads of a block. Smaller
/// tiles change no bit; they have more blocks share what is to be added up, as long as all of them run at once.
pub(super) fn divide_tiles(
    arch: &str,
    deterministic: bool,
    (rows, n_heads): (usize, usize),
    key_blocks: usize,
) -> (Division, usize) {
    let n_tiles = |tile: usize| rows * n_heads.div_ceil(tile);
    let division = divide(arch, deterministic, n_tiles(HEAD_TILE), key_blocks);
    let n_splits = division.n_splits(key_blocks);
    let runs_at_once = |&tile: &usize| n_tiles(tile) * n_splits <= n_resident(arch);
    // Of equals the fewer launches.
    let is_short = |&tile: &usize| COUNT + tile * n_splits / HEAD_SPLITS <= LAUNCH;
    match HEAD_TILES.into_iter().find(runs_at_once).filter(is_short) {
        Some(tile) => (Division { merge: Merge::Last, ..division }, tile),
        None => (division, HEAD_TILE),
    }
}

/// [`LONG`] splits, whose bits are the same whoever adds them up. Blocks without keys keep others out,
/// so there are some only where all run at once.
fn by_length(n_tiles: usize, key_blocks: usize) -> Division {
    let n_splits = key_blocks.div_ceil(LONG);
    let cluster = CLUSTERS.into_iter().find(|&cluster| cluster >= n_splits);
    let cluster = cluster
        .filter(|&cluster| cluster == n_splits || n_tiles * cluster <= n_in_clusters(cluster));
    Division { split_blocks: LONG, merge: cluster.map_or(Merge::Launch, Merge::Cluster) }
}

/// Whatever is predicted to take the shortest, and of equals the fewest launches and blocks. Partial
/// results of more than [`most_partial`] splits are only made where splits would else be too long.
fn by_time(n_tiles: usize, key_blocks: usize) -> Division {
    let resident = n_resident("sm_90a");
    let most = most_partial("sm_90a");
    // In thousandths; more blocks than run at once take turns.
    let time = |n_blocks: usize, at_once: usize, split: usize, merge: usize| {
        1000 * n_blocks.max(at_once) / at_once * (2 * split + BLOCK + merge)
    };
    let clusters = CLUSTERS.map(|cluster| (cluster, key_blocks.div_ceil(cluster)));
    let fewest = clusters.into_iter().find(|&(_, split)| split <= LONGEST);
    let clusters = clusters
        .into_iter()
        .filter(|&(cluster, split)| {
            let has_room = cluster == 1 || n_tiles * cluster <= most;
            split <= LONGEST && (has_room || fewest == Some((cluster, split)))
        })
        .map(|(cluster, split)| {
            let merge = if cluster == 1 { 0 } else { EXCHANGE };
            let time = time(n_tiles * cluster, n_in_clusters(cluster), split, merge);
            (time, Division { split_blocks: split, merge: Merge::Cluster(cluster) })
        });
    let launches = [1, 2, LONG].into_iter().filter_map(|split| {
        let n_splits = key_blocks.div_ceil(split);
        let is_allowed = if split == LONG {
            n_tiles * n_splits <= most || fewest.is_none()
        } else {
            n_tiles * n_splits <= resident && n_splits <= MOST
        };
        let time = time(n_tiles * n_splits, resident, split, 0) + 1000 * LAUNCH;
        let division = Division { split_blocks: split, merge: Merge::Launch };
        is_allowed.then_some((time, division))
    });
    let best = clusters.chain(launches).min_by_key(|&(time, _)| time);
    best.map_or(Division { split_blocks: LONG, merge: Merge::Launch }, |(_, division)| division)
}

/// Splits whose partial results are this many at most, over all tiles, unless more tiles have more.
pub(super) fn most_partial(arch: &str) -> usize {
    let turns = if arch == "sm_90a" { 2 } else { 1 };
    turns * n_resident(arch)
}

#[cfg(test)]
mod tests {
    use super::super::step::MAX_ENDED_HEADS;
    use super::*;

    fn form(division: Division) -> (usize, usize) {
        let cluster = match division.merge {
            Merge::Launch | Merge::Last => 0,
            Merge::Cluster(cluster) => cluster,
        };
        (division.split_blocks, cluster)
    }

    #[test]
    fn the_last_split_adds_up_where_that_takes_no_longer_than_a_launch() {
        let tiles = |rows: usize, key_blocks: usize| {
            let (division, tile) = divide_tiles("sm_80", false, (rows, 64), key_blocks);
            (division.split_blocks, (division.merge == Merge::Last).then_some(tile))
        };
        // Flash at 1K tokens and beyond.
        assert_eq!(
            [2, 3, 6, 10].map(|n| tiles(1, n)),
            [(1, Some(4)), (1, Some(4)), (1, Some(4)), (1, Some(8))]
        );
        assert_eq!(
            [2, 4, 8, 64].map(|n| tiles(n, 10)),
            [(1, None), (2, Some(16)), (LONG, Some(16)), (LONG, None)]
        );
        let (division, tile) = divide_tiles("sm_80", true, (1, 64), 10);
        assert_eq!((division.split_blocks, division.merge, tile), (LONG, Merge::Last, 4));
        // Tiles that count have a word each.
        for rows in 1..300 {
            let (division, tile) = divide_tiles("sm_120", false, (rows, 128), 2);
            let n_tiles = rows * 128_usize.div_ceil(tile);
            assert!(division.merge != Merge::Last || n_tiles <= MAX_ENDED_HEADS);
        }
    }

    #[test]
    fn few_tokens_fill_the_device_and_many_do_not_pay_for_it() {
        let sm_80 = |n_tiles: usize| divide("sm_80", false, n_tiles, 10);
        assert_eq!([1, 8, 16, 24, 256].map(|n| form(sm_80(n)).0), [1, 1, 2, 4, 4]);
        // Flash on sm_90a: one tile of heads, 128 keys of the window and 512 chosen.
        let flash = |n_tokens: usize| form(divide("sm_90a", false, n_tokens, 10));
        assert_eq!(
            [1, 8, 16, 32, 64, 256].map(flash),
            [(2, 8), (2, 8), (3, 4), (3, 4), (5, 2), (10, 1)]
        );
        // Pro: two tiles, 1,024 chosen.
        let pro = |n_tokens: usize| form(divide("sm_90a", false, 2 * n_tokens, 18));
        assert_eq!([1, 4, 8, 64].map(pro), [(3, 8), (3, 8), (5, 4), (18, 1)]);
        // The window alone, and with some entries of 128 tokens.
        let one = |key_blocks: usize| form(divide("sm_90a", false, 1, key_blocks));
        assert_eq!([1, 2, 3].map(one), [(1, 1), (1, 2), (1, 4)]);
    }

    #[test]
    fn long_contexts_of_few_tokens_have_more_splits_than_a_cluster() {
        // A million tokens, 128 to an entry.
        let long = |n_tiles: usize| form(divide("sm_90a", false, n_tiles, 130));
        assert_eq!([1, 4, 64].map(long), [(LONG, 0), (LONG, 0), (17, 8)]);
        assert_eq!(form(divide("sm_90a", false, 1000, 200)), (LONG, 0));
    }

    #[test]
    fn in_deterministic_mode_a_split_is_as_long_as_ever() {
        for n_tiles in [1, 24, 25, 1000] {
            for key_blocks in [1, 4, 5, 10, 32, 33, 130] {
                let (split, cluster) = form(divide("sm_90a", true, n_tiles, key_blocks));
                assert_eq!(split, LONG);
                assert!(cluster == 0 || cluster * LONG >= key_blocks, "{n_tiles} {key_blocks}");
            }
        }
        let flash = |n_tiles: usize| form(divide("sm_90a", true, n_tiles, 10)).1;
        assert_eq!([1, 24, 25].map(flash), [4, 4, 0]);
        assert_eq!(form(divide("sm_90a", true, 1000, 8)).1, 2);
    }

    #[test]
    fn fewer_tiles_need_no_more_partial_results_than_all_do() {
        for key_blocks in 1..200 {
            let mut most = most_partial("sm_90a");
            for n_tiles in 1..400 {
                let n_splits = divide("sm_90a", false, n_tiles, key_blocks).n_partial(key_blocks);
                assert!(n_tiles * n_splits <= most_partial("sm_90a") || n_tiles * n_splits >= most);
                most = most.max(n_tiles * n_splits);
            }
        }
    }
}
