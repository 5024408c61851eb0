//! Autoscaled pools with a webhook. Bursts scale a pool from zero and back without a failed request, within the budget,
//! and draining nodes lose no request. Plans warm a pool before its first request. Webhooks that fail, hang or send
//! invalid responses do no harm.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use potstill_gateway::config::{Config, PoolConfig};
use serde_json::{Value, json};
use system_tests::cloud::{Cloud, Mood};
use system_tests::gateway::{TestGateway, config};
use system_tests::mock::{Behaviour, until};

fn pool(model: &str, cloud: &Cloud, max: usize, slots: usize) -> PoolConfig {
    let mut pool = PoolConfig::new(model);
    pool.scale = Some(cloud.scaling(max, slots));
    pool.health.interval_ms = 20;
    pool
}

fn quick(mut config: Config) -> Config {
    config.autoscale.interval_ms = 20;
    config
}

fn ask(gateway: &TestGateway, model: &str) -> tokio::task::JoinHandle<(u16, String)> {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "x"}]});
    let request = gateway.client.post(gateway.url("/v1/chat/completions")).json(&body).send();
    tokio::spawn(async move {
        let response = request.await.unwrap();
        let status = response.status().as_u16();
        (status, response.text().await.unwrap())
    })
}

async fn all_well(requests: Vec<tokio::task::JoinHandle<(u16, String)>>) {
    for request in requests {
        let (status, text) = request.await.unwrap();
        assert_eq!(status, 200, "{text}");
    }
}

fn stream_of(chunks: usize) -> Behaviour {
    Behaviour::Stream(chunks, Duration::from_millis(10))
}

#[tokio::test]
async fn bursts_scale_a_pool_without_failed_requests() {
    let cloud = Cloud::start(Behaviour::Answer(5), Duration::from_millis(100)).await;
    let gateway = TestGateway::start(quick(config(pool("m", &cloud, 4, 2)))).await;
    assert_eq!(cloud.nodes(), 0);
    for _ in 0..3 {
        let requests = (0..40).map(|_| ask(&gateway, "m")).collect();
        all_well(requests).await;
        until("all nodes are gone", || cloud.nodes() == 0).await;
    }
    let (most, started, cut) = cloud.counts();
    assert!(most <= 4 && started >= 3 && cut == 0, "{most} {started} {cut}");
    gateway.all_free().await;
}

#[tokio::test]
async fn removed_node_finishes_its_streams() {
    let cloud = Cloud::start(stream_of(60), Duration::from_millis(10)).await;
    let gateway = TestGateway::start(quick(config(pool("m", &cloud, 3, 1)))).await;
    let body = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]});
    let streams: Vec<_> = (0..3)
        .map(|_| {
            let request = gateway.client.post(gateway.url("/v1/chat/completions")).json(&body).send();
            tokio::spawn(async move { request.await.unwrap().text().await.unwrap() })
        })
        .collect();
    // The new configuration permits one node while all three stream.
    until("three nodes write", || gateway.gateway.load("m").unwrap().active == 3).await;
    let mut less = pool("m", &cloud, 3, 1);
    less.scale.as_mut().unwrap().max = 1;
    gateway.gateway.reload(quick(config(less))).unwrap();
    until("two drain", || gateway.gateway.load("m").unwrap().draining == 2).await;
    for stream in streams {
        assert!(stream.await.unwrap().ends_with("data: [DONE]\n\n"));
    }
    until("they are gone", || cloud.nodes() <= 1).await;
    assert_eq!(cloud.counts().2, 0, "nothing was cut");
}

#[tokio::test]
async fn draining_node_is_readmitted_before_a_new_start() {
    let cloud = Cloud::start(Behaviour::Hold, Duration::from_millis(10)).await;
    let gateway = TestGateway::start(quick(config(pool("m", &cloud, 2, 1)))).await;
    let first: Vec<_> = (0..2).map(|_| ask(&gateway, "m")).collect();
    until("both work", || gateway.gateway.load("m").unwrap().active == 2).await;
    let with_max = |max| {
        let mut changed = pool("m", &cloud, 2, 1);
        changed.scale.as_mut().unwrap().max = max;
        quick(config(changed))
    };
    gateway.gateway.reload(with_max(1)).unwrap();
    until("one drains", || gateway.gateway.load("m").unwrap().draining == 1).await;
    gateway.gateway.reload(with_max(2)).unwrap();
    until("it is back", || gateway.gateway.load("m").unwrap().draining == 0).await;
    cloud.each(|node| node.release());
    all_well(first).await;
    assert_eq!(cloud.counts().1, 2, "none was started besides");
}

#[tokio::test]
async fn pools_together_stay_within_the_budget() {
    let clouds = [
        Cloud::start(Behaviour::Answer(5), Duration::from_millis(50)).await,
        Cloud::start(Behaviour::Answer(5), Duration::from_millis(50)).await,
    ];
    let mut both = config(pool("a", &clouds[0], 8, 1));
    let mut dear = pool("b", &clouds[1], 8, 1);
    dear.scale.as_mut().unwrap().cost_per_hour = 2.0;
    both.pools.push(dear);
    both.autoscale.budget = Some(5.0);
    let gateway = TestGateway::start(quick(both)).await;
    let watched = [clouds[0].clone(), clouds[1].clone()];
    let watch = tokio::spawn(async move {
        let mut most = 0;
        loop {
            most = most.max(watched[0].nodes() + 2 * watched[1].nodes());
            assert!(most <= 5, "over the budget");
            tokio::task::yield_now().await;
        }
    });
    for _ in 0..3 {
        let mut requests: Vec<_> = (0..12).map(|_| ask(&gateway, "a")).collect();
        requests.extend((0..12).map(|_| ask(&gateway, "b")));
        all_well(requests).await;
    }
    assert!(!watch.is_finished(), "the watcher saw too much");
    watch.abort();
}

#[tokio::test]
async fn failing_webhook_does_not_affect_existing_nodes() {
    let cloud = Cloud::start(Behaviour::Answer(5), Duration::from_millis(10)).await;
    let gateway = TestGateway::start(quick(config(pool("m", &cloud, 2, 4)))).await;
    all_well(vec![ask(&gateway, "m")]).await;
    for mood in [Mood::Failing, Mood::Babbling] {
        cloud.set_mood(mood);
        let before = cloud.asked().len();
        // Existing nodes keep serving.
        let requests = (0..20).map(|_| ask(&gateway, "m")).collect();
        all_well(requests).await;
        until("it was asked again", || cloud.asked().len() > before + 1).await;
        cloud.set_mood(Mood::Well);
        until("all nodes are gone", || cloud.nodes() == 0).await;
        all_well(vec![ask(&gateway, "m")]).await;
    }
    // A webhook that hangs delays neither another pool nor requests to existing nodes.
    let mut both = config(pool("m", &cloud, 2, 4));
    let other = Cloud::start(Behaviour::Answer(5), Duration::from_millis(10)).await;
    both.pools.push(pool("other", &other, 2, 4));
    gateway.gateway.reload(quick(both)).unwrap();
    cloud.set_mood(Mood::Silent);
    all_well(vec![ask(&gateway, "other")]).await;
    assert_eq!(cloud.counts().2, 0);
}

#[tokio::test]
async fn unready_nodes_give_503_with_cold_start_as_retry_after() {
    let cloud = Cloud::start(Behaviour::Answer(5), Duration::from_millis(10)).await;
    cloud.set_mood(Mood::Sterile);
    let mut sick = pool("m", &cloud, 2, 1);
    sick.queue.wait_ms = 300;
    sick.queue.requests = 3;
    sick.scale.as_mut().unwrap().cold_start_s = 77.0;
    let gateway = TestGateway::start(quick(config(sick))).await;
    let waiting: Vec<_> = (0..3).map(|_| ask(&gateway, "m")).collect();
    until("three wait", || gateway.gateway.load("m").unwrap().queued == 3).await;
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
    let fourth = gateway.client.post(gateway.url("/v1/chat/completions")).json(&body).send().await.unwrap();
    assert_eq!((fourth.status().as_u16(), &fourth.headers()["retry-after"]), (503, &"77".parse().unwrap()));
    for request in waiting {
        assert_eq!(request.await.unwrap().0, 503, "the longest wait is over");
    }
    assert!(cloud.counts().0 <= 2, "no pile-up of nodes that are not ready");
    let models = gateway.client.get(gateway.url("/v1/models")).send().await.unwrap().text().await.unwrap();
    assert!(models.contains("\"m\""), "a pool without nodes is still a model");
    // Once its nodes are healthy the pool serves, and the measured cold start replaces the configured one.
    cloud.each(|node| node.set_healthy(true));
    until("they are ready", || gateway.gateway.load("m").unwrap().ready > 0).await;
    all_well(vec![ask(&gateway, "m")]).await;
}

async fn admin(gateway: &TestGateway) -> (String, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = gateway.gateway.clone();
    tokio::spawn(async move { potstill_gateway::app::admin::serve(serving.clone(), listener, None).await });
    (format!("http://{address}/admin"), std::env::var("PATH").unwrap())
}

#[tokio::test]
async fn planned_stage_is_warmed_and_unrefreshed_plan_expires() {
    let (a, b) = (
        Cloud::start(Behaviour::Answer(5), Duration::from_millis(10)).await,
        Cloud::start(Behaviour::Answer(5), Duration::from_millis(10)).await,
    );
    let mut both = config(pool("a", &a, 4, 8));
    both.pools.push(pool("b", &b, 4, 8));
    both.admin = Some(serde_json::from_value(json!({"listen": "127.0.0.1:0", "env": "PATH"})).unwrap());
    let gateway = TestGateway::start(quick(both)).await;
    let (url, key) = admin(&gateway).await;
    let post = async |plan: Value| {
        let answer =
            gateway.client.post(format!("{url}/stages")).bearer_auth(&key).json(&plan).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let plan = |ttl: f64, starts: f64| {
        json!({"run": "r", "ttl_s": ttl, "stages": [
            {"model": "a", "stage": "generate", "order": 0, "remaining": 100, "est_out_tokens": 1000, "concurrency": 8},
            {"model": "b", "stage": "verify", "order": 1, "remaining": 100, "est_out_tokens": 1000, "concurrency": 16, "starts_in_s": starts}]})
    };
    let (status, answer) = post(plan(60.0, 600.0)).await;
    assert_eq!(status, 200, "{answer}");
    let forecasts = answer["forecasts"].as_array().unwrap();
    assert_eq!(forecasts[0]["stage"], "generate");
    assert!((595.0..=600.0).contains(&forecasts[1]["begins_in_s"].as_f64().unwrap()), "{answer}");
    assert!(
        forecasts[0]["advised_open"].as_u64() >= Some(8) && forecasts[0]["done_in_s"].as_f64() > Some(1.0)
    );
    until("the running stage has its node", || gateway.gateway.load("a").unwrap().ready == 1).await;
    assert_eq!(b.nodes(), 0, "the next stage is far away");
    post(plan(1.0, 0.1)).await;
    until("the next stage is warm", || gateway.gateway.load("b").unwrap().ready >= 1).await;
    assert!(a.asked().len() > 1 && gateway.gateway.load("b").unwrap().active == 0);
    // A plan that is not refreshed expires, and its nodes are removed.
    until("all nodes are gone", || a.nodes() + b.nodes() == 0).await;
    for (bad, word) in [
        (
            json!({"run": "r", "stages": [{"model": "z", "stage": "s", "order": 0, "remaining": 1, "est_out_tokens": 1, "concurrency": 1}]}),
            "`z`",
        ),
        (json!({"run": "r", "stages": [{"model": "a"}]}), "stages[0]"),
        (json!({"run": "r", "stages": [], "ttl_s": -1}), "ttl_s"),
    ] {
        let (status, answer) = post(bad).await;
        let message = answer["error"]["message"].as_str().unwrap().to_owned();
        assert!(status == 400 && message.contains(word), "{message}");
    }
    let shown: Value = gateway
        .client
        .get(format!("{url}/autoscale"))
        .bearer_auth(&key)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let pools = shown["pools"].as_array().unwrap();
    assert!(
        pools.len() == 2 && pools[0]["reason"].is_string() && pools[0]["cost_so_far"].as_f64() > Some(0.0),
        "{shown}"
    );
}

#[tokio::test]
async fn request_waiting_for_a_node_gets_heartbeats() {
    let cloud = Cloud::start(stream_of(3), Duration::from_millis(700)).await;
    let mut waiting = pool("m", &cloud, 1, 4);
    waiting.heartbeat_ms = Some(100);
    waiting.queue.wait_ms = 5_000;
    let with = |wait_ms| {
        let mut changed = waiting.clone();
        changed.queue.wait_ms = wait_ms;
        quick(config(changed))
    };
    let gateway = TestGateway::start(with(5_000)).await;
    let post = |path: &str, body: Value| gateway.client.post(gateway.url(path)).json(&body).send();
    let chat = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]});
    let answer = post("/v1/chat/completions", chat.clone()).await.unwrap();
    assert_eq!((answer.status().as_u16(), cloud.nodes()), (200, 1), "the head is here before any node works");
    assert_eq!(answer.headers()["content-type"], "text/event-stream; charset=utf-8");
    let text = answer.text().await.unwrap();
    assert!(text.starts_with(": keep-alive\n\n") && text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(text.matches("keep-alive").count() >= 3 && text.matches("data: {").count() >= 4, "{text}");
    gateway.all_free().await;
    // A failure after the first comment is reported by an event in the form of the API. The stream does not end as
    // complete.
    until("all nodes are gone", || cloud.nodes() == 0).await;
    cloud.set_mood(Mood::Sterile);
    gateway.gateway.reload(with(300)).unwrap();
    let text = post("/v1/chat/completions", chat.clone()).await.unwrap().text().await.unwrap();
    assert!(text.contains("\"code\":\"no_upstream\"") && !text.contains("[DONE]"), "{text}");
    let asked = json!({"model": "m", "stream": true, "input": "x"});
    let text = post("/v1/responses", asked).await.unwrap().text().await.unwrap();
    assert!(text.contains("event: error\ndata: {") && text.contains("no_upstream"), "{text}");
    // A client that disconnects leaves the queue.
    gateway.gateway.reload(with(60_000)).unwrap();
    let answer = post("/v1/chat/completions", chat).await.unwrap();
    until("it waits", || gateway.gateway.load("m").unwrap().queued == 1).await;
    drop(answer);
    gateway.all_free().await;
    assert_eq!(gateway.gateway.in_flight_bytes(), 0);
}

#[tokio::test]
async fn dry_run_reports_decisions_without_applying_them() {
    let cloud = Cloud::start(Behaviour::Answer(5), Duration::from_millis(10)).await;
    let mut dry = pool("m", &cloud, 2, 1);
    dry.queue.wait_ms = 200;
    let mut dry = config(dry);
    dry.autoscale.dry_run = true;
    dry.admin = Some(serde_json::from_value(json!({"listen": "127.0.0.1:0", "env": "PATH"})).unwrap());
    let gateway = TestGateway::start(quick(dry)).await;
    let (url, key) = admin(&gateway).await;
    let request = ask(&gateway, "m");
    until("it waits", || gateway.gateway.load("m").unwrap().queued == 1).await;
    let shown: Value = gateway
        .client
        .get(format!("{url}/autoscale"))
        .bearer_auth(&key)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(shown["dry_run"], true);
    assert_eq!(request.await.unwrap().0, 503);
    assert_eq!(cloud.counts().1, 0);
}

#[tokio::test]
async fn records_the_load_for_simulators() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("load.csv");
    let cloud = Cloud::start(Behaviour::Answer(7), Duration::from_millis(10)).await;
    let mut recorded = quick(config(pool("m", &cloud, 1, 4)));
    recorded.autoscale.load_trace_file = Some(file.clone());
    let gateway = TestGateway::start(recorded).await;
    all_well((0..5).map(|_| ask(&gateway, "m")).collect()).await;
    let rows = || std::fs::read_to_string(&file).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    until("five rows are written", || rows().len() == 6).await;
    let rows = rows();
    assert_eq!(rows[0], "t_s,in_tokens,out_tokens,wait_s,stay_s,model,stage");
    for row in &rows[1..] {
        let fields: Vec<&str> = row.split(',').collect();
        let number = |at: usize| fields[at].parse::<f64>().unwrap();
        assert!(
            number(0) >= 0.0 && fields[2] == "7" && number(3) >= 0.0 && number(4) >= 0.0 && fields[5] == "m",
            "{row}"
        );
    }
}
