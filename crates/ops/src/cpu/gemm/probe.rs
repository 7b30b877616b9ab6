//! What this machine could do at best: the yardstick for products.
//!
//! Both probes run on one thread; call them on as many as the product had. Neither is a product,
//! so neither can be fast for the same wrong reason.

use std::hint::black_box;

use crate::cpu::isa::{Isa, LANES, Lanes, Level, Task};

/// Independent chains of multiply-adds: more than the latency of one times the units there are.
const CHAINS: usize = 12;

/// Adds up `values`, as fast as they come from memory.
#[must_use]
pub fn read(level: Level, values: &[u64]) -> u64 {
    let mut sum = 0;
    level.run(Read { values, sum: &mut sum });
    sum
}

/// Runs about `n` f32 multiply-adds in registers; returns how many exactly.
#[must_use]
pub fn multiply_adds(level: Level, n: usize) -> usize {
    let rounds = n.div_ceil(CHAINS * LANES);
    level.run(MultiplyAdds { rounds });
    rounds * CHAINS * LANES
}

struct Read<'a> {
    values: &'a [u64],
    sum: &'a mut u64,
}

impl Task for Read<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) {
        let mut lanes = [0_u64; 64];
        let (chunks, rest) = self.values.as_chunks::<64>();
        for chunk in chunks {
            for i in 0..64 {
                lanes[i] = lanes[i].wrapping_add(chunk[i]);
            }
        }
        *self.sum = lanes.iter().chain(rest).fold(0, |sum: u64, &value| sum.wrapping_add(value));
    }
}

struct MultiplyAdds {
    rounds: usize,
}

impl Task for MultiplyAdds {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut out = Lanes::ZERO;
        for part in 0..I::PARTS {
            let (a, b) = (isa.splat(black_box(0.5)), isa.splat(black_box(1.0)));
            let mut sums = [b; CHAINS];
            for _ in 0..self.rounds {
                for sum in &mut sums {
                    *sum = isa.fma(*sum, a, b);
                }
            }
            for sum in sums {
                isa.store(sum, &mut out, part);
                black_box(&out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_adds_up_every_value_on_every_instruction_set() {
        let values: Vec<u64> = (1..=1000).collect();
        for level in Level::available() {
            assert_eq!(read(level, &values), 500_500);
        }
    }

    #[test]
    fn at_least_as_many_multiply_adds_run_as_asked_for() {
        for level in Level::available() {
            let n = multiply_adds(level, 1000);
            assert!((1000..1000 + CHAINS * LANES).contains(&n), "{n}");
        }
    }
}
