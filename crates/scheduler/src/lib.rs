//! Decides what the next step runs: a pure state machine over token counts and block ids.
//!
//! [`Scheduler::plan`] fills a [`StepPlan`]; whoever executed it reports the sampled tokens to
//! [`Scheduler::commit`]. There is no clock, no IO and no tensor here: time is a parameter, and the
//! same calls give the same plans.
//!
//! - [`budget`]: limits; [`plan`]: what a step is; [`sequence`]: what is scheduled;
//! - `queue`: priorities and fairness between users; `admit`, `preempt`: who runs;
//! - `blocks`, `snapshots`, `keys`, [`prefix_cache`], [`lower`]: KV memory and its reuse.

mod admit;
mod audit;
mod blocks;
pub mod budget;
pub mod commit;
mod keys;
pub mod lower;
mod lru;
pub mod plan;
mod preempt;
pub mod prefix_cache;
mod queue;
pub mod scheduler;
pub mod sequence;
mod snapshots;

pub use budget::{ConfigError, Limits, SchedulerConfig};
pub use commit::{Outcome, Outcomes};
pub use keys::BlockKey;
pub use lower::{Load, LoadId, LoadItem, Save, SaveReason, StateKey, StateKind};
pub use plan::{Capture, PlanEntry, Restore, StepPlan, Work};
pub use prefix_cache::CacheStats;
pub use scheduler::{Ended, RefuseError, Scheduler, SchedulerStats};
pub use sequence::{End, Phase, Sequence, SequenceIndex, SequenceSpec};

/// Tokens of one KV block. Snapshots are taken at multiples of it.
pub const BLOCK_TOKENS: u32 = 256;

/// Blocks that hold `n_tokens` tokens.
#[must_use]
pub const fn blocks_for(n_tokens: u32) -> u32 {
    n_tokens.div_ceil(BLOCK_TOKENS)
}
