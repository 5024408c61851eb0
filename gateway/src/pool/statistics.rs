//! What a pool learns from its answers: how long completions are (per stage), how fast each node is, how many requests
//! a node takes at once. Pure arithmetic.

use std::collections::HashMap;

/// Exponentially weighted mean; the first values count more, so that it is right soon.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ewma {
    mean: f64,
    seen: u32,
}

impl Ewma {
    /// Takes a value; `window` is how many values the mean remembers.
    pub fn push(&mut self, value: f64, window: u32) {
        self.seen = (self.seen + 1).min(window);
        self.mean += (value - self.mean) / f64::from(self.seen);
    }

    /// The mean, if anything was seen.
    pub fn get(&self) -> Option<f64> {
        (self.seen > 0).then_some(self.mean)
    }
}

/// Stages beyond this share one mean.
const STAGES: usize = 64;

/// Mean length of completions, per stage and over all.
#[derive(Debug, Default)]
pub struct CompletionLengths {
    all: (Ewma, u64),
    stages: HashMap<String, (Ewma, u64)>,
}

/// What a completion is taken to have before any was seen.
const UNKNOWN_LENGTH: f64 = 500.0;

impl CompletionLengths {
    /// Learns a finished completion.
    pub fn push(&mut self, stage: Option<&str>, tokens: u64) {
        let learn = |(mean, count): &mut (Ewma, u64), window| {
            mean.push(tokens as f64, window);
            *count += 1;
        };
        learn(&mut self.all, 256);
        if let Some(stage) = stage {
            if let Some(known) = self.stages.get_mut(stage) {
                learn(known, 64);
            } else if self.stages.len() < STAGES {
                learn(self.stages.entry(stage.to_owned()).or_default(), 64);
            }
        }
    }

    /// Mean of the completions seen and how many they were, of one stage or of all.
    pub fn mean_and_count(&self, stage: Option<&str>) -> (Option<f64>, u64) {
        let known = stage.map_or(Some(&self.all), |stage| self.stages.get(stage));
        known.map_or((None, 0), |(mean, count)| (mean.get(), *count))
    }

    /// What a completion of that stage will have.
    pub fn expected(&self, stage: Option<&str>) -> u64 {
        let mean = stage.and_then(|stage| self.stages.get(stage)).and_then(|(mean, _)| mean.get());
        mean.or(self.all.0.get()).unwrap_or(UNKNOWN_LENGTH).max(1.0) as u64
    }
}

/// Seconds that a node takes per token of a request (its own, not a share of the batch).
#[derive(Debug, Clone, Copy, Default)]
pub struct Speed {
    seconds_per_token: Ewma,
    at_ms: u64,
}

/// An unused node's speed is forgotten over this time, so that one that was slow for a while gets another chance.
const FORGET_MS: f64 = 60_000.0;

impl Speed {
    /// Learns a finished request.
    pub fn push(&mut self, seconds: f64, tokens: u64, now_ms: u64) {
        self.seconds_per_token.push(seconds / tokens.max(1) as f64, 128);
        self.at_ms = now_ms;
    }

    /// Seconds per token, drawn towards `usual` the longer nothing was seen.
    pub fn get(&self, usual: f64, now_ms: u64) -> f64 {
        let Some(seen) = self.seconds_per_token.get() else { return usual };
        let age = now_ms.saturating_sub(self.at_ms) as f64;
        let weight = (-age / FORGET_MS).exp();
        seen * weight + usual * (1.0 - weight)
    }

    /// What was measured.
    pub fn measured(&self) -> Option<f64> {
        self.seconds_per_token.get()
    }
}

/// Milliseconds per token as a line over the requests that share the node: least squares over answers, older ones counting
/// less.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenTime {
    weight: f64,
    batch: f64,
    ms: f64,
    batch_batch: f64,
    batch_ms: f64,
    skipped: u8,
}

/// Answers by a node that has just started say little about it.
const WARM_UP: u8 = 3;
/// What an answer's weight is multiplied by with each later one.
const FADE: f64 = 0.99;

impl TokenTime {
    /// Learns an answer: how many requests the node had, and how long a token took.
    pub fn push(&mut self, batch: usize, ms: f64) {
        if self.skipped < WARM_UP {
            self.skipped += 1;
            return;
        }
        let x = batch as f64;
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.batch, x),
            (&mut self.ms, ms),
            (&mut self.batch_batch, x * x),
            (&mut self.batch_ms, x * ms),
        ] {
            *sum = *sum * FADE + value;
        }
    }

    /// The line through what several nodes learnt: milliseconds alone, and for each request besides.
    pub fn line(nodes: impl IntoIterator<Item = Self>) -> Option<[f64; 2]> {
        let sum = nodes.into_iter().fold(Self::default(), |a, b| Self {
            weight: a.weight + b.weight,
            batch: a.batch + b.batch,
            ms: a.ms + b.ms,
            batch_batch: a.batch_batch + b.batch_batch,
            batch_ms: a.batch_ms + b.batch_ms,
            skipped: 0,
        });
        if sum.weight < 3.0 {
            return None;
        }
        let (x, y) = (sum.batch / sum.weight, sum.ms / sum.weight);
        let spread = sum.batch_batch / sum.weight - x * x;
        let together = sum.batch_ms / sum.weight - x * y;
        // A line needs two places to stand on; and no node gets faster by having more to do.
        let slope = if spread > 0.05 * x * x { (together / spread).max(0.0) } else { 0.0 };
        let alone = (y - slope * x).max(y * 0.05);
        Some([alone, (y - alone).max(0.0) / x.max(1.0)])
    }
}

/// How many requests a node takes at once, when nobody has said: grows by one for as many successes as it has slots,
/// falls below what was in flight when the node said that it is busy (additive increase, multiplicative decrease).
#[derive(Debug, Clone, Copy)]
pub struct ConcurrencyLimit {
    limit: f64,
    measured: bool,
}

impl ConcurrencyLimit {
    /// Known, or to be learnt.
    pub fn new(known: Option<usize>) -> Self {
        Self { limit: known.unwrap_or(16) as f64, measured: known.is_none() }
    }

    /// Takes a new setting; what was learnt stays where it still has to be learnt.
    pub fn configure(&mut self, known: Option<usize>) {
        if known.is_some() || !self.measured {
            *self = Self::new(known);
        }
    }

    /// Whether somebody has said the number.
    pub fn known(&self) -> bool {
        !self.measured
    }

    /// The number now.
    pub fn get(&self) -> usize {
        self.limit as usize
    }

    /// An answer went well while so many were in flight.
    pub fn success(&mut self, in_flight: usize) {
        if self.measured && in_flight >= self.get() {
            self.limit = (self.limit + 1.0 / self.limit).min(4096.0);
        }
    }

    /// The node said that it is busy while so many were in flight.
    pub fn busy(&mut self, in_flight: usize) {
        if self.measured {
            self.limit = (in_flight as f64 * 0.9).floor().min(self.limit).max(1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_are_learnt_per_stage() {
        let mut lengths = CompletionLengths::default();
        assert_eq!(lengths.expected(None), 500);
        for _ in 0..100 {
            lengths.push(Some("judge"), 10);
            lengths.push(Some("generate"), 8_000);
        }
        assert_eq!((lengths.expected(Some("judge")), lengths.expected(Some("generate"))), (10, 8_000));
        assert!((3_000..5_000).contains(&lengths.expected(Some("new"))));
    }

    #[test]
    fn slots_find_what_a_node_takes() {
        let mut slots = ConcurrencyLimit::new(None);
        for _ in 0..20_000 {
            let in_flight = slots.get();
            if in_flight > 40 { slots.busy(in_flight) } else { slots.success(in_flight) }
        }
        assert!((30..=41).contains(&slots.get()), "{}", slots.get());
        let mut known = ConcurrencyLimit::new(Some(3));
        known.busy(1);
        known.success(3);
        assert_eq!(known.get(), 3);
    }

    #[test]
    fn the_time_of_a_token_is_a_line_over_the_batch() {
        let mut learnt = TokenTime::default();
        assert_eq!(TokenTime::line([learnt]), None);
        for number in 0..200 {
            let batch = 1 + number % 64;
            learnt.push(batch, 15.0 + 0.25 * batch as f64);
        }
        let [alone, each] = TokenTime::line([learnt, TokenTime::default()]).unwrap();
        assert!((alone - 15.0).abs() < 1e-6 && (each - 0.25).abs() < 1e-6, "{alone} {each}");
        let mut one = TokenTime::default();
        (0..9).for_each(|_| one.push(8, 40.0));
        let [alone, each] = TokenTime::line([one]).unwrap();
        assert!((alone - 40.0).abs() < 1e-9 && each.abs() < 1e-9, "one batch size says nothing about others");
    }

    #[test]
    fn an_old_speed_is_forgotten() {
        let mut speed = Speed::default();
        assert_eq!(speed.get(0.5, 0), 0.5);
        speed.push(4.0, 4, 0);
        assert_eq!(speed.get(0.5, 0), 1.0);
        assert!(speed.get(0.5, 600_000) < 0.51);
    }

    proptest! {
        #[test]
        fn a_mean_stays_between_its_values(values in prop::collection::vec(0.0f64..1e6, 1..100), window in 1u32..50) {
            let mut mean = Ewma::default();
            for value in &values { mean.push(*value, window); }
            let mean = mean.get().unwrap();
            prop_assert!(values.iter().any(|v| *v <= mean + 1e-6) && values.iter().any(|v| *v >= mean - 1e-6));
        }
    }
}
