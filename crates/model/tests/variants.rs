//! Checkpoints other than the release's: wider experts that ranks can slice, and the -Base formats.

use std::path::Path;

use fathom_core::num::{Ue8m0, e2m1_to_f32, e4m3_from_f32, e4m3_to_f32};
use fathom_core::{Numerics, ParallelConfig, Rank};
use fathom_model::session::Rows;
use fathom_model::{LoadOptions, NoProbe, Session, Transformer};
use fathom_ops::cpu::CpuOps;
use fathom_ops::{Communicator, LocalComm, Solo};
use fathom_weights::{Checkpoint, StoredDtype};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tempfile::TempDir;

use crate::golden::files::{Manifest, nano};
use crate::golden::pool::rel_l2;
use crate::golden::run::{Model, load};

/// A tensor to write.
struct Stored {
    name: String,
    dtype: StoredDtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// A copy of nano in one shard, each tensor and the config changed as wanted.
fn rewritten(
    config_changes: &[(&str, Value)],
    change: impl Fn(&Checkpoint, Stored) -> Vec<Stored>,
) -> TempDir {
    let source = Checkpoint::open(&nano()).unwrap();
    let mut names: Vec<&str> = source.names().collect();
    names.sort_unstable();
    let tensors: Vec<Stored> = names
        .into_iter()
        .flat_map(|name| {
            let view = source.tensor(name).unwrap();
            let (name, data) = (view.name, view.data.to_vec());
            change(&source, Stored { name, dtype: view.dtype, shape: view.shape, data })
        })
        .collect();
    let views = tensors.iter().map(|tensor| {
        let dtype = match tensor.dtype {
            StoredDtype::F8E4M3 => Dtype::F8_E4M3,
            StoredDtype::F8E8M0 => Dtype::F8_E8M0,
            StoredDtype::I8 => Dtype::I8,
            StoredDtype::BF16 => Dtype::BF16,
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::I64 => Dtype::I64,
        };
        (&tensor.name, TensorView::new(dtype, tensor.shape.clone(), &tensor.data).unwrap())
    });
    let dir = tempfile::tempdir().unwrap();
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let config = std::fs::read(nano().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    for (key, value) in config_changes {
        config[*key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn load_from(dir: &Path, numerics: Numerics, rank: Rank) -> Model {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let ops = CpuOps::new(numerics);
    Transformer::load(ops, &checkpoint, rank, LoadOptions::default(), &mut |_| {}).unwrap()
}

/// Logits of every row of a golden prompt, and of the MTP block's last row.
fn logits(model: &Model, comm: &dyn Communicator) -> Vec<f32> {
    let ids = &Manifest::main().cases["p129"].ids;
    let mut session = Session::new(model, comm, ids.len(), 0).unwrap();
    let step = session.run(ids, Rows::All, true, &mut NoProbe).unwrap();
    let draft = session.draft(0, ids, &step.copies.unwrap(), Rows::Last, &mut NoProbe).unwrap();
    let mut logits = Vec::from(step.logits.unwrap().data);
    logits.extend_from_slice(&draft.logits.unwrap().data);
    logits
}

/// Appends to every row of `width` bytes the same row backwards.
fn widen(data: &[u8], width: usize) -> Vec<u8> {
    let both = |row: &[u8]| row.iter().chain(row.iter().rev()).copied().collect::<Vec<_>>();
    data.chunks_exact(width).flat_map(both).collect()
}

/// nano with experts of 256 channels, two quantisation blocks, so that TP = 2 can slice them.
fn with_wide_experts() -> TempDir {
    let is_expert = |name: &str| name.contains(".experts.") || name.contains(".shared_experts.");
    rewritten(&[("moe_intermediate_size", 256.into())], |_, mut tensor| {
        if is_expert(&tensor.name) {
            let width = tensor.data.len() / tensor.shape[0];
            if tensor.name.contains(".w2.") {
                tensor.data = widen(&tensor.data, width);
                tensor.shape[1] *= 2;
            } else {
                // As bytes this mirrors the rows end to end, scales in step with codes.
                let rows = tensor.data.chunks_exact(width).rev().flatten().copied();
                let mirrored: Vec<u8> = rows.collect();
                tensor.data.extend(mirrored);
                tensor.shape[0] *= 2;
            }
        }
        vec![tensor]
    })
}

#[test]
fn experts_sliced_over_tp_ranks_equal_whole_ones() {
    let dir = with_wide_experts();
    for (numerics, limit) in [(Numerics::F32, 1e-5), (Numerics::Bf16, 0.2)] {
        let alone = logits(&load_from(dir.path(), numerics, Rank::solo()), &Solo);
        for (tensor, expert) in [(2, 1), (2, 2)] {
            let comms = LocalComm::group(ParallelConfig { tensor, expert }).unwrap();
            let sharded: Vec<Vec<f32>> = std::thread::scope(|scope| {
                let ranks: Vec<_> = comms
                    .into_iter()
                    .map(|comm| {
                        let path = dir.path();
                        scope.spawn(move || {
                            let model = load_from(path, numerics, comm.rank());
                            let weights = &model.layers()[0].ffn.weights;
                            assert!(weights.experts_are_slices && weights.shared.is_slice);
                            logits(&model, &comm)
                        })
                    })
                    .collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            let distance = rel_l2(&sharded[0], &alone);
            assert!(distance <= limit, "{numerics} TP {tensor} EP {expert}: {distance:.1e}");
            assert!(sharded.iter().all(|rank| *rank == sharded[0]), "{numerics}: ranks disagree");
        }
    }
}

/// E2M1 codes with a scale per 32 inputs as E4M3 codes with a scale per 128x128 block, without
/// loss: the block's scale is its largest one over 64.
fn fp4_to_fp8(codes: &Stored, scales: &[u8]) -> [Stored; 2] {
    let (rows, cols) = (codes.shape[0], 2 * codes.shape[1]);
    let scale_at = |row: usize, col: usize| {
        Ue8m0::from_byte(scales[(row * cols + col) / 32]).unwrap().to_f32()
    };
    let (row_blocks, col_blocks) = (rows / 128, cols / 128);
    let mut block_scales = Vec::new();
    for block in 0..row_blocks * col_blocks {
        let (row, col) = (block / col_blocks * 128, block % col_blocks * 128);
        let all = (0..128).flat_map(|r| (0..4).map(move |g| (row + r, col + 32 * g)));
        let largest = all.map(|(row, col)| scale_at(row, col)).fold(0.0_f32, f32::max);
        block_scales.push(largest / 64.0);
    }
    let mut data = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        for col in 0..cols {
            let byte = codes.data[(row * cols + col) / 2];
            let nibble = if col % 2 == 0 { byte & 15 } else { byte >> 4 };
            let scale = block_scales[row / 128 * col_blocks + col / 128];
            let value = e2m1_to_f32(nibble) * scale_at(row, col) / scale;
            let code = e4m3_from_f32(value);
            assert_eq!(e4m3_to_f32(code), value, "nano repacks without loss");
            data.push(code);
        }
    }
    let scale_name = codes.name.replace(".weight", ".scale");
    let (dtype, shape) = (StoredDtype::F8E4M3, vec![rows, cols]);
    [
        Stored { name: codes.name.clone(), dtype, shape, data },
        Stored {
            name: scale_name,
            dtype: StoredDtype::F32,
            shape: vec![row_blocks, col_blocks],
            data: block_scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
        },
    ]
}

/// nano as a -Base checkpoint: FP8 experts, f32 scales, the MTP block's own embedding and head.
fn as_base() -> TempDir {
    rewritten(&[("expert_dtype", "fp8".into())], |source, mut tensor| {
        if tensor.dtype == StoredDtype::I8 {
            let scales = source.tensor(&tensor.name.replace(".weight", ".scale")).unwrap();
            return fp4_to_fp8(&tensor, &scales.data).into();
        }
        if tensor.name.contains(".ffn.experts.") {
            // The scales of what became FP8 above.
            return Vec::new();
        }
        if tensor.dtype == StoredDtype::F8E8M0 {
            let to_f32 = |byte: &u8| Ue8m0::from_byte(*byte).unwrap().to_f32().to_le_bytes();
            tensor.data = tensor.data.iter().flat_map(to_f32).collect();
            tensor.dtype = StoredDtype::F32;
        }
        let duplicate = match tensor.name.as_str() {
            "embed.weight" => Some("mtp.0.emb.tok_emb.weight"),
            "head.weight" => Some("mtp.0.head.weight"),
            _ => None,
        };
        let Some(name) = duplicate else { return vec![tensor] };
        let (name, shape, data) = (name.to_owned(), tensor.shape.clone(), tensor.data.clone());
        let copy = Stored { name, dtype: tensor.dtype, shape, data };
        vec![tensor, copy]
    })
}

#[test]
fn a_base_checkpoint_of_the_same_values_gives_the_same_logits() {
    let dir = as_base();
    let base = logits(&load_from(dir.path(), Numerics::F32, Rank::solo()), &Solo);
    let release = logits(&load(Numerics::F32), &Solo);
    let distance = rel_l2(&base, &release);
    assert!(distance <= 1e-5, "{distance:.1e}");
}
