//! The gateway in a cluster. It finds the pods of its workloads and scales them within the roles of our manifests
//! without cutting a response. It coordinates with other gateways and tolerates faults of the API server.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::disallowed_methods, reason = "files of a test need not outlive a crash")]

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use system_tests::kubernetes::rights::{Attempt, Rights, granted};
use system_tests::kubernetes::{Fault, Kubernetes};
use system_tests::mock::Behaviour;
use system_tests::started::Started;
use tempfile::TempDir;
use tokio::task::JoinHandle;

const DEPLOYMENTS: &str = "apps/deployments";
const STATEFUL: &str = "apps/statefulsets";
const LWS: &str = "leaderworkerset.x-k8s.io/leaderworkersets";

/// The roles of our manifests.
fn rights() -> Rights {
    Rights::of(&granted(&["base", "overlays/qwq", "overlays/r1-h20", "overlays/students"]))
}

struct World {
    cluster: Kubernetes,
    folder: TempDir,
}

impl World {
    async fn new(behaviour: Behaviour, cold_ms: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cluster = Kubernetes::start(folder.path(), behaviour, Duration::from_millis(cold_ms)).await;
        cluster.workload(DEPLOYMENTS, "qwq-32b");
        cluster.workload(STATEFUL, "student");
        cluster.workload(LWS, "deepseek-r1");
        cluster.user("potstill-gateway", rights());
        Self { cluster, folder }
    }

    fn kubeconfig(&self) -> std::path::PathBuf {
        self.folder.path().join("potstill-gateway.kubeconfig")
    }

    /// Starts a gateway over one workload. `more` is added to its scaling configuration, `top` to the top level.
    async fn gateway(&self, name: &str, kind: &str, workload: &str, more: &str, top: &str) -> Started {
        let config = self.config(kind, workload, more, top);
        let kubeconfig = self.kubeconfig();
        let env = [("KUBECONFIG", kubeconfig.as_os_str()), ("POD_NAME", name.as_ref())];
        Started::with_env(&config, "info", &env).await
    }

    fn config(&self, kind: &str, workload: &str, more: &str, top: &str) -> String {
        let memory = if more.contains("memory_s") { "" } else { "demand_window_s = 0.5\n" };
        let more = if more.contains("max") { more.to_owned() } else { format!("max = 4\n{more}") };
        format!(
            "{top}\n[autoscale]\ninterval_ms = 50\nlease_s = 2\n[admin]\nlisten = \"127.0.0.1:0\"\nenv = \"PATH\"\n\
             [[pools]]\nmodel = \"m\"\nhealth = {{ interval_ms = 50 }}\n[pools.scale]\nmax_concurrency = 2\ncold_start_s = 0.3\n\
             {memory}scale_down_delay_s = 0.3\n{more}\n[pools.scale.kubernetes]\nkind = \"{kind}\"\nname = \"{workload}\"\nport = {}\n",
            self.cluster.port()
        )
    }

    /// Waits until a pod is marked as draining.
    async fn one_drains(&self) {
        within_a_minute("one drains", async || {
            let marked = |name: &String| {
                !self.cluster.get("pods", name)["metadata"]["annotations"]["potstill.dev/drains"].is_null()
            };
            self.cluster.pods().iter().any(marked)
        })
        .await;
    }

    fn refused(&self) -> Vec<String> {
        let audit = self.cluster.audit();
        let refused = audit.iter().filter(|(.., status)| *status == 403 || *status == 401);
        refused.map(|(user, attempt, _)| format!("{user} {attempt:?}")).collect()
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn ask(client: &reqwest::Client, gateway: &Started, stream: bool) -> JoinHandle<(u16, String)> {
    let body = json!({"model": "m", "stream": stream, "messages": [{"role": "user", "content": "x"}]});
    let request = client.post(format!("{}/v1/chat/completions", gateway.url)).json(&body).send();
    tokio::spawn(async move {
        let response = request.await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap_or_else(|error| format!("cut: {error}")))
    })
}

async fn all_well(requests: Vec<JoinHandle<(u16, String)>>, end: &str) {
    for request in requests {
        let (status, text) = request.await.unwrap();
        assert!(status == 200 && text.contains(end), "{status} {text}");
    }
}

/// Like `until`, with a timeout of a minute.
async fn within_a_minute(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), waiting).await.is_ok(), "{what}");
}

/// Waits until this number of requests is on nodes.
async fn writes(client: &reqwest::Client, gateway: &Started, requests: usize) {
    let line = format!("potstill_gateway_in_flight_requests{{model=\"m\"}} {requests}\n");
    within_a_minute("they write", async || {
        let url = format!("{}/metrics", gateway.url);
        client.get(url).send().await.unwrap().text().await.unwrap().contains(&line)
    })
    .await;
}

fn slow_stream(chunks: usize) -> Behaviour {
    Behaviour::Stream(chunks, Duration::from_millis(20))
}

#[tokio::test(flavor = "multi_thread")]
async fn deployment_scales_from_zero_and_back_without_cut_responses() {
    let world = World::new(slow_stream(30), 200).await;
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "", "").await;
    let client = client();
    for _ in 0..2 {
        let requests = (0..16).map(|_| ask(&client, &gateway, true)).collect();
        all_well(requests, "[DONE]").await;
    }
    within_a_minute("all pods are gone", async || world.cluster.pods().is_empty()).await;
    let counts = world.cluster.counts();
    assert!(counts.most >= 3 && counts.most <= 4 && counts.cut == 0, "{counts:?}");
    assert_eq!(world.refused(), Vec::<String>::new());
    within_a_minute("it is counted", async || {
        let metrics =
            client.get(format!("{}/metrics", gateway.url)).send().await.unwrap().text().await.unwrap();
        metrics.contains("potstill_gateway_leader 1") && metrics.contains("event=\"stopped\"")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stateful_sets_remove_the_highest_index_once_drained() {
    for (kind, resource, name) in
        [("StatefulSet", STATEFUL, "student"), ("LeaderWorkerSet", LWS, "deepseek-r1")]
    {
        let world = World::new(slow_stream(40), 50).await;
        let gateway = world.gateway("a", kind, name, "", "").await;
        let client = client();
        let requests = (0..8).map(|_| ask(&client, &gateway, true)).collect();
        within_a_minute("four pods", async || world.cluster.replicas(resource, name) == 4).await;
        all_well(requests, "[DONE]").await;
        // One long response keeps one pod while the others are removed.
        let cut = world.cluster.counts().cut;
        within_a_minute("all pods are gone", async || world.cluster.pods().is_empty()).await;
        assert_eq!(
            (cut, world.cluster.counts().cut, world.refused().len()),
            (0, 0, 0),
            "{:?}",
            world.refused()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tolerates_api_server_faults() {
    let world = World::new(slow_stream(10), 50).await;
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "", "").await;
    let client = client();
    let burst = async || {
        let requests = (0..8).map(|_| ask(&client, &gateway, true)).collect();
        all_well(requests, "[DONE]").await;
        within_a_minute("all pods are gone", async || world.cluster.pods().is_empty()).await;
    };
    for round in [
        [
            ("patch", "deployments/scale", Fault::Status(409)),
            ("get", "deployments/scale", Fault::Status(429)),
            ("patch", "leases", Fault::Status(409)),
        ],
        [
            ("patch", "deployments/scale", Fault::Status(500)),
            ("patch", "pods", Fault::Status(500)),
            ("get", "leases", Fault::Status(500)),
        ],
    ] {
        round.into_iter().for_each(|(verb, resource, fault)| world.cluster.fault(verb, resource, 2, fault));
        burst().await;
        within_a_minute("the faults were met", async || world.cluster.faults_left() == 0).await;
    }
    // History and watches are lost, so the gateway lists the pods again.
    world.cluster.fault("list", "pods", 2, Fault::Status(500));
    world.cluster.forget();
    world.cluster.break_watches();
    burst().await;
    assert_eq!(world.cluster.counts().cut, 0);
    let printed = gateway.printed();
    assert!(printed.contains("nodes stay as they are") && printed.contains("(500)"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_api_call_delays_no_request() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "min = 1", "").await;
    let client = client();
    all_well(vec![ask(&client, &gateway, false)], "choices").await;
    world.cluster.fault("get", "leases", 1, Fault::Hang);
    world.cluster.fault("get", "deployments/scale", 1, Fault::Hang);
    within_a_minute("it hangs", async || world.cluster.faults_left() == 0).await;
    all_well((0..20).map(|_| ask(&client, &gateway, false)).collect(), "choices").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_missing_permissions() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    world.cluster.user("potstill-gateway", Rights::of(&granted(&["base"])));
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "min = 1", "").await;
    within_a_minute("it says so", async || {
        let printed = gateway.printed();
        printed.contains("forbidden")
            && printed.contains("deployments/scale")
            && printed.contains("rbac.yaml")
    })
    .await;
    world.cluster.user("potstill-gateway", rights());
    within_a_minute("with the right it works", async || world.cluster.replicas(DEPLOYMENTS, "qwq-32b") == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restart_keeps_pods_and_external_changes_are_followed() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    world.cluster.change(DEPLOYMENTS, "qwq-32b", &json!({"spec": {"replicas": 3}}));
    within_a_minute("three pods", async || world.cluster.pods().len() == 3).await;
    let client = client();
    {
        let gateway = world.gateway("a", "Deployment", "qwq-32b", "min = 0\nmemory_s = 3600.0", "").await;
        all_well((0..6).map(|_| ask(&client, &gateway, false)).collect(), "choices").await;
        let leads = async || {
            let text =
                client.get(format!("{}/metrics", gateway.url)).send().await.unwrap().text().await.unwrap();
            // A leader reads the count once more before it decides.
            let looks =
                world.cluster.audit().into_iter().filter(|(_, attempt, _)| {
                    attempt.verb == "get" && attempt.resource == "deployments/scale"
                });
            looks.count() >= 2
                && text.contains("potstill_gateway_leader 1")
                && text.contains("potstill_gateway_nodes{model=\"m\",state=\"ready\"} 3")
        };
        within_a_minute("it leads three nodes", leads).await;
        assert_eq!(
            world.cluster.replicas(DEPLOYMENTS, "qwq-32b"),
            3,
            "nothing is taken within a memory window"
        );
        world.cluster.change(DEPLOYMENTS, "qwq-32b", &json!({"spec": {"replicas": 1}}));
        within_a_minute("the change is seen", async || gateway.printed().contains("somebody else changed"))
            .await;
    }
    assert_eq!(world.cluster.counts().cut, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_gateway_takes_over_when_the_leader_is_killed() {
    let world = World::new(slow_stream(150), 50).await;
    let mut first = world.gateway("gateway-1", "Deployment", "qwq-32b", "", "").await;
    within_a_minute("the first leads", async || {
        world.cluster.get("coordination.k8s.io/leases", "potstill-gateway")["spec"]["holderIdentity"]
            == "gateway-1"
    })
    .await;
    let second = world.gateway("gateway-2", "Deployment", "qwq-32b", "", "").await;
    let client = client();
    // Sent to the gateway that does not lead: the leader scales for it.
    let requests: Vec<_> = (0..6).map(|_| ask(&client, &second, true)).collect();
    within_a_minute("the leader scales", async || world.cluster.replicas(DEPLOYMENTS, "qwq-32b") >= 3).await;
    // Pods with these requests are kept, although the leader itself has none.
    all_well(requests, "[DONE]").await;
    let lease = || world.cluster.get("coordination.k8s.io/leases", "potstill-gateway");
    assert_eq!(lease()["spec"]["holderIdentity"], "gateway-1");
    let requests: Vec<_> = (0..4).map(|_| ask(&client, &second, true)).collect();
    first.process.0.kill().unwrap();
    within_a_minute("the second leads", async || lease()["spec"]["holderIdentity"] == "gateway-2").await;
    all_well(requests, "[DONE]").await;
    within_a_minute("it takes the pods back", async || world.cluster.pods().is_empty()).await;
    assert_eq!(world.cluster.counts().cut, 0);
    let notes = lease()["metadata"]["annotations"].as_object().unwrap().len();
    within_a_minute("the dead one is forgotten", async || {
        lease()["metadata"]["annotations"].as_object().unwrap().len() == 1
    })
    .await;
    assert!(notes <= 2);
    first.ended(Duration::from_secs(5)).await;
    // A gateway that shuts down in order releases the Lease at once.
    let mut second = second;
    second.signal("TERM");
    second.ended(Duration::from_secs(20)).await;
    assert_eq!(lease()["spec"]["holderIdentity"], "");
    assert_eq!(world.refused(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_pods_with_requests_of_other_gateways() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    let leader = world.gateway("gateway-1", "Deployment", "qwq-32b", "", "").await;
    within_a_minute("it leads", async || {
        world.cluster.get("coordination.k8s.io/leases", "potstill-gateway")["spec"]["holderIdentity"]
            == "gateway-1"
    })
    .await;
    let other = world.gateway("gateway-2", "Deployment", "qwq-32b", "", "").await;
    let client = client();
    world.cluster.behave(slow_stream(250));
    // Both gateways need two pods; responses through the other one take five seconds.
    let long: Vec<_> = (0..4).map(|_| ask(&client, &other, true)).collect();
    within_a_minute("two pods", async || world.cluster.pods().len() >= 2).await;
    // The leader's target becomes zero while the other gateway has requests.
    let config = world.config("Deployment", "qwq-32b", "max = 1", "");
    let text = format!("listen = \"127.0.0.1:{}\"\n{config}", leader.port);
    std::fs::write(leader.config(), text).unwrap();
    leader.signal("HUP");
    world.one_drains().await;
    all_well(long, "[DONE]").await;
    within_a_minute("it is gone", async || world.cluster.pods().len() <= 1).await;
    assert_eq!(world.cluster.counts().cut, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn evicted_pod_finishes_unless_a_disruption_budget_forbids_it() {
    let world = World::new(slow_stream(60), 20).await;
    world.cluster.set_grace(Duration::from_secs(60));
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "min = 1", "").await;
    let client = client();
    let requests: Vec<_> = (0..2).map(|_| ask(&client, &gateway, true)).collect();
    within_a_minute("a pod", async || !world.cluster.pods().is_empty()).await;
    let pod = world.cluster.pods()[0].clone();
    let budget = json!({"spec": {"maxUnavailable": 0, "selector": {"matchLabels": {"app.kubernetes.io/name": "qwq-32b"}}}});
    world.cluster.put("policy/poddisruptionbudgets", "qwq-32b", budget);
    assert_eq!(world.cluster.evict(&pod).await, 429);
    world.cluster.change("policy/poddisruptionbudgets", "qwq-32b", &json!({"spec": {"maxUnavailable": 1}}));
    writes(&client, &gateway, 2).await;
    assert_eq!(world.cluster.evict(&pod).await, 201);
    // The pod gets no new requests, its running ones finish, and a new pod replaces it.
    let later: Vec<_> = (0..2).map(|_| ask(&client, &gateway, true)).collect();
    all_well(requests, "[DONE]").await;
    all_well(later, "[DONE]").await;
    assert_eq!(world.cluster.counts().cut, 0);
    within_a_minute("it is gone", async || !world.cluster.pods().contains(&pod)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flapping_pod_costs_no_request_and_no_extra_pod() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "min = 2\nmax = 2", "").await;
    let client = client();
    within_a_minute("two pods", async || world.cluster.pods().len() == 2).await;
    all_well(vec![ask(&client, &gateway, false)], "choices").await;
    let pod = world.cluster.pods()[0].clone();
    for round in 0..20 {
        world.cluster.set_healthy(&pod, round % 2 == 1);
        all_well((0..4).map(|_| ask(&client, &gateway, false)).collect(), "choices").await;
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    let counts = world.cluster.counts();
    assert_eq!((counts.started, counts.cut), (2, 0));
    assert_eq!(world.cluster.replicas(DEPLOYMENTS, "qwq-32b"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn dry_run_changes_nothing_and_validates_on_the_server() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    world.cluster.change(DEPLOYMENTS, "qwq-32b", &json!({"spec": {"replicas": 1}}));
    let config = world
        .config("Deployment", "qwq-32b", "min = 2", "")
        .replace("[autoscale]", "[autoscale]\ndry_run = true");
    let kubeconfig = world.kubeconfig();
    let gateway = Started::with_env(
        &config,
        "info",
        &[("KUBECONFIG", kubeconfig.as_os_str()), ("POD_NAME", "a".as_ref())],
    )
    .await;
    within_a_minute("it says what it would do", async || gateway.printed().contains("replicas set")).await;
    assert!(gateway.printed().contains("dry_run=true"), "{}", gateway.printed());
    assert_eq!(world.cluster.replicas(DEPLOYMENTS, "qwq-32b"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_pods_are_awaited_without_extra_replicas() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    world.cluster.set_quota(Some(1));
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "", "").await;
    let client = client();
    world.cluster.behave(Behaviour::Hold);
    let held: Vec<_> = (0..8).map(|_| ask(&client, &gateway, false)).collect();
    within_a_minute("four are asked for", async || world.cluster.replicas(DEPLOYMENTS, "qwq-32b") == 4).await;
    let most = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (watched, seen) = (world.cluster.clone(), Arc::clone(&most));
    let watch = tokio::spawn(async move {
        loop {
            seen.fetch_max(watched.replicas(DEPLOYMENTS, "qwq-32b"), std::sync::atomic::Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    held.iter().for_each(JoinHandle::abort);
    within_a_minute("what did not come is not wanted any more, nor what did", async || {
        world.cluster.replicas(DEPLOYMENTS, "qwq-32b") == 0 && world.cluster.pods().is_empty()
    })
    .await;
    watch.abort();
    assert_eq!(most.load(std::sync::atomic::Ordering::SeqCst), 4);
    world.cluster.set_quota(None);
    world.cluster.behave(Behaviour::Answer(5));
    all_well((0..8).map(|_| ask(&client, &gateway, false)).collect(), "choices").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unready_pod_gets_no_requests() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "min = 2\nmax = 2", "").await;
    let client = client();
    within_a_minute("two pods", async || world.cluster.pods().len() == 2).await;
    let ready = async |pods: usize| {
        within_a_minute("the pods are as they should be", async || {
            let url = format!("{}/metrics", gateway.url);
            let text = client.get(url).send().await.unwrap().text().await.unwrap();
            text.contains(&format!("potstill_gateway_nodes{{model=\"m\",state=\"ready\"}} {pods}"))
        })
        .await;
    };
    ready(2).await;
    let pod = world.cluster.pods()[0].clone();
    world.cluster.set_ready(&pod, false);
    ready(1).await;
    // After several health checks the pod still gets no requests; the other pod serves all.
    let before = world.cluster.asked(&pod);
    for _ in 0..10 {
        all_well(vec![ask(&client, &gateway, false)], "choices").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(world.cluster.asked(&pod), before);
    world.cluster.set_ready(&pod, true);
    ready(2).await;
    assert_eq!(world.cluster.counts().started, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn pod_with_a_new_address_is_found() {
    let world = World::new(Behaviour::Answer(5), 20).await;
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "min = 1\nmax = 1", "").await;
    let client = client();
    all_well(vec![ask(&client, &gateway, false)], "choices").await;
    let pod = world.cluster.pods()[0].clone();
    world.cluster.move_pod(&pod);
    within_a_minute("it has moved", async || world.cluster.counts().addresses == 2).await;
    within_a_minute("it answers", async || {
        let (status, _) = ask(&client, &gateway, false).await.unwrap();
        status == 200 && world.cluster.asked(&pod) > 0
    })
    .await;
    assert_eq!(world.cluster.pods(), [pod]);
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_with_another_workload_cuts_no_response() {
    let world = World::new(slow_stream(150), 20).await;
    let gateway = world.gateway("a", "Deployment", "qwq-32b", "", "").await;
    let client = client();
    let long: Vec<_> = (0..2).map(|_| ask(&client, &gateway, true)).collect();
    writes(&client, &gateway, 2).await;
    // The same pods under another name: a second actuator watches them with a target of zero.
    let config = world.config("Deployment", "qwq-32b", "", "") + "namespace = \"test\"\n";
    std::fs::write(gateway.config(), format!("listen = \"127.0.0.1:{}\"\n{config}", gateway.port)).unwrap();
    gateway.signal("HUP");
    world.one_drains().await;
    all_well(long, "[DONE]").await;
    within_a_minute("all pods are gone", async || world.cluster.pods().is_empty()).await;
    assert_eq!(world.cluster.counts().cut, 0);
    all_well(vec![ask(&client, &gateway, true)], "[DONE]").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_leader_releases_the_lease_before_its_last_response() {
    let world = World::new(slow_stream(400), 20).await;
    let lease = || world.cluster.get("coordination.k8s.io/leases", "potstill-gateway");
    let leads = async |name: &str| {
        within_a_minute("it leads", async || lease()["spec"]["holderIdentity"] == name).await;
    };
    let mut first = world.gateway("gateway-1", "Deployment", "qwq-32b", "", "").await;
    leads("gateway-1").await;
    let second = world.gateway("gateway-2", "Deployment", "qwq-32b", "", "").await;
    let client = client();
    let long = ask(&client, &first, true);
    writes(&client, &first, 1).await;
    first.signal("TERM");
    leads("gateway-2").await;
    assert!(!long.is_finished());
    // The new leader needs no node and waits for the other gateway's response.
    all_well(vec![long], "[DONE]").await;
    first.ended(Duration::from_secs(20)).await;
    within_a_minute("all pods are gone", async || world.cluster.pods().is_empty()).await;
    assert_eq!(world.cluster.counts().cut, 0);
    drop(second);
}

#[test]
fn roles_grant_only_what_they_name() {
    let attempt = |verb, group: &str, resource: &str, name: Option<&str>| Attempt {
        verb,
        group: group.to_owned(),
        resource: resource.to_owned(),
        name: name.map(str::to_owned),
    };
    let rights = rights();
    assert!(rights.grant(&attempt("patch", "apps", "deployments/scale", Some("qwq-32b"))));
    for refused in [
        attempt("patch", "apps", "deployments/scale", Some("other")),
        attempt("patch", "apps", "deployments", Some("qwq-32b")),
        attempt("delete", "", "pods", Some("qwq-32b-0")),
        attempt("list", "", "secrets", None),
        attempt("create", "", "pods/eviction", Some("qwq-32b-0")),
    ] {
        assert!(!rights.grant(&refused), "{refused:?}");
    }
}
