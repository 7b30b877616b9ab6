//! Embedding, hyper-connections and what stands before a head.

use rayon::prelude::*;

use super::exact::{self, Site};
use super::parts::{CPU_ROWS, VOCAB, cpu, step};
use super::random::Random;
use super::{BF16_STEP, Report, Size, pick, plain};
use crate::layer::{HcHead, HcSite, MtpInputWeights, Norm};
use crate::traits::HcMix;
use crate::{Backend, OpError, Ops, WeightSource};

/// Most rows of a small step.
const MANY_ROWS: usize = 32;
/// Rows of a large step that are recomputed in f64, each as a whole.
const EXACT_ROWS: usize = 64;

/// A site's values: function, base, scale.
type SiteSource = (WeightSource, Vec<f32>, Vec<f32>);

/// What all sides compute from.
struct Inputs {
    width: usize,
    embed: WeightSource,
    /// Of two sites, and of the collapse before a head.
    sites: [SiteSource; 3],
    norm: Vec<f32>,
    mtp_norms: [Vec<f32>; 2],
    mtp: [WeightSource; 2],
    tokens: Vec<u32>,
    x: Vec<f32>,
    y: Vec<f32>,
}

impl Inputs {
    fn new(random: &mut Random, width: usize, rows: usize) -> Result<Self, OpError> {
        let embed = random.bf16(VOCAB, width)?;
        let mut site = |n: usize, n_scales: usize| {
            let function = random.f32(n, 4 * width)?;
            let base = random.numbers(n, 0.0);
            Ok::<_, OpError>((function, base, random.numbers(n_scales, 1.0)))
        };
        let sites = [site(24, 3)?, site(24, 3)?, site(4, 1)?];
        Ok(Self {
            width,
            embed,
            sites,
            norm: random.numbers(width, 1.0),
            mtp_norms: [random.numbers(width, 1.0), random.numbers(width, 1.0)],
            mtp: [random.fp8(width, width)?, random.fp8(width, width)?],
            tokens: (0..rows).map(|_| random.below(VOCAB) as u32).collect(),
            x: random.values(rows * 4 * width, 2.0),
            y: random.values(rows * width, 1.0),
        })
    }

    fn site<B: Backend>(&self, ops: &B, index: usize) -> Result<HcSite<B>, OpError> {
        let (function, base, scale) = &self.sites[index];
        Ok(HcSite {
            function: ops.load_linear(function)?,
            base: ops.load_vector(base)?,
            scale: ops.load_vector(scale)?,
            sinkhorn_iters: 20,
            hc_eps: 1e-6,
            norm_eps: 1e-6,
        })
    }

    fn exact_site(&self, index: usize) -> Site<'_> {
        let (function, base, scale) = &self.sites[index];
        Site { function, base, scale, norm: &self.norm }
    }
}

/// Name, values and columns of everything that one side computes.
pub(super) type Results = Vec<(&'static str, Vec<f32>, usize)>;

fn results<B: Ops>(ops: &B, inputs: &Inputs, wanted: &[usize]) -> Result<Results, OpError> {
    let (n, width) = (wanted.len(), inputs.width);
    let embed = ops.load_linear(&inputs.embed)?;
    let (first, second) = (inputs.site(ops, 0)?, inputs.site(ops, 1)?);
    let norm = |weight: &[f32]| Ok(Norm::<B> { weight: ops.load_vector(weight)?, eps: 1e-6 });
    let [enorm, hnorm] = &inputs.mtp_norms;
    let mtp = MtpInputWeights {
        enorm: norm(enorm)?,
        hnorm: norm(hnorm)?,
        e_proj: ops.load_linear(&inputs.mtp[0])?,
        h_proj: ops.load_linear(&inputs.mtp[1])?,
    };
    let norm = norm(&inputs.norm)?;
    let HcSite { function, base, scale, hc_eps, norm_eps, .. } = inputs.site(ops, 2)?;
    let head = HcHead { function, base, scale, hc_eps, norm_eps };
    let x = ops.upload(n, 4 * width, &pick(&inputs.x, 4 * width, wanted))?;
    let y = ops.upload(n, width, &pick(&inputs.y, width, wanted))?;
    let tokens: Vec<u32> = wanted.iter().map(|&row| inputs.tokens[row]).collect();
    let step = step(ops, &tokens)?;

    let mut results = Results::new();
    let mut keep = |name, tensor: &B::Tensor| {
        results.push((name, ops.download(tensor)?, ops.shape(tensor).1));
        Ok::<_, OpError>(())
    };
    keep("embed", &ops.embed(&embed, &step)?)?;
    let pre = ops.hc_pre(&x, &first, &norm)?;
    keep("hc_pre normed", &pre.normed)?;
    keep("hc_pre post", &pre.mix.post)?;
    keep("hc_pre comb", &pre.mix.comb)?;
    let HcMix { post, comb } = &pre.mix;
    let mix = HcMix { post: post.clone(), comb: comb.clone() };
    keep("hc_post", &ops.hc_post(&x, &y, &mix)?)?;
    let mut copies = x.clone();
    let next = ops.hc_boundary(&mut copies, &y, &mix, (&second, &norm), &step)?;
    keep("boundary x", &copies)?;
    keep("boundary normed", &next.normed)?;
    keep("boundary comb", &next.mix.comb)?;
    let collapsed = ops.hc_head(&x, &head, &norm)?;
    keep("hc_head", &collapsed)?;
    keep("mtp_input", &ops.mtp_input(&mtp, &embed, &step, &x)?)?;
    Ok(results)
}

/// What the definition gives for rows `wanted`, without embedding and MTP block.
fn exact_results(inputs: &Inputs, wanted: &[usize]) -> Results {
    let width = inputs.width;
    let row = |&row: &usize| {
        let x = &inputs.x[4 * row * width..4 * (row + 1) * width];
        let y = &inputs.y[row * width..(row + 1) * width];
        let pre = inputs.exact_site(0).pre(x);
        let copies = pre.post(x, y);
        let next = inputs.exact_site(1).pre(&copies);
        let values = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        [
            ("hc_pre post", values(&pre.post)),
            ("hc_pre comb", values(pre.comb.as_flattened())),
            ("hc_pre normed", pre.normed),
            ("hc_post", copies.clone()),
            ("boundary x", copies),
            ("boundary comb", values(next.comb.as_flattened())),
            ("boundary normed", next.normed),
            ("hc_head", inputs.exact_site(2).head(x)),
        ]
    };
    let rows: Vec<_> = wanted.par_iter().map(row).collect();
    let mut results = Results::new();
    for row in rows {
        for (index, (name, values)) in row.into_iter().enumerate() {
            match results.get_mut(index) {
                Some((_, all, _)) => all.extend(values),
                None => results.push((name, values.clone(), values.len())),
            }
        }
    }
    results
}

/// What a result may differ by from the CPU's.
fn limit_of(name: &str) -> f64 {
    match name {
        "embed" => 0.0,
        // Equal apart from the sums behind `post` and `comb`.
        "hc_pre post" | "hc_pre comb" => 2e-5,
        // Of copies rounded to bf16: where one falls to the other side, 3e-5 is seen.
        "boundary comb" => 5e-4,
        _ => BF16_STEP,
    }
}

/// The same from exact values: one rounding.
fn exact_limit_of(name: &str) -> f64 {
    let limit = limit_of(name);
    if limit == BF16_STEP { exact::ROUNDED } else { limit }
}

/// Everything of `HyperConnectionOps` and `HeadOps`.
pub(super) fn hyper_connections(report: &mut Report<'_>) -> Result<(), OpError> {
    let (widths, row_counts): (&[usize], &[usize]) = match report.size {
        Size::Small => (&[384], &[3, 33]),
        Size::Real => (&[4096, 7168], &[1, 8, 1024]),
    };
    let (ops, cpu) = (report.ops, cpu(report));
    for &width in widths {
        for &rows in row_counts {
            let checked = report.random.some_of(rows, CPU_ROWS);
            let all: Vec<usize> = (0..rows).collect();
            let inputs = Inputs::new(&mut report.random, width, rows)?;
            let got = results(ops, &inputs, &all)?;
            let expected = results(&cpu, &inputs, &checked)?;
            for ((name, got, cols), (_, expected, _)) in got.iter().zip(&expected) {
                let what = format!("{name} [{rows}, {cols}]");
                report.close(what, &pick(got, *cols, &checked), expected, limit_of(name));
            }
            let wanted = report.random.some_of(rows, EXACT_ROWS);
            for (name, exact, cols) in exact_results(&inputs, &wanted) {
                let Some((_, got, _)) = got.iter().find(|(other, ..)| *other == name) else {
                    continue;
                };
                let what = format!("{name} [{rows}, {cols}], {} rows in f64", wanted.len());
                report.close(what, &pick(got, cols, &wanted), &exact, exact_limit_of(name));
            }
            if plain::is_affordable(report.size, rows) {
                let sites = [0, 1, 2].map(|index| inputs.exact_site(index));
                for (name, all, cols) in
                    plain::hyper_connections(report, sites, &inputs.x, &inputs.y)?
                {
                    let of = |results: &Results| {
                        let result = results.iter().find(|(other, ..)| *other == name);
                        result.map_or_else(Vec::new, |(_, values, _)| values.clone())
                    };
                    let what = format!("{name} [{rows}, {cols}], the plain kernels");
                    let limit = limit_of(name);
                    report.close(what, &pick(&all, cols, &checked), &of(&expected), limit);
                    let what = format!("{name} [{rows}, {cols}], all outputs as theirs");
                    report.close(what, &of(&got), &all, limit);
                }
            }
            if rows <= MANY_ROWS {
                continue;
            }
            // Boundaries of few rows may take one launch: the bits are the same.
            let first = [0, 1, 2];
            let few = results(ops, &inputs, &first)?;
            let boundaries =
                |(name, ..): &&(&str, _, _)| name.contains("pre") || name.contains("bound");
            for ((name, got, cols), (_, few, _)) in
                got.iter().zip(&few).filter(|(all, _)| boundaries(all))
            {
                let what = format!("{name}, three rows like those of [{rows}, {cols}]");
                report.mostly_equal(what, few, &pick(got, *cols, &first), 0.0);
            }
        }
    }
    Ok(())
}
