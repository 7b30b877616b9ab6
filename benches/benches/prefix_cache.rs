//! Cost of finding a cached prefix, beside 10,000 others.
//!
//! Run with `cargo bench -p fathom-benches --bench prefix_cache`. Measured is the CPU time of the
//! `plan` that starts a request: key derivation, look-up, taking blocks. Targets: 40 us at 32K
//! tokens, and at 1M tokens 1 ms or half the speed of hashing the same bytes in the same run.
//!
//! - `device`: everything is in the device's pools, and the request starts;
//! - `lower`: everything is in a lower tier, and a load of all of it is planned;
//! - `last`: as `device`, but the last of the blocks is another one;
//! - `first`: as `device`, but the first block is another one: nothing is found.

#![expect(clippy::print_stdout, reason = "a benchmark reports on standard output")]

use std::time::Duration;

use fathom_core::{RequestId, TokenId};
use fathom_scheduler::{
    BLOCK_TOKENS, Limits, Outcome, Save, Scheduler, SchedulerConfig, SequenceSpec, StateKey,
    StepPlan, blocks_for,
};
use rustix::time::{ClockId, clock_gettime};
use xxhash_rust::xxh3::xxh3_128;

const N_PREFIXES: u32 = 10_000;
const N_ROUNDS: usize = 50;

struct Cache {
    scheduler: Scheduler,
    plan: StepPlan,
    next_id: u64,
}

impl Cache {
    fn new(max_model_len: u32) -> Self {
        let (n_blocks, n_snapshots) =
            (2 * blocks_for(max_model_len) + N_PREFIXES, N_PREFIXES + 600);
        let config = SchedulerConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 1 << 20,
            queue_len: 1 << 20,
            lower_tiers: true,
            ..SchedulerConfig::new(max_model_len, n_blocks, n_snapshots)
        };
        let limits = Limits::try_from(config).expect("the limits are consistent");
        Self { scheduler: Scheduler::new(limits), plan: StepPlan::default(), next_id: 0 }
    }

    fn submit(&mut self, prompt: Vec<TokenId>) -> RequestId {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        let spec =
            SequenceSpec { id, prompt, max_tokens: 1, priority: 0, user: None, cache_salt: None };
        self.scheduler.submit(spec, Duration::ZERO).expect("the queue has room");
        id
    }

    /// CPU time of planning.
    fn plan(&mut self) -> Duration {
        let start = cpu_time();
        self.scheduler.plan(Duration::ZERO, &mut self.plan);
        cpu_time().saturating_sub(start)
    }

    fn commit(&mut self) {
        let wanted = self.plan.entries.iter().filter(|entry| entry.wants_logits).count();
        self.scheduler.commit(&self.plan, &vec![Outcome::token(0); wanted]);
    }

    /// Runs `prompt` and others of one block and one snapshot each; returns what a lower tier was
    /// offered.
    fn fill(&mut self, prompt: &[TokenId]) -> Vec<Save> {
        for number in 1..=N_PREFIXES {
            self.submit((0..300).map(|i| i ^ (number << 12)).collect());
        }
        let mut saves = self.finish();
        self.submit(prompt.to_vec());
        saves.extend(self.finish());
        saves
    }

    /// Runs everything to its end; returns what a lower tier was offered.
    fn finish(&mut self) -> Vec<Save> {
        while !self.scheduler.is_empty() {
            self.plan();
            self.commit();
        }
        let mut saves = Vec::new();
        self.scheduler.take_saves(&mut saves);
        saves
    }
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// Times of starting `cached`, after `change` of its copy, while it and others are on the device;
/// and blocks shared.
fn on_device(cached: &[TokenId], change: impl Fn(&mut [TokenId], u32)) -> (f64, u32) {
    let mut cache = Cache::new(1 << 20);
    cache.fill(cached);
    let (mut times, mut shared) = (Vec::new(), 0);
    for round in 1..=N_ROUNDS as u32 {
        let mut prompt = cached.to_vec();
        change(&mut prompt, round);
        cache.submit(prompt);
        times.push(cache.plan());
        shared = cache.plan.entries[0].position / BLOCK_TOKENS;
        cache.commit();
        cache.finish();
    }
    (median(times), shared)
}

/// Times of starting `prompt` while it and others are in a lower tier, and blocks to load.
fn below(prompt: &[TokenId]) -> (f64, u32) {
    let mut cache = Cache::new(1 << 20);
    let states: Vec<StateKey> = cache.fill(prompt).iter().map(|save| save.state).collect();
    let mut cache = Cache::new(1 << 20);
    states.iter().for_each(|&state| cache.scheduler.set_lower(state, true));
    let (mut times, mut loaded) = (Vec::new(), 0);
    for _ in 0..N_ROUNDS {
        let id = cache.submit(prompt.to_vec());
        times.push(cache.plan());
        let load = &cache.plan.loads[0];
        loaded = load.items.len() as u32 - 1;
        cache.scheduler.finish_load(load.id, &vec![false; load.items.len()]);
        cache.scheduler.cancel(id);
    }
    (median(times), loaded)
}

/// Time of hashing the bytes of `tokens` at once.
fn hashing(tokens: &[TokenId]) -> f64 {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let times = (0..N_ROUNDS).map(|_| {
        let start = cpu_time();
        std::hint::black_box(xxh3_128(std::hint::black_box(&bytes)));
        cpu_time().saturating_sub(start)
    });
    median(times.collect())
}

fn main() {
    for (n_tokens, target_us) in [(32 << 10, 40.0), ((1 << 20) - 300, 1000.0)] {
        let prompt: Vec<TokenId> = (0..n_tokens).collect();
        let n_blocks = (n_tokens - 1) / BLOCK_TOKENS;
        let end = (n_blocks * BLOCK_TOKENS) as usize;
        let hashing = hashing(&prompt);
        println!("hashing {n_tokens:8} tokens  p50 {hashing:8.2} us");
        for (name, (time, found)) in [
            ("device", on_device(&prompt, |_, _| {})),
            ("lower", below(&prompt)),
            ("last", on_device(&prompt, |prompt, round| prompt[end - 1] ^= round)),
            ("first", on_device(&prompt, |prompt, round| prompt[0] ^= round)),
        ] {
            println!(
                "{name:7} {n_tokens:8} tokens  p50 {time:8.2} us, {:.2} of the target of {target_us} \
                 us, {:.2} of the speed of hashing, {found} of {n_blocks} blocks",
                time / target_us,
                hashing / time
            );
        }
    }
}
