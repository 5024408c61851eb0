//! The control loops of a cluster: controllers that create and delete pods by the rules of their kind, and a kubelet.
//! Its pods are mock nodes with a cold start and a termination grace period.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::store::Key;
use super::{Inner, lock};
use crate::mock::Mock;

const TICK: Duration = Duration::from_millis(10);

/// A pod of the kubelet.
struct Running {
    uid: String,
    node: Mock,
    ready_at: Instant,
    killed_at: Option<Instant>,
}

/// Runs the control loops until the cluster is dropped.
pub(super) async fn run(cluster: Weak<Inner>) {
    let mut pods: HashMap<Key, Running> = HashMap::new();
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        let Some(cluster) = cluster.upgrade() else { return };
        for resource in ["apps/deployments", "apps/statefulsets", "leaderworkerset.x-k8s.io/leaderworkersets"]
        {
            control(&cluster, resource);
        }
        kubelet(&cluster, &mut pods).await;
    }
}

fn leaving(pod: &Value) -> bool {
    !pod["metadata"]["deletionTimestamp"].is_null()
}

fn ready(pod: &Value) -> bool {
    pod["status"]["conditions"][0]["status"] == "True"
}

fn control(cluster: &Inner, resource: &str) {
    let mut store = lock(&cluster.store);
    for (key, workload) in store.list(resource, "") {
        let labels = super::pod_labels(resource, &workload);
        let selector: Vec<_> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let all = store.list("pods", &selector.join(","));
        let alive: Vec<_> = all.iter().filter(|(_, pod)| !leaving(pod)).collect();
        let wanted = workload["spec"]["replicas"].as_u64().unwrap() as usize;
        let ordered = resource != "apps/deployments";
        if alive.len() < wanted && lock(&cluster.faults).quota.is_none_or(|quota| all.len() < quota) {
            let (name, index) = if ordered {
                // Lowest index without a pod; terminating pods count.
                let taken =
                    |index: usize| all.iter().any(|(pod, _)| pod.name == format!("{}-{index}", key.name));
                let Some(index) = (0..wanted).find(|index| !taken(*index)) else { continue };
                (format!("{}-{index}", key.name), index)
            } else {
                (format!("{}-7d9c5b8f6d-{:05x}", key.name, store.version()), 0)
            };
            let mut labels: serde_json::Map<String, Value> =
                labels.into_iter().map(|(name, value)| (name, json!(value))).collect();
            match resource {
                "apps/deployments" => labels.insert("pod-template-hash".into(), json!("7d9c5b8f6d")),
                "apps/statefulsets" => {
                    labels.insert("apps.kubernetes.io/pod-index".into(), json!(index.to_string()))
                }
                _ => {
                    labels.insert("leaderworkerset.sigs.k8s.io/group-index".into(), json!(index.to_string()))
                }
            };
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"labels": labels}, "status": {"phase": "Pending"}});
            store.put(&Key { resource: "pods".into(), name, ..key.clone() }, pod);
        } else if alive.len() > wanted {
            let cost = |pod: &Value| -> i64 {
                let cost =
                    pod["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"].as_str();
                cost.map_or(0, |cost| cost.parse().unwrap())
            };
            let victim = if ordered {
                alive
                    .iter()
                    .max_by_key(|(pod, _)| pod.name.rsplit_once('-').unwrap().1.parse::<usize>().unwrap())
            } else {
                alive.iter().min_by_key(|(_, pod)| (ready(pod), cost(pod)))
            };
            let (victim, _) = victim.unwrap();
            store.change(victim, &json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
        }
    }
}

/// Returns an address that no pod has had.
fn address(cluster: &Inner) -> IpAddr {
    let mut counts = lock(&cluster.counts);
    counts.addresses += 1;
    IpAddr::V4(Ipv4Addr::new(127, 20, (counts.addresses / 250) as u8, (counts.addresses % 250) as u8 + 1))
}

async fn kubelet(cluster: &Arc<Inner>, pods: &mut HashMap<Key, Running>) {
    let all = lock(&cluster.store).list("pods", "");
    for (key, pod) in &all {
        let uid = pod["metadata"]["uid"].as_str().unwrap();
        if pods.get(key).is_none_or(|running| running.uid != uid) {
            if leaving(pod) {
                lock(&cluster.store).remove(key);
                continue;
            }
            let ip = address(cluster);
            let (behaviour, cold) = {
                let faults = lock(&cluster.faults);
                (faults.behaviour.clone(), faults.cold)
            };
            let node = Mock::start_at(SocketAddr::new(ip, cluster.port), behaviour).await;
            let ready_at = Instant::now() + cold;
            node.set_healthy(false);
            lock(&cluster.counts).started += 1;
            pods.insert(key.clone(), Running { uid: uid.to_owned(), node, ready_at, killed_at: None });
            let status = json!({"status": {"phase": "Running", "podIP": ip.to_string(),
                "conditions": [{"type": "Ready", "status": "False"}]}});
            lock(&cluster.store).change(key, &status);
            continue;
        }
        let running = pods.get_mut(key).unwrap();
        let moved = lock(&cluster.faults).moves.extract_if(.., |pod| *pod == key.name).count() > 0;
        if moved {
            running.node.kill();
            let (ip, behaviour) = (address(cluster), lock(&cluster.faults).behaviour.clone());
            running.node = Mock::start_at(SocketAddr::new(ip, cluster.port), behaviour).await;
            lock(&cluster.store).change(key, &json!({"status": {"podIP": ip.to_string()}}));
        }
        lock(&cluster.asked).insert(key.name.clone(), running.node.asked());
        if leaving(pod) {
            let since = *running.killed_at.get_or_insert_with(Instant::now);
            let writing = running.node.writing();
            if writing == 0 || since.elapsed() > lock(&cluster.faults).grace {
                lock(&cluster.counts).cut += writing;
                running.node.kill();
                pods.remove(key);
                lock(&cluster.store).remove(key);
            }
        } else if let Some(ready) = lock(&cluster.faults).readiness.get(&key.name).copied() {
            let status = if ready { "True" } else { "False" };
            let status = json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
            lock(&cluster.store).change(key, &status);
        } else if let Some(healthy) = lock(&cluster.faults).health.get(&key.name).copied() {
            running.node.set_healthy(healthy);
            let status = if healthy { "True" } else { "False" };
            let status = json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
            lock(&cluster.store).change(key, &status);
        } else if !ready(pod) && Instant::now() >= running.ready_at {
            running.node.set_healthy(true);
            let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
            lock(&cluster.store).change(key, &status);
        }
    }
    pods.retain(|key, _| all.iter().any(|(known, _)| known == key));
    let mut counts = lock(&cluster.counts);
    counts.most = counts.most.max(all.len());
}
