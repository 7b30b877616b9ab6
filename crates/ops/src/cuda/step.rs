//! A batch as kernels read it.

use std::sync::Arc;

use super::device::{Buffer, Device};
use super::tensor::u32_bytes;
use crate::{Batch, OpError};

/// A batch in device memory.
#[derive(Debug)]
pub struct DeviceStep {
    pub(crate) batch: Batch,
    /// `[n_tokens]` u32: position of each row, and its sequence's number.
    pub(crate) positions: Buffer,
    pub(crate) sequence_of: Buffer,
    /// `[n_sequences, 8]` u32: slot, row, tokens, position, first block, blocks, two unused.
    pub(crate) sequences: Buffer,
    /// Block ids of all sequences.
    pub(crate) blocks: Buffer,
}

impl DeviceStep {
    /// Uploads `batch`, which must be valid for the cache it will run over.
    pub(crate) fn new(device: &Arc<dyn Device>, batch: &Batch) -> Result<Self, OpError> {
        let upload = |values: &[u32]| Buffer::from_bytes(device, &u32_bytes(values));
        let positions: Vec<u32> = batch.positions().iter().map(|&p| p as u32).collect();
        let sequence_of: Vec<u32> = (0..)
            .zip(&batch.sequences)
            .flat_map(|(index, sequence)| vec![index; sequence.n_tokens as usize])
            .collect();
        let sequences: Vec<u32> = batch
            .sequences
            .iter()
            .flat_map(|s| {
                let n_blocks = s.blocks.end - s.blocks.start;
                [s.slot, s.row, s.n_tokens, s.position, s.blocks.start, n_blocks, 0, 0]
            })
            .collect();
        Ok(Self {
            batch: batch.clone(),
            positions: upload(&positions)?,
            sequence_of: upload(&sequence_of)?,
            sequences: upload(&sequences)?,
            blocks: upload(&batch.blocks)?,
        })
    }

    /// The largest position of the batch plus one.
    pub(crate) fn max_context(&self) -> usize {
        self.batch.sequences.iter().map(|s| s.positions().end).max().unwrap_or(0)
    }
}
