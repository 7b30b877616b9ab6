//! Choosing tokens: what can be said of a choice without the engine's sampler.

use fathom_core::SamplingParams;

use super::{Report, Size};
use crate::OpError;
use crate::cuda::choose::MAX_TOP;
use crate::cuda::memory::Buffer;
use crate::cuda::tensor::{DeviceTensor, Element, f32_bytes};
use crate::sample::{Choice, RowChoice};

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
    Ok(())
}

fn choose(
    report: &Report<'_>,
    logits: &DeviceTensor,
    params: &SamplingParams,
) -> Result<Vec<Choice>, OpError> {
    let row = |position| RowChoice { params, position, seen: &[], mask: None, forbidden: &[] };
    let rows: Vec<RowChoice<'_>> = (0..logits.rows as u32).map(row).collect();
    report.ops.choose_tokens(logits, &rows)
}
