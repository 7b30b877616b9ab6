//! How long a step takes at best: bytes over bandwidth, operations over math rate, links.
//!
//! A step reads every weight it needs once and, for each decoding sequence, the cache rows that
//! attention and indexer look at; it computes what its tokens cost at their positions. The larger of
//! the two times is the floor; tensor parallelism adds two all-reduces per layer. With these counts
//! the decode and prefill rooflines of a whole model come out as the tables of the performance design
//! have them (the tests compare), so a simulated time means "at the roofline", divided by an
//! efficiency that whoever simulates chooses.
//!
//! Not here: measured times. No GPU has run this.

use fathom_core::LayerKind;
use fathom_ops::{CacheSpec, IndexKeyFormat, KvFormat};
use fathom_scheduler::{StepPlan, Work};

const GIB: f64 = (1_u64 << 30) as f64;

/// Memory of a card that context, workspace and graphs take, in GiB.
const RESERVED_GIB: f64 = 2.5;

/// Latency of one all-reduce, in seconds.
const ALL_REDUCE_S: f64 = 4e-6;

/// A GPU, by rates that are achieved rather than printed on the box.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// As the command line calls it.
    pub name: &'static str,
    /// Memory bandwidth, TB/s: measured for H200, 0.896 of the data sheet for the others.
    pub memory_tb_s: f64,
    /// bf16 products, TFLOP/s: measured for H200, 0.80 of the data sheet for the others.
    pub bf16_tflops: f64,
    /// FP8 products, TFLOP/s; bf16 where there are none.
    pub fp8_tflops: f64,
    /// Usable memory, GiB.
    pub memory_gib: f64,
    /// All-reduce bandwidth between cards, GB/s and direction.
    pub link_gb_s: f64,
}

/// Source: performance design, section 1 (rates), section 3 (memory), section 4 (links).
pub const GPUS: [Gpu; 4] = [
    Gpu {
        name: "a100",
        memory_tb_s: 1.83,
        bf16_tflops: 250.0,
        fp8_tflops: 250.0,
        memory_gib: 79.0,
        link_gb_s: 300.0,
    },
    Gpu {
        name: "h100",
        memory_tb_s: 3.00,
        bf16_tflops: 790.0,
        fp8_tflops: 1580.0,
        memory_gib: 79.0,
        link_gb_s: 450.0,
    },
    Gpu {
        name: "h200",
        memory_tb_s: 4.30,
        bf16_tflops: 790.0,
        fp8_tflops: 1580.0,
        memory_gib: 139.0,
        link_gb_s: 450.0,
    },
    Gpu {
        name: "b200",
        memory_tb_s: 7.17,
        bf16_tflops: 1800.0,
        fp8_tflops: 3600.0,
        memory_gib: 178.0,
        link_gb_s: 900.0,
    },
];

/// A straight line through what a table gives at 4,096 and at 1,048,576 tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    at_4k: f64,
    at_1m: f64,
}

impl Line {
    fn at(self, position: f64) -> f64 {
        let slope = (self.at_1m - self.at_4k) / f64::from((1 << 20) - (1 << 12));
        self.at_4k + slope * (position - f64::from(1 << 12))
    }
}

/// A released model, by the work that its configuration implies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelWork {
    /// As the command line calls it.
    pub name: &'static str,
    /// Layers without MTP.
    pub n_layers: u32,
    /// Routed experts of a layer.
    pub n_experts: u32,
    /// Width of a hidden state.
    pub hidden: u32,
    /// Weights outside routed experts and head, GB (section 2.1).
    pub body_gb: f64,
    /// Of those, what every rank of a tensor-parallel group holds, GB: what makes the table of
    /// section 4 come out.
    pub replicated_gb: f64,
    /// The head, GB (section 2.1).
    pub head_gb: f64,
    /// One routed expert, MB (section 2.1).
    pub expert_mb: f64,
    /// All weights, GB (section 2.1).
    pub resident_gb: f64,
    /// KV rows that one decoded token reads, MB (section 2.3).
    pub kv_read_mb: Line,
    /// FP8 index keys that one decoded token reads, MB (section 2.3).
    pub index_read_mb: Line,
    /// Products with weights per token, GFLOP (section 2.4).
    pub linear_gflop: f64,
    /// Attention per token, GFLOP, in bf16 (section 2.4).
    pub attention_gflop: Line,
    /// Indexer per token, GFLOP, in FP8 (section 2.4).
    pub index_gflop: Line,
    /// Traffic of the hyper-connections per token, MB (the share column of section 5).
    pub hc_mb: f64,
}

/// Source: performance design, sections 2.1 to 2.4 and 5.
pub const MODELS: [ModelWork; 2] = [
    ModelWork {
        name: "flash",
        n_layers: 43,
        n_experts: 256,
        hidden: 4096,
        body_gb: 6.70,
        replicated_gb: 1.32,
        head_gb: 1.06,
        expert_mb: 13.37,
        resident_gb: 156.0,
        kv_read_mb: Line { at_4k: 9.9, at_1m: 105.2 },
        index_read_mb: Line { at_4k: 2.8, at_1m: 726.7 },
        linear_gflop: 26.5,
        attention_gflop: Line { at_4k: 2.21, at_1m: 23.61 },
        index_gflop: Line { at_4k: 0.35, at_1m: 90.19 },
        hc_mb: 9.8,
    },
    ModelWork {
        name: "pro",
        n_layers: 61,
        n_experts: 384,
        hidden: 7168,
        body_gb: 24.96,
        replicated_gb: 3.59,
        head_gb: 1.85,
        expert_mb: 35.09,
        resident_gb: 850.7,
        kv_read_mb: Line { at_4k: 23.1, at_1m: 170.8 },
        index_read_mb: Line { at_4k: 4.1, at_1m: 1038.1 },
        linear_gflop: 97.7,
        attention_gflop: Line { at_4k: 10.36, at_1m: 76.67 },
        index_gflop: Line { at_4k: 0.50, at_1m: 128.85 },
        hc_mb: 25.0,
    },
];

/// Routed experts that a token runs.
const EXPERTS_PER_TOKEN: f64 = 6.0;

/// What a step consists of, as far as its time depends on it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepWork {
    /// Tokens, prefill and decode together.
    pub n_tokens: f64,
    /// Whether the head runs.
    pub wants_logits: bool,
    /// Cache rows read for decoding, MB.
    read_mb: f64,
    /// GFLOP in FP8, and in bf16.
    fp8_gflop: f64,
    bf16_gflop: f64,
}

impl StepWork {
    /// Adds `n_tokens` tokens from `position` on.
    pub fn add(&mut self, model: &ModelWork, position: u32, n_tokens: u32, decodes: bool) {
        let (n, first) = (f64::from(n_tokens), f64::from(position));
        // What is linear in the position costs what the middle one costs, times their number.
        let middle = first + (n - 1.0) / 2.0;
        self.n_tokens += n;
        self.fp8_gflop += n * (model.linear_gflop + model.index_gflop.at(middle).max(0.0));
        self.bf16_gflop += n * model.attention_gflop.at(middle).max(0.0);
        if decodes {
            let rows = model.kv_read_mb.at(middle) + model.index_read_mb.at(middle);
            self.read_mb += n * rows.max(0.0);
        }
    }

    /// The work of a plan.
    #[must_use]
    pub fn of(model: &ModelWork, plan: &StepPlan) -> Self {
        let mut work = Self::default();
        for entry in &plan.entries {
            work.add(model, entry.position, entry.n_tokens, entry.work == Work::Decode);
            work.wants_logits |= entry.wants_logits;
        }
        work
    }
}

/// A model on a group of GPUs, tensor parallel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// The model.
    pub model: ModelWork,
    /// Each GPU.
    pub gpu: Gpu,
    /// How many.
    pub n_gpus: u32,
    /// Fraction of the roofline that is reached.
    pub efficiency: f64,
}

impl Machine {
    /// Seconds that a step takes.
    #[must_use]
    pub fn step_seconds(&self, work: &StepWork) -> f64 {
        let Self { model, gpu, .. } = self;
        let n_gpus = f64::from(self.n_gpus);
        let distinct = {
            let n_experts = f64::from(model.n_experts);
            n_experts * (1.0 - (1.0 - EXPERTS_PER_TOKEN / n_experts).powf(work.n_tokens))
        };
        let experts_gb = f64::from(model.n_layers) * distinct * model.expert_mb / 1e3;
        let head_gb = if work.wants_logits { model.head_gb } else { 0.0 };
        let divided_gb = model.body_gb - model.replicated_gb + head_gb + experts_gb;
        // The cache has one KV head: every rank reads all of it, and has all of the copies.
        let hc_mb = work.n_tokens * model.hc_mb;
        let bytes_gb = model.replicated_gb + divided_gb / n_gpus + (work.read_mb + hc_mb) / 1e3;
        let math_s = (work.fp8_gflop / gpu.fp8_tflops + work.bf16_gflop / gpu.bf16_tflops) / 1e3;
        let hc_s = hc_mb / 1e6 / gpu.memory_tb_s;
        let floor_s = (bytes_gb / 1e3 / gpu.memory_tb_s).max((math_s / n_gpus) + hc_s);
        (floor_s + self.links_seconds(work.n_tokens)) / self.efficiency
    }

    fn links_seconds(&self, n_tokens: f64) -> f64 {
        if self.n_gpus == 1 {
            return 0.0;
        }
        let n_gpus = f64::from(self.n_gpus);
        let n_reduces = 2.0 * f64::from(self.model.n_layers);
        let bytes = n_tokens * f64::from(self.model.hidden) * 2.0 * 2.0 * (n_gpus - 1.0) / n_gpus;
        n_reduces * (ALL_REDUCE_S + bytes / (self.gpu.link_gb_s * 1e9))
    }

    /// Blocks and snapshots that fit beside the weights and `n_slots` slots; `None` if nothing does.
    #[must_use]
    pub fn room(&self, n_slots: u32) -> Option<(u32, u32)> {
        let Self { model, gpu, .. } = self;
        let n_gpus = f64::from(self.n_gpus);
        let weights = model.replicated_gb + (model.resident_gb - model.replicated_gb) / n_gpus;
        let free = (gpu.memory_gib - RESERVED_GIB) * GIB - weights * 1e9;
        let spec = self.cache_spec(n_slots);
        let free = free - f64::from(n_slots) * spec.slot_bytes() as f64;
        // A fifth for snapshots, as `fathom serve` divides it.
        let blocks = (free * 0.8 / spec.block_bytes() as f64).floor();
        let snapshots = (free * 0.2 / spec.snapshot_bytes() as f64).floor();
        (blocks >= 1.0 && snapshots >= 1.0).then_some((blocks as u32, snapshots as u32))
    }

    fn cache_spec(&self, n_slots: u32) -> CacheSpec {
        use LayerKind::{Csa, Hca, Window};
        let first = if self.model.name == "pro" { [Hca, Hca] } else { [Window, Window] };
        let n_pairs = (self.model.n_layers as usize - 3) / 2;
        let mut layers = first.to_vec();
        layers.extend([Csa, Hca].repeat(n_pairs));
        layers.push(Csa);
        CacheSpec {
            layers,
            n_slots: n_slots as usize,
            n_blocks: 1,
            n_snapshots: 1,
            spare_rows: 0,
            draft_width: 0,
            kv: KvFormat::Fp8,
            index_keys: IndexKeyFormat::Mxfp4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(model: usize, gpu: &str, n_gpus: u32) -> Machine {
        let gpu = *GPUS.iter().find(|known| known.name == gpu).unwrap();
        Machine { model: MODELS[model], gpu, n_gpus, efficiency: 1.0 }
    }

    /// Tokens per second of `batch` decoding sequences.
    fn decode(machine: &Machine, context: u32, batch: u32) -> f64 {
        let mut work = StepWork { wants_logits: true, ..StepWork::default() };
        (0..batch).for_each(|_| work.add(&machine.model, context, 1, true));
        f64::from(batch) / machine.step_seconds(&work)
    }

    #[track_caller]
    fn assert_near(got: f64, table: f64, tolerance: f64) {
        assert!((got / table - 1.0).abs() < tolerance, "{got:.1}, the table has {table}");
    }

    #[test]
    fn decode_rates_are_those_of_the_roofline_tables() {
        // With links, section 4; the index keys of that table are FP8, as here.
        for (model, gpu, n_gpus, context, batch, table) in [
            (0, "b200", 1, 4096, 1, 638.0),
            (0, "b200", 1, 4096, 128, 6088.0),
            (0, "h200", 2, 4096, 1, 554.0),
            (0, "h200", 2, 4096, 256, 12664.0),
            (0, "h200", 8, 4096, 256, 35826.0),
            (0, "h200", 8, 131_072, 128, 14395.0),
            (0, "h200", 4, 1 << 20, 8, 1959.0),
            (0, "b200", 8, 32_768, 64, 20447.0),
            (0, "a100", 4, 4096, 32, 2437.0),
            (1, "h200", 8, 4096, 1, 421.0),
            (1, "b200", 8, 131_072, 32, 3980.0),
        ] {
            let machine = machine(model, gpu, n_gpus);
            assert_near(decode(&machine, context, batch), table, 0.03);
        }
    }

    #[test]
    fn prefill_rates_are_those_of_the_prefill_table() {
        // FP8 linear, bf16 attention, section 5: the mean over a prompt.
        for (model, gpu, prompt, table) in [
            (0, "h200", 4096, 47_998.0),
            (0, "h200", 131_072, 37_904.0),
            (0, "h200", 1 << 20, 15_810.0),
            (0, "b200", 32_768, 98_138.0),
            (1, "h200", 32_768, 12_331.0),
            (1, "b200", 1 << 20, 13_882.0),
        ] {
            let machine = machine(model, gpu, 1);
            let mut work = StepWork::default();
            work.add(&machine.model, 0, prompt, false);
            assert_near(f64::from(prompt) / machine.step_seconds(&work), table, 0.05);
        }
    }

    #[test]
    fn what_fits_is_what_the_memory_table_says() {
        assert_eq!(machine(0, "h200", 1).room(1), None, "Flash does not fit one H200");
        assert_eq!(machine(1, "h200", 4).room(1), None, "Pro does not fit four");
        // 30.2 GiB or 8.8 M tokens beside the weights of Flash on one B200, snapshots included.
        let (blocks, snapshots) = machine(0, "b200", 1).room(1).unwrap();
        let bytes = f64::from(blocks) * 899_648.0 + f64::from(snapshots) * 3_644_416.0;
        assert_near(bytes / GIB, 30.2, 0.02);
    }
}
