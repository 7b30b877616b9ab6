//! Metrics of what went wrong in an engine, by reason.
//!
//! Not here: requests that were refused before an engine saw them, which are counted by status.

use fathom_engine::EngineStats;
use fathom_engine::stats::EndCounts;

use super::Page;
use crate::registry::ModelEntry;

type Count = fn(&EndCounts) -> u64;

/// Reasons, by what they are called in the label.
const REASONS: [(&str, Count); 5] = [
    ("non_finite_logits", |ended| ended.non_finite_logits),
    ("queue_timeout", |ended| ended.queue_timeout),
    ("constraint", |ended| ended.constraint),
    ("step_failed", |ended| ended.step_failed),
    ("shutdown", |ended| ended.shutdown),
];

pub(super) fn render(page: &mut Page, engines: &[(&ModelEntry, EngineStats)]) {
    const FAILED: &str = "fathom_failed_generations_total";
    page.family(FAILED, "counter", "Accepted generations that could not be completed.");
    for (entry, stats) in engines {
        for (reason, of) in REASONS {
            let labels = [("model", entry.canonical_id()), ("reason", reason)];
            page.sample(FAILED, &labels, of(&stats.ended));
        }
    }
    const STEPS: &str = "fathom_failed_steps_total";
    page.family(STEPS, "counter", "Steps that failed or panicked.");
    for (entry, stats) in engines {
        page.sample(STEPS, &[("model", entry.canonical_id())], stats.failed_steps);
    }
}
