//! A pod as a node, and the state of its drain.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::drain_mark::DrainMark;
use super::pods::PodState;
use crate::pool::node::Node;

/// Longest time until the watch reports an annotation that this gateway wrote.
const WATCH_LAG: Duration = Duration::from_secs(5);

/// A drain of a pod.
#[derive(Debug, Clone)]
pub(super) struct Drain {
    pub(super) mark: DrainMark,
    pub(super) since: Instant,
    /// When the mark was on the pod, as far as this gateway knows.
    pub(super) written: Option<Instant>,
}

/// A pod as a node.
pub(super) struct PodNode {
    pub(super) pod: PodState,
    pub(super) node: Option<Arc<Node>>,
    /// Address of the node.
    pub(super) ip: Option<String>,
    /// When the pod was requested, or first seen.
    pub(super) since: Instant,
    /// Whether the pod was not ready when it was first seen, so that its start can be timed.
    pub(super) seen_starting: bool,
    /// Whether the pod has passed a health check.
    pub(super) was_ready: bool,
    pub(super) drain: Option<Drain>,
    /// The mark that this gateway wrote last, and when. `None` within stands for a removed mark.
    last_written: Option<(Option<DrainMark>, Instant)>,
}

impl PodNode {
    /// A pod that was just found. `since` is when it was requested.
    pub(super) fn new(pod: &PodState, since: Instant) -> Self {
        Self {
            pod: pod.clone(),
            node: None,
            ip: None,
            since,
            seen_starting: !pod.ready,
            was_ready: false,
            drain: None,
            last_written: None,
        }
    }

    /// Begins a drain.
    pub(super) fn drain(&mut self) {
        self.drain = Some(Drain { mark: DrainMark::new(), since: Instant::now(), written: None });
    }

    /// Begins or ends a drain as the pod's annotation says.
    pub(super) fn apply_annotation(&mut self) {
        let since = self.drain.as_ref().map_or_else(Instant::now, |drain| drain.since);
        let same = self.drain.as_ref().map(|drain| &drain.mark) == self.pod.mark.as_ref();
        if !same {
            let begin = |mark| Drain { mark, since, written: Some(Instant::now()) };
            self.drain = self.pod.mark.clone().map(begin);
        }
    }

    /// Returns whether the pod receives no new requests: it is being deleted, or it drains.
    pub(super) fn is_unavailable(&self) -> bool {
        self.pod.deleting || self.drain.is_some()
    }

    /// Returns whether the pod has the annotation `mark`. A mark that was just written counts before the watch reports it.
    pub(super) fn has_annotation(&self, mark: Option<&DrainMark>) -> bool {
        match &self.last_written {
            Some((written, at)) if at.elapsed() < WATCH_LAG => written.as_ref() == mark,
            _ => self.pod.mark.as_ref() == mark,
        }
    }

    /// Returns whether the mark of this drain was removed by somebody else. Reports about this drain no longer count then.
    pub(super) fn lost_mark(&self) -> bool {
        let Some(drain) = self.drain.as_ref().filter(|drain| drain.written.is_some()) else { return false };
        let same = |mark: &Option<DrainMark>| mark.as_ref().is_some_and(|mark| mark.id == drain.mark.id);
        match &self.last_written {
            Some((written, at)) if at.elapsed() < WATCH_LAG => !same(written),
            _ => !same(&self.pod.mark),
        }
    }

    /// Records that `mark` was written on the pod.
    pub(super) fn record_written(&mut self, mark: Option<DrainMark>) {
        let now = Instant::now();
        if let Some(drain) = self.drain.as_mut().filter(|drain| mark.as_ref() == Some(&drain.mark)) {
            drain.written.get_or_insert(now);
        }
        self.last_written = Some((mark, now));
    }

    /// Requests of this gateway on the pod.
    pub(super) fn requests(&self) -> usize {
        self.node.as_ref().map_or(0, |node| node.requests())
    }
}
