//! Bugs that other engines shipped with this cache, and the tests that hold them off.
//!
//! Cache specification, section 7 (`crate::module::test`, this file where nothing else is said):
//!
//! | other engines' bug | test |
//! |---|---|
//! | garbage after a hit of another request: window outside the cache | `fathom-model::invariance::a_snapshot_resumes_as_if_nothing_had_happened`, `fathom-engine::nano::*_tokens_do_not_depend_on_batch_chunks_cache_hits_or_preemption` |
//! | another request's data: a block shared before it was full | `prefix_reuse::prompts_that_diverge_inside_a_block_do_not_share_it`, `interleavings::tokens_never_depend_on_what_else_runs` |
//! | no hit ever: what is kept and what is looked up disagree | `every_prompt_longer_than_a_block_is_found_when_it_is_sent_again` |
//! | no hit below some thousands of tokens: alignment to huge blocks | the same |
//! | no hit of prompts sent again: first keys lost when blocks are reassigned | `a_prompt_whose_blocks_were_reassigned_is_found_again_after_it_was_computed_again` |
//! | wrong from the 4th token on: compressor without the true length | `fathom-model::invariance::logits_do_not_depend_on_the_chunks_a_prompt_comes_in` (chunks of 1 to 5) |
//! | decode differs from prefill | the same, chunks of 1 |
//! | read after write between two kernels | CUDA only: `fathom-ops::emulator` checks each kernel; launches of one stream are ordered, and nothing overlaps them yet |
//! | stale overlap in a reused slot | `fathom-model::invariance::a_slot_used_by_a_long_sequence_shows_nothing_of_it_to_a_short_one` |
//! | small pools rejected: reserves counted at full length | `a_pool_for_one_long_sequence_runs_many_short_ones_at_once` |
//!
//! Section 9, required tests:
//!
//! | requirement | test |
//! |---|---|
//! | 1 random chunkings, same rows, keys and windows | `fathom-model::rules::entries_and_keys_do_not_depend_on_the_chunks_they_were_compressed_in`, `fathom-model::invariance::logits_do_not_depend_on_the_chunks_a_prompt_comes_in` |
//! | 2 snapshot and resume at 128, 256, 384, 4096 + 128 | `fathom-model::invariance::a_snapshot_resumes_as_if_nothing_had_happened` and `..::a_snapshot_beyond_4096_tokens_resumes_too` |
//! | 3 requests that diverge inside a block do not share it | `prefix_reuse::prompts_that_diverge_inside_a_block_do_not_share_it` |
//! | 4 slot reuse with prompts of 1 to 5 tokens | `fathom-model::invariance::a_slot_used_by_a_long_sequence_shows_nothing_of_it_to_a_short_one` |
//! | 5 rejection around multiples of 4 and 128 | `fathom-model::invariance::tokens_taken_back_leave_no_trace` |
//! | 6 page format against a reference packer | `fathom-ops::cache_page::tests::a_packed_page_is_the_reference_page_for_every_block_and_window_size` and its neighbours |

use fathom_scheduler::{BLOCK_TOKENS, SchedulerConfig};

use crate::model_engine::{Engine, Request, prompt};

#[test]
fn every_prompt_longer_than_a_block_is_found_when_it_is_sent_again() {
    let n_blocks = 64;
    for n_tokens in [257, 300, 511, 513, 1000, 4095, 4096, 4097, 8191, 16_000] {
        let mut engine = Engine::new(SchedulerConfig {
            max_num_batched_tokens: 2048,
            max_num_seqs: 4,
            ..SchedulerConfig::new(n_blocks * BLOCK_TOKENS, n_blocks, 16)
        });
        for expected in [0, (n_tokens - 1) / BLOCK_TOKENS * BLOCK_TOKENS] {
            let id = engine.submit(Request::new(prompt(1, n_tokens), 2));
            engine.finish();
            assert_eq!(engine.usage(id).cached_tokens, expected, "prompt of {n_tokens}");
        }
    }
}

#[test]
fn a_prompt_whose_blocks_were_reassigned_is_found_again_after_it_was_computed_again() {
    let mut engine = Engine::new(SchedulerConfig {
        max_num_batched_tokens: 2048,
        max_num_seqs: 2,
        ..SchedulerConfig::new(6 * BLOCK_TOKENS, 6, 6)
    });
    let mut cached = |family| {
        let id = engine.submit(Request::new(prompt(family, 1200), 2));
        engine.finish();
        engine.check_answers();
        engine.usage(id).cached_tokens
    };
    for round in 0..4 {
        // Five blocks each, of six: the one takes the other's, in another order every time.
        assert_eq!((cached(1), cached(1)), (0, 1024), "round {round}");
        assert_eq!((cached(2), cached(2)), (0, 1024), "round {round}");
    }
}

#[test]
fn a_pool_for_one_long_sequence_runs_many_short_ones_at_once() {
    let n_blocks = 12;
    let mut engine = Engine::new(SchedulerConfig {
        max_num_seqs: 10,
        ..SchedulerConfig::new(n_blocks * BLOCK_TOKENS, n_blocks, 2)
    });
    // Each may ask for as many tokens as the whole pool holds; none is given more than it fills.
    for family in 0..10 {
        engine.submit(Request::new(prompt(family, 20), n_blocks * BLOCK_TOKENS - 20));
    }
    assert!(engine.plan());
    assert_eq!(engine.plan.entries.len(), 10);
    engine.run();
    assert_eq!(engine.scheduler.stats().blocks_used, 10);
    engine.finish();
    engine.check_answers();
    engine.check_nothing_held();
}
