//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::error::LoadError;
use crate::files::is_inside;
use crate::shard::Name;

/// The index's file name.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Longest index that is read (Pro's is about 14 MB).
pub(crate) const MAX_INDEX_BYTES: u64 = 256 << 20;

/// A parsed index.
#[derive(Debug)]
pub(crate) struct Index {
    /// Shard names, in order of first mention.
    pub(crate) shards: Vec<String>,
    /// Tensor name as written, and the number of its shard in `shards`.
    pub(crate) places: Vec<(Box<str>, usize)>,
    /// `metadata.total_size`, where it is given.
    pub(crate) total_size: Option<u64>,
    /// Whether there is an index at all; without one the single shard speaks for itself.
    pub(crate) listed: bool,
}

impl Index {
    /// Stands for the missing index of a checkpoint that is one file.
    pub(crate) fn of_single_file(file: &str) -> Self {
        Self { shards: vec![file.to_owned()], places: Vec::new(), total_size: None, listed: false }
    }
}

/// Reads the text of an index; `file` is how messages name it.
pub(crate) fn parse_index(json: &[u8], file: &str) -> Result<Index, LoadError> {
    let raw: RawIndex = serde_json::from_slice(json)
        .map_err(|source| LoadError::IndexJson { file: file.to_owned(), source })?;
    let total_size = raw.metadata.get("total_size").and_then(integer);
    let mut shards: Vec<String> = Vec::new();
    let mut numbers: HashMap<Box<str>, usize> = HashMap::new();
    let mut places = Vec::with_capacity(raw.weight_map.0.len());
    for (name, shard) in raw.weight_map.0 {
        let number = match numbers.get(&shard) {
            Some(number) => *number,
            None => {
                if !is_inside(&shard) {
                    let (name, file) = (name.into_string(), shard.into_string());
                    return Err(LoadError::IndexOutside { name, file });
                }
                shards.push(shard.to_string());
                numbers.insert(shard, shards.len() - 1);
                shards.len() - 1
            }
        };
        places.push((name, number));
    }
    Ok(Index { shards, places, total_size, listed: true })
}

/// An integer, also when a writer made it a float (`1.5e11`).
fn integer(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let x = value.as_f64()?;
        ((0.0..9e15).contains(&x) && x.fract() == 0.0).then_some(x as u64)
    })
}

#[derive(Deserialize)]
struct RawIndex {
    #[serde(default)]
    metadata: serde_json::Map<String, Value>,
    weight_map: WeightMap,
}

/// The map in document order and with duplicates.
struct WeightMap(Vec<(Box<str>, Box<str>)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WeightMapVisitor;
        impl<'de> Visitor<'de> for WeightMapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut out = Vec::new();
                while let Some((name, shard)) = map.next_entry::<Name<'_>, Name<'_>>()? {
                    out.push((name.0.into(), shard.0.into()));
                }
                Ok(WeightMap(out))
            }
        }
        deserializer.deserialize_map(WeightMapVisitor)
    }
}
