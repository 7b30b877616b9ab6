//! What the engine counts, in plain structs; rendering them is the server's business.

use std::time::Duration;

use crate::speculate::MAX_DRAFTS;

/// A cumulative histogram with fixed upper bounds, as Prometheus wants it.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One per bound, plus one for everything above the last; not cumulative.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// An empty histogram whose buckets end at `bounds` (ascending).
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// Counts one value.
    pub fn observe(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }

    /// Pairs of (upper bound, values at or below it), without the last bucket, whose bound is
    /// infinite and whose count is [`Histogram::count`].
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let mut total = 0;
        self.bounds.iter().zip(&self.counts).map(move |(&bound, &count)| {
            total += count;
            (bound, total)
        })
    }

    /// Number of values counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of the values counted.
    #[must_use]
    pub const fn sum(&self) -> f64 {
        self.sum
    }
}

/// A count per phase of a request's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PhaseCounts {
    /// Not started yet.
    pub queued: u64,
    /// Running its prompt.
    pub prefill: u64,
    /// Producing tokens.
    pub decode: u64,
}

/// Why requests ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EndCounts {
    /// By the end-of-sequence token or one of the request's stop tokens.
    pub stop: u64,
    /// By `max_tokens` or a full context.
    pub length: u64,
    /// By the client, by phase.
    pub cancelled: PhaseCounts,
    /// After waiting too long in the queue.
    pub queue_timeout: u64,
    /// Because of NaN or infinite logits.
    pub non_finite_logits: u64,
    /// Because of their constraint.
    pub constraint: u64,
    /// Because their step failed or panicked.
    pub step_failed: u64,
    /// Because the engine shut down.
    pub shutdown: u64,
}

/// KV memory, in the scheduler's units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvUsage {
    /// KV blocks there are.
    pub blocks_total: u64,
    /// Held by running sequences.
    pub blocks_used: u64,
    /// Held by nobody, kept for reuse.
    pub blocks_cached: u64,
    /// State snapshots there are.
    pub snapshots_total: u64,
    /// Snapshots that hold something.
    pub snapshots_used: u64,
}

/// What prefix-cache look-ups found. `lookups` is `hits` plus all misses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheCounts {
    /// Sequences started or resumed with the cache on.
    pub lookups: u64,
    /// Look-ups that skipped at least one block.
    pub hits: u64,
    /// Tokens skipped, also those of resumed sequences.
    pub hit_tokens: u64,
    /// Misses: too short to hold a reusable block.
    pub miss_short: u64,
    /// Misses: the first block was never seen.
    pub miss_no_block: u64,
    /// Misses: the first block was there until it was evicted.
    pub miss_evicted: u64,
    /// Misses: the first block is there under another salt or user.
    pub miss_salt: u64,
    /// Misses: blocks are there, but no state snapshot at the end of any of them.
    pub miss_no_snapshot: u64,
}

/// Lower tiers of the prefix cache. An item is a KV block or a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierCounts {
    /// Prefixes brought back, or tried to.
    pub loads: u64,
    /// Gauge: items in host memory.
    pub host_items: u64,
    /// Gauge: their bytes.
    pub host_bytes: u64,
    /// Items wanted and found in host memory.
    pub host_hits: u64,
    /// Items wanted and not found there.
    pub host_misses: u64,
    /// Gauge: items on disk, those of other models included.
    pub disk_items: u64,
    /// Gauge: bytes of their files.
    pub disk_bytes: u64,
    /// Items read from disk.
    pub disk_hits: u64,
    /// Items wanted from disk that turned out to be damaged or gone.
    pub disk_misses: u64,
    /// Files that were not usable.
    pub disk_damaged: u64,
    /// Bytes of state written.
    pub disk_written_bytes: u64,
    /// Bytes of state read.
    pub disk_read_bytes: u64,
    /// Items not written because the disk did not keep up.
    pub disk_dropped: u64,
    /// Writes that failed.
    pub disk_write_errors: u64,
}

/// Speculative decoding; arrays are by position among the drafts of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DraftCounts {
    /// Times a sequence ran drafts in a step.
    pub drafts: u64,
    /// Draft tokens run.
    pub drafted: [u64; MAX_DRAFTS],
    /// Those of them that were accepted.
    pub accepted: [u64; MAX_DRAFTS],
}

/// Counters since start, and gauges as of the last step.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineStats {
    /// Gauge: sequences that hold a slot.
    pub requests_running: u64,
    /// Gauge: accepted requests without a slot, preempted ones included.
    pub requests_waiting: u64,
    /// Gauge: those of the waiting ones that ran before.
    pub requests_preempted: u64,
    /// Requests accepted.
    pub requests_accepted: u64,
    /// Why requests ended.
    pub ended: EndCounts,
    /// Times a running sequence lost its KV blocks to another.
    pub preemptions: u64,
    /// Prompt tokens of started requests.
    pub prompt_tokens: u64,
    /// Those of the prompt tokens that came from the prefix cache.
    pub cached_prompt_tokens: u64,
    /// Tokens sampled.
    pub completion_tokens: u64,
    /// Speculative decoding.
    pub drafts: DraftCounts,
    /// Gauges of KV memory.
    pub kv: KvUsage,
    /// Prefix-cache look-ups.
    pub cache: CacheCounts,
    /// Its lower tiers.
    pub tiers: TierCounts,
    /// Steps that failed or panicked.
    pub failed_steps: u64,
    /// Seconds per step, from plan to events.
    pub step_seconds: Histogram,
    /// Seconds of it inside the model.
    pub model_seconds: Histogram,
    /// Prefill tokens per step that had any.
    pub prefill_tokens: Histogram,
    /// Decode tokens per step that had any.
    pub decode_tokens: Histogram,
    /// Sequences in prefill per step that had any.
    pub prefill_requests: Histogram,
    /// Sequences in decode per step that had any.
    pub decode_requests: Histogram,
}

const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
const TOKENS: &[f64] =
    &[1.0, 8.0, 32.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0];
const REQUESTS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];

impl Default for EngineStats {
    fn default() -> Self {
        Self {
            requests_running: 0,
            requests_waiting: 0,
            requests_preempted: 0,
            requests_accepted: 0,
            ended: EndCounts::default(),
            preemptions: 0,
            prompt_tokens: 0,
            cached_prompt_tokens: 0,
            completion_tokens: 0,
            drafts: DraftCounts::default(),
            kv: KvUsage::default(),
            cache: CacheCounts::default(),
            tiers: TierCounts::default(),
            failed_steps: 0,
            step_seconds: Histogram::new(SECONDS),
            model_seconds: Histogram::new(SECONDS),
            prefill_tokens: Histogram::new(TOKENS),
            decode_tokens: Histogram::new(TOKENS),
            prefill_requests: Histogram::new(REQUESTS),
            decode_requests: Histogram::new(REQUESTS),
        }
    }
}

impl EngineStats {
    /// Counts the duration of one step and of the model's part in it.
    pub(crate) fn observe_step(&mut self, step: Duration, model: Duration) {
        self.step_seconds.observe(step.as_secs_f64());
        self.model_seconds.observe(model.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_belongs_to_the_bucket_that_ends_there() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 2.0, 3.0] {
            histogram.observe(value);
        }
        assert_eq!(histogram.cumulative().collect::<Vec<_>>(), [(1.0, 2), (2.0, 4)]);
        assert_eq!((histogram.count(), histogram.sum()), (5, 8.0));
    }
}
