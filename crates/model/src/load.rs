//! From a checkpoint to the weights of one rank.
//!
//! Matrices reach the backend as the bytes of the mapped shard with the part this rank wants;
//! nothing is copied here but small vectors. The format of a matrix is decided by the dtypes
//! stored, so -Base checkpoints (FP8 experts, f32 scales) need no switch.
//!
//! Not here: names, shapes and damage (`fathom-weights` has checked them when it opened the
//! checkpoint), and which part a rank owns (`core::parallel`).

use fathom_core::{ModelConfig, Rank};
use fathom_ops::layer::Norm;
use fathom_ops::{Ops, Scales, WeightData, WeightSource};
use fathom_weights::synthetic::{self, Popularity};
use fathom_weights::{Checkpoint, StoredDtype, TensorView, check_scales};

use crate::ModelError;

/// What to load.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Whether to load the MTP block, if the checkpoint has one. Default true.
    pub mtp: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { mtp: true }
    }
}

/// How far loading is, in parts: the embedding with the head, then each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Parts loaded.
    pub loaded: usize,
    /// Parts in all.
    pub total: usize,
}

/// Reads tensors of one checkpoint for one rank's device.
#[derive(Debug)]
pub(crate) struct Loader<'a, O: Ops> {
    ops: &'a O,
    checkpoint: &'a Checkpoint,
    rank: Rank,
}

impl<'a, O: Ops> Loader<'a, O> {
    pub(crate) const fn new(ops: &'a O, checkpoint: &'a Checkpoint, rank: Rank) -> Self {
        Self { ops, checkpoint, rank }
    }

    pub(crate) const fn ops(&self) -> &'a O {
        self.ops
    }

    pub(crate) const fn rank(&self) -> Rank {
        self.rank
    }

    pub(crate) fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    /// The matrix `name` with its scales, if its dtype has any.
    pub(crate) fn matrix(&self, name: &str) -> Result<WeightSource, ModelError> {
        let view = self.tensor(name)?;
        let &[rows, stored_cols] = view.shape.as_slice() else {
            let (name, found) = (name.to_owned(), view.shape.len());
            return Err(ModelError::WrongRank { name, found, expected: 2 });
        };
        let (cols, data) = match view.dtype {
            StoredDtype::F8E4M3 => {
                let scales = match self.scale_of(name)? {
                    TensorView { dtype: StoredDtype::F8E8M0, data, .. } => Scales::Ue8m0(data),
                    TensorView { dtype: StoredDtype::F32, data, .. } => Scales::F32(data),
                    other => return wrong_dtype(&scale_name(name), &other, "F8_E8M0 or F32"),
                };
                (stored_cols, WeightData::Fp8 { codes: view.data, scales })
            }
            StoredDtype::I8 => {
                let scale = self.scale_of(name)?;
                if scale.dtype != StoredDtype::F8E8M0 {
                    return wrong_dtype(&scale_name(name), &scale, "F8_E8M0");
                }
                (2 * stored_cols, WeightData::Fp4 { codes: view.data, scales: scale.data })
            }
            StoredDtype::BF16 => (stored_cols, WeightData::Bf16(view.data)),
            StoredDtype::F32 => (stored_cols, WeightData::F32(view.data)),
            StoredDtype::F8E8M0 | StoredDtype::I64 => {
                return wrong_dtype(name, &view, "F8_E4M3, I8, BF16 or F32");
            }
        };
        Ok(WeightSource::new(name, rows, cols, data)?)
    }

    /// The whole matrix `name`, prepared by the device.
    pub(crate) fn linear(&self, name: &str) -> Result<O::Linear, ModelError> {
        Ok(self.ops.load_linear(&self.matrix(name)?)?)
    }

    /// The values of a small BF16 or F32 tensor, row-major.
    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let view = self.tensor(name)?;
        if let Some(drawing) = self.ops.drawing() {
            return Ok(synthetic::draw_vector(name, view.n_elements(), drawing.seed.into()));
        }
        if !self.ops.keeps_values() {
            return Ok(vec![0.0; view.n_elements()]);
        }
        Ok(view.to_f32_vec()?)
    }

    /// A small tensor, uploaded.
    pub(crate) fn vector(&self, name: &str) -> Result<O::Vector, ModelError> {
        Ok(self.ops.load_vector(&self.values(name)?)?)
    }

    /// The RMS norm whose weight is `{prefix}.weight`.
    pub(crate) fn norm(&self, prefix: &str) -> Result<Norm<O>, ModelError> {
        let weight = self.vector(&format!("{prefix}.weight"))?;
        Ok(Norm { weight, eps: self.config().rms_norm_eps })
    }

    /// `tid2eid`, checked and narrowed, row-major `[V, k]`.
    pub(crate) fn expert_table(&self, name: &str) -> Result<Vec<u16>, ModelError> {
        if let Some(drawing) = self.ops.drawing() {
            let config = self.config();
            let per_token = config.num_experts_per_tok;
            let shape = (config.vocab_size, per_token, config.n_routed_experts);
            let popularity = if drawing.zipf { Popularity::Zipf } else { Popularity::Uniform };
            return Ok(synthetic::draw_expert_table(name, shape, popularity, drawing.seed.into()));
        }
        if !self.ops.keeps_values() {
            return Ok(vec![0; self.tensor(name)?.n_elements()]);
        }
        Ok(self.checkpoint.tid2eid(name)?)
    }

    /// The tensor; for a rehearsal, without a look at it.
    fn tensor(&self, name: &str) -> Result<TensorView, ModelError> {
        Ok(if self.ops.keeps_values() {
            self.checkpoint.tensor(name)?
        } else {
            self.checkpoint.unread_tensor(name)?
        })
    }

    fn scale_of(&self, weight: &str) -> Result<TensorView, ModelError> {
        let scale = self.tensor(&scale_name(weight))?;
        if self.ops.keeps_values() {
            check_scales(&scale)?;
        }
        Ok(scale)
    }
}

/// `….weight` to `….scale`.
fn scale_name(weight: &str) -> String {
    format!("{}.scale", weight.strip_suffix(".weight").unwrap_or(weight))
}

fn wrong_dtype<T>(name: &str, view: &TensorView, expected: &'static str) -> Result<T, ModelError> {
    Err(ModelError::WrongDtype { name: name.to_owned(), found: view.dtype, expected })
}
