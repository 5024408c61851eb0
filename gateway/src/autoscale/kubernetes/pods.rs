//! The pods of a workload, as the API server tells of them.

use std::collections::BTreeMap;
use std::pin::Pin;

use futures_util::{FutureExt, Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};

use super::member::Mark;

/// Holds the [`Mark`] of a pod that gets no more requests; every gateway obeys it.
pub(super) const DRAINS: &str = "potstill.dev/drains";
/// Says which pods a Deployment gives up first.
pub(super) const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Lower than any other.
pub(super) const LOWEST_COST: &str = "-2147483648";
/// A watch begins anew after so many seconds, so one that hangs is noticed.
const WATCH_S: u32 = 60;

/// What matters of a pod.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PodSeen {
    /// Distinguishes pods that follow each other under one name.
    pub(super) uid: String,
    pub(super) ip: Option<String>,
    pub(super) ready: bool,
    /// It is on its way out.
    pub(super) leaving: bool,
    /// Index in a StatefulSet or LeaderWorkerSet.
    pub(super) index: usize,
    /// Which version of its Deployment it belongs to.
    pub(super) template: Option<String>,
    /// What it carries as [`DRAINS`].
    pub(super) mark: Option<Mark>,
    /// It carries [`LOWEST_COST`].
    pub(super) lowest_cost: bool,
}

impl PodSeen {
    fn of(pod: &Pod) -> Self {
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
            leaving: meta.deletion_timestamp.is_some(),
            index: index.and_then(|index| index.parse().ok()).unwrap_or(0),
            template: label("pod-template-hash").cloned(),
            mark: note(DRAINS).map(|text| Mark::parse(text)),
            lowest_cost: note(DELETION_COST).is_some_and(|cost| cost == LOWEST_COST),
        }
    }
}

/// Whether its containers have ended for good: what is left of it may stay for days.
fn ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

type Events = Pin<Box<dyn Stream<Item = watcher::Result<Event<Pod>>> + Send>>;

/// The pods of one selector. Nothing happens between two reads: the watch is read where the pods are looked at.
pub(super) struct Pods {
    events: Events,
    seen: BTreeMap<String, PodSeen>,
    /// A list that is being read.
    listing: Option<BTreeMap<String, PodSeen>>,
    synced: bool,
}

impl Pods {
    /// The pods that `selector` chooses.
    pub(super) fn new(api: Api<Pod>, selector: &str) -> Self {
        let config = watcher::Config::default().labels(selector).timeout(WATCH_S);
        let events = Box::pin(watcher(api, config).default_backoff());
        Self { events, seen: BTreeMap::new(), listing: None, synced: false }
    }

    /// Takes in what has happened since, and says whether anything has; an error says that news are missing, and the watch tries again.
    pub(super) fn read(&mut self) -> Result<bool, String> {
        let mut outcome = Ok(false);
        while let Some(Some(event)) = self.events.next().now_or_never() {
            outcome = outcome.map(|_| true);
            let named = |pod: &Pod| (pod.metadata.name.clone().unwrap_or_default(), PodSeen::of(pod));
            match event {
                Ok(Event::Init) => self.listing = Some(BTreeMap::new()),
                Ok(Event::InitApply(pod)) => {
                    let listing = self.listing.get_or_insert_default();
                    listing.extend((!ended(&pod)).then(|| named(&pod)));
                }
                Ok(Event::InitDone) => {
                    self.seen = self.listing.take().unwrap_or_default();
                    self.synced = true;
                }
                Ok(Event::Apply(pod)) if !ended(&pod) => self.seen.extend([named(&pod)]),
                Ok(Event::Apply(pod) | Event::Delete(pod)) => {
                    self.seen.remove(pod.metadata.name.as_deref().unwrap_or_default());
                }
                Err(error) => outcome = Err(format!("watching pods: {error}")),
            }
        }
        outcome
    }

    /// Pods by name; none before the first list was read.
    pub(super) fn seen(&self) -> Option<&BTreeMap<String, PodSeen>> {
        self.synced.then_some(&self.seen)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(value: serde_json::Value) -> PodSeen {
        PodSeen::of(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn what_matters_is_read_from_labels_annotations_and_status() {
        let pod = of(json!({
            "metadata": {"name": "r1-3", "uid": "u", "labels": {"leaderworkerset.sigs.k8s.io/group-index": "3"},
                "annotations": {"potstill.dev/drains": "true"}},
            "status": {"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}]}
        }));
        assert_eq!((pod.index, pod.ip.as_deref()), (3, Some("10.0.0.7")));
        assert!(pod.ready && pod.mark.is_some() && !pod.leaving && !pod.lowest_cost);
        let pod =
            of(json!({"metadata": {"name": "qwq-7d9f-x2x4z", "deletionTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {"controller.kubernetes.io/pod-deletion-cost": "-2147483648"}}}));
        assert!(pod.leaving && pod.lowest_cost && !pod.ready && pod.ip.is_none());
        assert_eq!(of(json!({"metadata": {"name": "cache-12"}})).index, 12);
        let phase =
            |phase: &str| ended(&serde_json::from_value(json!({"status": {"phase": phase}})).unwrap());
        assert!(phase("Failed") && phase("Succeeded") && !phase("Running"));
    }
}
