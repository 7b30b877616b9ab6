//! Metrics of speculative decoding: guesses run and accepted, by their position in a step.
//!
//! Not here: what is counted ([`fathom_engine::stats::DraftCounts`]).

use fathom_engine::EngineStats;
use fathom_engine::stats::DraftCounts;

use super::Page;
use crate::registry::ModelEntry;

type OfPosition = fn(&DraftCounts, usize) -> u64;

/// Families with one sample per position: name, help, value.
const PER_POSITION: [(&str, &str, OfPosition); 2] = [
    (
        "fathom_spec_decode_draft_tokens_total",
        "Draft tokens run, by position among the drafts of a step.",
        |drafts, position| drafts.drafted[position],
    ),
    (
        "fathom_spec_decode_accepted_tokens_total",
        "Draft tokens accepted, by position among the drafts of a step.",
        |drafts, position| drafts.accepted[position],
    ),
];

/// Renders the families. Positions that no draft has reached have no sample.
pub(super) fn render(page: &mut Page, engines: &[(&ModelEntry, EngineStats)]) {
    let name = "fathom_spec_decode_drafts_total";
    page.family(name, "counter", "Times a sequence ran drafts in a step.");
    for (entry, stats) in engines {
        page.sample(name, &[("model", entry.canonical_id())], stats.drafts.drafts);
    }
    for (name, help, of) in PER_POSITION {
        page.family(name, "counter", help);
        for (entry, stats) in engines {
            let reached = stats.drafts.drafted.iter().take_while(|&&count| count > 0).count();
            for position in 0..reached.max(1) {
                let label = position.to_string();
                let labels = [("model", entry.canonical_id()), ("position", &label)];
                page.sample(name, &labels, of(&stats.drafts, position));
            }
        }
    }
}
