//! Replica counts that this gateway has published but that may not have been applied yet. KEDA applies a count up to a minute
//! later; the workload's controller applies it almost at once. Pure.

use std::time::{Duration, Instant};

/// Most counts that are kept; older ones are merged to their minimum.
const MAX_PUBLISHED: usize = 64;

/// A published count.
#[derive(Debug, Clone, Copy)]
struct Published {
    replicas: usize,
    /// It is not applied after this time. `None` for the current count.
    until: Option<Instant>,
    /// A later count has been applied.
    past: bool,
    /// It has been applied, and no more pods are left than that: nothing is left to do.
    done: bool,
}

/// Published counts, oldest first.
#[derive(Debug, Clone, Default)]
pub(super) struct ReplicaHistory {
    numbers: Vec<Published>,
    /// `replicas` of the workload when it was last read.
    seen: Option<usize>,
}

impl ReplicaHistory {
    /// State at the beginning: `published` is the current count, and the workload has `replicas`. `earlier` is the lowest count
    /// that may have been published before, and for how long it may still be applied.
    pub(super) fn begin(
        published: usize,
        replicas: usize,
        earlier: Option<(usize, Duration)>,
        now: Instant,
    ) -> Self {
        let earlier = earlier.map(|(least, apply_time)| Published {
            replicas: least.min(published),
            until: Some(now + apply_time),
            past: false,
            done: false,
        });
        let published = Published { replicas: published, until: None, past: false, done: false };
        Self { numbers: earlier.into_iter().chain([published]).collect(), seen: Some(replicas) }
    }

    /// The current count; `None` before the beginning.
    pub(super) fn current(&self) -> Option<usize> {
        self.numbers.last().map(|number| number.replicas)
    }

    /// The lowest count that may still be applied. No more pods than this may receive requests.
    pub(super) fn min_pending_replicas(&self, now: Instant) -> Option<usize> {
        let open = self.numbers.iter().filter(|number| number.until.is_none_or(|until| now < until));
        open.map(|number| number.replicas).min()
    }

    /// Publishes a count. The one before may be applied for another `apply_time`.
    pub(super) fn publish(&mut self, replicas: usize, now: Instant, apply_time: Duration) {
        if self.current() == Some(replicas) {
            return;
        }
        if let Some(last) = self.numbers.last_mut() {
            last.until = Some(if last.done { now } else { now + apply_time });
        }
        self.numbers.push(Published { replicas, until: None, past: false, done: false });
        self.numbers.retain(|number| number.until.is_none_or(|until| now < until));
        if self.numbers.len() > MAX_PUBLISHED {
            let oldest = self.numbers.remove(0);
            self.numbers[0].replicas = self.numbers[0].replicas.min(oldest.replicas);
        }
    }

    /// Records that the workload has `replicas` and `pods`. When a count has been applied, those before it can no longer be; they
    /// count for another `lag`, while controllers may still work on them. A count that was there before proves nothing.
    pub(super) fn observe(&mut self, replicas: usize, pods: usize, now: Instant, lag: Duration) {
        let changed = self.seen.replace(replicas) != Some(replicas);
        let came = self.numbers.iter().position(|number| !number.past && number.replicas == replicas);
        for number in &mut self.numbers[..came.filter(|_| changed).unwrap_or(0)] {
            number.past = true;
            number.until = number.until.map(|until| until.min(now + lag));
        }
        let Some((last, before)) = self.numbers.split_last_mut() else { return };
        let alone = before.iter().all(|number| number.past || number.until.is_some_and(|until| until <= now));
        last.done = alone && last.replicas == replicas && pods <= replicas;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTS: Duration = Duration::from_secs(60);
    const LAG: Duration = Duration::from_secs(5);

    #[test]
    fn a_lower_number_counts_until_it_cannot_be_acted_on() {
        let now = Instant::now();
        let mut history = ReplicaHistory::begin(4, 4, None, now);
        history.publish(2, now, ACTS);
        history.publish(4, now, ACTS);
        assert_eq!((history.current(), history.min_pending_replicas(now)), (Some(4), Some(2)));
        // The workload had four all along, which proves nothing.
        history.observe(4, 4, now, LAG);
        assert_eq!(history.min_pending_replicas(now + LAG), Some(2));
        assert_eq!(history.min_pending_replicas(now + ACTS), Some(4));
        // The current count may be applied at any time.
        history.publish(1, now, ACTS);
        assert_eq!(history.min_pending_replicas(now + 100 * ACTS), Some(1));
    }

    #[test]
    fn a_number_that_came_about_leaves_those_before_it_behind() {
        let now = Instant::now();
        let mut history = ReplicaHistory::begin(4, 4, None, now);
        history.publish(2, now, ACTS);
        history.publish(5, now, ACTS);
        history.observe(5, 4, now, LAG);
        assert_eq!(
            (history.min_pending_replicas(now), history.min_pending_replicas(now + LAG)),
            (Some(2), Some(5))
        );
    }

    #[test]
    fn what_is_done_is_left_at_once() {
        let now = Instant::now();
        let mut history = ReplicaHistory::begin(4, 4, Some((3, ACTS)), now);
        assert_eq!(
            (history.min_pending_replicas(now), history.min_pending_replicas(now + ACTS)),
            (Some(3), Some(4))
        );
        history.publish(2, now, ACTS);
        history.observe(2, 3, now, LAG);
        history.publish(3, now, ACTS);
        assert_eq!(history.min_pending_replicas(now + LAG), Some(2), "a pod has yet to go");
        let mut history = ReplicaHistory::begin(4, 4, None, now);
        history.publish(2, now, ACTS);
        history.observe(2, 2, now, LAG);
        history.publish(4, now, ACTS);
        assert_eq!(history.min_pending_replicas(now + LAG), Some(4));
    }

    #[test]
    fn a_number_that_was_there_before_it_was_said_again_is_not_done() {
        let now = Instant::now();
        let mut history = ReplicaHistory::begin(0, 0, None, now);
        [2, 1, 0].into_iter().for_each(|number| history.publish(number, now, ACTS));
        history.observe(0, 0, now, LAG);
        history.publish(1, now, ACTS);
        assert_eq!(history.min_pending_replicas(now + LAG), Some(0));
    }

    #[test]
    fn what_somebody_else_undid_is_done_no_longer() {
        let now = Instant::now();
        let mut history = ReplicaHistory::begin(4, 4, None, now);
        history.publish(2, now, ACTS);
        history.observe(2, 2, now, LAG);
        // KEDA went back to four and will lower it again.
        history.observe(4, 4, now, LAG);
        history.publish(4, now, ACTS);
        assert_eq!(
            (history.min_pending_replicas(now + LAG), history.min_pending_replicas(now + ACTS)),
            (Some(2), Some(4))
        );
    }

    #[test]
    fn what_is_past_does_not_come_again() {
        let now = Instant::now();
        let mut history = ReplicaHistory::begin(4, 4, None, now);
        history.publish(2, now, ACTS);
        history.observe(2, 3, now, LAG);
        history.publish(4, now, ACTS);
        history.observe(4, 3, now, LAG);
        assert_eq!(
            (history.min_pending_replicas(now), history.min_pending_replicas(now + LAG)),
            (Some(2), Some(4))
        );
    }

    #[test]
    fn numbers_are_bounded_and_the_lowest_is_kept() {
        let now = Instant::now();
        let mut history = ReplicaHistory::begin(1, 1, None, now);
        (2..1000).for_each(|number| history.publish(number, now, ACTS));
        assert_eq!((history.numbers.len(), history.min_pending_replicas(now)), (MAX_PUBLISHED, Some(1)));
    }
}
