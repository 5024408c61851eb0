//! Learning rate schedule: linear warm-up, then cosine decay to a minimum (Loshchilov and Hutter 2017, "SGDR"). One
//! curve spans one phase; there are no restarts within a phase.

/// Cosine schedule with warm-up over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosineSchedule {
    /// Learning rate at the end of the warm-up.
    pub peak: f64,
    /// Number of steps of the phase.
    pub steps: usize,
    /// Fraction of the steps used for the warm-up, 0 to 1.
    pub warmup_ratio: f64,
    /// Minimum learning rate as a fraction of `peak`, 0 to 1.
    pub floor_ratio: f64,
}

impl CosineSchedule {
    /// Returns the learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: usize) -> f64 {
        let warmup = (self.steps as f64 * self.warmup_ratio).ceil();
        let at = step as f64;
        if at < warmup {
            return self.peak * (at + 1.0) / warmup;
        }
        let progress = ((at - warmup) / (self.steps as f64 - warmup).max(1.0)).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.peak * (self.floor_ratio + (1.0 - self.floor_ratio) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn learning_rate_rises_then_falls_within_bounds(steps in 2usize..500, warmup_ratio in 0.0f64..0.5, floor_ratio in 0.0f64..1.0) {
            let schedule = CosineSchedule { peak: 1e-3, steps, warmup_ratio, floor_ratio };
            let rates: Vec<f64> = (0..steps).map(|step| schedule.rate(step)).collect();
            let top = rates.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            prop_assert!(rates[..=top].windows(2).all(|pair| pair[0] <= pair[1]));
            prop_assert!(rates[top..].windows(2).all(|pair| pair[0] >= pair[1]));
            prop_assert!(rates.iter().all(|&rate| rate > 0.0 && rate <= 1e-3 + 1e-12));
        }
    }
}
