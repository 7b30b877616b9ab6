//! Choosing tokens: what can be said of a choice at all, and choices against those of the host: draws,
//! under penalties, bias, masks and forbidden tokens, and of rows that give none.

use fathom_core::SamplingParams;

use super::random::Random;
use super::{Report, Size};
use crate::OpError;
use crate::cuda::choose::MAX_TOP;
use crate::cuda::memory::Buffer;
use crate::cuda::tensor::{DeviceTensor, Element, f32_bytes};
use crate::sample::{Choice, ChoiceScratch, OwnedRowChoice, RowChoice, choose_token};

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
    like_the_host(report, &values, vocab)?;
    under_constraints(report, &values, vocab)?;
    without_a_token(report, &values, vocab)
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

/// What a request and a grammar do to single tokens.
#[derive(Clone, Copy)]
struct Constraints {
    name: &'static str,
    penalises: bool,
    biases: bool,
    masks: bool,
    forbids: bool,
}

const NO_CONSTRAINTS: Constraints =
    Constraints { name: "none", penalises: false, biases: false, masks: false, forbids: false };
const CONSTRAINTS: [Constraints; 5] = [
    Constraints { name: "penalties", penalises: true, ..NO_CONSTRAINTS },
    Constraints { name: "bias", biases: true, ..NO_CONSTRAINTS },
    Constraints { name: "mask", masks: true, ..NO_CONSTRAINTS },
    Constraints { name: "forbidden tokens", forbids: true, ..NO_CONSTRAINTS },
    Constraints {
        name: "all constraints",
        penalises: true,
        biases: true,
        masks: true,
        forbids: true,
    },
];

impl Constraints {
    /// A choice under them. They concern half of the row's likeliest tokens `likely`, and others.
    fn choice(
        self,
        random: &mut Random,
        params: &SamplingParams,
        (position, vocab): (u32, usize),
        likely: &[u32],
    ) -> OwnedRowChoice {
        let mut params = params.clone();
        let mut some = |n: usize| -> Vec<u32> {
            let others = (0..n).map(|_| random.below(vocab) as u32);
            let mut tokens: Vec<u32> = likely.iter().step_by(2).copied().chain(others).collect();
            tokens.sort_unstable();
            tokens.dedup();
            tokens
        };
        let mut choice = OwnedRowChoice {
            params: params.clone().into(),
            position,
            seen: Vec::new(),
            mask: None,
            forbidden: Vec::new(),
        };
        if self.penalises {
            // Tokens of the prompt alone were generated 0 times.
            choice.seen = some(30).into_iter().map(|token| (token, token % 4)).collect();
            (params.repetition_penalty, params.frequency_penalty) = (1.01, 0.04);
            params.presence_penalty = 0.17;
        }
        if self.biases {
            let bias = |token: u32| (token, 0.1 * (token % 9) as f32);
            params.logit_bias = some(20).into_iter().map(bias).collect();
            // One token twice: both are added. And one that there is not.
            params.logit_bias.extend([(likely[1], 0.7), (likely[1], 0.2), (vocab as u32, 50.0)]);
        }
        if self.forbids {
            choice.forbidden = some(10);
        }
        if self.masks {
            // Whole words of both kinds, as long runs of a vocabulary make them, and mixed ones.
            let word = |bits: u32| match bits % 4 {
                0 => 0,
                1 => u32::MAX,
                _ => bits.rotate_left(7) ^ bits << 3,
            };
            choice.mask = Some((0..vocab.div_ceil(32)).map(|_| word(random.bits())).collect());
        }
        choice.params = params.into();
        choice
    }
}

/// Tokens that are chosen from, in what a row under constraints is made to be.
const LIKELY: usize = 16;
/// Rows with the same settings.
const REPEATS: usize = 4;

/// Each constraint with each filter, the host's choice to the bit with its log-probabilities. Some tokens
/// of each row, all positive or all negative, are far above the others and so close to each other that a
/// small change decides.
fn under_constraints(report: &mut Report<'_>, values: &[f32], vocab: usize) -> Result<(), OpError> {
    let drawn = |seed| SamplingParams { temperature: 0.1, ..SamplingParams::sampled(1, seed) };
    let settings = [
        SamplingParams { logprobs: Some(MAX_TOP as u32), ..SamplingParams::greedy(1) },
        SamplingParams { logprobs: Some(0), ..drawn(11) },
        SamplingParams { top_k: 30, logprobs: Some(3), ..drawn(12) },
        SamplingParams { top_p: 0.8, ..drawn(13) },
        SamplingParams { min_p: 0.05, logprobs: Some(1), ..drawn(14) },
        SamplingParams { top_k: 50, top_p: 0.9, min_p: 0.01, logprobs: Some(5), ..drawn(15) },
    ];
    let rows: Vec<&[f32]> = values.chunks_exact(vocab).collect();
    for (index, constraints) in CONSTRAINTS.into_iter().enumerate() {
        let (mut choices, mut logits) = (Vec::new(), Vec::new());
        for (position, params) in settings.iter().cycle().take(REPEATS * settings.len()).enumerate()
        {
            let mut row = rows[(index + position) % rows.len()].to_vec();
            let likely: Vec<u32> = (0..LIKELY).map(|i| (i * vocab / LIKELY) as u32).collect();
            for (i, &token) in likely.iter().enumerate() {
                row[token as usize] = 30.0 + 0.05 * ((7 * i + 5 * position) % LIKELY) as f32;
            }
            if position / settings.len() % 2 == 1 {
                row.iter_mut().for_each(|x| *x -= 60.0);
            }
            let at = (position as u32, vocab);
            choices.push(constraints.choice(&mut report.random, params, at, &likely));
            logits.extend(row);
        }
        same_as_the_host(report, constraints.name, &logits, vocab, &choices)?;
    }
    Ok(())
}

/// Rows with a logit that is no number or infinite, and rows of which nothing is allowed.
fn without_a_token(report: &mut Report<'_>, values: &[f32], vocab: usize) -> Result<(), OpError> {
    let plain = OwnedRowChoice {
        params: SamplingParams { logprobs: Some(2), ..SamplingParams::sampled(1, 5) }.into(),
        position: 3,
        seen: Vec::new(),
        mask: None,
        forbidden: Vec::new(),
    };
    let (mut logits, mut choices) = (Vec::new(), Vec::new());
    let wrong = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for (wrong, place) in wrong.into_iter().zip([0, vocab - 1, vocab / 2]) {
        let mut row = values[..vocab].to_vec();
        row[place] = wrong;
        logits.extend(row);
        choices.push(plain.clone());
    }
    // Nothing but a token that is forbidden, nothing, and only the last token.
    let only = |token: usize| {
        let mut mask = vec![0_u32; vocab.div_ceil(32)];
        mask[token / 32] = 1 << (token % 32);
        mask
    };
    let masks = [
        (Some(only(7)), vec![7]),
        (Some(vec![0; vocab.div_ceil(32)]), vec![]),
        (Some(only(vocab - 1)), vec![]),
    ];
    for (mask, forbidden) in masks {
        logits.extend_from_slice(&values[..vocab]);
        choices.push(OwnedRowChoice { mask, forbidden, ..plain.clone() });
    }
    same_as_the_host(report, "rows without a token", &logits, vocab, &choices)
}

fn same_as_the_host(
    report: &mut Report<'_>,
    what: &str,
    values: &[f32],
    vocab: usize,
    choices: &[OwnedRowChoice],
) -> Result<(), OpError> {
    let ops = report.ops;
    let stored = Buffer::from_bytes(ops.memory().device(), &f32_bytes(values))?;
    let logits = DeviceTensor::of(choices.len(), vocab, Element::F32, stored)?;
    let rows: Vec<RowChoice<'_>> = choices.iter().map(OwnedRowChoice::borrowed).collect();
    let got = ops.choose_tokens(&logits, &rows)?;
    let mut scratch = ChoiceScratch::default();
    let expected: Vec<Choice> = rows
        .iter()
        .zip(values.chunks_exact(vocab))
        .map(|(choice, row)| choose_token(choice, &mut row.to_vec(), &mut scratch))
        .collect();
    report.mostly_equal(format!("choices: {what}, {} rows", rows.len()), &got, &expected, 0.0);
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
