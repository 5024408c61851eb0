//! A Deployment, StatefulSet or LeaderWorkerSet: its `/scale`, and the notes on its pods.

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::json;

use super::cluster::{call, told};
use super::member::Mark;
use super::pods::{DELETION_COST, DRAINS, LOWEST_COST, Pods};
use super::steps::Order;
use crate::config::{KubernetesConfig, WorkloadKind};

/// What `/scale` says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scale {
    pub(super) replicas: usize,
    version: Option<String>,
}

/// A workload within reach.
pub(super) struct Workload {
    objects: Api<DynamicObject>,
    pods: Api<Pod>,
    name: String,
    pub(super) order: Order,
}

impl Workload {
    /// Finds the workload; answers its pods and its present scale as well.
    pub(super) async fn reach(
        client: kube::Client,
        namespace: &str,
        config: &KubernetesConfig,
    ) -> Result<(Self, Pods, Scale), String> {
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
                WorkloadKind::Deployment => Order::Marked,
                _ => Order::HighestIndex,
            },
        };
        let found = call(workload.objects.get_scale(&config.name)).await.map_err(|error| told(&error))?;
        let selector = found.status.as_ref().and_then(|status| status.selector.clone()).unwrap_or_default();
        if selector.is_empty() {
            return Err(format!("{kind} `{}` names no selector for its pods", config.name));
        }
        Ok((workload, Pods::new(pods, &selector), scale(&found)))
    }

    /// How many pods there should be, by Kubernetes.
    pub(super) async fn scale(&self) -> Result<Scale, String> {
        call(self.objects.get_scale(&self.name))
            .await
            .map(|found| scale(&found))
            .map_err(|error| told(&error))
    }

    /// Sets `replicas`, if nobody has changed the workload since `seen`.
    pub(super) async fn set(&self, seen: &Scale, replicas: usize, dry_run: bool) -> Result<Scale, String> {
        let patch = json!({"metadata": {"resourceVersion": seen.version}, "spec": {"replicas": replicas}});
        let params = PatchParams { dry_run, ..PatchParams::default() };
        let answer = call(self.objects.patch_scale(&self.name, &params, &Patch::Merge(&patch))).await;
        answer.map(|found| scale(&found)).map_err(|error| told(&error))
    }

    /// Writes on a pod what `mark` says of its drain, or that it works. Who is given up is the first to go.
    pub(super) async fn write(&self, pod: &str, mark: Option<&Mark>) -> Result<(), String> {
        let given_up = mark.is_some_and(|mark| mark.given_up);
        let annotations = json!({
            DRAINS: mark.map(Mark::text),
            DELETION_COST: given_up.then_some(LOWEST_COST),
        });
        let patch = json!({"metadata": {"annotations": annotations}});
        match call(self.pods.patch_metadata(pod, &PatchParams::default(), &Patch::Merge(&patch))).await {
            Ok(_) => Ok(()),
            // It is gone, and the watch will say so.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(told(&error)),
        }
    }
}

fn scale(found: &k8s_openapi::api::autoscaling::v1::Scale) -> Scale {
    let replicas = found.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
    Scale { replicas: replicas.max(0) as usize, version: found.metadata.resource_version.clone() }
}
