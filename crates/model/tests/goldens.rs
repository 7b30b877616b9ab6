//! Every golden of the main files, in the three numeric modes, and of the long file.

use fathom_core::Numerics;

use crate::golden::compare::Checker;
use crate::golden::{check_mode, long};

fn has_no_findings(checker: &Checker) {
    assert!(checker.findings.is_empty(), "{}\n{checker}", checker.findings.join("\n"));
}

#[test]
fn f32_is_the_official_mathematics_in_every_golden_case() {
    has_no_findings(&check_mode(Numerics::F32));
}

#[test]
fn f32qat_keeps_its_tolerances_over_all_golden_cases() {
    has_no_findings(&check_mode(Numerics::F32Qat));
}

#[test]
fn bf16_keeps_its_tolerances_over_all_golden_cases() {
    has_no_findings(&check_mode(Numerics::Bf16));
}

#[test]
fn a_prompt_of_4173_tokens_and_what_follows_is_the_official_mathematics() {
    has_no_findings(&long::check_long_prompts());
}

#[test]
fn sequences_in_mixed_batches_get_the_values_each_has_alone_in_the_official_code() {
    has_no_findings(&long::check_batches());
}

#[test]
fn recurrent_drafts_are_the_official_ones_before_and_after_a_rejection() {
    has_no_findings(&long::check_drafts());
}
