//! Passive health of a node: ejected after failures in a row (mid-stream ones count), tried with one request when its
//! time is over, then taken back with a share that grows. Pure: times are passed in as milliseconds.

use crate::config::OutlierConfig;

/// What is remembered of a node's answers.
#[derive(Debug, Clone, Default)]
pub struct Outlier {
    failures: u32,
    ejections: u32,
    until_ms: Option<u64>,
    probing: bool,
    /// When it came back, for the slow start; none when it never left.
    back_ms: Option<u64>,
    /// The node itself asked for a pause (`Retry-After`).
    pause_ms: u64,
}

impl Outlier {
    /// How many of its `slots` may be used now.
    pub fn usable(&self, slots: usize, config: &OutlierConfig, now_ms: u64) -> usize {
        if self.pause_ms > now_ms {
            return 0;
        }
        match (self.until_ms, self.back_ms) {
            (Some(until), _) if now_ms < until => 0,
            // Half open: one request decides.
            (Some(_), _) => 1,
            (None, Some(back)) if now_ms < back + config.slow_start_ms => {
                let share = (now_ms - back) as f64 / config.slow_start_ms as f64;
                ((slots as f64 * share).ceil() as usize).clamp(1, slots)
            }
            _ => slots,
        }
    }

    /// Whether it is ejected, or being tried again.
    pub fn ejected(&self) -> bool {
        self.until_ms.is_some()
    }

    /// A request begins.
    pub fn begin(&mut self) {
        self.probing = self.until_ms.is_some();
    }

    /// An answer went well. True when the node came back by it.
    pub fn success(&mut self, config: &OutlierConfig, now_ms: u64) -> bool {
        self.failures = 0;
        let probed = self.until_ms.is_some_and(|until| until <= now_ms);
        if probed {
            self.until_ms = None;
            self.probing = false;
            self.back_ms = Some(now_ms);
        } else if self.back_ms.is_some_and(|back| back + 10 * config.slow_start_ms.max(1_000) < now_ms) {
            // Well for long enough: the next ejection is a first one again.
            self.ejections = 0;
            self.back_ms = None;
        }
        probed
    }

    /// An answer failed. True when the node was ejected by it.
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

    /// The node asked to be left alone until then.
    pub fn pause_until(&mut self, at_ms: u64) {
        self.pause_ms = self.pause_ms.max(at_ms);
    }

    /// A health check found the node well after it had been ill: what was counted before is void.
    pub fn reset(&mut self, now_ms: u64) {
        *self = Self { back_ms: Some(now_ms), ejections: self.ejections, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_node_goes_out_is_tried_and_comes_back_slowly() {
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
        fn whatever_happens_it_is_usable_again_in_bounded_time(events in prop::collection::vec((any::<bool>(), 0u64..20_000), 0..60)) {
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
