//! Choosing tokens: what can be said of a choice at all, and draws against those of the host.

use fathom_core::SamplingParams;

use super::{Report, Size};
use crate::OpError;
use crate::cuda::choose::MAX_TOP;
use crate::cuda::memory::Buffer;
use crate::cuda::tensor::{DeviceTensor, Element, f32_bytes};
use crate::sample::{Choice, ChoiceScratch, RowChoice, choose_token};

/// Greedy tokens, log-probabilities, and draws inside of what the filters leave.
pub(super) fn choosing(report: &mut Report<'_>) -> Result<(), OpError> {
    let (rows, vocab) = match report.size {
        Size::Small => (3, 601),
        Size::Real => (64, 129_280),
    };
    let ops = report.ops;
    let values = report.random.values(rows * vocab, 8.0);
    let stored = Buffer::from_bytes(ops.memory().device(), &f32_bytes(&values))?;
    let logits = DeviceTensor::of(rows, vocab, Element::F32, stored)?;
    let row_of = |row: usize| &values[row * vocab..(row + 1) * vocab];
    let order = |row: usize| {
        let mut order: Vec<usize> = (0..vocab).collect();
        let row = row_of(row);
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order
    };
    let orders: Vec<Vec<usize>> = (0..rows).map(order).collect();

    let greedy = SamplingParams { logprobs: Some(MAX_TOP as u32), ..SamplingParams::greedy(1) };
    let choices = choose(report, &logits, &greedy)?;
    let (mut tokens, mut expected_tokens) = (Vec::new(), Vec::new());
    let (mut logprobs, mut expected_logprobs) = (Vec::new(), Vec::new());
    for (row, choice) in choices.iter().enumerate() {
        let Choice::Token(token, Some(reported)) = choice else {
            tokens.push(u32::MAX);
            expected_tokens.push(0);
            continue;
        };
        tokens.push(*token);
        tokens.extend(reported.top.iter().map(|&(token, _)| token));
        logprobs.push(reported.logprob);
        logprobs.extend(reported.top.iter().map(|&(_, value)| value));
        let (order, row) = (&orders[row], row_of(row));
        let most = f64::from(row[order[0]]);
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - most).exp()).sum();
        let logprob = |token: usize| (f64::from(row[token]) - most - sum.ln()) as f32;
        expected_tokens.push(order[0] as u32);
        expected_tokens.extend(order[..MAX_TOP].iter().map(|&token| token as u32));
        expected_logprobs.push(logprob(order[0]));
        expected_logprobs.extend(order[..MAX_TOP].iter().map(|&token| logprob(token)));
    }
    report.mostly_equal(format!("likeliest [{rows}, {vocab}]"), &tokens, &expected_tokens, 0.0);
    report.close(
        format!("log-probabilities [{rows}, {vocab}]"),
        &logprobs,
        &expected_logprobs,
        1e-6,
    );

    // Whatever is drawn, it is among the k most likely.
    for k in [2_usize, 50] {
        let params = SamplingParams { top_k: k as u32, ..SamplingParams::sampled(1, 7) };
        let choices = choose(report, &logits, &params)?;
        let is_inside = |(row, choice): (usize, &Choice)| match choice {
            Choice::Token(token, _) => orders[row][..k].contains(&(*token as usize)),
            Choice::NotFinite | Choice::NothingAllowed => false,
        };
        let inside: Vec<bool> = choices.iter().enumerate().map(is_inside).collect();
        report.mostly_equal(format!("draws of the first {k}"), &inside, &vec![true; rows], 0.0);
    }
    like_the_host(report, &values, vocab)
}

/// Makes logits of a kind.
type Change = fn(f32) -> f32;

/// Every draw is the host's to the bit: of flat and of steep rows, and of rows with many equal logits.
fn like_the_host(report: &mut Report<'_>, values: &[f32], vocab: usize) -> Result<(), OpError> {
    let drawn =
        |temperature, seed| SamplingParams { temperature, ..SamplingParams::sampled(1, seed) };
    let settings = [
        ("all", drawn(1.0, 1)),
        ("all, cold", drawn(0.3, 2)),
        ("all, hot", drawn(4.0, 3)),
        ("top-p", SamplingParams { top_p: 0.95, ..drawn(1.0, 4) }),
        ("top-p, hot", SamplingParams { top_p: 0.6, ..drawn(1.7, 5) }),
        ("min-p", SamplingParams { min_p: 0.02, ..drawn(1.0, 6) }),
        ("all filters", SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.01, ..drawn(0.8, 7) }),
    ];
    let kinds: [(&str, Change); 4] = [
        ("flat", |x| x),
        ("steep", |x| 5.0 * x),
        ("equal", |x| x.round()),
        // The lower zero often has the lower id.
        ("zero", |x| if x > 4.0 { -0.0 } else { x.min(0.0) }),
    ];
    let ops = report.ops;
    for (kind, change) in kinds {
        let values: Vec<f32> = values.iter().map(|&x| change(x)).collect();
        let stored = Buffer::from_bytes(ops.memory().device(), &f32_bytes(&values))?;
        let logits = DeviceTensor::of(values.len() / vocab, vocab, Element::F32, stored)?;
        let mut scratch = ChoiceScratch::default();
        for (name, params) in &settings {
            let got = choose(report, &logits, params)?;
            let expected: Vec<Choice> = (0..)
                .zip(values.chunks_exact(vocab))
                .map(|(position, row)| {
                    choose_token(&row_choice(params, position), &mut row.to_vec(), &mut scratch)
                })
                .collect();
            report.mostly_equal(format!("draws: {name}, {kind} rows"), &got, &expected, 0.0);
        }
    }
    Ok(())
}

const fn row_choice(params: &SamplingParams, position: u32) -> RowChoice<'_> {
    RowChoice { params, position, seen: &[], mask: None, forbidden: &[] }
}

fn choose(
    report: &Report<'_>,
    logits: &DeviceTensor,
    params: &SamplingParams,
) -> Result<Vec<Choice>, OpError> {
    let rows: Vec<RowChoice<'_>> =
        (0..logits.rows as u32).map(|position| row_choice(params, position)).collect();
    report.ops.choose_tokens(logits, &rows)
}
