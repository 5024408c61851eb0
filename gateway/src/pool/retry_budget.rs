//! How many retries a pool may make: a share of its requests, so that a failing pool is not asked twice as much.

/// Tokens for retries; every request pays some in, every retry takes one.
#[derive(Debug)]
pub struct RetryBudget {
    tokens: f64,
}

/// In hand at the start, and the most that can be saved.
const RESERVE: f64 = 10.0;

impl Default for RetryBudget {
    fn default() -> Self {
        Self { tokens: RESERVE }
    }
}

impl RetryBudget {
    /// A request came.
    pub fn deposit(&mut self, percent: u32) {
        self.tokens = (self.tokens + f64::from(percent) / 100.0).min(RESERVE.max(f64::from(percent)));
    }

    /// Whether a retry may be made; counts it.
    pub fn withdraw(&mut self) -> bool {
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn retries_stay_within_their_share(percent in 0u32..100, requests in 0usize..2_000) {
            let mut budget = RetryBudget::default();
            let mut retries = 0;
            for _ in 0..requests {
                budget.deposit(percent);
                while budget.withdraw() { retries += 1; }
            }
            prop_assert!(retries as f64 <= RESERVE + requests as f64 * f64::from(percent) / 100.0 + 1e-6);
        }
    }
}
