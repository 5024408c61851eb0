//! A pod as a node, and what is written on it about its drain.

use std::sync::Arc;
use std::time::{Duration, Instant};

use potstill_shared::id;

use super::pods::PodSeen;
use crate::pool::node::Node;

/// News of a pod that this gateway wrote itself come by the watch within this time.
const WATCH_LAG: Duration = Duration::from_secs(5);
/// After the id of a drain: nothing is left on the pod.
const EMPTY: &str = "/empty";

/// What stands on a pod that gets no more requests. Each drain has an id of its own, so that what gateways say of one drain of
/// a pod is never taken for the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) id: String,
    /// No gateway has anything on it, so it may go at any time. Stays true until the pod is taken back.
    pub(super) given_up: bool,
}

impl Mark {
    fn new() -> Self {
        Self { id: id::unique("d"), given_up: false }
    }

    /// As it is written.
    pub(super) fn text(&self) -> String {
        format!("{}{}", self.id, if self.given_up { EMPTY } else { "" })
    }

    /// Reads what [`text`](Self::text) wrote.
    pub(super) fn parse(text: &str) -> Self {
        let id = text.strip_suffix(EMPTY);
        Self { id: id.unwrap_or(text).to_owned(), given_up: id.is_some() }
    }
}

/// A drain of a pod.
#[derive(Debug, Clone)]
pub(super) struct Drain {
    pub(super) mark: Mark,
    pub(super) since: Instant,
    /// When the mark was on the pod, as far as this gateway knows.
    pub(super) written: Option<Instant>,
}

/// A pod as a node.
pub(super) struct Member {
    pub(super) pod: PodSeen,
    pub(super) node: Option<Arc<Node>>,
    /// The address that the node has.
    pub(super) ip: Option<String>,
    /// When it was asked for, or first seen.
    pub(super) since: Instant,
    /// It was not ready when first seen, so its start can be timed.
    pub(super) seen_starting: bool,
    /// It has answered a check.
    pub(super) was_ready: bool,
    pub(super) drain: Option<Drain>,
    /// What was written on it last, and when.
    wrote: Option<(Option<Mark>, Instant)>,
}

impl Member {
    /// A pod that was just found, and asked for `since` then.
    pub(super) fn new(pod: &PodSeen, since: Instant) -> Self {
        Self {
            pod: pod.clone(),
            node: None,
            ip: None,
            since,
            seen_starting: !pod.ready,
            was_ready: false,
            drain: None,
            wrote: None,
        }
    }

    /// Begins a drain.
    pub(super) fn drain(&mut self) {
        self.drain = Some(Drain { mark: Mark::new(), since: Instant::now(), written: None });
    }

    /// Does what the pod says.
    pub(super) fn obey(&mut self) {
        let since = self.drain.as_ref().map_or_else(Instant::now, |drain| drain.since);
        let same = self.drain.as_ref().map(|drain| &drain.mark) == self.pod.mark.as_ref();
        if !same {
            let begin = |mark| Drain { mark, since, written: Some(Instant::now()) };
            self.drain = self.pod.mark.clone().map(begin);
        }
    }

    /// It gets no requests and never will again, or not before it is taken back.
    pub(super) fn out(&self) -> bool {
        self.pod.leaving || self.drain.is_some()
    }

    /// Whether `mark` is on the pod. The watch may not have told yet of what was written last.
    pub(super) fn carries(&self, mark: Option<&Mark>) -> bool {
        match &self.wrote {
            Some((wrote, at)) if at.elapsed() < WATCH_LAG => wrote.as_ref() == mark,
            _ => self.pod.mark.as_ref() == mark,
        }
    }

    /// Somebody took the mark of this drain away: what was said of it no longer counts.
    pub(super) fn unmarked(&self) -> bool {
        let Some(drain) = self.drain.as_ref().filter(|drain| drain.written.is_some()) else { return false };
        let same = |mark: &Option<Mark>| mark.as_ref().is_some_and(|mark| mark.id == drain.mark.id);
        match &self.wrote {
            Some((wrote, at)) if at.elapsed() < WATCH_LAG => !same(wrote),
            _ => !same(&self.pod.mark),
        }
    }

    /// `mark` is on the pod now.
    pub(super) fn wrote(&mut self, mark: Option<Mark>) {
        let now = Instant::now();
        if let Some(drain) = self.drain.as_mut().filter(|drain| mark.as_ref() == Some(&drain.mark)) {
            drain.written.get_or_insert(now);
        }
        self.wrote = Some((mark, now));
    }

    /// Requests of this gateway on it.
    pub(super) fn requests(&self) -> usize {
        self.node.as_ref().map_or(0, |node| node.requests())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written_and_no_two_drains_share_an_id() {
        let mark = Mark::new();
        let given_up = Mark { given_up: true, ..mark.clone() };
        assert_eq!(Mark::parse(&mark.text()), mark);
        assert_eq!(Mark::parse(&given_up.text()), given_up);
        assert_ne!(Mark::new().id, mark.id);
        assert_eq!(Mark::parse("true"), Mark { id: "true".to_owned(), given_up: false });
    }
}
