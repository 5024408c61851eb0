//! Outlier detection (as in Envoy): a node is ejected after consecutive failures, including streams that break. After
//! the ejection one request probes the node. If that succeeds, the usable slots rise slowly to all (slow start). Pure:
//! times are arguments, in milliseconds.

use crate::config::OutlierConfig;

/// Failures and ejections of a node.
#[derive(Debug, Clone, Default)]
pub struct OutlierState {
    failures: u32,
    ejections: u32,
    ejected_until_ms: Option<u64>,
    is_probing: bool,
    /// Time at which the last ejection ended, for the slow start; `None` if there was none.
    readmitted_at_ms: Option<u64>,
    /// End of the pause that the node requested with `Retry-After`.
    paused_until_ms: u64,
}

impl OutlierState {
    /// Returns how many of `slots` may be used at `now_ms`.
    pub fn usable_slots(&self, slots: usize, config: &OutlierConfig, now_ms: u64) -> usize {
        if self.paused_until_ms > now_ms {
            return 0;
        }
        match (self.ejected_until_ms, self.readmitted_at_ms) {
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
    pub fn is_ejected(&self) -> bool {
        self.ejected_until_ms.is_some()
    }

    /// Records the start of a request.
    pub fn record_start(&mut self) {
        self.is_probing = self.ejected_until_ms.is_some();
    }

    /// Records a successful response. Returns `true` if it ended an ejection.
    pub fn record_success(&mut self, config: &OutlierConfig, now_ms: u64) -> bool {
        self.failures = 0;
        let probed = self.ejected_until_ms.is_some_and(|until| until <= now_ms);
        if probed {
            self.ejected_until_ms = None;
            self.is_probing = false;
            self.readmitted_at_ms = Some(now_ms);
        } else if self
            .readmitted_at_ms
            .is_some_and(|back| back + 10 * config.slow_start_ms.max(1_000) < now_ms)
        {
            // After ten slow starts without an ejection, the next ejection is as short as the first.
            self.ejections = 0;
            self.readmitted_at_ms = None;
        }
        probed
    }

    /// Records a failed response. Returns `true` if it ejected the node.
    pub fn record_failure(&mut self, config: &OutlierConfig, now_ms: u64) -> bool {
        self.failures += 1;
        let tried = self.ejected_until_ms.is_some_and(|until| until <= now_ms);
        if !tried && (self.ejected_until_ms.is_some() || self.failures < config.failures) {
            return false;
        }
        let time = config.eject_ms.saturating_mul(1 << self.ejections.min(16)).min(config.max_eject_ms);
        self.ejections += 1;
        self.failures = 0;
        self.is_probing = false;
        self.readmitted_at_ms = None;
        self.ejected_until_ms = Some(now_ms + time);
        true
    }

    /// Pauses the node until `at_ms`. A longer pause stays in effect.
    pub fn pause_until(&mut self, at_ms: u64) {
        self.paused_until_ms = self.paused_until_ms.max(at_ms);
    }

    /// Clears failures, ejection and pause after a successful health check of an unhealthy node, and begins a slow
    /// start.
    pub fn reset(&mut self, now_ms: u64) {
        *self = Self { readmitted_at_ms: Some(now_ms), ejections: self.ejections, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ejects_probes_and_readmits_with_slow_start() {
        let config = OutlierConfig::default();
        let mut node = OutlierState::default();
        assert!(!node.record_failure(&config, 0) && !node.record_failure(&config, 1));
        assert_eq!(node.usable_slots(8, &config, 2), 8, "two failures are bad luck");
        assert!(node.record_failure(&config, 2));
        assert_eq!(node.usable_slots(8, &config, 5_001), 0);
        assert_eq!(node.usable_slots(8, &config, 5_002), 1, "one request decides");
        assert!(node.record_failure(&config, 5_100), "and it failed");
        assert_eq!(node.usable_slots(8, &config, 15_099), 0, "longer this time");
        assert!(node.record_success(&config, 15_100));
        assert_eq!(node.usable_slots(8, &config, 15_100), 1);
        assert_eq!(node.usable_slots(8, &config, 20_100), 4);
        assert_eq!(node.usable_slots(8, &config, 25_100), 8);
        node.pause_until(30_000);
        assert_eq!((node.usable_slots(8, &config, 29_999), node.usable_slots(8, &config, 30_000)), (0, 8));
    }

    proptest! {
        #[test]
        fn ejected_node_is_usable_again_within_max_eject_ms(events in prop::collection::vec((any::<bool>(), 0u64..20_000), 0..60)) {
            let config = OutlierConfig::default();
            let (mut node, mut now) = (OutlierState::default(), 0);
            for (good, pause) in events {
                now += pause;
                if node.usable_slots(8, &config, now) > 0 {
                    if good { node.record_success(&config, now); } else { node.record_failure(&config, now); }
                }
                prop_assert!(node.usable_slots(8, &config, now + config.max_eject_ms) >= 1);
                prop_assert!(node.usable_slots(8, &config, now) <= 8);
            }
        }
    }
}
