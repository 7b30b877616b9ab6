//! Distances between vectors, and their statistics over many.

/// `|a - b| / |b|`.
pub(crate) fn rel_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "vectors of different lengths");
    let (mut difference, mut norm) = (0.0_f64, 0.0_f64);
    for (&a, &b) in a.iter().zip(b) {
        difference += f64::from(a - b).powi(2);
        norm += f64::from(b).powi(2);
    }
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Index of the largest value; the first of equals.
pub(crate) fn argmax(values: &[f32]) -> usize {
    (1..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// Largest minus second largest value.
fn margin(values: &[f32]) -> f64 {
    let best = argmax(values);
    let rest = values.iter().enumerate().filter(|&(i, _)| i != best);
    f64::from(values[best] - rest.map(|(_, &v)| v).fold(f32::NEG_INFINITY, f32::max))
}

/// Relative distances of many vectors.
#[derive(Debug, Default, Clone)]
pub(crate) struct Spread(pub(crate) Vec<f64>);

impl Spread {
    pub(crate) fn max(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }

    /// The value below which the share `q` lies, linear between neighbours as numpy has it.
    pub(crate) fn quantile(&self, q: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let place = q * (sorted.len().max(1) - 1) as f64;
        let (low, high) = (place.floor() as usize, place.ceil() as usize);
        match (sorted.get(low), sorted.get(high)) {
            (Some(a), Some(b)) => a + (b - a) * place.fract(),
            _ => 0.0,
        }
    }

    pub(crate) fn mean(&self) -> f64 {
        self.0.iter().fold(0.0, |sum, x| sum + x) / self.0.len().max(1) as f64
    }
}

/// Logits compared with golden logits.
#[derive(Debug, Default, Clone)]
pub(crate) struct LogitPool {
    pub(crate) rel_l2: Spread,
    cosine: Spread,
    /// Golden margin and whether the best token agrees.
    top1: Vec<(f64, bool)>,
}

impl LogitPool {
    /// Adds one row; returns its relative distance.
    pub(crate) fn add(&mut self, got: &[f32], golden: &[f32]) -> f64 {
        let distance = rel_l2(got, golden);
        self.rel_l2.0.push(distance);
        self.cosine.0.push(cosine(got, golden));
        self.top1.push((margin(golden), argmax(got) == argmax(golden)));
        distance
    }

    pub(crate) fn n(&self) -> usize {
        self.top1.len()
    }

    pub(crate) fn cosine_median(&self) -> f64 {
        self.cosine.quantile(0.5)
    }

    pub(crate) fn cosine_min(&self) -> f64 {
        self.cosine.0.iter().copied().fold(1.0, f64::min)
    }

    /// Share of rows with the golden best token, among those whose golden margin exceeds `above`.
    pub(crate) fn top1_agreement(&self, above: f64) -> f64 {
        let chosen = || self.top1.iter().filter(|(margin, _)| *margin > above);
        chosen().filter(|(_, agrees)| *agrees).count() as f64 / chosen().count().max(1) as f64
    }
}
