//! The pods of a workload, as a watch of the API server reports them.

use std::collections::BTreeMap;
use std::pin::Pin;

use futures_util::{FutureExt, Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};

use super::drain_mark::DrainMark;

/// Annotation with the [`DrainMark`] of a pod that receives no new requests. Every gateway follows it.
pub(super) const DRAINS: &str = "potstill.dev/drains";
/// Annotation by which a Deployment chooses the pods that it deletes first.
pub(super) const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Lowest deletion cost.
pub(super) const LOWEST_COST: &str = "-2147483648";
/// Seconds after which a watch is started again, so that one that hangs is noticed.
const WATCH_S: u32 = 60;

/// The part of a pod that scaling uses.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PodState {
    /// Tells apart pods that have one name one after the other.
    pub(super) uid: String,
    pub(super) ip: Option<String>,
    pub(super) ready: bool,
    /// It is being deleted.
    pub(super) deleting: bool,
    /// Index in a StatefulSet or LeaderWorkerSet.
    pub(super) index: usize,
    /// Pod template of its Deployment (`pod-template-hash`).
    pub(super) template: Option<String>,
    /// Its annotation [`DRAINS`].
    pub(super) mark: Option<DrainMark>,
    /// Its deletion cost is [`LOWEST_COST`].
    pub(super) lowest_cost: bool,
}

impl PodState {
    fn from_pod(pod: &Pod) -> Self {
        let meta = &pod.metadata;
        let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name));
        let note = |name: &str| meta.annotations.as_ref().and_then(|notes| notes.get(name));
        let status = pod.status.as_ref();
        let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        let suffix = meta.name.as_deref().and_then(|name| name.rsplit_once('-')).map(|(_, suffix)| suffix);
        let index = label("leaderworkerset.sigs.k8s.io/group-index")
            .or_else(|| label("apps.kubernetes.io/pod-index"))
            .map(String::as_str)
            .or(suffix);
        Self {
            uid: meta.uid.clone().unwrap_or_default(),
            ip: status.and_then(|status| status.pod_ip.clone()).filter(|ip| !ip.is_empty()),
            ready: conditions
                .iter()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True"),
            deleting: meta.deletion_timestamp.is_some(),
            index: index.and_then(|index| index.parse().ok()).unwrap_or(0),
            template: label("pod-template-hash").cloned(),
            mark: note(DRAINS).map(|text| DrainMark::parse(text)),
            lowest_cost: note(DELETION_COST).is_some_and(|cost| cost == LOWEST_COST),
        }
    }
}

/// Returns whether its containers have ended for good. The object may stay for days.
fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

type Events = Pin<Box<dyn Stream<Item = watcher::Result<Event<Pod>>> + Send>>;

/// The pods of one selector. The watch is polled by [`Self::poll`] only; no task runs in between.
pub(super) struct PodWatch {
    events: Events,
    seen: BTreeMap<String, PodState>,
    /// The list that the watch is sending.
    listing: Option<BTreeMap<String, PodState>>,
    synced: bool,
}

impl PodWatch {
    /// Watches the pods that `selector` selects.
    pub(super) fn new(api: Api<Pod>, selector: &str) -> Self {
        let config = watcher::Config::default().labels(selector).timeout(WATCH_S);
        let events = Box::pin(watcher(api, config).default_backoff());
        Self { events, seen: BTreeMap::new(), listing: None, synced: false }
    }

    /// Takes in all events. Returns whether there were any. After an error the watch starts again by itself.
    pub(super) fn poll(&mut self) -> Result<bool, String> {
        let mut outcome = Ok(false);
        while let Some(Some(event)) = self.events.next().now_or_never() {
            outcome = outcome.map(|_| true);
            let named = |pod: &Pod| (pod.metadata.name.clone().unwrap_or_default(), PodState::from_pod(pod));
            match event {
                Ok(Event::Init) => self.listing = Some(BTreeMap::new()),
                Ok(Event::InitApply(pod)) => {
                    let listing = self.listing.get_or_insert_default();
                    listing.extend((!has_ended(&pod)).then(|| named(&pod)));
                }
                Ok(Event::InitDone) => {
                    self.seen = self.listing.take().unwrap_or_default();
                    self.synced = true;
                }
                Ok(Event::Apply(pod)) if !has_ended(&pod) => self.seen.extend([named(&pod)]),
                Ok(Event::Apply(pod) | Event::Delete(pod)) => {
                    self.seen.remove(pod.metadata.name.as_deref().unwrap_or_default());
                }
                Err(error) => outcome = Err(format!("watching pods: {error}")),
            }
        }
        outcome
    }

    /// Pods by name; `None` before the first list is complete.
    pub(super) fn pods(&self) -> Option<&BTreeMap<String, PodState>> {
        self.synced.then_some(&self.seen)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: serde_json::Value) -> PodState {
        PodState::from_pod(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn parses_labels_annotations_and_status() {
        let pod = parse(json!({
            "metadata": {"name": "r1-3", "uid": "u", "labels": {"leaderworkerset.sigs.k8s.io/group-index": "3"},
                "annotations": {"potstill.dev/drains": "true"}},
            "status": {"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}]}
        }));
        assert_eq!((pod.index, pod.ip.as_deref()), (3, Some("10.0.0.7")));
        assert!(pod.ready && pod.mark.is_some() && !pod.deleting && !pod.lowest_cost);
        let pod =
            parse(json!({"metadata": {"name": "qwq-7d9f-x2x4z", "deletionTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {"controller.kubernetes.io/pod-deletion-cost": "-2147483648"}}}));
        assert!(pod.deleting && pod.lowest_cost && !pod.ready && pod.ip.is_none());
        assert_eq!(parse(json!({"metadata": {"name": "cache-12"}})).index, 12);
        let phase =
            |phase: &str| has_ended(&serde_json::from_value(json!({"status": {"phase": phase}})).unwrap());
        assert!(phase("Failed") && phase("Succeeded") && !phase("Running"));
    }
}
