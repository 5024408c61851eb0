//! KEDA as the actuator: it reads the replica count from any gateway of the cluster over gRPC and sets `replicas`; no
//! response is cut. The test plays KEDA and the horizontal pod autoscaler behind it.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::time::Duration;

use potstill_gateway::autoscale::kubernetes::keda::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, ScaledObjectRef,
};
use serde_json::{Value, json};
use system_tests::kubernetes::Kubernetes;
use system_tests::kubernetes::rights::{Rights, granted};
use system_tests::mock::Behaviour;
use system_tests::programs::free_port;
use system_tests::started::Started;
use tokio::task::JoinHandle;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

fn object(model: &str) -> ScaledObjectRef {
    ScaledObjectRef {
        name: "qwq-32b".to_owned(),
        namespace: "test".to_owned(),
        scaler_metadata: HashMap::from([("model".to_owned(), model.to_owned())]),
    }
}

async fn call<Q, A>(port: u16, method: &'static str, question: Q) -> Result<A, Status>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let channel = Channel::from_shared(format!("http://127.0.0.1:{port}")).unwrap().connect_lazy();
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::from_static(method);
    Ok(grpc.unary(Request::new(question), path, ProstCodec::default()).await?.into_inner())
}

async fn nodes(port: u16) -> Result<i64, Status> {
    let question =
        GetMetricsRequest { scaled_object_ref: Some(object("m")), metric_name: "nodes".to_owned() };
    let answer: GetMetricsResponse =
        call(port, "/externalscaler.ExternalScaler/GetMetrics", question).await?;
    assert_eq!(answer.metric_values[0].metric_value as f64, answer.metric_values[0].metric_value_float);
    Ok(answer.metric_values[0].metric_value)
}

/// Starts gateways over one workload that KEDA scales. Returns each with its gRPC port.
async fn gateways(cluster: &Kubernetes, names: &[&str], min: usize) -> (Vec<Started>, Vec<u16>) {
    // These gateways need no right to patch `/scale`.
    let kubeconfig = cluster.user("potstill-gateway", Rights::of(&granted(&["base", "overlays/keda"])));
    let (mut gateways, mut ports) = (Vec::new(), Vec::new());
    for name in names {
        let port = free_port();
        let config = format!(
            "[autoscale]\ninterval_ms = 50\nlease_s = 2\nkeda_listen = \"127.0.0.1:{port}\"\n[[pools]]\nmodel = \"m\"\n\
             health = {{ interval_ms = 50 }}\n[pools.scale]\nmin = {min}\nmax = 4\nmax_concurrency = 2\ncold_start_s = 0.3\nmemory_s = 0.5\nhold_s = 0.3\n\
             [pools.scale.kubernetes]\nkind = \"Deployment\"\nname = \"qwq-32b\"\nport = {}\nactuator = \"keda\"\n",
            cluster.port()
        );
        let env = [("KUBECONFIG", kubeconfig.as_os_str()), ("POD_NAME", name.as_ref())];
        gateways.push(Started::with_env(&config, "info", &env).await);
        ports.push(port);
    }
    (gateways, ports)
}

/// Plays KEDA and the pod autoscaler: reads the count from each gateway in turn and sets it.
fn keda(cluster: &Kubernetes, ports: &[u16]) -> JoinHandle<()> {
    let (cluster, ports) = (cluster.clone(), ports.to_owned());
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(50));
        loop {
            for &port in &ports {
                ticks.tick().await;
                if let Ok(nodes) = nodes(port).await {
                    cluster.change("apps/deployments", "qwq-32b", &json!({"spec": {"replicas": nodes}}));
                }
            }
        }
    })
}

/// Sends requests to these gateways in turn, all at once.
fn ask(gateways: &[Started], requests: usize) -> Vec<JoinHandle<String>> {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]});
    let ask = |number: usize| {
        let url = format!("{}/v1/chat/completions", gateways[number % gateways.len()].url);
        let request = client.post(url).json(&body).send();
        tokio::spawn(async move { request.await.unwrap().text().await.unwrap() })
    };
    (0..requests).map(ask).collect()
}

async fn all_whole(requests: Vec<JoinHandle<String>>) {
    for request in requests {
        let text = request.await.unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    }
}

async fn within_a_minute(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), waiting).await.is_ok(), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keda_applies_published_scale_without_cut_responses() {
    let folder = tempfile::tempdir().unwrap();
    let behaviour = Behaviour::Stream(30, Duration::from_millis(20));
    let cluster = Kubernetes::start(folder.path(), behaviour, Duration::from_millis(50)).await;
    cluster.workload("apps/deployments", "qwq-32b");
    let (gateways, ports) = gateways(&cluster, &["gateway-1", "gateway-2"], 0).await;
    let specs: GetMetricSpecResponse =
        call(ports[0], "/externalscaler.ExternalScaler/GetMetricSpec", object("m")).await.unwrap();
    assert_eq!(
        (specs.metric_specs[0].metric_name.as_str(), specs.metric_specs[0].target_size_float),
        ("nodes", 1.0)
    );
    let hand = keda(&cluster, &ports);
    // The push interface: one stream reports the first node and the last.
    let channel = Channel::from_shared(format!("http://127.0.0.1:{}", ports[1])).unwrap().connect_lazy();
    let mut grpc = Grpc::new(channel);
    let path = PathAndQuery::from_static("/externalscaler.ExternalScaler/StreamIsActive");
    let mut pushed = loop {
        grpc.ready().await.unwrap();
        let codec = ProstCodec::<ScaledObjectRef, IsActiveResponse>::default();
        match grpc.server_streaming(Request::new(object("m")), path.clone(), codec).await {
            Ok(answer) => break answer.into_inner(),
            // There is no leader yet.
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
        }
    };
    assert!(!pushed.message().await.unwrap().unwrap().result);
    let requests = ask(&gateways, 16);
    assert!(pushed.message().await.unwrap().unwrap().result);
    all_whole(requests).await;
    let last = tokio::time::timeout(Duration::from_secs(60), pushed.message()).await.unwrap();
    assert!(!last.unwrap().unwrap().result, "the last node may go");
    within_a_minute("all pods are gone", async || cluster.pods().is_empty()).await;
    let counts = cluster.counts();
    assert!(counts.most >= 3 && counts.most <= 4 && counts.cut == 0, "{counts:?}");
    let patched = cluster.audit().into_iter().any(|(_, attempt, status)| {
        status == 403 || (attempt.verb == "patch" && attempt.resource == "deployments/scale")
    });
    assert!(!patched, "{:?}", cluster.audit());
    let wrong: Result<IsActiveResponse, _> =
        call(ports[0], "/externalscaler.ExternalScaler/IsActive", object("other")).await;
    assert_eq!(wrong.unwrap_err().code(), Code::InvalidArgument);
    let unknown: Result<IsActiveResponse, _> =
        call(ports[0], "/externalscaler.ExternalScaler/Else", object("m")).await;
    assert_eq!(unknown.unwrap_err().code(), Code::Unimplemented);
    hand.abort();
}

/// KEDA stops in the middle: two pods are marked for deletion but not deleted, and KEDA may delete them at any time.
/// Neither a starting gateway nor a new leader sends them requests or drains pods that serve.
#[tokio::test(flavor = "multi_thread")]
async fn pods_marked_for_deletion_stay_drained_across_leaders() {
    let folder = tempfile::tempdir().unwrap();
    let behaviour = Behaviour::Stream(30, Duration::from_millis(20));
    let cluster = Kubernetes::start(folder.path(), behaviour, Duration::from_millis(50)).await;
    cluster.workload("apps/deployments", "qwq-32b");
    let (mut first, ports) = gateways(&cluster, &["gateway-1"], 1).await;
    let hand = keda(&cluster, &ports);
    let requests = ask(&first, 6);
    within_a_minute("three pods", async || cluster.pods().len() >= 3).await;
    hand.abort();
    all_whole(requests).await;
    let marks = || {
        let note =
            |pod: &String| cluster.get("pods", pod)["metadata"]["annotations"]["potstill.dev/drains"].clone();
        cluster.pods().into_iter().map(|pod| (note(&pod), pod)).collect::<Vec<_>>()
    };
    let given_up = |mark: &Value| mark.as_str().is_some_and(|mark| mark.ends_with("/empty"));
    within_a_minute("all but one are given up, and the number is said", async || {
        let marks = marks();
        marks.iter().filter(|(mark, _)| given_up(mark)).count() == marks.len() - 1
            && nodes(ports[0]).await.is_ok_and(|nodes| nodes == 1)
    })
    .await;
    let before = marks();
    let (second, more) = gateways(&cluster, &["gateway-2"], 1).await;
    all_whole(ask(&second, 2)).await;
    assert_eq!(marks(), before, "as it starts");
    first[0].process.0.kill().unwrap();
    within_a_minute("the second leads", async || {
        let lease = cluster.get("coordination.k8s.io/leases", "potstill-gateway");
        lease["spec"]["holderIdentity"] == "gateway-2"
            && lease["metadata"]["annotations"]["gateway.potstill.dev/gateway-1"].is_null()
    })
    .await;
    all_whole(ask(&second, 2)).await;
    assert_eq!((marks(), nodes(more[0]).await.unwrap()), (before, 1), "as it leads");
    // KEDA continues and may delete them at any time.
    let hand = keda(&cluster, &more);
    let writing = ask(&second, 2);
    within_a_minute("they are gone", async || cluster.pods().len() == 1).await;
    all_whole(writing).await;
    all_whole(ask(&second, 8)).await;
    assert_eq!(cluster.counts().cut, 0);
    hand.abort();
}
