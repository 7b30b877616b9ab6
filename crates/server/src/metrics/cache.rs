//! Metrics of the prefix cache: why look-ups missed, and what its lower tiers hold and do.
//!
//! Not here: KV memory itself, which the parent module renders with the engine's other gauges.

use fathom_engine::EngineStats;
use fathom_engine::stats::{CacheCounts, TierCounts};

use super::Page;
use crate::registry::ModelEntry;

type OfCache = fn(&CacheCounts) -> u64;
type OfTiers = fn(&TierCounts) -> u64;

/// Results of a look-up, by what they are called in the label.
const RESULTS: [(&str, OfCache); 6] = [
    ("hit", |cache| cache.hits),
    ("short", |cache| cache.miss_short),
    ("no_block", |cache| cache.miss_no_block),
    ("evicted", |cache| cache.miss_evicted),
    ("salt", |cache| cache.miss_salt),
    ("no_snapshot", |cache| cache.miss_no_snapshot),
];

/// Families with one sample per lower tier: name, kind, help, of host memory, of the disk.
const PER_TIER: [(&str, &str, &str, OfTiers, OfTiers); 4] = [
    (
        "fathom_cache_tier_items",
        "gauge",
        "KV blocks and snapshots in a lower tier.",
        |tiers| tiers.host_items,
        |tiers| tiers.disk_items,
    ),
    (
        "fathom_cache_tier_bytes",
        "gauge",
        "Bytes of a lower tier.",
        |tiers| tiers.host_bytes,
        |tiers| tiers.disk_bytes,
    ),
    (
        "fathom_cache_tier_hits_total",
        "counter",
        "Items wanted from a tier and found.",
        |tiers| tiers.host_hits,
        |tiers| tiers.disk_hits,
    ),
    (
        "fathom_cache_tier_misses_total",
        "counter",
        "Items wanted from a tier and not found.",
        |tiers| tiers.host_misses,
        |tiers| tiers.disk_misses,
    ),
];

/// Families with one sample: name, help, value.
const COUNTERS: [(&str, &str, OfTiers); 6] = [
    ("fathom_cache_loads_total", "Prefixes brought back from lower tiers.", |tiers| tiers.loads),
    ("fathom_cache_disk_read_bytes_total", "Bytes read from the cache directory.", |tiers| {
        tiers.disk_read_bytes
    }),
    ("fathom_cache_disk_written_bytes_total", "Bytes written to the cache directory.", |tiers| {
        tiers.disk_written_bytes
    }),
    ("fathom_cache_disk_dropped_total", "Items not written: the disk was too slow.", |tiers| {
        tiers.disk_dropped
    }),
    ("fathom_cache_disk_write_errors_total", "Writes that failed.", |tiers| {
        tiers.disk_write_errors
    }),
    ("fathom_cache_disk_damaged_total", "Files of the cache that could not be used.", |tiers| {
        tiers.disk_damaged
    }),
];

pub(super) fn render(page: &mut Page, engines: &[(&ModelEntry, EngineStats)]) {
    const LOOKUPS: &str = "fathom_prefix_cache_lookups_total";
    page.family(LOOKUPS, "counter", "Look-ups of starting sequences, by what came of them.");
    for (entry, stats) in engines {
        for (result, of) in RESULTS {
            let labels = [("model", entry.canonical_id()), ("result", result)];
            page.sample(LOOKUPS, &labels, of(&stats.cache));
        }
    }
    for (name, kind, help, host, disk) in PER_TIER {
        page.family(name, kind, help);
        for (entry, stats) in engines {
            for (tier, of) in [("host", host), ("disk", disk)] {
                let labels = [("model", entry.canonical_id()), ("tier", tier)];
                page.sample(name, &labels, of(&stats.tiers));
            }
        }
    }
    for (name, help, of) in COUNTERS {
        page.family(name, "counter", help);
        for (entry, stats) in engines {
            page.sample(name, &[("model", entry.canonical_id())], of(&stats.tiers));
        }
    }
}
