//! Comparing a run with every golden tensor of its case.
//!
//! [`Checker::case`] walks over the keys of the golden file, so a golden that nothing looks at is a
//! finding too.

use std::collections::BTreeSet;
use std::fmt;

use fathom_core::{Numerics, TokenId};

use super::files::{Case, FreeRun, Golden, Goldens, Limits};
use super::pool::{LogitPool, Spread, argmax, rel_l2};
use super::record::{LayerRecord, Record};
use super::run::{CaseRun, Model, MtpRun, run_greedy};

/// Cases with one exact tie in the index scores of layer 1, at this position: the golden takes the
/// higher entry, we the lower. Rows before it must not notice, rows after it do (breaking ties the
/// other way brings every value of both cases within 3e-6 of the golden).
const TIES: [(&str, usize); 2] = [("p600", 505), ("p1300", 566)];
const TIE_ROW_LIMIT: f64 = 3e-2;
const TIE_STEP_LIMIT: f64 = 1e-3;
const TIE_END_LIMIT: f64 = 2e-4;
/// f32qat runs, and the step from which on some activation is taken to be rounded to the other
/// neighbour than in the golden: noise of 1e-7 on the linear inputs turns the token back in a part
/// of the runs. From there on the run is judged by the statistics.
const FLIPS: [(&str, usize); 1] = [("c_sys", 13)];
/// Index sets of the long file must be equal where the best entry left out is further behind.
const CLEAR_GAP: f32 = 1e-4;

/// Everything compared in one mode.
#[derive(Debug)]
pub(crate) struct Checker {
    /// What was run, for the table.
    title: &'static str,
    numerics: Numerics,
    limits: Limits,
    /// What broke a limit, in words.
    pub(crate) findings: Vec<String>,
    n_cases: usize,
    /// Logits judged by statistics: a row per prefill end, decode step, greedy step, MTP row.
    pub(crate) logits: LogitPool,
    /// The same at `sel_positions`.
    pub(crate) selected: LogitPool,
    /// Those of the MTP block once more, for the table.
    pub(crate) mtp: LogitPool,
    /// Logits of cases judged one by one.
    pub(crate) exact: LogitPool,
    /// Copies, module inputs and outputs.
    pub(crate) streams: Spread,
    /// Compressed entries and indexer keys.
    pub(crate) entries: Spread,
    /// 1 for each (row, layer) whose experts differ, else 0.
    pub(crate) router_flips: Spread,
    /// Share of the golden index set that was chosen too.
    pub(crate) index_overlap: Spread,
}

/// Where in a case a value belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A row of the prompt.
    Row(usize),
    /// The last row of the prompt.
    End,
    /// A step after the prompt.
    Step(usize),
}

impl Checker {
    pub(crate) fn new(title: &'static str, numerics: Numerics) -> Self {
        Self {
            title,
            numerics,
            limits: Limits::of(numerics),
            findings: Vec::new(),
            n_cases: 0,
            logits: LogitPool::default(),
            selected: LogitPool::default(),
            mtp: LogitPool::default(),
            exact: LogitPool::default(),
            streams: Spread::default(),
            entries: Spread::default(),
            router_flips: Spread::default(),
            index_overlap: Spread::default(),
        }
    }

    fn find(&mut self, what: impl fmt::Display) {
        self.findings.push(format!("{}: {what}", self.title));
    }

    /// The relative distance that values of `case` must keep, where single values are judged.
    fn limit(&self, case: &str, place: Place) -> Option<f64> {
        let listed = |list: &[(&str, usize)]| {
            list.iter().find(|(name, _)| *name == case).map(|(_, place)| *place)
        };
        match (self.numerics, listed(&TIES), listed(&FLIPS), place) {
            (Numerics::F32, Some(_), _, Place::Step(_)) => Some(TIE_STEP_LIMIT),
            (Numerics::F32, Some(_), _, Place::End) => Some(TIE_END_LIMIT),
            (Numerics::F32, Some(tie), _, Place::Row(row)) if row >= tie => Some(TIE_ROW_LIMIT),
            (Numerics::F32, ..) => self.limits.get("logits_relL2_max"),
            (_, _, Some(flip), Place::Step(step)) if step >= flip => None,
            _ if self.limits.is_short(case) => self.limits.get("short_logits_relL2_max"),
            _ => None,
        }
    }

    /// Compares a run with all goldens of `name`.
    pub(crate) fn case(&mut self, name: &str, goldens: &Goldens, case: &Case, run: &CaseRun) {
        self.n_cases += 1;
        for key in goldens.keys_of(name) {
            let golden = goldens.get(&format!("{name}/{key}")).expect("the key was listed");
            let parts: Vec<&str> = key.split('/').collect();
            match parts.as_slice() {
                ["prefill", rest] => self.prefill(name, rest, golden, case, run),
                ["prefill", layer, rest] => {
                    self.prefill_layer(name, layer_of(layer), rest, goldens, golden, case, run);
                }
                ["decode", "logits"] => {
                    for (row, golden) in golden.rows().enumerate() {
                        let what = format!("{name}/decode/logits[{row}]");
                        self.logit_row(
                            name,
                            Place::Step(row),
                            &what,
                            run.decode_logits.row(row),
                            golden,
                        );
                    }
                    self.decode_argmax(name, case, run);
                }
                ["decode", "router_ids"] => self.decode_routing(name, golden, &run.decode),
                ["decode", layer, "index_topk"] => {
                    let (layer, gap) =
                        (layer_of(layer), format!("{name}/decode/{layer}/index_gap"));
                    let chosen = &run.decode[&layer].chosen;
                    let what = format!("{name}/decode/layer{layer}");
                    self.index_sets(name, Place::Step, &what, golden, chosen, goldens.get(&gap));
                }
                ["mtp", rest] => {
                    let mtp = run.mtp.as_ref().expect("the manifest asks for the MTP block");
                    self.mtp(name, rest, golden, run, mtp);
                }
                [_, _, "index_gap"] => {}
                _ => self.find(format!("{name}/{key} is compared with nothing")),
            }
        }
    }

    fn prefill(&mut self, name: &str, key: &str, golden: &Golden, case: &Case, run: &CaseRun) {
        let logits = &run.prefill_logits;
        let what = format!("{name}/prefill/{key}");
        match key {
            "logits_last" => {
                let row = logits.row(logits.rows - 1);
                self.logit_row(name, Place::End, &what, row, &golden.values);
                let expected = case.last_argmax[self.numerics.name()];
                if self.is_exact() && argmax(row) != expected as usize {
                    self.find(format!("{what}: best token {}, expected {expected}", argmax(row)));
                }
            }
            "logits_sel" => {
                for (&position, golden) in case.sel_positions.iter().zip(golden.rows()) {
                    let distance = self.selected.add(logits.row(position), golden);
                    self.judge(name, Place::Row(position), &format!("{what}@{position}"), distance);
                }
            }
            "top5_ids" | "top5_vals" => self.top5(name, &what, key, golden, run),
            "final_hidden_last" => {
                let last = run.prefill.keys().rev().find(|layer| **layer < N_LAYERS);
                let record = &run.prefill[last.expect("there are layers")];
                self.stream(name, Place::End, &what, &record.out_last, &golden.values);
            }
            _ => self.find(format!("{what} is compared with nothing")),
        }
    }

    /// At every position: the values of the golden best five, and that they are our best five.
    fn top5(&mut self, name: &str, what: &str, key: &str, golden: &Golden, run: &CaseRun) {
        for (row, golden) in golden.rows().enumerate() {
            let Some(limit) = self.limit(name, Place::Row(row)) else { return };
            let logits = run.prefill_logits.row(row);
            let mut best: Vec<f32> = logits.to_vec();
            best.sort_by(|a, b| b.total_cmp(a));
            let what = format!("{what}[{row}]");
            if key == "top5_vals" {
                self.judge(name, Place::Row(row), &what, rel_l2(&best[..5], golden));
                continue;
            }
            // Two that are nearly equal may change places: a golden id must be among our best five,
            // or behind them by no more than both may be off.
            let slack = 2.0 * limit as f32 * best[0].abs();
            if golden.iter().any(|&id| logits[id as usize] < best[4] - slack) {
                self.find(format!("{what}: other tokens than {golden:?} are best"));
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one call site; the parts of a golden's name")]
    fn prefill_layer(
        &mut self,
        name: &str,
        layer: usize,
        key: &str,
        goldens: &Goldens,
        golden: &Golden,
        case: &Case,
        run: &CaseRun,
    ) {
        let what = format!("{name}/prefill/layer{layer}/{key}");
        let record = &run.prefill[&layer];
        match key {
            "out_last" => {
                self.stream(name, Place::End, &what, &record.out_last, &golden.values);
            }
            "out_rms" => self.rms(name, &what, &record.out_rms, &golden.values),
            "out" => self.rows(name, &what, &record.out, golden),
            "attn_in" => self.rows(name, &what, &record.attn_in, golden),
            "attn_out" => self.rows(name, &what, &record.attn_out, golden),
            "ffn_in" => self.rows(name, &what, &record.ffn_in, golden),
            "ffn_out" => self.rows(name, &what, &record.ffn_out, golden),
            "router_ids" => self.routing(name, Place::Row, &what, golden, &record.router_ids),
            "router_w" => {
                let ids = goldens.get(&format!("{name}/prefill/layer{layer}/router_ids"));
                self.routing_weights(name, &what, golden, ids.expect("ids with weights"), record);
            }
            "router_ids_sel" => {
                let chosen = pick(&record.router_ids, &case.sel_positions);
                self.routing(name, Place::Row, &what, golden, &chosen);
            }
            "router_w_sel" => {
                let ids = goldens.get(&format!("{name}/prefill/layer{layer}/router_ids_sel"));
                let record = LayerRecord {
                    router_ids: pick(&record.router_ids, &case.sel_positions),
                    router_w: pick(&record.router_w, &case.sel_positions),
                    ..LayerRecord::default()
                };
                self.routing_weights(name, &what, golden, ids.expect("ids with weights"), &record);
            }
            "index_topk" => {
                let gap = goldens.get(&format!("{name}/prefill/layer{layer}/index_gap"));
                self.index_sets(name, Place::Row, &what, golden, &record.chosen, gap);
            }
            "index_topk_sel" => {
                let chosen = pick(&record.chosen, &case.sel_positions);
                for (index, golden) in golden.rows().enumerate() {
                    let position = case.sel_positions[index];
                    let may_differ = TIES.contains(&(name, position));
                    let must = self.is_exact() && !may_differ;
                    self.index_set(&format!("{what}@{position}"), golden, &chosen[index], must);
                }
            }
            "ckv_first" | "ckv_last" | "idx_ckv_first" | "idx_ckv_last" => {
                let is_last = key.ends_with("last");
                let (kv, index_key) = &run.entries[&layer][usize::from(is_last)];
                let index_key = index_key.as_ref();
                let got = if key.starts_with("idx") { index_key.expect("keys") } else { kv };
                let distance = rel_l2(got, &golden.values);
                self.entries.0.push(distance);
                let last_row = if is_last { case.ids.len() - 1 } else { 0 };
                self.judge(name, Place::Row(last_row), &what, distance);
            }
            "index_gap" => {}
            _ => self.find(format!("{what} is compared with nothing")),
        }
    }

    fn mtp(&mut self, name: &str, key: &str, golden: &Golden, run: &CaseRun, mtp: &MtpRun) {
        let what = format!("{name}/mtp/{key}");
        let record = &run.prefill[&N_LAYERS];
        match key {
            "logits_last" => {
                self.mtp.add(&mtp.logits_last, &golden.values);
                self.logit_row(name, Place::End, &what, &mtp.logits_last, &golden.values);
            }
            "decode_logits" => {
                for (row, golden) in golden.rows().enumerate() {
                    let (what, got) = (format!("{what}[{row}]"), mtp.decode_logits.row(row));
                    self.mtp.add(got, golden);
                    self.logit_row(name, Place::Step(row), &what, got, golden);
                }
            }
            "hidden_in" => self.rows(name, &what, &mtp.hidden_in.data, golden),
            "router_ids" => self.routing(name, Place::Row, &what, golden, &record.router_ids),
            "attn_in" => self.rows(name, &what, &record.attn_in, golden),
            "attn_out" => self.rows(name, &what, &record.attn_out, golden),
            "ffn_in" => self.rows(name, &what, &record.ffn_in, golden),
            "ffn_out" => self.rows(name, &what, &record.ffn_out, golden),
            // Recurrent drafts need their own run, see `drafts`.
            _ if key.starts_with("draft_") || key.starts_with("redraft_") => {}
            _ => self.find(format!("{what} is compared with nothing")),
        }
    }

    /// A round of recurrent drafts (`kind` is `draft` or `redraft`).
    pub(crate) fn drafts(
        &mut self,
        name: &str,
        kind: &str,
        goldens: &Goldens,
        logits: &[Vec<f32>],
        tokens: &[TokenId],
        hidden: &[Vec<f32>],
    ) {
        let golden = |what: &str| {
            let key = format!("{name}/mtp/{kind}_{what}");
            goldens.get(&key).unwrap_or_else(|| panic!("no golden {key}"))
        };
        let expected: Vec<TokenId> =
            golden("tokens").values.iter().map(|id| *id as TokenId).collect();
        if expected != tokens {
            self.find(format!("{name}/{kind}: tokens {tokens:?}, expected {expected:?}"));
        }
        for (row, golden) in golden("logits").rows().enumerate() {
            self.mtp.add(&logits[row], golden);
            let what = format!("{name}/{kind}_logits[{row}]");
            self.logit_row(name, Place::Step(row), &what, &logits[row], golden);
        }
        self.rows(name, &format!("{name}/{kind}_hidden"), &hidden.concat(), golden("hidden"));
        self.n_cases += 1;
    }

    /// A free greedy run, up to the first step that the golden itself decides by a hair.
    pub(crate) fn greedy(&mut self, name: &str, goldens: &Goldens, free: &FreeRun, model: &Model) {
        self.n_cases += 1;
        let too_close = match self.numerics {
            Numerics::F32 => 1e-3,
            Numerics::F32Qat => 0.05,
            Numerics::Bf16 => 1.0,
        };
        let golden = goldens.get(&format!("{name}/greedy/logits")).expect("a run has logits");
        let run = free.in_mode(self.numerics);
        let steps = run_greedy(model, &free.ids, run.tokens.len());
        for (step, (logits, token)) in steps.enumerate() {
            let what = format!("{name}/greedy[{step}]");
            let expected = golden.rows().nth(step).expect("a row per token");
            self.logit_row(name, Place::Step(step), &what, &logits, expected);
            if run.margins[step] < too_close || self.is_flipped(name, step) {
                break;
            }
            if token != run.tokens[step] {
                self.find(format!("{what}: token {token}, expected {}", run.tokens[step]));
                break;
            }
        }
    }

    /// Whether `case` leaves its golden by a rounding flip in this step.
    fn is_flipped(&self, case: &str, step: usize) -> bool {
        self.numerics == Numerics::F32Qat && FLIPS.contains(&(case, step))
    }

    /// Whether single values are judged in this mode, for cases of any length.
    fn is_exact(&self) -> bool {
        self.numerics == Numerics::F32
    }

    fn judge(&mut self, name: &str, place: Place, what: &str, distance: f64) {
        if let Some(limit) = self.limit(name, place)
            && (distance > limit || distance.is_nan())
        {
            self.find(format!("{what}: relL2 {distance:.2e} exceeds {limit:.0e}"));
        }
    }

    fn logit_row(&mut self, name: &str, place: Place, what: &str, got: &[f32], golden: &[f32]) {
        let is_single = self.limit(name, place).is_some();
        let pool = if is_single { &mut self.exact } else { &mut self.logits };
        let distance = pool.add(got, golden);
        self.judge(name, place, what, distance);
    }

    fn stream(&mut self, name: &str, place: Place, what: &str, got: &[f32], golden: &[f32]) {
        let distance = rel_l2(got, golden);
        self.streams.0.push(distance);
        self.judge(name, place, what, distance);
    }

    fn rows(&mut self, name: &str, what: &str, got: &[f32], golden: &Golden) {
        assert_eq!(got.len(), golden.values.len(), "{what}: another number of rows was recorded");
        let width = golden.values.len() / golden.shape[0];
        let pairs = got.chunks_exact(width).zip(golden.values.chunks_exact(width));
        for (row, (got, golden)) in pairs.enumerate() {
            self.stream(name, Place::Row(row), &format!("{what}[{row}]"), got, golden);
        }
    }

    fn rms(&mut self, name: &str, what: &str, got: &[f32], golden: &[f32]) {
        assert_eq!(got.len(), golden.len(), "{what}: another number of rows was recorded");
        for (row, (&got, &golden)) in got.iter().zip(golden).enumerate() {
            let distance = f64::from((got - golden) / golden).abs();
            self.judge(name, Place::Row(row), &format!("{what}[{row}]"), distance);
        }
    }

    fn routing(
        &mut self,
        name: &str,
        place: fn(usize) -> Place,
        what: &str,
        golden: &Golden,
        got: &[Vec<u32>],
    ) {
        assert_eq!(golden.shape[0], got.len(), "{what}: another number of rows was recorded");
        for (row, golden) in golden.rows().enumerate() {
            let differs = set(golden) != got[row].iter().copied().collect();
            self.router_flips.0.push(f64::from(u8::from(differs)));
            if differs && self.limit(name, place(row)).is_some() {
                self.find(format!("{what}[{row}]: experts {:?}, expected {golden:?}", got[row]));
            }
        }
    }

    fn decode_routing(&mut self, name: &str, golden: &Golden, decode: &Record) {
        let [_, n_layers, k] = golden.shape[..] else { panic!("{name}: {:?}", golden.shape) };
        for layer in 0..n_layers {
            let of_layer = golden.values.chunks_exact(n_layers * k);
            let values: Vec<f32> =
                of_layer.flat_map(|row| &row[layer * k..(layer + 1) * k]).copied().collect();
            let golden = Golden { shape: vec![golden.shape[0], k], values };
            let what = format!("{name}/decode/layer{layer}/router_ids");
            self.routing(name, Place::Step, &what, &golden, &decode[&layer].router_ids);
        }
    }

    fn routing_weights(
        &mut self,
        name: &str,
        what: &str,
        golden: &Golden,
        ids: &Golden,
        record: &LayerRecord,
    ) {
        for (row, (golden, ids)) in golden.rows().zip(ids.rows()).enumerate() {
            let weight_of = |id: &f32| {
                let place = record.router_ids[row].iter().position(|got| *got == *id as u32);
                place.map_or(0.0, |place| record.router_w[row][place])
            };
            let got: Vec<f32> = ids.iter().map(weight_of).collect();
            self.judge(name, Place::Row(row), &format!("{what}[{row}]"), rel_l2(&got, golden));
        }
    }

    fn index_sets(
        &mut self,
        name: &str,
        place: fn(usize) -> Place,
        what: &str,
        golden: &Golden,
        got: &[Vec<u32>],
        gap: Option<&Golden>,
    ) {
        assert_eq!(golden.shape[0], got.len(), "{what}: another number of rows was recorded");
        for (row, golden) in golden.rows().enumerate() {
            let is_clear = gap.is_none_or(|gap| gap.values[row] > CLEAR_GAP);
            let must = is_clear && self.limit(name, place(row)).is_some();
            self.index_set(&format!("{what}[{row}]"), golden, &got[row], must);
        }
    }

    fn index_set(&mut self, what: &str, golden: &[f32], got: &[u32], must_agree: bool) {
        let (golden, got) = (set(golden), got.iter().copied().collect::<BTreeSet<_>>());
        if !golden.is_empty() {
            let shared = golden.intersection(&got).count();
            self.index_overlap.0.push(shared as f64 / golden.len() as f64);
        }
        if must_agree && golden != got {
            self.find(format!("{what}: entries {got:?}, expected {golden:?}"));
        }
    }

    fn decode_argmax(&mut self, name: &str, case: &Case, run: &CaseRun) {
        if !self.is_exact() {
            return;
        }
        let rows = run.decode_logits.data.chunks_exact(run.decode_logits.cols);
        let best: Vec<TokenId> = rows.map(|row| argmax(row) as TokenId).collect();
        let expected = &case.decode_argmax[self.numerics.name()];
        if best != *expected {
            self.find(format!("{name}/decode: best tokens {best:?}, expected {expected:?}"));
        }
    }

    /// Judges the statistics; call it when all cases have run.
    pub(crate) fn finish(&mut self) {
        if self.is_exact() {
            return;
        }
        for (what, pool) in
            [("logits", self.logits.clone()), ("logits at selected rows", self.selected.clone())]
        {
            self.judge_pool(what, &pool);
        }
        let (flips, overlap) = (self.router_flips.mean(), self.index_overlap.mean());
        self.at_most("routing sets that differ", "router_flip_rate_max", flips);
        self.at_least("index overlap", "index_topk_mean_overlap_min", overlap);
    }

    fn judge_pool(&mut self, what: &str, pool: &LogitPool) {
        for (name, value) in [
            ("relL2_median_max", pool.rel_l2.quantile(0.5)),
            ("relL2_p95_max", pool.rel_l2.quantile(0.95)),
            ("relL2_max", pool.rel_l2.max()),
        ] {
            self.at_most(what, &format!("logits_{name}"), value);
            self.at_most(what, &format!("long_logits_{name}"), value);
        }
        for (name, value) in [
            ("cosine_median_min", pool.cosine_median()),
            ("cosine_min", pool.cosine_min()),
            ("top1_agreement_min", pool.top1_agreement(f64::NEG_INFINITY)),
            ("top1_agreement_where_golden_margin_gt_1_min", pool.top1_agreement(1.0)),
            ("top1_agreement_where_golden_margin_gt_2_min", pool.top1_agreement(2.0)),
        ] {
            self.at_least(what, name, value);
        }
    }

    fn at_most(&mut self, what: &str, limit: &str, value: f64) {
        if let Some(bound) = self.limits.get(limit)
            && (value > bound || value.is_nan())
        {
            self.find(format!("{what}: {limit} is {bound}, got {value:.4}"));
        }
    }

    fn at_least(&mut self, what: &str, limit: &str, value: f64) {
        if let Some(bound) = self.limits.get(limit)
            && (value < bound || value.is_nan())
        {
            self.find(format!("{what}: {limit} is {bound}, got {value:.4}"));
        }
    }
}

impl fmt::Display for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, what: &str, spread: &Spread| {
            if spread.0.is_empty() {
                return Ok(());
            }
            let (max, median, p95) = (spread.max(), spread.quantile(0.5), spread.quantile(0.95));
            let (title, cases, n) = (self.title, self.n_cases, spread.0.len());
            writeln!(
                f,
                "{title:<7} {cases:>5}  {what:<22} {n:>6}  {max:>8.1e} {median:>8.1e} {p95:>8.1e}"
            )
        };
        line(f, "logits, one by one", &self.exact.rel_l2)?;
        line(f, "logits, pooled", &self.logits.rel_l2)?;
        line(f, "logits at selected", &self.selected.rel_l2)?;
        line(f, "MTP logits", &self.mtp.rel_l2)?;
        line(f, "copies, modules", &self.streams)?;
        line(f, "compressed entries", &self.entries)?;
        let all = self.logits.n().max(self.exact.n());
        let pool = if self.logits.n() > 0 { &self.logits } else { &self.exact };
        writeln!(
            f,
            "{:<7} {:>5}  top-1 {:.3} of {all}, experts differ {:.4}, index overlap {:.4}, {} findings",
            self.title,
            self.n_cases,
            pool.top1_agreement(f64::NEG_INFINITY),
            self.router_flips.mean(),
            self.index_overlap.mean(),
            self.findings.len(),
        )
    }
}

/// Main layers of nano; the MTP block is the layer after them.
pub(crate) const N_LAYERS: usize = 4;

fn layer_of(part: &str) -> usize {
    part.strip_prefix("layer").and_then(|n| n.parse().ok()).expect("layer<n>")
}

/// Golden ids as a set; -1 stands for none.
fn set(golden: &[f32]) -> BTreeSet<u32> {
    golden.iter().filter(|id| **id >= 0.0).map(|id| *id as u32).collect()
}

fn pick<T: Clone>(rows: &[T], positions: &[usize]) -> Vec<T> {
    positions.iter().map(|&position| rows[position].clone()).collect()
}
