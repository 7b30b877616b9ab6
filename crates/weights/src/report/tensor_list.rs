//! All tensors of a config on one page: equal tensors of several layers share a line.

use std::fmt::Write as _;

use fathom_core::ModelConfig;

use crate::expected::{Place, TensorPattern, Variant, patterns_of, places};

/// The tensors of `config`, one line per name pattern, format and shape, with the layers that
/// have it and the number of tensors it stands for.
#[must_use]
pub fn tensor_list(config: &ModelConfig, variant: Variant) -> String {
    // In order of first appearance; `group` keeps `norm.weight` of the top and of mtp apart.
    let mut lines: Vec<(&'static str, TensorPattern, Vec<usize>)> = Vec::new();
    for place in places(config) {
        let (group, number) = match place {
            Place::Top => ("", 0),
            Place::Layer(l) => ("layers.{l}.", l),
            Place::Mtp(i) => ("mtp.{i}.", i),
        };
        for pattern in patterns_of(config, variant, place) {
            match lines.iter_mut().find(|(g, p, _)| *g == group && *p == pattern) {
                Some((_, _, numbers)) => numbers.push(number),
                None => lines.push((group, pattern, vec![number])),
            }
        }
    }
    let mut out = String::new();
    for (group, pattern, numbers) in lines {
        let name = format!("{group}{}", pattern.name);
        let shape = format!("{:?}", pattern.shape);
        let count = pattern.count * numbers.len();
        let layers = if group.is_empty() { "-".to_owned() } else { ranges(&numbers) };
        writeln!(out, "{name:<48} {:<7} {shape:<16} {count:>6}  {layers}", pattern.dtype)
            .expect("writing to a String cannot fail");
    }
    out
}

/// Ascending numbers with runs joined: `0-1,4,6-8`; every second number of a run as `3-41/2`.
fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut rest = numbers;
    while let [first, tail @ ..] = rest {
        let step = tail.first().map_or(1, |next| next - first);
        let mut n = 1;
        while n < rest.len() && rest[n] == first + n * step {
            n += 1;
        }
        // A pair two apart is no run: the second may begin one.
        if step > 2 || (step == 2 && n < 3) {
            n = 1;
        }
        let last = rest[n - 1];
        parts.push(match (n, step) {
            (1, _) => first.to_string(),
            (_, 1) => format!("{first}-{last}"),
            _ => format!("{first}-{last}/{step}"),
        });
        rest = &rest[n..];
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn runs_of_layers_are_joined() {
        assert_eq!(ranges(&[0]), "0");
        assert_eq!(ranges(&[0, 1, 2, 3]), "0-3");
        assert_eq!(ranges(&[2, 4, 6, 8]), "2-8/2");
        assert_eq!(ranges(&[0, 1, 3, 5, 7]), "0-1,3-7/2");
        assert_eq!(ranges(&[1, 3]), "1,3");
    }
}
