//! Statistics that a pool learns from responses: completion lengths per stage, and speed and concurrency limit per
//! node. Pure arithmetic.

use std::collections::HashMap;

/// Exponentially weighted moving average. Starts as the plain mean of the first values.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ewma {
    mean: f64,
    count: u32,
}

impl Ewma {
    /// Adds a value. `window` is the number of values after which older ones begin to fade.
    pub fn push(&mut self, value: f64, window: u32) {
        self.count = (self.count + 1).min(window);
        self.mean += (value - self.mean) / f64::from(self.count);
    }

    /// Returns the mean, or `None` without values.
    pub fn get(&self) -> Option<f64> {
        (self.count > 0).then_some(self.mean)
    }
}

/// Largest number of stages with their own mean.
const MAX_STAGES: usize = 64;

/// Mean length of completions in tokens, per stage and overall.
#[derive(Debug, Default)]
pub struct CompletionLengths {
    all: (Ewma, u64),
    stages: HashMap<String, (Ewma, u64)>,
}

/// Assumed length of a completion in tokens before any was measured.
const DEFAULT_COMPLETION_TOKENS: f64 = 500.0;

impl CompletionLengths {
    /// Adds the length of a complete response.
    pub fn push(&mut self, stage: Option<&str>, tokens: u64) {
        let learn = |(mean, count): &mut (Ewma, u64), window| {
            mean.push(tokens as f64, window);
            *count += 1;
        };
        learn(&mut self.all, 256);
        if let Some(stage) = stage {
            if let Some(known) = self.stages.get_mut(stage) {
                learn(known, 64);
            } else if self.stages.len() < MAX_STAGES {
                learn(self.stages.entry(stage.to_owned()).or_default(), 64);
            }
        }
    }

    /// Returns the mean length and the number of completions of `stage`, or of all stages if `stage` is `None`.
    pub fn mean_and_count(&self, stage: Option<&str>) -> (Option<f64>, u64) {
        let known = stage.map_or(Some(&self.all), |stage| self.stages.get(stage));
        known.map_or((None, 0), |(mean, count)| (mean.get(), *count))
    }

    /// Returns the expected length of a completion of `stage` in tokens, at least 1.
    pub fn expected_tokens(&self, stage: Option<&str>) -> u64 {
        let mean = stage.and_then(|stage| self.stages.get(stage)).and_then(|(mean, _)| mean.get());
        mean.or(self.all.0.get()).unwrap_or(DEFAULT_COMPLETION_TOKENS).max(1.0) as u64
    }
}

/// Seconds per token of a request on a node. This is the duration of the request divided by its own tokens, independent
/// of other requests in the batch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Speed {
    seconds_per_token: Ewma,
    measured_at_ms: u64,
}

/// Time constant, in milliseconds, with which the measured speed of an idle node decays to the usual one. A node that
/// was slow once is tried again.
const SPEED_DECAY_MS: f64 = 60_000.0;

impl Speed {
    /// Adds a completed request.
    pub fn push(&mut self, seconds: f64, tokens: u64, now_ms: u64) {
        self.seconds_per_token.push(seconds / tokens.max(1) as f64, 128);
        self.measured_at_ms = now_ms;
    }

    /// Returns the seconds per token. The value approaches `usual` with the time since the last measurement.
    pub fn seconds_per_token(&self, usual: f64, now_ms: u64) -> f64 {
        let Some(seen) = self.seconds_per_token.get() else { return usual };
        let age = now_ms.saturating_sub(self.measured_at_ms) as f64;
        let weight = (-age / SPEED_DECAY_MS).exp();
        seen * weight + usual * (1.0 - weight)
    }

    /// Returns the measured mean without decay.
    pub fn measured_seconds_per_token(&self) -> Option<f64> {
        self.seconds_per_token.get()
    }
}

/// Milliseconds per token as a linear function of the requests on the node. Least squares over responses, older ones
/// with smaller weight.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenTime {
    weight: f64,
    batch: f64,
    ms: f64,
    batch_batch: f64,
    batch_ms: f64,
    skipped: u8,
}

/// Number of responses after the start of a node that are ignored, because warm-up distorts them.
const WARM_UP_RESPONSES: u8 = 3;
/// Factor on the weight of all earlier responses with each new one.
const DECAY_PER_RESPONSE: f64 = 0.99;

impl TokenTime {
    /// Adds a response: number of requests on the node, and milliseconds per token.
    pub fn push(&mut self, batch: usize, ms: f64) {
        if self.skipped < WARM_UP_RESPONSES {
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
            *sum = *sum * DECAY_PER_RESPONSE + value;
        }
    }

    /// Fits one line to the measurements of several nodes. Returns intercept and slope in milliseconds, or `None` with
    /// fewer than three responses.
    pub fn fit_line(nodes: impl IntoIterator<Item = Self>) -> Option<[f64; 2]> {
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
        // A slope needs different batch sizes. A negative slope is noise: larger batches do not make a node faster.
        let slope = if spread > 0.05 * x * x { (together / spread).max(0.0) } else { 0.0 };
        let alone = (y - slope * x).max(y * 0.05);
        Some([alone, (y - alone).max(0.0) / x.max(1.0)])
    }
}

/// Learned limit of concurrent requests on a node (AIMD). The limit rises by one for as many successes at the limit as
/// there are slots. It falls to 90 % of the requests in flight when the node reports that it is busy. A configured
/// limit is constant.
#[derive(Debug, Clone, Copy)]
pub struct ConcurrencyLimit {
    limit: f64,
    is_learned: bool,
}

impl ConcurrencyLimit {
    /// Creates a limit: `known` if configured, else 16 as a start for learning.
    pub fn new(known: Option<usize>) -> Self {
        Self { limit: known.unwrap_or(16) as f64, is_learned: known.is_none() }
    }

    /// Applies a new configuration. A learned value is kept if the limit is still to be learned.
    pub fn configure(&mut self, known: Option<usize>) {
        if known.is_some() || !self.is_learned {
            *self = Self::new(known);
        }
    }

    /// Returns whether the limit is configured rather than learned.
    pub fn is_configured(&self) -> bool {
        !self.is_learned
    }

    /// Returns the current limit.
    pub fn get(&self) -> usize {
        self.limit as usize
    }

    /// Records a success with `in_flight` requests on the node.
    pub fn record_success(&mut self, in_flight: usize) {
        if self.is_learned && in_flight >= self.get() {
            self.limit = (self.limit + 1.0 / self.limit).min(4096.0);
        }
    }

    /// Records that the node reported to be busy with `in_flight` requests.
    pub fn record_busy(&mut self, in_flight: usize) {
        if self.is_learned {
            self.limit = (in_flight as f64 * 0.9).floor().min(self.limit).max(1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn learns_completion_lengths_per_stage() {
        let mut lengths = CompletionLengths::default();
        assert_eq!(lengths.expected_tokens(None), 500);
        for _ in 0..100 {
            lengths.push(Some("judge"), 10);
            lengths.push(Some("generate"), 8_000);
        }
        assert_eq!(
            (lengths.expected_tokens(Some("judge")), lengths.expected_tokens(Some("generate"))),
            (10, 8_000)
        );
        assert!((3_000..5_000).contains(&lengths.expected_tokens(Some("new"))));
    }

    #[test]
    fn learned_limit_converges_to_capacity() {
        let mut slots = ConcurrencyLimit::new(None);
        for _ in 0..20_000 {
            let in_flight = slots.get();
            if in_flight > 40 { slots.record_busy(in_flight) } else { slots.record_success(in_flight) }
        }
        assert!((30..=41).contains(&slots.get()), "{}", slots.get());
        let mut known = ConcurrencyLimit::new(Some(3));
        known.record_busy(1);
        known.record_success(3);
        assert_eq!(known.get(), 3);
    }

    #[test]
    fn token_time_fits_a_line_over_batch_size() {
        let mut learnt = TokenTime::default();
        assert_eq!(TokenTime::fit_line([learnt]), None);
        for number in 0..200 {
            let batch = 1 + number % 64;
            learnt.push(batch, 15.0 + 0.25 * batch as f64);
        }
        let [alone, each] = TokenTime::fit_line([learnt, TokenTime::default()]).unwrap();
        assert!((alone - 15.0).abs() < 1e-6 && (each - 0.25).abs() < 1e-6, "{alone} {each}");
        let mut one = TokenTime::default();
        (0..9).for_each(|_| one.push(8, 40.0));
        let [alone, each] = TokenTime::fit_line([one]).unwrap();
        assert!((alone - 40.0).abs() < 1e-9 && each.abs() < 1e-9, "one batch size says nothing about others");
    }

    #[test]
    fn speed_decays_to_the_usual_one() {
        let mut speed = Speed::default();
        assert_eq!(speed.seconds_per_token(0.5, 0), 0.5);
        speed.push(4.0, 4, 0);
        assert_eq!(speed.seconds_per_token(0.5, 0), 1.0);
        assert!(speed.seconds_per_token(0.5, 600_000) < 0.51);
    }

    proptest! {
        #[test]
        fn ewma_stays_between_its_values(values in prop::collection::vec(0.0f64..1e6, 1..100), window in 1u32..50) {
            let mut mean = Ewma::default();
            for value in &values { mean.push(*value, window); }
            let mean = mean.get().unwrap();
            prop_assert!(values.iter().any(|v| *v <= mean + 1e-6) && values.iter().any(|v| *v >= mean - 1e-6));
        }
    }
}
