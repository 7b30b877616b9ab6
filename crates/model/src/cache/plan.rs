//! How many tokens and sequences a byte budget holds.
//!
//! A sequence costs one slot (window rings and compressor state, whatever its length) and one
//! block per 256 tokens or part of them. Slots are allocated for every sequence that may run, and
//! what the budget leaves becomes blocks.
//!
//! Not here: which block belongs to whom (`fathom-scheduler`).

use std::fmt;

use fathom_core::LayerKind;
use fathom_ops::{BLOCK_TOKENS, CacheSpec, RowFormats};

/// What a cache must hold.
#[derive(Debug, Clone)]
pub struct CacheRequest {
    /// Kind of every layer with a cache: main layers, then MTP blocks.
    pub layers: Vec<LayerKind>,
    /// How rows are stored.
    pub formats: RowFormats,
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_model_len: usize,
    /// Sequences that may hold state at once.
    pub max_num_seqs: usize,
    /// Draft tokens that may be rejected in one step; 0 without speculation.
    pub spare_rows: usize,
    /// Width of the copies kept for an MTP block that drafts, the last of `layers`; 0 without one.
    pub draft_width: usize,
    /// Bytes the stores may take; `None` for as many as every sequence at full length needs.
    pub budget_bytes: Option<u64>,
}

/// A cache that fits its budget: having one is the proof.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    spec: CacheSpec,
    max_model_len: usize,
    budget_bytes: Option<u64>,
}

/// No cache can be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages document the variants")]
pub enum PlanError {
    #[error("{what} is 0, expected at least 1")]
    Zero { what: &'static str },
    #[error(
        "a cache for {max_num_seqs} sequences needs {needed_bytes} bytes before the first token, \
         the budget is {budget_bytes}: lower max_num_seqs to at most {fitting_seqs}"
    )]
    NoRoomForSlots {
        max_num_seqs: usize,
        needed_bytes: u64,
        budget_bytes: u64,
        fitting_seqs: usize,
    },
    #[error(
        "one sequence of {max_model_len} tokens beside the state of {max_num_seqs} sequences \
         needs {needed_bytes} bytes of cache, the budget is {budget_bytes}: lower max_model_len \
         to at most {fitting_len}, or raise the budget"
    )]
    NoRoomForOne {
        max_model_len: usize,
        max_num_seqs: usize,
        needed_bytes: u64,
        budget_bytes: u64,
        fitting_len: usize,
    },
}

impl MemoryPlan {
    /// Plans the largest useful cache inside the budget.
    ///
    /// # Errors
    /// [`PlanError::NoRoomForSlots`] or [`PlanError::NoRoomForOne`] if one sequence of full length
    /// beside all slots does not fit; both say what would.
    pub fn new(request: CacheRequest) -> Result<Self, PlanError> {
        let CacheRequest { layers, formats, max_model_len, max_num_seqs, .. } = request;
        let (spare_rows, draft_width) = (request.spare_rows, request.draft_width);
        for (what, value) in [("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs)] {
            if value == 0 {
                return Err(PlanError::Zero { what });
            }
        }
        let blocks_per_seq = max_model_len.div_ceil(BLOCK_TOKENS);
        let n_blocks = blocks_per_seq * max_num_seqs;
        let mut spec = CacheSpec {
            layers,
            n_slots: max_num_seqs,
            n_blocks,
            n_snapshots: 0,
            spare_rows,
            draft_width,
            kv: formats.kv(),
            index_keys: formats.index_keys(),
        };
        if let Some(budget_bytes) = request.budget_bytes {
            spec.n_blocks = blocks_within(&spec, max_model_len, blocks_per_seq, budget_bytes)?;
        }
        Ok(Self { spec, max_model_len, budget_bytes: request.budget_bytes })
    }

    /// The geometry to allocate.
    #[must_use]
    pub const fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// The plan's geometry, without the plan.
    #[must_use]
    pub fn into_spec(self) -> CacheSpec {
        self.spec
    }

    /// Longest sequence the plan was made for, in tokens.
    #[must_use]
    pub const fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Tokens that all blocks together hold.
    #[must_use]
    pub const fn n_tokens(&self) -> usize {
        self.spec.n_blocks * BLOCK_TOKENS
    }

    /// Bytes one more token costs in the long run: a block's bytes over its tokens.
    #[must_use]
    pub fn token_bytes(&self) -> f64 {
        self.spec.block_bytes() as f64 / BLOCK_TOKENS as f64
    }

    /// Bytes of all slots.
    #[must_use]
    pub fn slots_bytes(&self) -> u64 {
        (self.spec.n_slots * self.spec.slot_bytes()) as u64
    }

    /// Bytes of all blocks.
    #[must_use]
    pub fn blocks_bytes(&self) -> u64 {
        (self.spec.n_blocks * self.spec.block_bytes()) as u64
    }

    /// Bytes of all stores.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.slots_bytes() + self.blocks_bytes()
    }
}

/// Blocks that fit beside all slots of `spec`, at most as many as it wants.
fn blocks_within(
    spec: &CacheSpec,
    max_model_len: usize,
    blocks_per_seq: usize,
    budget_bytes: u64,
) -> Result<usize, PlanError> {
    let max_num_seqs = spec.n_slots;
    // A model of window layers alone has no blocks to pay for.
    let (slot_bytes, block_bytes) = (spec.slot_bytes() as u64, spec.block_bytes() as u64);
    let slots_bytes = slot_bytes * max_num_seqs as u64;
    let Some(left) = budget_bytes.checked_sub(slots_bytes) else {
        let fitting_seqs = (budget_bytes / slot_bytes) as usize;
        let needed_bytes = slots_bytes;
        return Err(PlanError::NoRoomForSlots {
            max_num_seqs,
            needed_bytes,
            budget_bytes,
            fitting_seqs,
        });
    };
    let fitting = left.checked_div(block_bytes).map_or(spec.n_blocks, |n| n as usize);
    if fitting < blocks_per_seq {
        return Err(PlanError::NoRoomForOne {
            max_model_len,
            max_num_seqs,
            needed_bytes: slots_bytes + block_bytes * blocks_per_seq as u64,
            budget_bytes,
            fitting_len: fitting * BLOCK_TOKENS,
        });
    }
    Ok(fitting.min(spec.n_blocks))
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spec = &self.spec;
        write!(f, "KV cache {}", Binary(self.total_bytes()))?;
        if let Some(budget) = self.budget_bytes {
            write!(f, " of {}", Binary(budget))?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "  blocks {} x {} = {} ({BLOCK_TOKENS} tokens each, {:.2} B per token)",
            spec.n_blocks,
            Binary(spec.block_bytes() as u64),
            Binary(self.blocks_bytes()),
            self.token_bytes(),
        )?;
        writeln!(
            f,
            "  slots  {} x {} = {} (window and compressor state of a sequence)",
            spec.n_slots,
            Binary(spec.slot_bytes() as u64),
            Binary(self.slots_bytes()),
        )?;
        write!(
            f,
            "  holds  {} tokens: {:.1} sequences of {}",
            self.n_tokens(),
            spec.n_blocks as f64 / self.max_model_len.div_ceil(BLOCK_TOKENS) as f64,
            self.max_model_len,
        )
    }
}

/// A byte count in the largest binary unit that keeps it above 1.
struct Binary(u64);

impl fmt::Display for Binary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let power = (self.0.checked_ilog2().unwrap_or(0) / 10).min(UNITS.len() as u32 - 1);
        if power == 0 {
            return write!(f, "{} B", self.0);
        }
        let value = self.0 as f64 / f64::from(1_u32 << 10).powi(power as i32);
        write!(f, "{value:.2} {}", UNITS[power as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use LayerKind::{Csa, Hca, Window};
    use fathom_core::Numerics;
    use fathom_ops::{IndexKeyFormat, KvFormat};

    const MIB: u64 = 1 << 20;
    const GIB: f64 = (1_u64 << 30) as f64;

    fn alternating(first: [LayerKind; 2], n_pairs: usize) -> Vec<LayerKind> {
        let mut layers = first.to_vec();
        layers.extend([Csa, Hca].repeat(n_pairs));
        layers.push(Csa);
        layers
    }

    fn flash() -> Vec<LayerKind> {
        alternating([Window, Window], 20)
    }

    fn pro() -> Vec<LayerKind> {
        alternating([Hca, Hca], 29)
    }

    fn request(layers: Vec<LayerKind>, max_model_len: usize) -> CacheRequest {
        CacheRequest {
            layers,
            formats: RowFormats::smallest(Numerics::Bf16),
            max_model_len,
            max_num_seqs: 1,
            spare_rows: 0,
            draft_width: 0,
            budget_bytes: None,
        }
    }

    fn plan(layers: Vec<LayerKind>, max_model_len: usize) -> MemoryPlan {
        MemoryPlan::new(request(layers, max_model_len)).unwrap()
    }

    /// Blocks and windows of one sequence in GiB, without compressor state, as the specification
    /// counts.
    fn gib_without_state(plan: &MemoryPlan) -> f64 {
        let windows = plan.spec.layers.len() * plan.spec.window_rows() * plan.spec.kv.row_bytes();
        (plan.blocks_bytes() + windows as u64) as f64 / GIB
    }

    #[test]
    fn a_token_costs_what_the_cache_specification_says() {
        assert_eq!(plan(flash(), 256).token_bytes(), 3_514.25);
        // The specification rounds to two places.
        assert_eq!(plan(pro(), 256).token_bytes(), 5_031.437_5);
    }

    #[test]
    fn other_row_formats_cost_what_the_cache_specification_says() {
        let (bf16, fp8) =
            ((KvFormat::Bf16, IndexKeyFormat::Bf16), (KvFormat::Fp8, IndexKeyFormat::Fp8));
        for (layers, (kv, index_keys), token_bytes, gib) in [
            (flash(), bf16, 6_880.0, 6.724),
            (pro(), bf16, 9_848.0, 9.625),
            (flash(), fp8, 3_850.25, 3.763),
            (pro(), fp8, 5_511.437_5, 5.387),
        ] {
            let formats = RowFormats::choose(Numerics::Bf16, Some(kv), Some(index_keys)).unwrap();
            let request = CacheRequest { formats, ..request(layers, 1 << 20) };
            let plan = MemoryPlan::new(request).unwrap();
            assert_eq!(plan.token_bytes(), token_bytes);
            assert!((gib_without_state(&plan) - gib).abs() < 6e-4, "{}", gib_without_state(&plan));
        }
    }

    #[test]
    fn long_contexts_cost_what_the_cache_specification_says() {
        for (layers, len, gib) in [
            (flash(), 128 << 10, 0.432),
            (flash(), 1 << 20, 3.435),
            (pro(), 128 << 10, 0.618),
            (pro(), 1 << 20, 4.918),
        ] {
            let got = gib_without_state(&plan(layers, len));
            assert!((got - gib).abs() < 6e-4, "{len} tokens: {got} GiB, expected {gib}");
        }
    }

    #[test]
    fn a_slot_holds_windows_and_raw_compressor_state_and_the_mtp_window_on_request() {
        assert_eq!(plan(flash(), 256).slots_bytes(), 3_214_336 + 12_206_080);
        assert_eq!(plan(pro(), 256).slots_bytes(), 4_559_872 + 18_710_528);
        let mut with_mtp = flash();
        with_mtp.push(Window);
        assert_eq!(plan(with_mtp, 256).slots_bytes(), 3_214_336 + 12_206_080 + 74_752);
    }

    #[test]
    fn what_slots_leave_of_a_budget_becomes_blocks() {
        let mut request = request(flash(), 32_768);
        request.max_num_seqs = 4;
        request.budget_bytes = Some(300 * MIB);
        let plan = MemoryPlan::new(request).unwrap();
        // 300 MiB - 4 * 15,420,416 B of slots = 252,891,136 B = 281.1 blocks of 899,648 B.
        assert_eq!(plan.spec.n_blocks, 281);
        assert!(plan.total_bytes() <= 300 * MIB);
        assert!(plan.total_bytes() + plan.spec.block_bytes() as u64 > 300 * MIB);
    }

    #[test]
    fn a_budget_beyond_every_sequence_at_full_length_is_left_alone() {
        let mut request = request(flash(), 257);
        request.max_num_seqs = 3;
        request.budget_bytes = Some(1 << 40);
        assert_eq!(MemoryPlan::new(request).unwrap().spec.n_blocks, 6);
    }

    #[test]
    fn a_budget_too_small_for_one_sequence_is_refused_with_the_length_that_fits() {
        let mut request = request(flash(), 32_768);
        request.budget_bytes = Some(32 * MIB);
        let error = MemoryPlan::new(request.clone()).unwrap_err();
        let PlanError::NoRoomForOne { fitting_len, needed_bytes, .. } = error else {
            panic!("{error}");
        };
        request.max_model_len = fitting_len;
        assert!(MemoryPlan::new(request.clone()).is_ok());
        request.max_model_len = fitting_len + 1;
        assert!(MemoryPlan::new(request.clone()).is_err());
        request.max_model_len = 32_768;
        request.budget_bytes = Some(needed_bytes);
        assert!(MemoryPlan::new(request).is_ok());
    }

    #[test]
    fn a_budget_too_small_for_the_slots_is_refused_with_the_number_that_fits() {
        let mut request = request(flash(), 256);
        (request.max_num_seqs, request.budget_bytes) = (64, Some(100 * MIB));
        let error = MemoryPlan::new(request).unwrap_err();
        assert!(error.to_string().ends_with("lower max_num_seqs to at most 6"), "{error}");
    }

    #[test]
    fn a_plan_reads_like_a_bill() {
        let mut request = request(flash(), 32_768);
        (request.max_num_seqs, request.budget_bytes) = (4, Some(300 * MIB));
        let expected = "\
KV cache 299.91 MiB of 300.00 MiB
  blocks 281 x 878.56 KiB = 241.09 MiB (256 tokens each, 3514.25 B per token)
  slots  4 x 14.71 MiB = 58.82 MiB (window and compressor state of a sequence)
  holds  71936 tokens: 2.2 sequences of 32768";
        assert_eq!(MemoryPlan::new(request).unwrap().to_string(), expected);
    }
}
