//! Arrivals and departures of the last minutes, by the second. Pure: the second is passed in.

/// EventCounter that are remembered.
const SPAN: usize = 301;

/// Events by the second.
#[derive(Debug)]
pub struct EventCounter {
    counts: [u32; SPAN],
    now: u64,
}

impl Default for EventCounter {
    fn default() -> Self {
        Self { counts: [0; SPAN], now: 0 }
    }
}

impl EventCounter {
    fn advance(&mut self, second: u64) {
        if second > self.now {
            for passed in (self.now + 1..=second).rev().take(SPAN) {
                self.counts[(passed % SPAN as u64) as usize] = 0;
            }
            self.now = second;
        }
    }

    /// Counts an event.
    pub fn count(&mut self, second: u64) {
        self.advance(second);
        self.counts[(self.now % SPAN as u64) as usize] += 1;
    }

    /// Events in the last `span` whole seconds and the running one.
    pub fn last(&mut self, second: u64, span: u64) -> u64 {
        self.advance(second);
        let from = self.now.saturating_sub(span.min(SPAN as u64 - 1));
        (from..=self.now).map(|at| u64::from(self.counts[(at % SPAN as u64) as usize])).sum()
    }
}

/// What came to a pool and what left it, served or not.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Requests that asked for a slot.
    pub arrived: EventCounter,
    /// Requests that freed their slot or left the queue.
    pub departed: EventCounter,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_window_counts_its_seconds(steps in prop::collection::vec(0u64..400, 1..80), span in 1u64..300) {
            let (mut ring, mut now, mut all) = (EventCounter::default(), 0, Vec::new());
            for step in steps {
                now += step;
                ring.count(now);
                all.push(now);
                let wanted = all.iter().filter(|at| **at + span >= now).count() as u64;
                prop_assert_eq!(ring.last(now, span), wanted);
            }
            prop_assert_eq!(ring.last(now + 301, 300), 0);
        }
    }
}
