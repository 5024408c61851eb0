//! Divergences between a teacher's distribution `p` and a student's distribution `q`, with their gradient with respect
//! to `q`. Pure functions over classes. A class is a token; a teacher with only its top-`k` tokens adds one class for
//! the rest.

use serde::{Deserialize, Serialize};

/// Divergence that training minimizes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// Forward KL, `Σ p log(p / q)`: the student covers all tokens that the teacher finds likely.
    #[default]
    ForwardKl,
    /// Reverse KL, `Σ q log(q / p)`: the student concentrates on the teacher's most likely tokens.
    ReverseKl,
    /// Generalized Jensen-Shannon divergence with `β` (Agarwal et al. 2024): `β KL(p, m) + (1 - β) KL(q, m)`, `m = β p
    /// + (1 - β) q`.
    Jsd(f64),
    /// Adaptive KL (Wu et al. 2024): forward and reverse KL, weighted by the gap between `p` and `q` over the head and
    /// the tail of `p`. The head holds half of the teacher's mass.
    AdaptiveKl,
}

/// Lower bound of probabilities inside logarithms and quotients, to keep them finite.
const MIN_PROBABILITY: f64 = 1e-12;

impl Divergence {
    /// Returns the divergence and writes `∂/∂q` to `gradient`. All slices have equal length; `p` and `q` each sum to 1.
    pub fn value_and_gradient(self, p: &[f64], q: &[f64], gradient: &mut [f64]) -> f64 {
        let log = |value: f64| value.max(MIN_PROBABILITY).ln();
        match self {
            Self::ForwardKl => {
                let mut sum = 0.0;
                for ((p, q), g) in p.iter().zip(q).zip(gradient) {
                    *g = -p / q.max(MIN_PROBABILITY);
                    sum += if *p > 0.0 { p * (log(*p) - log(*q)) } else { 0.0 };
                }
                sum
            }
            Self::ReverseKl => {
                let mut sum = 0.0;
                for ((p, q), g) in p.iter().zip(q).zip(gradient) {
                    let ratio = log(*q) - log(*p);
                    *g = ratio + 1.0;
                    sum += q * ratio;
                }
                sum
            }
            Self::Jsd(beta) => {
                let mut sum = 0.0;
                for ((p, q), g) in p.iter().zip(q).zip(gradient) {
                    let m = beta * p + (1.0 - beta) * q;
                    let (of_p, of_q) = (log(*p) - log(m), log(*q) - log(m));
                    sum += beta * p * of_p + (1.0 - beta) * q * of_q;
                    // The derivatives of `m` cancel: β p/m + (1 - β) q/m = 1.
                    *g = (1.0 - beta) * of_q;
                }
                sum
            }
            Self::AdaptiveKl => {
                let share = head_gap_fraction(p, q);
                let mut reverse = vec![0.0; q.len()];
                let forward = Self::ForwardKl.value_and_gradient(p, q, gradient);
                let backward = Self::ReverseKl.value_and_gradient(p, q, &mut reverse);
                for (g, r) in gradient.iter_mut().zip(&reverse) {
                    *g = share * *g + (1.0 - share) * r;
                }
                share * forward + (1.0 - share) * backward
            }
        }
    }
}

/// Returns the fraction of the gap `Σ |p - q|` in the head: the most likely classes that hold half of the teacher's
/// mass. The fraction is treated as a constant, without gradient. Returns 0.5 if there is no gap.
fn head_gap_fraction(p: &[f64], q: &[f64]) -> f64 {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_unstable_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    let (mut mass, mut head, mut tail) = (0.0, 0.0, 0.0);
    for index in order {
        let gap = (p[index] - q[index]).abs();
        if mass < 0.5 {
            head += gap
        } else {
            tail += gap
        }
        mass += p[index];
    }
    if head + tail > 0.0 { head / (head + tail) } else { 0.5 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normalize(values: &[f64]) -> Vec<f64> {
        let total: f64 = values.iter().sum();
        values.iter().map(|value| value / total).collect()
    }

    #[test]
    fn kl_and_jsd_match_closed_forms() {
        let (p, q) = ([0.5, 0.5], [0.25, 0.75]);
        let mut g = [0.0; 2];
        let forward = Divergence::ForwardKl.value_and_gradient(&p, &q, &mut g);
        assert!((forward - 0.5 * (2.0f64.ln() + (2.0f64 / 3.0).ln())).abs() < 1e-12);
        let reverse = Divergence::ReverseKl.value_and_gradient(&p, &q, &mut g);
        assert!((reverse - (0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln())).abs() < 1e-12);
        let half = Divergence::Jsd(0.5).value_and_gradient(&p, &q, &mut g);
        let m = [0.375, 0.625];
        let kl = |a: &[f64; 2]| -> f64 { (0..2).map(|i| a[i] * (a[i] / m[i]).ln()).sum() };
        assert!((half - 0.5 * kl(&p) - 0.5 * kl(&q)).abs() < 1e-12);
    }

    proptest! {
        /// Moves mass between two classes, so that the sum stays 1 as after a softmax.
        #[test]
        fn divergence_gradients_match_central_differences(
            p in prop::collection::vec(0.05f64..1.0, 2..8),
            q in prop::collection::vec(0.05f64..1.0, 8),
            beta in 0.1f64..0.9,
        ) {
            let (p, q) = (normalize(&p), normalize(&q[..p.len()]));
            for kind in [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::Jsd(beta)] {
                let mut g = vec![0.0; q.len()];
                let value = kind.value_and_gradient(&p, &q, &mut g);
                prop_assert!(value >= -1e-12);
                for i in 1..q.len() {
                    let h = 1e-6;
                    let shifted = |h: f64| { let mut q = q.clone(); q[i] += h; q[0] -= h; q };
                    let mut unused = vec![0.0; q.len()];
                    let slope = (kind.value_and_gradient(&p, &shifted(h), &mut unused) - kind.value_and_gradient(&p, &shifted(-h), &mut unused)) / (2.0 * h);
                    prop_assert!((slope - (g[i] - g[0])).abs() < 1e-5 * (1.0 + slope.abs()), "{kind:?}: {slope} against {}", g[i] - g[0]);
                }
                prop_assert!(kind.value_and_gradient(&p, &p, &mut g).abs() < 1e-12);
            }
            let mut g = vec![0.0; q.len()];
            let (mut f, mut r) = (g.clone(), g.clone());
            let ends = [Divergence::ForwardKl.value_and_gradient(&p, &q, &mut f), Divergence::ReverseKl.value_and_gradient(&p, &q, &mut r)];
            let adaptive = Divergence::AdaptiveKl.value_and_gradient(&p, &q, &mut g);
            prop_assert!(adaptive <= ends[0].max(ends[1]) + 1e-12 && adaptive >= ends[0].min(ends[1]) - 1e-12);
        }
    }
}
