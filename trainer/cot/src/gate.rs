//! How many requests may be open at once, by model: what the recipe allows, what the gateway advises, and less while an endpoint
//! says that it is busy (additive increase, multiplicative decrease).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// What is left of the limit after an answer of "busy".
const CUT: f64 = 0.7;
/// Answers of one burst cut once.
const CUT_EVERY: Duration = Duration::from_secs(1);

/// The gates of all models.
#[derive(Debug)]
pub struct Gates {
    most: usize,
    by_model: Mutex<HashMap<String, Arc<Gate>>>,
}

impl Gates {
    /// At most `most` open requests per model.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), by_model: Mutex::default() }
    }

    /// The gate of a model.
    pub fn of(&self, model: &str) -> Arc<Gate> {
        let mut gates = self.by_model.lock().unwrap_or_else(PoisonError::into_inner);
        match gates.get(model) {
            Some(gate) => Arc::clone(gate),
            None => {
                let gate = Arc::new(Gate::new(self.most));
                gates.insert(model.to_owned(), Arc::clone(&gate));
                gate
            }
        }
    }
}

#[derive(Debug)]
struct State {
    most: usize,
    advised: usize,
    bearable: f64,
    open: usize,
    cut: Option<Instant>,
}

impl State {
    fn limit(&self) -> usize {
        self.most.min(self.advised).min(self.bearable as usize).max(1)
    }
}

/// The gate of one model.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    freed: Notify,
}

/// A place inside; it is free again when this is dropped.
#[derive(Debug)]
pub struct Place(Arc<Gate>);

impl Gate {
    fn new(most: usize) -> Self {
        let state = State { most, advised: most, bearable: most as f64, open: 0, cut: None };
        Self { state: Mutex::new(state), freed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place.
    pub async fn enter(self: &Arc<Self>) -> Place {
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            if let Some(place) = self.try_enter() {
                return place;
            }
            freed.await;
        }
    }

    fn try_enter(self: &Arc<Self>) -> Option<Place> {
        let mut state = self.state();
        let free = state.open < state.limit();
        free.then(|| {
            state.open += 1;
            // Places may have come in numbers, and a wake-up is for one.
            if state.open < state.limit() {
                self.freed.notify_one();
            }
            Place(Arc::clone(self))
        })
    }

    /// How many may be open now.
    pub fn limit(&self) -> usize {
        self.state().limit()
    }

    /// The gateway says how many its nodes can use.
    pub fn advise(&self, open: usize) {
        self.state().advised = open.max(1);
        self.freed.notify_one();
    }

    /// An endpoint was busy.
    pub fn busy(&self, now: Instant) {
        let mut state = self.state();
        if state.cut.is_none_or(|cut| now.duration_since(cut) >= CUT_EVERY) {
            state.bearable = (state.limit() as f64 * CUT).max(1.0);
            state.cut = Some(now);
        }
    }

    /// An answer came.
    pub fn answered(&self) {
        let mut state = self.state();
        state.bearable = (state.bearable + 1.0 / state.bearable).min(state.most as f64);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.state().open -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_more_are_open_than_advised_and_all_get_in() {
        let gates = Gates::new(8);
        let gate = gates.of("m");
        gate.advise(3);
        let most = Arc::new(Mutex::new((0, 0)));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let (gate, most) = (gates.of("m"), Arc::clone(&most));
            tasks.spawn(async move {
                let _place = gate.enter().await;
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
    async fn more_places_wake_all_who_wait_for_them() {
        let gate = Gates::new(4).of("m");
        gate.advise(1);
        let first = gate.enter().await;
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let gate = Arc::clone(&gate);
                tokio::spawn(async move { gate.enter().await })
            })
            .collect();
        tokio::task::yield_now().await;
        gate.advise(9);
        let mut inside = Vec::new();
        for task in waiting {
            inside.push(tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap());
        }
        assert_eq!(gate.state().open, 4, "never more than the recipe allows");
        drop((first, inside));
    }

    #[test]
    fn busy_cuts_once_a_burst_and_answers_bring_it_back() {
        let gate = Gates::new(100).of("m");
        let now = Instant::now();
        gate.busy(now);
        gate.busy(now + Duration::from_millis(10));
        assert_eq!(gate.limit(), 70);
        gate.busy(now + Duration::from_secs(2));
        assert_eq!(gate.limit(), 49);
        for _ in 0..49 * 3 {
            gate.answered();
        }
        assert_eq!(gate.limit(), 51);
        for _ in 0..20_000 {
            gate.answered();
        }
        assert_eq!(gate.limit(), 100);
        for n in 0..100 {
            gate.busy(now + Duration::from_secs(10 + n));
        }
        assert_eq!(gate.limit(), 1);
    }
}
