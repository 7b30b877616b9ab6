//! How much memory the KV cache gets, and how it is divided.
//!
//! Not here: what a block, a slot and a snapshot are (`CacheSpec`), what fits a budget
//! ([`MemoryPlan`]).

use std::{fmt, fs};

use anyhow::Result;
use fathom_core::LayerKind;
use fathom_model::{CacheRequest, MemoryPlan, PlanError};
use fathom_ops::{BLOCK_TOKENS, CacheSpec, RowFormats};

use crate::bytes::readable;

/// Budget where the operator gave none and the system does not say what is free.
const FALLBACK_BYTES: u64 = 4 << 30;

/// Budget of the embedded model: it is for trying out, beside whatever else the machine runs.
pub(super) const EMBEDDED_BYTES: u64 = 512 << 20;

/// What must be known to divide a budget.
pub(super) struct Demand<'a> {
    /// Layers that have a cache.
    pub(super) layers: &'a [LayerKind],
    /// How rows are stored.
    pub(super) formats: RowFormats,
    /// Longest context the operator asked for; `None` for as long as fits.
    pub(super) max_model_len: Option<u32>,
    /// Longest context of the model.
    pub(super) model_max_len: usize,
    /// Sequences at once.
    pub(super) max_num_seqs: u32,
    /// Tokens of a sequence that may be taken back in one step.
    pub(super) spare_rows: usize,
    /// Width of the copies kept for the MTP block; 0 without it.
    pub(super) draft_width: usize,
}

/// A divided budget.
#[derive(Debug)]
pub(super) struct Division {
    /// What to allocate.
    pub(super) spec: CacheSpec,
    /// The plan, for printing.
    pub(super) plan: MemoryPlan,
    /// Longest context there is room for.
    pub(super) max_model_len: u32,
}

impl Division {
    /// Bytes of all stores.
    pub(super) fn total_bytes(&self) -> u64 {
        self.plan.total_bytes() + self.snapshots_bytes()
    }

    /// Bytes of all snapshots.
    pub(super) fn snapshots_bytes(&self) -> u64 {
        (self.spec.n_snapshots * self.spec.snapshot_bytes()) as u64
    }
}

/// What there is of each kind, its bytes, and what that holds.
impl fmt::Display for Division {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { spec, plan, max_model_len } = self;
        let total = readable(self.total_bytes());
        writeln!(f, "{total} per rank, rows in {}, indexer keys in {}", spec.kv, spec.index_keys)?;
        for (what, n, bytes, note) in [
            ("blocks", spec.n_blocks, spec.block_bytes(), format!("{BLOCK_TOKENS} tokens each")),
            ("slots", spec.n_slots, spec.slot_bytes(), "one for each running sequence".to_owned()),
            ("snapshots", spec.n_snapshots, spec.snapshot_bytes(), "to resume prefixes".to_owned()),
        ] {
            let (each, all) = (readable(bytes as u64), readable((n * bytes) as u64));
            writeln!(f, "{what:<9} {n} x {each} = {all}, {note}")?;
        }
        let at_length = spec.n_blocks / (*max_model_len as usize).div_ceil(BLOCK_TOKENS).max(1);
        let at_once = spec.n_blocks / spec.n_slots.max(1) * BLOCK_TOKENS;
        write!(
            f,
            "holds     {} tokens of {:.2} B: {at_length} x {max_model_len}, or {} x {at_once}",
            plan.n_tokens(),
            plan.token_bytes(),
            spec.n_slots,
        )
    }
}

/// Divides `budget_bytes` into blocks, slots and snapshots.
///
/// A fifth goes to snapshots, without which no prefix could be reused. A context that was not asked
/// for is cut to what fits.
///
/// # Errors
/// [`PlanError`] if one sequence of the length asked for does not fit.
pub(super) fn divide(demand: &Demand<'_>, budget_bytes: u64) -> Result<Division, PlanError> {
    let for_snapshots = budget_bytes / 5;
    let plan = |max_model_len| {
        MemoryPlan::new(CacheRequest {
            layers: demand.layers.to_vec(),
            formats: demand.formats,
            max_model_len,
            max_num_seqs: demand.max_num_seqs as usize,
            spare_rows: demand.spare_rows,
            draft_width: demand.draft_width,
            budget_bytes: Some(budget_bytes - for_snapshots),
        })
    };
    let wanted = demand.max_model_len.map_or(demand.model_max_len, |len| len as usize);
    let plan = match plan(wanted) {
        Err(PlanError::NoRoomForOne { fitting_len, .. })
            if demand.max_model_len.is_none() && fitting_len > 0 =>
        {
            plan(fitting_len)
        }
        plan => plan,
    }?;
    let mut spec = plan.spec().clone();
    // A snapshot ends at a block's end: more snapshots than blocks are never used.
    let fitting = usize::try_from(for_snapshots).unwrap_or(usize::MAX) / spec.snapshot_bytes();
    spec.n_snapshots = fitting.min(spec.n_blocks);
    let max_model_len = u32::try_from(plan.max_model_len()).unwrap_or(u32::MAX);
    Ok(Division { spec, plan, max_model_len })
}

/// The least budget that holds one sequence of `len` tokens beside all slots: blocks, slots, and the
/// fifth that goes to snapshots.
pub(super) fn smallest_budget(demand: &Demand<'_>, len: u32) -> Result<u64, PlanError> {
    let plan = MemoryPlan::new(CacheRequest {
        layers: demand.layers.to_vec(),
        formats: demand.formats,
        max_model_len: len as usize,
        max_num_seqs: demand.max_num_seqs as usize,
        spare_rows: demand.spare_rows,
        draft_width: demand.draft_width,
        budget_bytes: None,
    })?;
    let spec = plan.spec();
    let one = spec.block_bytes() * (len as usize).div_ceil(BLOCK_TOKENS);
    Ok((plan.slots_bytes() + one as u64) * 5 / 4 + 1)
}

/// A quarter of the memory that is free once weights of `weight_bytes` are resident.
pub(super) fn default_budget(weight_bytes: u64) -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available_bytes(&info).map_or(FALLBACK_BYTES, |free| free.saturating_sub(weight_bytes) / 4)
}

/// `MemAvailable` of `/proc/meminfo`.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fathom_core::Numerics;

    const NANO: [LayerKind; 4] =
        [LayerKind::Window, LayerKind::Csa, LayerKind::Hca, LayerKind::Csa];

    fn demand(max_model_len: Option<u32>) -> Demand<'static> {
        let (formats, model_max_len) = (RowFormats::smallest(Numerics::Bf16), 1 << 20);
        Demand {
            layers: &NANO,
            formats,
            max_model_len,
            model_max_len,
            max_num_seqs: 64,
            spare_rows: 0,
            draft_width: 0,
        }
    }

    #[test]
    fn what_drafts_need_is_taken_from_the_budget() {
        let roomy = divide(&demand(Some(4096)), 200 << 20).unwrap();
        // What is left of it without the snapshots' fifth is just enough without drafts.
        let budget = roomy.plan.total_bytes() * 5 / 4 + 4;
        let plain = divide(&demand(Some(4096)), budget).unwrap();
        let layers = [&NANO[..], &[LayerKind::Window]].concat();
        let drafting =
            Demand { layers: &layers, spare_rows: 3, draft_width: 1024, ..demand(Some(4096)) };
        let drafting = divide(&drafting, budget).unwrap();
        assert!(drafting.total_bytes() <= budget, "{drafting:?}");
        assert!(drafting.spec.slot_bytes() > plain.spec.slot_bytes());
        assert!(drafting.spec.snapshot_bytes() > plain.spec.snapshot_bytes());
        let n_blocks = (plain.spec.n_blocks, drafting.spec.n_blocks);
        assert!(n_blocks.0 == roomy.spec.n_blocks && n_blocks.1 < n_blocks.0, "{n_blocks:?}");
    }

    #[test]
    fn the_stores_fit_the_budget_and_snapshots_get_their_part() {
        for budget in [200 << 20, 512 << 20, 4 << 30] {
            let division = divide(&demand(Some(4096)), budget).unwrap();
            assert!(division.total_bytes() <= budget, "{division:?}");
            assert!(division.spec.n_snapshots > 0);
            assert!(division.spec.n_snapshots <= division.spec.n_blocks);
        }
    }

    #[test]
    fn the_smallest_budget_is_just_enough() {
        for len in [256, 4096, 1 << 20] {
            let smallest = smallest_budget(&demand(Some(len)), len).unwrap();
            assert!(divide(&demand(Some(len)), smallest).is_ok());
            assert!(divide(&demand(Some(len)), smallest * 9 / 10).is_err());
        }
    }

    #[test]
    fn a_context_that_was_asked_for_is_never_cut_and_others_are() {
        let small = 256 << 20;
        let cut = divide(&demand(None), small).unwrap();
        assert!(cut.max_model_len < 1 << 20, "{}", cut.max_model_len);
        assert!(cut.spec.n_blocks * 256 >= cut.max_model_len as usize);
        let refused = divide(&demand(Some(1 << 20)), small).unwrap_err();
        assert!(matches!(refused, PlanError::NoRoomForOne { .. }), "{refused}");
    }

    #[test]
    fn the_division_reads_like_a_bill_whose_sums_are_right() {
        let demand = Demand { max_num_seqs: 4, ..demand(Some(4096)) };
        let division = divide(&demand, 16 << 20).unwrap();
        let CacheSpec { n_blocks, n_snapshots, .. } = division.spec;
        let text = division.to_string();
        for expected in [
            "per rank, rows in fp8, indexer keys in mxfp4".to_owned(),
            format!("blocks    {n_blocks} x 82.6 KiB = "),
            "slots     4 x ".to_owned(),
            format!("snapshots {n_snapshots} x "),
            format!("holds     {} tokens of 330.56 B: ", n_blocks * 256),
            format!("{} x 4096, or 4 x {}", n_blocks / 16, n_blocks / 4 * 256),
        ] {
            assert!(text.contains(&expected), "{expected:?} is not in\n{text}");
        }
        let spec = &division.spec;
        let sum = n_blocks * spec.block_bytes()
            + 4 * spec.slot_bytes()
            + n_snapshots * spec.snapshot_bytes();
        assert_eq!(division.total_bytes(), sum as u64);
    }

    #[test]
    fn what_is_free_is_read_from_the_kernels_table() {
        let info = "MemTotal:       24000 kB\nMemAvailable:      12 kB\n";
        assert_eq!(available_bytes(info), Some(12 * 1024));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }
}
