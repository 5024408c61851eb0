//! A Deployment, StatefulSet or LeaderWorkerSet: its `/scale`, and the annotations of its pods.

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::json;

use super::api_server::{call, describe};
use super::drain_mark::DrainMark;
use super::pods::{DELETION_COST, DRAINS, LOWEST_COST, PodWatch};
use super::reconcile::VictimOrder;
use crate::config::{KubernetesConfig, WorkloadKind};

/// The subresource `/scale`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct WorkloadScale {
    pub(super) replicas: usize,
    version: Option<String>,
}

/// A workload that exists.
pub(super) struct Workload {
    objects: Api<DynamicObject>,
    pods: Api<Pod>,
    name: String,
    pub(super) order: VictimOrder,
}

impl Workload {
    /// Finds the workload. Returns its pods and its current scale as well.
    pub(super) async fn connect(
        client: kube::Client,
        namespace: &str,
        config: &KubernetesConfig,
    ) -> Result<(Self, PodWatch, WorkloadScale), String> {
        let (group, kind, plural) = match config.kind {
            WorkloadKind::Deployment => ("apps", "Deployment", "deployments"),
            WorkloadKind::StatefulSet => ("apps", "StatefulSet", "statefulsets"),
            WorkloadKind::LeaderWorkerSet => {
                ("leaderworkerset.x-k8s.io", "LeaderWorkerSet", "leaderworkersets")
            }
        };
        let resource = ApiResource {
            group: group.to_owned(),
            version: "v1".to_owned(),
            api_version: format!("{group}/v1"),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        };
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let workload = Self {
            objects: Api::namespaced_with(client, namespace, &resource),
            pods: pods.clone(),
            name: config.name.clone(),
            order: match config.kind {
                WorkloadKind::Deployment => VictimOrder::DeletionCost,
                _ => VictimOrder::HighestIndex,
            },
        };
        let found = call(workload.objects.get_scale(&config.name)).await.map_err(|error| describe(&error))?;
        let selector = found.status.as_ref().and_then(|status| status.selector.clone()).unwrap_or_default();
        if selector.is_empty() {
            return Err(format!("{kind} `{}` names no selector for its pods", config.name));
        }
        Ok((workload, PodWatch::new(pods, &selector), scale(&found)))
    }

    /// The current scale.
    pub(super) async fn scale(&self) -> Result<WorkloadScale, String> {
        call(self.objects.get_scale(&self.name))
            .await
            .map(|found| scale(&found))
            .map_err(|error| describe(&error))
    }

    /// Sets `replicas`, unless the workload has changed since `seen`.
    pub(super) async fn set_replicas(
        &self,
        seen: &WorkloadScale,
        replicas: usize,
        dry_run: bool,
    ) -> Result<WorkloadScale, String> {
        let patch = json!({"metadata": {"resourceVersion": seen.version}, "spec": {"replicas": replicas}});
        let params = PatchParams { dry_run, ..PatchParams::default() };
        let answer = call(self.objects.patch_scale(&self.name, &params, &Patch::Merge(&patch))).await;
        answer.map(|found| scale(&found)).map_err(|error| describe(&error))
    }

    /// Writes the mark of a drain on a pod, or removes it. An evictable pod gets the lowest deletion cost.
    pub(super) async fn write_mark(&self, pod: &str, mark: Option<&DrainMark>) -> Result<(), String> {
        let evictable = mark.is_some_and(|mark| mark.evictable);
        let annotations = json!({
            DRAINS: mark.map(DrainMark::value),
            DELETION_COST: evictable.then_some(LOWEST_COST),
        });
        let patch = json!({"metadata": {"annotations": annotations}});
        match call(self.pods.patch_metadata(pod, &PatchParams::default(), &Patch::Merge(&patch))).await {
            Ok(_) => Ok(()),
            // The pod is gone, which the watch will report.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(describe(&error)),
        }
    }
}

fn scale(found: &k8s_openapi::api::autoscaling::v1::Scale) -> WorkloadScale {
    let replicas = found.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
    WorkloadScale { replicas: replicas.max(0) as usize, version: found.metadata.resource_version.clone() }
}
