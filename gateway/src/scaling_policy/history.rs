//! Demand over a sliding window.

use std::collections::VecDeque;

/// Values of the last `window` seconds. Values closer than `window / 1024` are merged to their maximum, which bounds
/// their number.
#[derive(Debug, Default)]
pub(super) struct DemandHistory {
    pub(super) values: VecDeque<(f64, usize)>,
}

impl DemandHistory {
    pub(super) fn push(&mut self, t: f64, value: usize, window: f64) {
        match self.values.back_mut() {
            Some((at, last)) if t - *at < window / 1024.0 => *last = value.max(*last),
            _ => self.values.push_back((t, value)),
        }
        while self.values.front().is_some_and(|(at, _)| *at < t - window) {
            self.values.pop_front();
        }
    }

    pub(super) fn peak(&self) -> usize {
        self.values.iter().map(|(_, value)| *value).max().unwrap_or(0)
    }

    /// Value at the quantile `share` (0 to 1); 0 without values.
    pub(super) fn quantile(&self, share: f64) -> usize {
        let mut sorted: Vec<usize> = self.values.iter().map(|(_, value)| *value).collect();
        let at = (sorted.len() as f64 * share) as usize;
        let at = at.min(sorted.len().saturating_sub(1));
        if sorted.is_empty() { 0 } else { *sorted.select_nth_unstable(at).1 }
    }
}
