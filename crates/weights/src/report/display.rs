//! The report as text: a card, then aligned tables.

use std::fmt;

use super::{InspectReport, ModelFacts, Totals, WeightFacts};

impl fmt::Display for InspectReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let release = self.model.as_ref().and_then(|model| model.release);
        match release {
            Some(name) => writeln!(f, "{name} in {}", self.source)?,
            None => writeln!(f, "{}", self.source)?,
        }
        if let Some(model) = &self.model {
            write_card(f, model, &self.totals)?;
            match &self.weights {
                Some(weights) => write_weights(f, weights)?,
                None => fact(f, "on disk", "config.json alone: sizes are those it implies")?,
            }
            self.write_layers(f)?;
            self.write_components(f)?;
            self.write_dtypes(f)?;
        }
        writeln!(f)?;
        for notice in &self.notices {
            writeln!(f, "notice: {notice}")?;
        }
        for reason in &self.refused {
            writeln!(f, "refused: {reason}")?;
        }
        match (self.accepted, &self.weights) {
            (true, Some(_)) => writeln!(f, "Fathom loads this checkpoint."),
            (true, None) => writeln!(f, "Fathom loads checkpoints of this config."),
            (false, _) => writeln!(f, "Fathom refuses this checkpoint."),
        }
    }
}

impl InspectReport {
    fn write_layers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:>6}  {:<9} {:>5}  {:<7} {:>18} {:>18}",
            "layer", "attention", "ratio", "routing", "bytes", "of which routed"
        )?;
        for row in &self.layers {
            writeln!(
                f,
                "{:>6}  {:<9} {:>5}  {:<7} {:>18} {:>18}",
                row.layer,
                row.kind,
                row.ratio,
                row.routing,
                grouped(row.bytes),
                grouped(row.routed_bytes)
            )?;
        }
        Ok(())
    }

    fn write_components(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<18} {:>18} {:>20}", "component", "bytes", "parameters")?;
        let totals = &self.totals;
        let rows =
            self.components.iter().map(|row| (row.component, row.bytes, row.params)).chain([
                ("main model", totals.main_bytes, totals.main_params),
                ("MTP blocks", totals.mtp_bytes, totals.mtp_params),
                ("total", totals.bytes, totals.params),
            ]);
        for (name, bytes, params) in rows {
            writeln!(f, "{name:<18} {:>18} {:>20}", grouped(bytes), grouped(params))?;
        }
        Ok(())
    }

    fn write_dtypes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<8} {:>9} {:>18}", "format", "tensors", "bytes")?;
        for row in &self.dtypes {
            let (n, bytes) = (grouped(row.n_tensors), grouped(row.bytes));
            writeln!(f, "{:<8} {n:>9} {bytes:>18}", row.dtype)?;
        }
        let (n, bytes) = (grouped(self.totals.n_tensors), grouped(self.totals.bytes));
        writeln!(f, "{:<8} {n:>9} {bytes:>18}", "total")
    }
}

fn write_card(f: &mut fmt::Formatter<'_>, m: &ModelFacts, totals: &Totals) -> fmt::Result {
    fact(
        f,
        "layers",
        format_args!(
            "{}, of which {} route by token id, and {} MTP",
            m.num_hidden_layers, m.num_hash_layers, m.num_nextn_predict_layers
        ),
    )?;
    fact(
        f,
        "parameters",
        format_args!(
            "{}, {} active per token",
            magnitude(totals.main_params),
            magnitude(totals.active_params)
        ),
    )?;
    fact(
        f,
        "widths",
        format_args!(
            "hidden {} in {} copies, vocabulary {}, context {}",
            m.hidden_size,
            m.hc_mult,
            grouped(m.vocab_size as u64),
            grouped(m.max_position_embeddings as u64)
        ),
    )?;
    fact(
        f,
        "attention",
        format_args!(
            "{} heads x {} (rotary {}), q rank {}, output {} groups x rank {}, window {}",
            m.num_attention_heads,
            m.head_dim,
            m.qk_rope_head_dim,
            m.q_lora_rank,
            m.o_groups,
            m.o_lora_rank,
            m.sliding_window
        ),
    )?;
    fact(
        f,
        "indexer",
        format_args!(
            "{} heads x {}, {} entries chosen",
            m.index_n_heads, m.index_head_dim, m.index_topk
        ),
    )?;
    fact(
        f,
        "rotary",
        format_args!(
            "base {}; compressed layers base {}, YaRN {} from {}",
            m.rope_theta,
            m.compress_rope_theta,
            m.yarn_factor,
            grouped(u64::from(m.original_max_position_embeddings))
        ),
    )?;
    fact(
        f,
        "experts",
        format_args!(
            "{} routed ({} per token) and {} shared, {} wide, {}; {} bytes each",
            m.n_routed_experts,
            m.num_experts_per_tok,
            m.n_shared_experts,
            m.moe_intermediate_size,
            m.expert_dtype,
            grouped(totals.expert_bytes)
        ),
    )
}

fn write_weights(f: &mut fmt::Formatter<'_>, weights: &WeightFacts) -> fmt::Result {
    let verified = if weights.verified { ", every value checked" } else { "" };
    fact(
        f,
        "on disk",
        format_args!(
            "{} shards, {} tensors loaded, {} bytes{verified}",
            weights.n_shards,
            grouped(weights.n_tensors as u64),
            grouped(weights.n_bytes)
        ),
    )
}

fn fact(f: &mut fmt::Formatter<'_>, name: &str, value: impl fmt::Display) -> fmt::Result {
    writeln!(f, "  {name:<11} {value}")
}

/// `1234567` as `1,234,567`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of parameters in billions, or millions where that would read 0.
fn magnitude(n: u64) -> String {
    if n >= 100_000_000 {
        format!("{:.2} B", n as f64 / 1e9)
    } else {
        format!("{:.2} M", n as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::{grouped, magnitude};

    #[test]
    fn numbers_are_grouped_by_thousands_and_rounded_to_billions() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(159_609_485_896), "159,609,485,896");
        assert_eq!(grouped(100_000), "100,000");
        assert_eq!(magnitude(13_268_000_000), "13.27 B");
        assert_eq!(magnitude(20_400_000), "20.40 M");
    }
}
