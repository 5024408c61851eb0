//! The numbers of pods that were said and may yet be acted on, by whoever acts on them: KEDA some time later, the workload's
//! controller at once or nearly so.

use std::time::{Duration, Instant};

/// More than these are not kept apart.
const KEPT: usize = 64;

/// A number that was said.
#[derive(Debug, Clone, Copy)]
struct Number {
    replicas: usize,
    /// Nobody acts on it after; the last one stands until another is said.
    until: Option<Instant>,
    /// A later one has come about since.
    past: bool,
    /// It has come about, and no more pods are left than that: there is nothing to do any more.
    done: bool,
}

/// What was said, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Said {
    numbers: Vec<Number>,
    /// What the workload said when it was last looked at.
    seen: Option<usize>,
}

impl Said {
    /// What stands at the beginning: `standing` was said last, and the workload says `replicas`. `earlier` is the least that may have
    /// been said before, and for how long it may yet be acted on.
    pub(super) fn begin(
        standing: usize,
        replicas: usize,
        earlier: Option<(usize, Duration)>,
        now: Instant,
    ) -> Self {
        let earlier = earlier.map(|(least, acts)| Number {
            replicas: least.min(standing),
            until: Some(now + acts),
            past: false,
            done: false,
        });
        let standing = Number { replicas: standing, until: None, past: false, done: false };
        Self { numbers: earlier.into_iter().chain([standing]).collect(), seen: Some(replicas) }
    }

    /// The last number said; none before the beginning.
    pub(super) fn last(&self) -> Option<usize> {
        self.numbers.last().map(|number| number.replicas)
    }

    /// The lowest that may yet be acted on: so many pods may work.
    pub(super) fn floor(&self, now: Instant) -> Option<usize> {
        let open = self.numbers.iter().filter(|number| number.until.is_none_or(|until| now < until));
        open.map(|number| number.replicas).min()
    }

    /// Another number is said; the one before it may be acted on for `acts` longer.
    pub(super) fn say(&mut self, replicas: usize, now: Instant, acts: Duration) {
        if self.last() == Some(replicas) {
            return;
        }
        if let Some(last) = self.numbers.last_mut() {
            last.until = Some(if last.done { now } else { now + acts });
        }
        self.numbers.push(Number { replicas, until: None, past: false, done: false });
        self.numbers.retain(|number| number.until.is_none_or(|until| now < until));
        if self.numbers.len() > KEPT {
            let oldest = self.numbers.remove(0);
            self.numbers[0].replicas = self.numbers[0].replicas.min(oldest.replicas);
        }
    }

    /// The workload says `replicas` and has `pods`. A number that has come about has left those before it behind: they count for
    /// `lag` longer, in which controllers may still be at work on them. One that was there before proves nothing.
    pub(super) fn see(&mut self, replicas: usize, pods: usize, now: Instant, lag: Duration) {
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
        let mut said = Said::begin(4, 4, None, now);
        said.say(2, now, ACTS);
        said.say(4, now, ACTS);
        assert_eq!((said.last(), said.floor(now)), (Some(4), Some(2)));
        // It said four all along: that is no proof.
        said.see(4, 4, now, LAG);
        assert_eq!(said.floor(now + LAG), Some(2));
        assert_eq!(said.floor(now + ACTS), Some(4));
        // A number that stands is acted on whenever KEDA likes.
        said.say(1, now, ACTS);
        assert_eq!(said.floor(now + 100 * ACTS), Some(1));
    }

    #[test]
    fn a_number_that_came_about_leaves_those_before_it_behind() {
        let now = Instant::now();
        let mut said = Said::begin(4, 4, None, now);
        said.say(2, now, ACTS);
        said.say(5, now, ACTS);
        said.see(5, 4, now, LAG);
        assert_eq!((said.floor(now), said.floor(now + LAG)), (Some(2), Some(5)));
    }

    #[test]
    fn what_is_done_is_left_at_once() {
        let now = Instant::now();
        let mut said = Said::begin(4, 4, Some((3, ACTS)), now);
        assert_eq!((said.floor(now), said.floor(now + ACTS)), (Some(3), Some(4)));
        said.say(2, now, ACTS);
        said.see(2, 3, now, LAG);
        said.say(3, now, ACTS);
        assert_eq!(said.floor(now + LAG), Some(2), "a pod has yet to go");
        let mut said = Said::begin(4, 4, None, now);
        said.say(2, now, ACTS);
        said.see(2, 2, now, LAG);
        said.say(4, now, ACTS);
        assert_eq!(said.floor(now + LAG), Some(4));
    }

    #[test]
    fn a_number_that_was_there_before_it_was_said_again_is_not_done() {
        let now = Instant::now();
        let mut said = Said::begin(0, 0, None, now);
        [2, 1, 0].into_iter().for_each(|number| said.say(number, now, ACTS));
        said.see(0, 0, now, LAG);
        said.say(1, now, ACTS);
        assert_eq!(said.floor(now + LAG), Some(0));
    }

    #[test]
    fn what_somebody_else_undid_is_done_no_longer() {
        let now = Instant::now();
        let mut said = Said::begin(4, 4, None, now);
        said.say(2, now, ACTS);
        said.see(2, 2, now, LAG);
        // KEDA fell back to four, and will lower it again.
        said.see(4, 4, now, LAG);
        said.say(4, now, ACTS);
        assert_eq!((said.floor(now + LAG), said.floor(now + ACTS)), (Some(2), Some(4)));
    }

    #[test]
    fn what_is_past_does_not_come_again() {
        let now = Instant::now();
        let mut said = Said::begin(4, 4, None, now);
        said.say(2, now, ACTS);
        said.see(2, 3, now, LAG);
        said.say(4, now, ACTS);
        said.see(4, 3, now, LAG);
        assert_eq!((said.floor(now), said.floor(now + LAG)), (Some(2), Some(4)));
    }

    #[test]
    fn numbers_are_bounded_and_the_lowest_is_kept() {
        let now = Instant::now();
        let mut said = Said::begin(1, 1, None, now);
        (2..1000).for_each(|number| said.say(number, now, ACTS));
        assert_eq!((said.numbers.len(), said.floor(now)), (KEPT, Some(1)));
    }
}
