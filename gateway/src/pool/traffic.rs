//! Arrivals and departures of the last five minutes, in buckets of one second. Pure: the current second is an argument.

/// Number of one-second buckets.
const BUCKETS: usize = 301;

/// Ring of event counts, one per second.
#[derive(Debug)]
pub struct EventCounter {
    counts: [u32; BUCKETS],
    current_second: u64,
}

impl Default for EventCounter {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], current_second: 0 }
    }
}

impl EventCounter {
    fn advance(&mut self, second: u64) {
        if second > self.current_second {
            for passed in (self.current_second + 1..=second).rev().take(BUCKETS) {
                self.counts[(passed % BUCKETS as u64) as usize] = 0;
            }
            self.current_second = second;
        }
    }

    /// Counts an event in `second`.
    pub fn count(&mut self, second: u64) {
        self.advance(second);
        self.counts[(self.current_second % BUCKETS as u64) as usize] += 1;
    }

    /// Returns the number of events in the current second and the `span` seconds before it.
    pub fn count_last(&mut self, second: u64, span: u64) -> u64 {
        self.advance(second);
        let from = self.current_second.saturating_sub(span.min(BUCKETS as u64 - 1));
        (from..=self.current_second).map(|at| u64::from(self.counts[(at % BUCKETS as u64) as usize])).sum()
    }
}

/// Arrivals and departures of a pool.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Requests that arrived, whether they got a slot or not.
    pub arrivals: EventCounter,
    /// Requests that freed their slot or left the queue.
    pub departures: EventCounter,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_exactly_the_events_of_the_window(steps in prop::collection::vec(0u64..400, 1..80), span in 1u64..300) {
            let (mut ring, mut now, mut all) = (EventCounter::default(), 0, Vec::new());
            for step in steps {
                now += step;
                ring.count(now);
                all.push(now);
                let wanted = all.iter().filter(|at| **at + span >= now).count() as u64;
                prop_assert_eq!(ring.count_last(now, span), wanted);
            }
            prop_assert_eq!(ring.count_last(now + 301, 300), 0);
        }
    }
}
