//! Concurrency limit per model: the smallest of the recipe's `concurrency`, the gateway's advice and an adaptive
//! limit.
//!
//! The adaptive limit follows additive increase, multiplicative decrease, as congestion avoidance in TCP does (RFC
//! 5681, section 3.1). A busy response multiplies the limit by 0.7; a success increases the limit `n` by `1 / n`.
//! Deliberately absent: queue order and retries.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Factor of the decrease after a busy response.
const DECREASE_FACTOR: f64 = 0.7;
/// Shortest time between two decreases, so that a burst of busy responses counts once.
const MIN_DECREASE_INTERVAL: Duration = Duration::from_secs(1);

/// Concurrency limits of all models.
#[derive(Debug)]
pub struct ConcurrencyLimits {
    most: usize,
    by_model: Mutex<HashMap<String, Arc<ConcurrencyLimiter>>>,
}

impl ConcurrencyLimits {
    /// Creates limits of at most `most` open requests per model, and at least one.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), by_model: Mutex::default() }
    }

    /// Returns the limit of a model. Creates the limit on first use.
    pub fn for_model(&self, model: &str) -> Arc<ConcurrencyLimiter> {
        let mut gates = self.by_model.lock().unwrap_or_else(PoisonError::into_inner);
        match gates.get(model) {
            Some(gate) => Arc::clone(gate),
            None => {
                let gate = Arc::new(ConcurrencyLimiter::new(self.most));
                gates.insert(model.to_owned(), Arc::clone(&gate));
                gate
            }
        }
    }
}

/// State behind the lock of a [`Gate`].
#[derive(Debug)]
struct LimiterState {
    /// Limit of the recipe.
    most: usize,
    /// Limit that the gateway advises.
    advised: usize,
    /// Adaptive limit.
    bearable: f64,
    /// Permits in use.
    open: usize,
    /// Time of the last decrease.
    cut: Option<Instant>,
}

impl LimiterState {
    fn limit(&self) -> usize {
        self.most.min(self.advised).min(self.bearable as usize).max(1)
    }
}

/// Concurrency limit of one model.
#[derive(Debug)]
pub struct ConcurrencyLimiter {
    state: Mutex<LimiterState>,
    freed: Notify,
}

/// Permit for one open request. Dropping the permit frees its slot.
#[derive(Debug)]
pub struct Permit(Arc<ConcurrencyLimiter>);

impl ConcurrencyLimiter {
    fn new(most: usize) -> Self {
        let state = LimiterState { most, advised: most, bearable: most as f64, open: 0, cut: None };
        Self { state: Mutex::new(state), freed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, LimiterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a free slot and returns its permit.
    pub async fn acquire(self: &Arc<Self>) -> Permit {
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            if let Some(place) = self.try_acquire() {
                return place;
            }
            freed.await;
        }
    }

    fn try_acquire(self: &Arc<Self>) -> Option<Permit> {
        let mut state = self.state();
        let free = state.open < state.limit();
        free.then(|| {
            state.open += 1;
            // A raised limit may free several slots at once, but a notification wakes only one waiter; each waiter
            // wakes the next.
            if state.open < state.limit() {
                self.freed.notify_one();
            }
            Permit(Arc::clone(self))
        })
    }

    /// Returns the current limit on open requests, at least 1.
    pub fn limit(&self) -> usize {
        self.state().limit()
    }

    /// Sets the limit that the gateway advises for its nodes, at least 1.
    pub fn set_advised_limit(&self, open: usize) {
        self.state().advised = open.max(1);
        self.freed.notify_one();
    }

    /// Decreases the adaptive limit after a busy response (429, 503, 529), at most once per second.
    pub fn record_busy(&self, now: Instant) {
        let mut state = self.state();
        if state.cut.is_none_or(|cut| now.duration_since(cut) >= MIN_DECREASE_INTERVAL) {
            state.bearable = (state.limit() as f64 * DECREASE_FACTOR).max(1.0);
            state.cut = Some(now);
        }
    }

    /// Increases the adaptive limit after a successful response, up to the recipe's `concurrency`.
    pub fn record_success(&self) {
        let mut state = self.state();
        state.bearable = (state.bearable + 1.0 / state.bearable).min(state.most as f64);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.state().open -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn advised_limit_holds_and_every_waiter_enters() {
        let gates = ConcurrencyLimits::new(8);
        let gate = gates.for_model("m");
        gate.set_advised_limit(3);
        let most = Arc::new(Mutex::new((0, 0)));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let (gate, most) = (gates.for_model("m"), Arc::clone(&most));
            tasks.spawn(async move {
                let _place = gate.acquire().await;
                {
                    let mut most = most.lock().unwrap();
                    most.0 += 1;
                    most.1 = most.1.max(most.0);
                }
                tokio::task::yield_now().await;
                most.lock().unwrap().0 -= 1;
            });
        }
        tasks.join_all().await;
        assert_eq!(*most.lock().unwrap(), (0, 3));
        assert_eq!(gate.state().open, 0);
    }

    #[tokio::test]
    async fn raised_limit_wakes_all_waiters() {
        let gate = ConcurrencyLimits::new(4).for_model("m");
        gate.set_advised_limit(1);
        let first = gate.acquire().await;
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let gate = Arc::clone(&gate);
                tokio::spawn(async move { gate.acquire().await })
            })
            .collect();
        tokio::task::yield_now().await;
        gate.set_advised_limit(9);
        let mut inside = Vec::new();
        for task in waiting {
            inside.push(tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap());
        }
        assert_eq!(gate.state().open, 4, "never more than the recipe allows");
        drop((first, inside));
    }

    #[test]
    fn burst_decreases_the_limit_once_and_successes_restore_it() {
        let gate = ConcurrencyLimits::new(100).for_model("m");
        let now = Instant::now();
        gate.record_busy(now);
        gate.record_busy(now + Duration::from_millis(10));
        assert_eq!(gate.limit(), 70);
        gate.record_busy(now + Duration::from_secs(2));
        assert_eq!(gate.limit(), 49);
        for _ in 0..49 * 3 {
            gate.record_success();
        }
        assert_eq!(gate.limit(), 51);
        for _ in 0..20_000 {
            gate.record_success();
        }
        assert_eq!(gate.limit(), 100);
        for n in 0..100 {
            gate.record_busy(now + Duration::from_secs(10 + n));
        }
        assert_eq!(gate.limit(), 1);
    }
}
