//! Outlier detection (as in Envoy): a node is ejected after consecutive failures, including streams that break. After
//! the ejection one request probes the node. If that succeeds, the usable slots rise slowly to all (slow start). Pure:
//! times are arguments, in milliseconds.

use crate::config::OutlierConfig;

/// Failures and ejections of a node.
#[derive(Debug, Clone, Default)]
pub struct Outlier {
    failures: u32,
    ejections: u32,
    until_ms: Option<u64>,
    probing: bool,
    /// Time at which the last ejection ended, for the slow start; `None` if there was none.
    back_ms: Option<u64>,
    /// End of the pause that the node requested with `Retry-After`.
    pause_ms: u64,
}

impl Outlier {
    /// Returns how many of `slots` may be used at `now_ms`.
    pub fn usable(&self, slots: usize, config: &OutlierConfig, now_ms: u64) -> usize {
        if self.pause_ms > now_ms {
            return 0;
        }
        match (self.until_ms, self.back_ms) {
            (Some(until), _) if now_ms < until => 0,
            // Half open: one request probes the node.
            (Some(_), _) => 1,
            (None, Some(back)) if now_ms < back + config.slow_start_ms => {
                let share = (now_ms - back) as f64 / config.slow_start_ms as f64;
                ((slots as f64 * share).ceil() as usize).clamp(1, slots)
            }
            _ => slots,
        }
    }

    /// Returns whether the node is ejected or being probed.
    pub fn ejected(&self) -> bool {
        self.until_ms.is_some()
    }

    /// Records the start of a request.
    pub fn begin(&mut self) {
        self.probing = self.until_ms.is_some();
    }

    /// Records a successful response. Returns `true` if it ended an ejection.
    pub fn success(&mut self, config: &OutlierConfig, now_ms: u64) -> bool {
        self.failures = 0;
        let probed = self.until_ms.is_some_and(|until| until <= now_ms);
        if probed {
            self.until_ms = None;
            self.probing = false;
            self.back_ms = Some(now_ms);
        } else if self.back_ms.is_some_and(|back| back + 10 * config.slow_start_ms.max(1_000) < now_ms) {
            // After ten slow starts without an ejection, the next ejection is as short as the first.
            self.ejections = 0;
            self.back_ms = None;
        }
        probed
    }

    /// Records a failed response. Returns `true` if it ejected the node.
    pub fn failure(&mut self, config: &OutlierConfig, now_ms: u64) -> bool {
        self.failures += 1;
        let tried = self.until_ms.is_some_and(|until| until <= now_ms);
        if !tried && (self.until_ms.is_some() || self.failures < config.failures) {
            return false;
        }
        let time = config.eject_ms.saturating_mul(1 << self.ejections.min(16)).min(config.max_eject_ms);
        self.ejections += 1;
        self.failures = 0;
        self.probing = false;
        self.back_ms = None;
        self.until_ms = Some(now_ms + time);
        true
    }

    /// Pauses the node until `at_ms`. A longer pause stays in effect.
    pub fn pause_until(&mut self, at_ms: u64) {
        self.pause_ms = self.pause_ms.max(at_ms);
    }

    /// Clears failures, ejection and pause after a successful health check of an unhealthy node, and begins a slow
    /// start.
    pub fn reset(&mut self, now_ms: u64) {
        *self = Self { back_ms: Some(now_ms), ejections: self.ejections, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ejects_probes_and_readmits_with_slow_start() {
        let config = OutlierConfig::default();
        let mut node = Outlier::default();
        assert!(!node.failure(&config, 0) && !node.failure(&config, 1));
        assert_eq!(node.usable(8, &config, 2), 8, "two failures are bad luck");
        assert!(node.failure(&config, 2));
        assert_eq!(node.usable(8, &config, 5_001), 0);
        assert_eq!(node.usable(8, &config, 5_002), 1, "one request decides");
        assert!(node.failure(&config, 5_100), "and it failed");
        assert_eq!(node.usable(8, &config, 15_099), 0, "longer this time");
        assert!(node.success(&config, 15_100));
        assert_eq!(node.usable(8, &config, 15_100), 1);
        assert_eq!(node.usable(8, &config, 20_100), 4);
        assert_eq!(node.usable(8, &config, 25_100), 8);
        node.pause_until(30_000);
        assert_eq!((node.usable(8, &config, 29_999), node.usable(8, &config, 30_000)), (0, 8));
    }

    proptest! {
        #[test]
        fn ejected_node_is_usable_again_within_max_eject_ms(events in prop::collection::vec((any::<bool>(), 0u64..20_000), 0..60)) {
            let config = OutlierConfig::default();
            let (mut node, mut now) = (Outlier::default(), 0);
            for (good, pause) in events {
                now += pause;
                if node.usable(8, &config, now) > 0 {
                    if good { node.success(&config, now); } else { node.failure(&config, now); }
                }
                prop_assert!(node.usable(8, &config, now + config.max_eject_ms) >= 1);
                prop_assert!(node.usable(8, &config, now) <= 8);
            }
        }
    }
}
