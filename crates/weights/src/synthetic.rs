//! Random-weight checkpoints of any size, in the release's layout.
//!
//! For benches and loader tests: proportions of a real model without its bytes. Weights are drawn
//! so that every linear keeps the size of its input (standard deviation about 1/sqrt(inputs)), so
//! activations stay finite through any number of layers. Neighbouring scales differ, so that a
//! wrong scale index shows. The same seed gives the same tensors, however they are split into
//! shards; files are streamed, a chunk in memory at a time.
//!
//! Not here: a model that says anything. The tokenizer is nano's, where the vocabulary holds it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use fathom_core::ModelConfig;
use serde_json::{Map, Value, json};

use crate::config::config_json;
use crate::dtype::{StoredDtype, byte_len};
use crate::expected::{Component, FP4_GROUP, FP8_BLOCK, Variant, visit_tensors};
use crate::index::INDEX;

/// Bytes of tensors after which the next shard begins.
const SHARD_BYTES: u64 = 1 << 30;
/// Bytes that are generated at a time.
const CHUNK: usize = 1 << 20;
/// Entries of nano's tokenizer.
const NANO_VOCAB: usize = 1024;
const NANO_TOKENIZER: &[u8] = include_bytes!("../../../models/nano/tokenizer.json");
const NANO_TOKENIZER_CONFIG: &[u8] = include_bytes!("../../../models/nano/tokenizer_config.json");

/// A synthetic checkpoint could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}")]
pub struct SyntheticError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: std::io::Error,
}

/// A tensor to write.
struct Planned {
    name: String,
    dtype: StoredDtype,
    shape: Vec<usize>,
    recipe: Recipe,
}

/// How a tensor's bytes are drawn.
#[derive(Clone, Copy)]
enum Recipe {
    /// Random E4M3 codes below 2 in magnitude.
    Fp8Codes,
    /// Random bytes: two E2M1 codes each.
    Fp4Codes,
    /// E8M0 bytes, this or one less.
    Scales { byte: u8 },
    /// F32 scales, this power of two or half of it.
    F32Scales { scale: f32 },
    /// BF16 or F32, uniform in `centre` +- `width`.
    Uniform { centre: f32, width: f32 },
    /// Distinct expert ids below `n_experts`, `per_token` a row.
    ExpertIds { n_experts: usize, per_token: usize },
}

/// Writes a checkpoint of `config` with random weights into `dir`, which is made if need be.
/// Returns the bytes of all tensors.
///
/// # Errors
/// [`SyntheticError`] names the file that could not be written.
pub fn write_synthetic(dir: &Path, config: &ModelConfig, seed: u64) -> Result<u64, SyntheticError> {
    write_sharded(dir, config, seed, SHARD_BYTES)
}

/// As [`write_synthetic`], with a shard for every `shard_bytes` bytes of tensors.
///
/// # Errors
/// As [`write_synthetic`].
pub fn write_sharded(
    dir: &Path,
    config: &ModelConfig,
    seed: u64,
    shard_bytes: u64,
) -> Result<u64, SyntheticError> {
    write_files(dir, config, plan(config, shard_bytes), |file, shard| {
        for tensor in shard {
            write_tensor(file, tensor, Random::of(seed, &tensor.name))?;
        }
        Ok(())
    })
}

/// Writes a checkpoint of `config` whose tensors are holes: headers, index and lengths are real,
/// reading a tensor gives zeros, and the disk holds next to nothing.
///
/// # Errors
/// As [`write_synthetic`].
pub fn write_sparse(
    dir: &Path,
    config: &ModelConfig,
    shard_bytes: u64,
) -> Result<u64, SyntheticError> {
    write_files(dir, config, plan(config, shard_bytes), |file, shard| {
        let begin = file.stream_position()?;
        let payload: u64 = shard.iter().map(tensor_bytes).sum();
        file.get_ref().set_len(begin + payload)
    })
}

/// Values of the vector `name` of `n` values (norm weights, biases, sinks, factors of the
/// hyper-connections), as [`write_synthetic`] would draw them: around 1 where that is what such a
/// vector multiplies with, else around 0.
#[must_use]
pub fn draw_vector(name: &str, n: usize, seed: u64) -> Vec<f32> {
    let is_factor = name.ends_with("norm.weight") || name.ends_with("_scale");
    let (centre, width) = if is_factor { (1.0, 0.1) } else { (0.0, 0.5) };
    // A bias may not outweigh the scores it is added to.
    let width = if name.ends_with("gate.bias") { 0.0 } else { width };
    let mut random = Random::of(seed, name);
    (0..n).map(|_| centre + width * random.signed_unit()).collect()
}

/// How often experts occur in a drawn table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Popularity {
    /// All equally.
    Uniform,
    /// The expert of rank `r`, from 1 on, in proportion to `1 / r`.
    Zipf,
}

/// A table of distinct expert ids, `per_token` for each of `n_tokens` tokens, row-major.
#[must_use]
pub fn draw_expert_table(
    name: &str,
    (n_tokens, per_token, n_experts): (usize, usize, usize),
    popularity: Popularity,
    seed: u64,
) -> Vec<u16> {
    let mut random = Random::of(seed, name);
    // Which expert is the popular one differs from table to table.
    let mut by_rank: Vec<u16> = (0..).take(n_experts).collect();
    for i in 0..n_experts {
        by_rank.swap(i, i + random.below(n_experts - i));
    }
    let weight = |rank: usize| match popularity {
        Popularity::Uniform => 1.0,
        Popularity::Zipf => 1.0 / (rank + 1) as f64,
    };
    let mut below = Vec::with_capacity(n_experts);
    let mut sum = 0.0;
    for rank in 0..n_experts {
        sum += weight(rank);
        below.push(sum);
    }
    let mut table = Vec::with_capacity(n_tokens * per_token);
    for _ in 0..n_tokens {
        let begin = table.len();
        while table.len() - begin < per_token.min(n_experts) {
            let at = (random.next() >> 11) as f64 / (1_u64 << 53) as f64 * sum;
            let expert = by_rank[below.partition_point(|&upper| upper <= at).min(n_experts - 1)];
            if !table[begin..].contains(&expert) {
                table.push(expert);
            }
        }
    }
    table
}

/// Writes all files; `fill` writes the payload of a shard behind its header.
fn write_files(
    dir: &Path,
    config: &ModelConfig,
    shards: Vec<Vec<Planned>>,
    fill: impl Fn(&mut BufWriter<File>, &[Planned]) -> std::io::Result<()>,
) -> Result<u64, SyntheticError> {
    std::fs::create_dir_all(dir)
        .map_err(|source| SyntheticError { path: dir.to_owned(), source })?;
    let mut weight_map = Map::new();
    let mut total = 0;
    let n_shards = shards.len();
    for (i, mut shard) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{n_shards:05}.safetensors", i + 1);
        // Wide elements first keeps every tensor aligned, as the reference writer does.
        shard.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
        for tensor in &shard {
            weight_map.insert(tensor.name.clone(), Value::String(file.clone()));
            total += tensor_bytes(tensor);
        }
        let path = dir.join(file);
        write_shard(&path, &shard, &fill).map_err(|source| SyntheticError { path, source })?;
    }
    weight_map.sort_keys();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let generation = json!({
        "bos_token_id": config.bos_token_id,
        "do_sample": true,
        "eos_token_id": config.eos_token_id,
        "temperature": 1.0,
        "top_p": 1.0,
    });
    let mut files: BTreeMap<&str, Vec<u8>> = BTreeMap::from([
        ("config.json", format!("{:#}\n", config_json(config)).into_bytes()),
        ("generation_config.json", format!("{generation:#}\n").into_bytes()),
        (INDEX, format!("{index:#}\n").into_bytes()),
    ]);
    if config.vocab_size >= NANO_VOCAB {
        files.insert("tokenizer.json", NANO_TOKENIZER.to_vec());
        files.insert("tokenizer_config.json", NANO_TOKENIZER_CONFIG.to_vec());
    }
    for (name, content) in files {
        let path = dir.join(name);
        std::fs::write(&path, content).map_err(|source| SyntheticError { path, source })?;
    }
    Ok(total)
}

/// All tensors, split into shards.
fn plan(config: &ModelConfig, shard_bytes: u64) -> Vec<Vec<Planned>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    visit_tensors(config, Variant::of(config), |_, pattern, name| {
        let recipe =
            recipe(config, pattern.component, &pattern.name, pattern.dtype, &pattern.shape);
        let (name, shape) = (name.to_owned(), pattern.shape.clone());
        let tensor = Planned { name, dtype: pattern.dtype, shape, recipe };
        let bytes = tensor_bytes(&tensor);
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("begins with one").push(tensor);
        ControlFlow::Continue(())
    });
    shards
}

fn tensor_bytes(tensor: &Planned) -> u64 {
    byte_len(tensor.dtype, &tensor.shape).expect("ModelConfig bounds every product")
}

fn recipe(
    config: &ModelConfig,
    component: Component,
    name: &str,
    dtype: StoredDtype,
    shape: &[usize],
) -> Recipe {
    let last = shape.last().copied().unwrap_or(1);
    // Uniform in +-sqrt(3) s has standard deviation s.
    let fan_in = |n: usize| Recipe::Uniform { centre: 0.0, width: (3.0 / n as f32).sqrt() };
    let is_scale = name.ends_with(".scale");
    match dtype {
        StoredDtype::F8E4M3 => Recipe::Fp8Codes,
        StoredDtype::I8 => Recipe::Fp4Codes,
        StoredDtype::I64 => {
            let (n_experts, per_token) = (config.n_routed_experts, config.num_experts_per_tok);
            Recipe::ExpertIds { n_experts, per_token }
        }
        StoredDtype::F8E8M0 if component == Component::RoutedExperts => {
            Recipe::Scales { byte: exponent(fp4_rms(), last * FP4_GROUP) }
        }
        StoredDtype::F8E8M0 => Recipe::Scales { byte: exponent(fp8_rms(), last * FP8_BLOCK) },
        StoredDtype::F32 if is_scale => {
            let byte = exponent(fp8_rms(), last * FP8_BLOCK);
            Recipe::F32Scales { scale: 2.0_f32.powi(i32::from(byte) - 127) }
        }
        StoredDtype::BF16 if component == Component::Embed => fan_in(1),
        // Norm weights and the factors of the hyper-connections lie around 1.
        StoredDtype::BF16 if shape.len() == 1 => Recipe::Uniform { centre: 1.0, width: 0.1 },
        StoredDtype::F32 if name.ends_with("_scale") => Recipe::Uniform { centre: 1.0, width: 0.1 },
        StoredDtype::F32 if name.ends_with("_fn") => fan_in(last),
        StoredDtype::BF16 => fan_in(last),
        StoredDtype::F32 => Recipe::Uniform { centre: 0.0, width: 0.5 },
    }
}

/// The E8M0 byte that brings codes of size `rms` to about 1/sqrt(`n_inputs`).
fn exponent(rms: f32, n_inputs: usize) -> u8 {
    let wanted = 1.0 / (rms * (n_inputs as f32).sqrt());
    (127.0 + wanted.log2().round()).clamp(1.0, 254.0) as u8
}

/// Root mean square of the 64 magnitudes [`Recipe::Fp8Codes`] draws from.
fn fp8_rms() -> f32 {
    let sum: f32 = (0..64).map(|code| fathom_core::num::e4m3_to_f32(code).powi(2)).sum();
    (sum / 64.0).sqrt()
}

/// Root mean square of the eight E2M1 magnitudes.
fn fp4_rms() -> f32 {
    let sum: f32 = (0..8).map(|code| fathom_core::num::e2m1_to_f32(code).powi(2)).sum();
    (sum / 8.0).sqrt()
}

fn write_shard(
    path: &Path,
    tensors: &[Planned],
    fill: impl Fn(&mut BufWriter<File>, &[Planned]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut begin = 0;
    for tensor in tensors {
        let (name, dtype, shape) = (&tensor.name, tensor.dtype.name(), &tensor.shape);
        let end = begin + tensor_bytes(tensor);
        write!(
            header,
            r#","{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#
        )
        .expect("writing to a String cannot fail");
        begin = end;
    }
    header.push('}');
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut out = BufWriter::with_capacity(CHUNK, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    fill(&mut out, tensors)?;
    out.flush()
}

fn write_tensor(out: &mut impl Write, tensor: &Planned, mut random: Random) -> std::io::Result<()> {
    let n_elements: usize = tensor.shape.iter().product();
    match tensor.recipe {
        // Without its top exponent bit an E4M3 code is below 2 and never NaN.
        Recipe::Fp8Codes => bytes(out, n_elements, &mut random, |byte| byte & 0xbf),
        Recipe::Fp4Codes => bytes(out, n_elements, &mut random, |byte| byte),
        Recipe::Scales { byte } => bytes(out, n_elements, &mut random, |r| byte - (r & 1)),
        Recipe::F32Scales { scale } => {
            for _ in 0..n_elements {
                let scale = if random.next() & 1 == 0 { scale } else { scale / 2.0 };
                out.write_all(&scale.to_le_bytes())?;
            }
            Ok(())
        }
        Recipe::Uniform { centre, width } => {
            for _ in 0..n_elements {
                let x = centre + width * random.signed_unit();
                match tensor.dtype {
                    StoredDtype::BF16 => {
                        let bits = fathom_core::num::round_bf16(x).to_bits() >> 16;
                        out.write_all(&(bits as u16).to_le_bytes())?;
                    }
                    _ => out.write_all(&x.to_le_bytes())?,
                }
            }
            Ok(())
        }
        Recipe::ExpertIds { n_experts, per_token } => {
            // A partial shuffle per row: distinct ids without retries.
            let mut ids: Vec<i64> = (0..).take(n_experts).collect();
            for _ in 0..n_elements / per_token {
                for slot in 0..per_token {
                    let rest = n_experts - slot;
                    ids.swap(slot, slot + random.below(rest));
                    out.write_all(&ids[slot].to_le_bytes())?;
                }
            }
            Ok(())
        }
    }
}

/// Writes `n` random bytes after `map`, a chunk at a time.
fn bytes(
    out: &mut impl Write,
    n: usize,
    random: &mut Random,
    map: impl Fn(u8) -> u8,
) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK.min(n.next_multiple_of(8))];
    let mut left = n;
    while left > 0 {
        for word in chunk.as_chunks_mut::<8>().0 {
            *word = random.next().to_le_bytes().map(&map);
        }
        let now = left.min(chunk.len());
        out.write_all(&chunk[..now])?;
        left -= now;
    }
    Ok(())
}

/// SplitMix64, seeded by a seed and a tensor's name.
struct Random(u64);

impl Random {
    fn of(seed: u64, name: &str) -> Self {
        // FNV-1a of the name keeps tensors independent of each other and of their order.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn signed_unit(&mut self) -> f32 {
        let top = (self.next() >> 40) as f32;
        top / (1_u64 << 23) as f32 - 1.0
    }

    /// Below `n`; the bias of the remainder does not matter here.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_vectors_lie_around_what_they_are_used_as() {
        let mean = |name: &str| draw_vector(name, 4096, 3).iter().sum::<f32>() / 4096.0;
        assert!((mean("layers.0.attn.q_norm.weight") - 1.0).abs() < 0.02);
        assert!(mean("layers.0.attn.attn_sink").abs() < 0.02);
        assert_eq!(draw_vector("layers.3.ffn.gate.bias", 8, 3), [0.0; 8]);
        assert_ne!(draw_vector("a_norm.weight", 8, 3), draw_vector("b_norm.weight", 8, 3));
    }

    #[test]
    fn tables_hold_distinct_experts_as_often_as_their_popularity_says() {
        let (n_tokens, per_token, n_experts) = (4000, 2, 16);
        for (popularity, expected) in [
            (Popularity::Uniform, 2.0 / 16.0),
            // 1 / H(16) = 0.296 for the first draw, and what others leave for the second.
            (Popularity::Zipf, 0.52),
        ] {
            let shape = (n_tokens, per_token, n_experts);
            let table = draw_expert_table("t", shape, popularity, 5);
            let mut counts = vec![0; n_experts];
            for row in table.chunks_exact(per_token) {
                assert_ne!(row[0], row[1]);
                row.iter().for_each(|&id| counts[usize::from(id)] += 1);
            }
            let share = f64::from(*counts.iter().max().unwrap()) / n_tokens as f64;
            assert!((share / expected - 1.0).abs() < 0.12, "{popularity:?}: {share}");
        }
    }
}
