//! The retry budget of a pool (as in Finagle): retries are at most a share of all requests, so that they do not
//! multiply the load on a failing pool.

/// Token bucket: each request deposits a fraction of a token and each retry withdraws one token.
#[derive(Debug)]
pub struct RetryBudget {
    tokens: f64,
}

/// Initial number of tokens, and the largest number that can be saved up.
const RESERVE_TOKENS: f64 = 10.0;

impl Default for RetryBudget {
    fn default() -> Self {
        Self { tokens: RESERVE_TOKENS }
    }
}

impl RetryBudget {
    /// Deposits for one request: `percent` hundredths of a token.
    pub fn deposit(&mut self, percent: u32) {
        self.tokens = (self.tokens + f64::from(percent) / 100.0).min(RESERVE_TOKENS.max(f64::from(percent)));
    }

    /// Withdraws one token. Returns whether the retry is permitted.
    pub fn take_retry(&mut self) -> bool {
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
        fn retries_never_exceed_reserve_and_percentage(percent in 0u32..100, requests in 0usize..2_000) {
            let mut budget = RetryBudget::default();
            let mut retries = 0;
            for _ in 0..requests {
                budget.deposit(percent);
                while budget.take_retry() { retries += 1; }
            }
            prop_assert!(retries as f64 <= RESERVE_TOKENS + requests as f64 * f64::from(percent) / 100.0 + 1e-6);
        }
    }
}
