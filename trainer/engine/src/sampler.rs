//! Samples the next token from logits. The random stream is an argument, so equal seeds and logits give
//! equal tokens. Order of operations: logit bias, penalties, temperature, top-k, top-p and min-p.

use std::collections::HashMap;

use rand::Rng;

use crate::error::EngineError;
use crate::ops::sum_exp;

/// Number of most likely tokens that are sorted first if top-k is off.
const INITIAL_CANDIDATES: usize = 64;

/// Sampling parameters of a request (as in vLLM).
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divisor of the logits, 0 to 100; 0 selects the most likely token.
    pub temperature: f32,
    /// Keeps the most likely tokens up to this probability mass, above 0 to 1; 1 keeps all.
    pub top_p: f32,
    /// Keeps the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens with at least this fraction of the best token's probability, 0 to 1; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or completion, above 0; 1 is
    /// off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the completion, -2 to 2; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from the logits of tokens in the completion, -2 to 2; 0 is off.
    pub frequency_penalty: f32,
    /// Token ids with the bias added to their logits, -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random stream.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Checks all ranges, and token ids against the size of the vocabulary. Fails with
    /// [`EngineError::Parameter`].
    pub fn validate(&self, vocabulary: usize) -> Result<(), EngineError> {
        let wrong = |name, expected, found: f32| EngineError::InvalidParameter {
            name,
            expected,
            found: found.to_string(),
        };
        if !(0.0..=100.0).contains(&self.temperature) {
            return Err(wrong("temperature", "between 0 and 100", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(wrong("top_p", "above 0 and at most 1", self.top_p));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(wrong("min_p", "between 0 and 1", self.min_p));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(wrong("repetition_penalty", "above 0", self.repetition_penalty));
        }
        for (name, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if !(-2.0..=2.0).contains(&value) {
                return Err(wrong(name, "between -2 and 2", value));
            }
        }
        for &(token, bias) in &self.logit_bias {
            if !(-100.0..=100.0).contains(&bias) {
                return Err(wrong("logit_bias", "between -100 and 100", bias));
            }
            if token as usize >= vocabulary {
                let expected = "token ids of the model's vocabulary";
                let found = token.to_string();
                return Err(EngineError::InvalidParameter { name: "logit_bias", expected, found });
            }
        }
        Ok(())
    }

    /// Samples a token. Changes `logits` in place. `prompt` and `completion` determine the penalties.
    pub fn sample(&self, logits: &mut [f32], prompt: &[u32], completion: &[u32], rng: &mut impl Rng) -> u32 {
        for &(token, bias) in &self.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        self.apply_penalties(logits, prompt, completion);
        if self.temperature == 0.0 {
            return argmax(logits);
        }
        // From here on logits hold the exponents of unnormalized probabilities; the best token has exponent
        // 0.
        let (max, inverse) = (logits[argmax(logits) as usize], 1.0 / self.temperature);
        logits.iter_mut().for_each(|logit| {
            let exponent = (*logit - max) * inverse;
            *logit = if exponent.is_nan() { f32::NEG_INFINITY } else { exponent };
        });
        let mut order = if self.top_k > 0 {
            sorted_candidates(logits, self.top_k)
        } else {
            // Sorting only the first candidates saves most of the time with thousands of unlikely tokens.
            sorted_candidates(logits, INITIAL_CANDIDATES)
        };
        let whole: f32 = if self.top_k > 0 {
            order.iter().map(|&id| logits[id as usize].exp()).sum()
        } else {
            sum_exp(logits, 0.0)
        };
        let random = rng.random::<f32>();
        loop {
            let all = self.top_k > 0 || order.len() == logits.len();
            if let Some(id) = self.select_candidate(logits, &order, whole, random, all) {
                return id;
            }
            order = sorted_candidates(logits, order.len() * 16);
        }
    }

    /// Returns the token at quantile `random` of the candidates in `order`, most likely first, after top-p
    /// and min-p. `whole` is the mass of all candidates; `all` means that `order` is complete. Returns
    /// `None` if more sorted candidates are needed.
    fn select_candidate(
        &self,
        logits: &[f32],
        order: &[u32],
        whole: f32,
        random: f32,
        all: bool,
    ) -> Option<u32> {
        let weights = || order.iter().map(|&id| logits[id as usize].exp());
        let mut kept = (order.len(), whole);
        if self.top_p < 1.0 || self.min_p > 0.0 {
            let (mut count, mut mass) = (0, 0.0);
            let mut over = false;
            for weight in weights() {
                if count > 0 && weight < self.min_p {
                    over = true;
                    break;
                }
                count += 1;
                mass += weight;
                if self.top_p < 1.0 && mass >= self.top_p * whole {
                    over = true;
                    break;
                }
            }
            if !over && !all {
                return None;
            }
            kept = (count, mass);
        }
        let mut left = random * kept.1;
        for (&id, weight) in order[..kept.0].iter().zip(weights()) {
            left -= weight;
            if left <= 0.0 {
                return Some(id);
            }
        }
        // Rounding may leave a rest; the last kept token takes the rest.
        (all || kept.0 < order.len()).then(|| order[kept.0 - 1])
    }

    /// Applies the repetition, presence and frequency penalties to `logits`.
    fn apply_penalties(&self, logits: &mut [f32], prompt: &[u32], completion: &[u32]) {
        #[expect(clippy::float_cmp, reason = "1 and 0 are the exact values for off")]
        let (repeats, counts) =
            (self.repetition_penalty != 1.0, self.presence_penalty != 0.0 || self.frequency_penalty != 0.0);
        if repeats {
            let seen: std::collections::HashSet<_> = prompt.iter().chain(completion).collect();
            for &id in seen {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / self.repetition_penalty
                    } else {
                        *logit * self.repetition_penalty
                    };
                }
            }
        }
        if counts {
            let mut times: HashMap<u32, f32> = HashMap::new();
            for &id in completion {
                *times.entry(id).or_default() += 1.0;
            }
            for (id, times) in times {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit -= self.presence_penalty + self.frequency_penalty * times;
                }
            }
        }
    }
}

/// Returns the token with the largest logit, the lowest id among equals. NaN never wins.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (id, logit);
        }
    }
    best.0 as u32
}

/// Returns the `k` most likely tokens, most likely first; an empty list for 0.
pub(crate) fn top_tokens(logits: &[f32], k: usize) -> Vec<u32> {
    if k == 0 { Vec::new() } else { sorted_candidates(logits, k) }
}

/// Returns the first `k` ids by falling logit; `k` must be at least 1.
fn sorted_candidates(logits: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let falling = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, falling);
        order.truncate(k);
    }
    order.sort_unstable_by(falling);
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-10.0f32..10.0, 2..40)
    }

    /// Reference implementation: sorts all tokens first.
    fn plain(sampling: &SamplingParams, logits: &[f32], random: f32) -> u32 {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if sampling.top_k > 0 {
            order.truncate(sampling.top_k);
        }
        let weight =
            |id: u32| ((logits[id as usize] - logits[order[0] as usize]) / sampling.temperature).exp();
        let whole: f32 = order.iter().map(|&id| weight(id)).sum();
        let (mut kept, mut mass) = (Vec::new(), 0.0);
        for &id in &order {
            if !kept.is_empty() && (mass >= sampling.top_p * whole || weight(id) < sampling.min_p) {
                break;
            }
            kept.push(id);
            mass += weight(id);
        }
        let mut left = random * mass;
        *kept
            .iter()
            .find(|&&id| {
                left -= weight(id);
                left <= 0.0
            })
            .unwrap_or(kept.last().unwrap())
    }

    proptest! {
        /// Partial sorting picks the token of full sorting, except for rounding at the border of two
        /// tokens.
        #[test]
        fn partial_sorting_matches_full_sorting(
            logits in prop::collection::vec(-9.0f32..9.0, 1..3000), k in 0usize..90, p in 0.01f32..1.2, m in -0.2f32..0.3, t in 0.05f32..3.0, seed: u64,
        ) {
            let sampling = SamplingParams { temperature: t, top_k: k, top_p: p.min(1.0), min_p: m.max(0.0), ..SamplingParams::default() };
            let random: f32 = rand::Rng::random(&mut ChaCha8Rng::seed_from_u64(seed));
            let ours = sampling.sample(&mut logits.clone(), &[], &[], &mut ChaCha8Rng::seed_from_u64(seed));
            let near = [-2e-4f32, 0.0, 2e-4].map(|by| plain(&sampling, &logits, (random + by).clamp(0.0, 1.0)));
            // Rounding may also move the border of top-p or min-p by one token.
            let wider = SamplingParams { top_p: (sampling.top_p + 1e-4).min(1.0), min_p: (sampling.min_p - 1e-6).max(0.0), ..sampling.clone() };
            let narrower = SamplingParams { top_p: (sampling.top_p - 1e-4).max(1e-6), min_p: sampling.min_p + 1e-6, ..sampling.clone() };
            let others = [plain(&wider, &logits, random), plain(&narrower, &logits, random)];
            prop_assert!(near.contains(&ours) || others.contains(&ours));
        }

        #[test]
        fn zero_temperature_picks_the_largest_logit(mut logits in logits(), seed: u64) {
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
            let id = greedy.sample(&mut logits, &[], &[], &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert_eq!(logits[id as usize], best);
        }

        #[test]
        fn top_k_top_p_and_min_p_exclude_unlikely_tokens(logits in logits(), k in 1usize..5, seed: u64) {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let sampling = SamplingParams { top_k: k, ..SamplingParams::default() };
            let id = sampling.sample(&mut logits.clone(), &[], &[], &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert!(logits[id as usize] >= sorted[k.min(sorted.len()) - 1]);
            let tiny = SamplingParams { top_p: 1e-6, ..SamplingParams::default() };
            let id = tiny.sample(&mut logits.clone(), &[], &[], &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert_eq!(logits[id as usize], sorted[0]);
            let min_p = SamplingParams { min_p: 0.5, ..SamplingParams::default() };
            let id = min_p.sample(&mut logits.clone(), &[], &[], &mut ChaCha8Rng::seed_from_u64(seed));
            prop_assert!(logits[id as usize] >= sorted[0] + 0.5f32.ln() - 1e-4);
        }
    }

    #[test]
    fn sample_frequencies_follow_the_softmax() {
        let base = [0.0f32, 1.0, 2.0];
        let total: f32 = base.iter().map(|x| x.exp()).sum();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0u32; 3];
        for _ in 0..20_000 {
            counts[SamplingParams::default().sample(&mut base.clone(), &[], &[], &mut rng) as usize] += 1;
        }
        for (count, logit) in counts.iter().zip(base) {
            let expected = logit.exp() / total;
            assert!((*count as f32 / 20_000.0 - expected).abs() < 0.015);
        }
    }

    #[test]
    fn penalties_lower_repeated_tokens() {
        let sampling =
            SamplingParams { temperature: 0.0, repetition_penalty: 4.0, ..SamplingParams::default() };
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        assert_eq!(sampling.sample(&mut [2.0, 1.0], &[0], &[], &mut rng), 1);
        let sampling =
            SamplingParams { temperature: 0.0, frequency_penalty: 1.0, ..SamplingParams::default() };
        assert_eq!(sampling.sample(&mut [2.0, 1.0], &[0], &[0, 0], &mut rng), 1);
    }
}
