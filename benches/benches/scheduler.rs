//! Cost of deciding: plan and commit per step, with a null executor behind it.
//!
//! Run with `cargo bench -p fathom-benches --bench scheduler`; `-- --json` prints a line of JSON for
//! each row, which `scripts/bench/python_scheduler.py` reads. Times are CPU time of the thread, so
//! that other load on the machine counts as little as possible. Two workloads at 32, 256 and 1,024
//! running sequences and 64 waiting ones:
//!
//! - `decode`: every sequence decodes. Target p50: 10, 40 and 160 us, and no allocation.
//! - `mixed`: answers of 1 to 400 tokens, prompts of 1 to 3,000 tokens, a third of them shared, a
//!   budget of 8,192 tokens; whoever ends is replaced.
//!
//! Not here: finding cached prefixes (`prefix_cache`).

#![expect(clippy::print_stdout, reason = "a benchmark reports on standard output")]

use std::time::Duration;

use fathom_core::{RequestId, TokenId};
use fathom_scheduler::{
    Limits, Outcome, Scheduler, SchedulerConfig, SequenceSpec, StepPlan, blocks_for,
};
use rustix::time::{ClockId, clock_gettime};

const N_WAITING: u32 = 64;
const N_STEPS: usize = 3000;
const N_PREFIXES: u32 = 10_000;

struct Load {
    scheduler: Scheduler,
    plan: StepPlan,
    outcomes: Vec<Outcome>,
    next_id: u64,
    random: u64,
}

impl Load {
    fn new(n_running: u32, max_model_len: u32, queue_len: usize) -> Self {
        let config = SchedulerConfig {
            max_num_seqs: n_running,
            queue_len,
            isolate_users: false,
            ..SchedulerConfig::new(
                max_model_len,
                blocks_for(max_model_len) * n_running + N_PREFIXES,
                2 * n_running + N_PREFIXES,
            )
        };
        Self {
            scheduler: Scheduler::new(Limits::try_from(config).expect("the limits are consistent")),
            plan: StepPlan::default(),
            outcomes: Vec::new(),
            next_id: 0,
            random: 1,
        }
    }

    fn below(&mut self, limit: u32) -> u32 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (((self.random >> 32) * u64::from(limit)) >> 32) as u32
    }

    fn submit(&mut self, prompt: Vec<TokenId>, max_tokens: u32) {
        self.next_id += 1;
        let user = format!("user {}", self.next_id % 16);
        let spec = SequenceSpec {
            id: RequestId(self.next_id),
            prompt,
            max_tokens,
            priority: 0,
            user: Some(&user),
            cache_salt: None,
        };
        self.scheduler.submit(spec, Duration::ZERO).expect("the queue has room");
    }

    fn submit_random(&mut self) {
        let n_tokens = 1 + self.below(3000);
        let shared = self.below(3) == 0;
        let family = if shared { 1 } else { self.next_id as u32 };
        let prompt = (0..n_tokens).map(|i| i ^ (family << 12)).collect();
        let max_tokens = 1 + self.below(400);
        self.submit(prompt, max_tokens);
    }

    /// Plans and commits one step; every sampled token is as good as any other.
    fn step(&mut self) {
        self.scheduler.plan(Duration::ZERO, &mut self.plan);
        self.outcomes.clear();
        let wanted = self.plan.entries.iter().filter(|entry| entry.wants_logits);
        self.outcomes.extend(wanted.map(|entry| Outcome::token(entry.position)));
        if !self.plan.is_empty() {
            self.scheduler.commit(&self.plan, &self.outcomes);
        }
    }
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Sorted CPU times of `N_STEPS` steps; `between` runs unmeasured before each.
fn measure(load: &mut Load, mut between: impl FnMut(&mut Load)) -> Vec<Duration> {
    let mut times = Vec::with_capacity(N_STEPS);
    for _ in 0..N_STEPS {
        between(load);
        let start = cpu_time();
        load.step();
        times.push(cpu_time().saturating_sub(start));
    }
    times.sort_unstable();
    times
}

fn report(workload: &str, n_running: u32, times: &[Duration], extra: &str) {
    let micros = |part: usize| times[times.len() * part / 100].as_secs_f64() * 1e6;
    if std::env::args().any(|argument| argument == "--json") {
        println!(
            "{{\"workload\": \"{workload}\", \"running\": {n_running}, \"p50_us\": {:.3}, \
             \"p99_us\": {:.3}}}",
            micros(50),
            micros(99),
        );
        return;
    }
    let per_sequence = micros(50) * 1e3 / f64::from(n_running);
    println!(
        "{workload:8} {n_running:5} running  p50 {:8.2} us  p99 {:8.2} us  {per_sequence:6.1} ns \
         per sequence  {extra}",
        micros(50),
        micros(99),
    );
}

fn decode(n_running: u32, target_us: f64) {
    let max_model_len = 600 + 2 * N_STEPS as u32;
    let mut load = Load::new(n_running, max_model_len, 4096);
    for number in 0..n_running + N_WAITING {
        let prompt = (0..500).map(|i| i ^ (number << 12)).collect();
        load.submit(prompt, max_model_len);
    }
    while load.scheduler.stats().running < n_running
        || load.plan.entries.iter().any(|entry| entry.n_tokens > 1)
    {
        load.step();
    }
    let times = measure(&mut load, |_| {});
    // A block's worth of steps: each sequence takes a block, publishes one and keeps a snapshot.
    let counted = allocation_counter::measure(|| (0..256).for_each(|_| load.step()));
    let p50 = times[times.len() / 2].as_secs_f64() * 1e6;
    let extra = format!(
        "{:.2} of the target of {target_us} us, {} allocations in 256 steps",
        p50 / target_us,
        counted.count_total
    );
    report("decode", n_running, &times, &extra);
}

fn mixed(n_running: u32) {
    let mut load = Load::new(n_running, 4096, 1 << 20);
    let mut ended = Vec::new();
    let mut refill = move |load: &mut Load| {
        while load.scheduler.len() < (n_running + N_WAITING) as usize {
            load.submit_random();
        }
        load.scheduler.take_ended(&mut ended);
        ended.clear();
    };
    for _ in 0..1000 {
        refill(&mut load);
        load.step();
    }
    let times = measure(&mut load, refill);
    let stats = load.scheduler.stats();
    let cached = 100.0 * stats.cached_prompt_tokens as f64 / stats.prompt_tokens as f64;
    let extra = format!("{cached:.0} % of prompt tokens cached, {} preemptions", stats.preemptions);
    report("mixed", n_running, &times, &extra);
}

fn main() {
    for (n_running, target_us) in [(32, 10.0), (256, 40.0), (1024, 160.0)] {
        decode(n_running, target_us);
    }
    for n_running in [32, 256, 1024] {
        mixed(n_running);
    }
}
