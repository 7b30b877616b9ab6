//! A probe that keeps what the goldens hold: one record per cache slot.

use std::collections::BTreeMap;

use fathom_model::{Probe, Seen};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{Backend, OpError, SequenceSlice};

/// Experts per token of nano.
const TOP_K: usize = 3;

/// What one layer did with one sequence; rows in the order of positions.
#[derive(Debug, Default)]
pub(crate) struct LayerRecord {
    pub(crate) attn_in: Vec<f32>,
    pub(crate) attn_out: Vec<f32>,
    pub(crate) ffn_in: Vec<f32>,
    pub(crate) ffn_out: Vec<f32>,
    pub(crate) out: Vec<f32>,
    pub(crate) out_last: Vec<f32>,
    pub(crate) out_rms: Vec<f32>,
    pub(crate) router_ids: Vec<Vec<u32>>,
    pub(crate) router_w: Vec<Vec<f32>>,
    pub(crate) chosen: Vec<Vec<u32>>,
}

/// Layers of one sequence.
pub(crate) type Record = BTreeMap<usize, LayerRecord>;

/// Records of all sequences of a run, by slot.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    /// Whether to keep every row of inputs and outputs, or only what is small.
    pub(crate) keeps_rows: bool,
    sequences: Vec<SequenceSlice>,
    records: BTreeMap<u32, Record>,
}

impl Recorder {
    pub(crate) fn new(keeps_rows: bool) -> Self {
        Self { keeps_rows, ..Self::default() }
    }

    /// Says whose rows the next step has; without it all rows are slot 0's.
    pub(crate) fn expect(&mut self, sequences: &[SequenceSlice]) {
        self.sequences = sequences.to_vec();
    }

    /// Hands out what `slot` did so far and begins anew.
    pub(crate) fn take(&mut self, slot: u32) -> Record {
        self.records.remove(&slot).unwrap_or_default()
    }

    /// Calls `keep` for each sequence with its layer record and its rows.
    fn each(
        &mut self,
        layer: usize,
        n_rows: usize,
        mut keep: impl FnMut(&mut LayerRecord, std::ops::Range<usize>),
    ) {
        let mut parts: Vec<_> = self.sequences.iter().map(|s| (s.slot, s.rows())).collect();
        if parts.is_empty() {
            parts.push((0, 0..n_rows));
        }
        for (slot, rows) in parts {
            keep(self.records.entry(slot).or_default().entry(layer).or_default(), rows);
        }
    }
}

impl Probe<CpuOps> for Recorder {
    fn see(&mut self, ops: &CpuOps, layer: usize, seen: Seen<'_, CpuOps>) -> Result<(), OpError> {
        let keeps_rows = self.keeps_rows;
        match seen {
            Seen::Routing(routing) => {
                let (ids, weights) = ops.read_routing(routing)?;
                self.each(layer, ids.len() / TOP_K, |record, rows| {
                    let values = rows.start * TOP_K..rows.end * TOP_K;
                    record.router_ids.extend(ids[values.clone()].chunks(TOP_K).map(Vec::from));
                    record.router_w.extend(weights[values].chunks(TOP_K).map(Vec::from));
                });
            }
            Seen::Selection(selection) => {
                let chosen = ops.read_selection(selection)?;
                self.each(layer, chosen.len(), |record, rows| {
                    record.chosen.extend_from_slice(&chosen[rows]);
                });
            }
            Seen::AttnIn(x) | Seen::AttnOut(x) | Seen::FfnIn(x) | Seen::FfnOut(x) if keeps_rows => {
                let cols = x.cols;
                self.each(layer, x.rows, |record, rows| {
                    let into = match seen {
                        Seen::AttnIn(_) => &mut record.attn_in,
                        Seen::AttnOut(_) => &mut record.attn_out,
                        Seen::FfnIn(_) => &mut record.ffn_in,
                        _ => &mut record.ffn_out,
                    };
                    into.extend_from_slice(&x.data[rows.start * cols..rows.end * cols]);
                });
            }
            Seen::BlockOut(x) => {
                let cols = x.cols;
                self.each(layer, x.rows, |record, rows| {
                    record.out_last = x.row(rows.end - 1).to_vec();
                    for row in rows.clone() {
                        let squares: f64 = x.row(row).iter().map(|&v| f64::from(v).powi(2)).sum();
                        record.out_rms.push((squares / cols as f64).sqrt() as f32);
                    }
                    if keeps_rows {
                        record.out.extend_from_slice(&x.data[rows.start * cols..rows.end * cols]);
                    }
                });
            }
            Seen::AttnIn(_) | Seen::AttnOut(_) | Seen::FfnIn(_) | Seen::FfnOut(_) => {}
        }
        Ok(())
    }
}
