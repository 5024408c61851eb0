//! KEDA in place of the gateway's own hand: it asks any gateway of the cluster over gRPC, sets `replicas` to what it is told,
//! and no answer is cut. The horizontal pod autoscaler behind it is played by the test.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::time::Duration;

use potstill_gateway::autoscale::keda::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, ScaledObjectRef,
};
use serde_json::json;
use system_tests::kubernetes::Kubernetes;
use system_tests::kubernetes::rights::{Rights, granted};
use system_tests::mock::Behaviour;
use system_tests::programs::free_port;
use system_tests::started::Started;
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

#[tokio::test(flavor = "multi_thread")]
async fn keda_sets_what_it_is_told_and_no_answer_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let behaviour = Behaviour::Stream(30, Duration::from_millis(20));
    let cluster = Kubernetes::start(folder.path(), behaviour, Duration::from_millis(50)).await;
    cluster.workload("apps/deployments", "qwq-32b");
    // It needs no right to patch `/scale`.
    let kubeconfig = cluster.user("potstill-gateway", Rights::of(&granted(&["base", "overlays/keda"])));
    let ports = [free_port(), free_port()];
    let mut gateways = Vec::new();
    for (port, name) in ports.into_iter().zip(["gateway-1", "gateway-2"]) {
        let config = format!(
            "[autoscale]\ninterval_ms = 50\nlease_s = 2\nkeda_listen = \"127.0.0.1:{port}\"\n[[pools]]\nmodel = \"m\"\n\
             health = {{ interval_ms = 50 }}\n[pools.scale]\nmax = 4\nslots = 2\ncold_start_s = 0.3\nmemory_s = 0.5\nhold_s = 0.3\n\
             [pools.scale.kubernetes]\nkind = \"Deployment\"\nname = \"qwq-32b\"\nport = {}\nactuator = \"keda\"\n",
            cluster.port()
        );
        let env = [("KUBECONFIG", kubeconfig.as_os_str()), ("POD_NAME", name.as_ref())];
        gateways.push(Started::with_env(&config, "info", &env).await);
    }
    let specs: GetMetricSpecResponse =
        call(ports[0], "/externalscaler.ExternalScaler/GetMetricSpec", object("m")).await.unwrap();
    assert_eq!(
        (specs.metric_specs[0].metric_name.as_str(), specs.metric_specs[0].target_size_float),
        ("nodes", 1.0)
    );
    // KEDA and the autoscaler behind it: ask one gateway or the other, set what was said.
    let hand = {
        let cluster = cluster.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(50));
            loop {
                for port in ports {
                    ticks.tick().await;
                    if let Ok(nodes) = nodes(port).await {
                        cluster.change("apps/deployments", "qwq-32b", &json!({"spec": {"replicas": nodes}}));
                    }
                }
            }
        })
    };
    // The push side: one stream, told of the first node and of the last.
    let channel = Channel::from_shared(format!("http://127.0.0.1:{}", ports[1])).unwrap().connect_lazy();
    let mut grpc = Grpc::new(channel);
    let path = PathAndQuery::from_static("/externalscaler.ExternalScaler/StreamIsActive");
    let mut pushed = loop {
        grpc.ready().await.unwrap();
        let codec = ProstCodec::<ScaledObjectRef, IsActiveResponse>::default();
        match grpc.server_streaming(Request::new(object("m")), path.clone(), codec).await {
            Ok(answer) => break answer.into_inner(),
            // No leader yet.
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
        }
    };
    assert!(!pushed.message().await.unwrap().unwrap().result);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]});
    let requests: Vec<_> = (0..16)
        .map(|number| {
            let url = format!("{}/v1/chat/completions", gateways[number % 2].url);
            let request = client.post(url).json(&body).send();
            tokio::spawn(async move { request.await.unwrap().text().await.unwrap() })
        })
        .collect();
    assert!(pushed.message().await.unwrap().unwrap().result);
    for request in requests {
        let text = request.await.unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    }
    let last = tokio::time::timeout(Duration::from_secs(60), pushed.message()).await.unwrap();
    assert!(!last.unwrap().unwrap().result, "the last node may go");
    let gone = async {
        while !cluster.pods().is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap();
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
