//! The golden files and manifests of nano, as data.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use fathom_core::{Numerics, TokenId};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;

/// The nano checkpoint.
pub(crate) fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano")
}

fn golden_file(name: &str) -> PathBuf {
    nano().join("goldens").join(name)
}

/// A golden tensor; integers are held as f32, which is exact for ids.
#[derive(Debug)]
pub(crate) struct Golden {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

impl Golden {
    /// The rows along the last axis.
    pub(crate) fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.values.chunks_exact(*self.shape.last().expect("goldens are no scalars"))
    }
}

/// One golden file.
#[derive(Debug)]
pub(crate) struct Goldens {
    tensors: BTreeMap<String, Golden>,
}

impl Goldens {
    pub(crate) fn load(name: &str) -> Self {
        let bytes = std::fs::read(golden_file(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let data = view.data();
            let word = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).unwrap();
            let values = match view.dtype() {
                Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(word(b))).collect(),
                Dtype::I32 => {
                    data.chunks_exact(4).map(|b| i32::from_le_bytes(word(b)) as f32).collect()
                }
                Dtype::BF16 => data
                    .chunks_exact(2)
                    .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
                    .collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, Golden { shape: view.shape().to_vec(), values })
        });
        Self { tensors: tensors.collect() }
    }

    /// The file of a numeric mode.
    pub(crate) fn of(numerics: Numerics) -> Self {
        Self::load(&format!("nano_{numerics}.safetensors"))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Golden> {
        self.tensors.get(key)
    }

    /// Keys below `{case}/`, without that prefix.
    pub(crate) fn keys_of(&self, case: &str) -> impl Iterator<Item = &str> {
        self.tensors
            .keys()
            .filter_map(move |key| key.strip_prefix(case).and_then(|rest| rest.strip_prefix('/')))
    }
}

/// What was run for each golden, and the discrete results.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) cases: BTreeMap<String, Case>,
    pub(crate) greedy: BTreeMap<String, FreeRun>,
    pub(crate) chats: BTreeMap<String, FreeRun>,
    #[serde(default)]
    pub(crate) batches: Vec<Vec<String>>,
}

/// A prompt with forced decode steps.
#[derive(Debug, Deserialize)]
pub(crate) struct Case {
    pub(crate) ids: Vec<TokenId>,
    pub(crate) forced: Vec<TokenId>,
    pub(crate) sel_positions: Vec<usize>,
    pub(crate) last_argmax: HashMap<String, TokenId>,
    pub(crate) decode_argmax: HashMap<String, Vec<TokenId>>,
    pub(crate) mtp_prefill_ids: Option<Vec<TokenId>>,
    pub(crate) mtp_decode_ids: Option<Vec<TokenId>>,
}

/// A prompt with a free greedy run per mode.
#[derive(Debug, Deserialize)]
pub(crate) struct FreeRun {
    pub(crate) ids: Vec<TokenId>,
    f32: Greedy,
    f32qat: Greedy,
    bf16: Greedy,
}

/// Tokens of a greedy run and by how much each won.
#[derive(Debug, Deserialize)]
pub(crate) struct Greedy {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) margins: Vec<f64>,
}

impl FreeRun {
    pub(crate) fn in_mode(&self, numerics: Numerics) -> &Greedy {
        match numerics {
            Numerics::F32 => &self.f32,
            Numerics::F32Qat => &self.f32qat,
            Numerics::Bf16 => &self.bf16,
        }
    }
}

impl Manifest {
    pub(crate) fn load(name: &str) -> Self {
        let text = std::fs::read_to_string(golden_file(name)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    pub(crate) fn main() -> Self {
        Self::load("nano_manifest.json")
    }

    pub(crate) fn long() -> Self {
        Self::load("nano_long_manifest.json")
    }
}

/// The limits of one mode, from `tolerances.json`.
#[derive(Debug)]
pub(crate) struct Limits(Value);

impl Limits {
    pub(crate) fn of(numerics: Numerics) -> Self {
        let text = std::fs::read_to_string(golden_file("tolerances.json")).unwrap();
        let mut all: Value = serde_json::from_str(&text).unwrap();
        let name = match numerics {
            Numerics::F32 => "fp32_engine_no_activation_quant_vs_f32",
            Numerics::F32Qat => "fp32_engine_with_quant_simulation_vs_f32qat",
            Numerics::Bf16 => "bf16_fp8_engine_with_activation_quant_vs_bf16",
        };
        Self(all[name].take())
    }

    /// The limit `name`, if the mode has it.
    pub(crate) fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|limit| limit.as_f64().unwrap())
    }

    pub(crate) fn is_short(&self, case: &str) -> bool {
        let short = self.0.get("short_cases").and_then(Value::as_array);
        short.is_some_and(|cases| cases.iter().any(|name| name == case))
    }
}
