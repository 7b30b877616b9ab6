//! Penalties, bias and masks: changes to single logits before anything is compared.
//!
//! A forbidden token's logit becomes negative infinity.
//!
//! Not here: which tokens count as seen, what a grammar allows (the engine).

use fathom_core::{SamplingParams, TokenId};

use super::RowChoice;

/// All stages before temperature. `logits` is `[vocab_size]`.
pub(super) fn shape(row: &RowChoice<'_>, logits: &mut [f32]) {
    penalise(row.params, row.seen, logits);
    add_bias(&row.params.logit_bias, logits);
    if let Some(mask) = row.mask {
        apply_mask(mask, logits);
    }
    for &token in row.forbidden {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Whether any penalty of `params` does something.
#[must_use]
pub fn penalises(params: &SamplingParams) -> bool {
    let SamplingParams { repetition_penalty, frequency_penalty, presence_penalty, .. } = *params;
    repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0
}

/// Repetition, then frequency and presence.
fn penalise(params: &SamplingParams, seen: &[(TokenId, u32)], logits: &mut [f32]) {
    if !penalises(params) {
        return;
    }
    for &(token, count) in seen {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        if *logit > 0.0 {
            *logit /= params.repetition_penalty;
        } else {
            *logit *= params.repetition_penalty;
        }
        if count > 0 {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
}

/// Adds a request's bias to single tokens. `logits` is `[vocab_size]`.
fn add_bias(bias: &[(TokenId, f32)], logits: &mut [f32]) {
    for &(token, value) in bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += value;
        }
    }
}

fn apply_mask(mask: &[u32], logits: &mut [f32]) {
    for (logits, &word) in logits.chunks_mut(32).zip(mask) {
        if word == 0 {
            logits.fill(f32::NEG_INFINITY);
        } else if word != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bias_is_added_and_adds_up() {
        let mut logits = vec![1.0, 1.0];
        add_bias(&[(0, -100.0), (0, 1.0), (9, 5.0)], &mut logits);
        assert_eq!(logits, [-98.0, 1.0]);
    }

    #[test]
    fn a_mask_decides_every_token_of_an_odd_sized_vocabulary() {
        let mut logits = vec![0.0; 37];
        apply_mask(&[0x5555_5555; 2], &mut logits);
        let allowed: Vec<usize> = (0..37).filter(|&token| logits[token] == 0.0).collect();
        assert_eq!(allowed, (0..37).step_by(2).collect::<Vec<_>>());
    }
}
