//! The OpenAI API as clients see it, and the features of pools: normalized responses, priority classes, retries,
//! fallback pools, limits, and the Responses API.

use std::time::Duration;

use potstill_gateway::config::{HedgeConfig, KeyConfig, PoolConfig, Priority, Reasoning};
use serde_json::{Value, json};
use system_tests::gateway::{TestGateway, config, pool};
use system_tests::mock::{Behaviour, Mock, until};

fn document(body: Value) -> Behaviour {
    Behaviour::Document(200, body.to_string())
}

fn key(config: KeyConfig) -> (String, KeyConfig) {
    let (key, hash) = potstill_gateway::auth::keys::generate_key();
    (key, KeyConfig { hash: Some(hash), ..config })
}

#[tokio::test]
async fn normalizes_responses_of_nodes() {
    let mock = Mock::start(document(json!({"model": "/weights", "choices": [{"message": {"content": [
        {"type": "text", "text": "a"}]}, "finish_reason": "abort"}], "usage": {"prompt_tokens": 2, "completion_tokens": 3}})))
    .await;
    let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
    let (_, answer) = TestGateway::json(gateway.chat(false)).await;
    assert_eq!((answer["model"].as_str(), answer["usage"]["total_tokens"].as_u64()), (Some("m"), Some(5)));
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "an aborted answer is not whole");
    assert_eq!(answer["choices"][0]["message"]["content"], "a");
    // An error body with status 200, and a body that is not a completion.
    for body in
        [json!({"error": {"message": "CUDA out of memory", "code": 500}}).to_string(), "<html>".into()]
    {
        mock.behave(Behaviour::Document(200, body));
        let (status, answer) = TestGateway::json(gateway.chat(false)).await;
        assert_eq!(status, 502, "{answer}");
        assert!(answer["error"]["message"].is_string() && !answer["error"]["code"].is_number());
    }
    mock.behave(Behaviour::Document(
        400,
        json!({"object": "error", "code": 400, "message":
        "The input (5000 tokens) is longer than the model's context length (4096 tokens)."})
        .to_string(),
    ));
    let (status, answer) = TestGateway::json(gateway.chat(false)).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
    assert!(answer["error"]["message"].as_str().unwrap().contains("maximum context length is 4096 tokens"));
    gateway.all_free().await;
}

#[tokio::test]
async fn drops_comments_and_other_sse_fields() {
    let chunk = |reason: Value| {
        json!({"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices":
        [{"index": 0, "delta": {"role": "assistant", "content": "x"}, "finish_reason": reason}]})
    };
    let text = format!(
        ": ping\r\n\r\nevent: message\r\nid: 1\r\ndata:{}\r\n\r\n: ping\r\n\r\ndata: {}\r\n\r\ndata: [DONE]\r\n\r\ndata: after\r\n\r\n",
        chunk(Value::Null),
        chunk(json!("stop"))
    );
    let mock = Mock::start(Behaviour::Events(text)).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
    let text = gateway.chat(true).send().await.unwrap().text().await.unwrap();
    assert_eq!(
        text,
        format!("data: {}\n\ndata: {}\n\ndata: [DONE]\n\n", chunk(Value::Null), chunk(json!("stop")))
    );
    mock.behave(Behaviour::Events(
        "data: {\"error\":{\"message\":\"engine died\"}}\n\ndata: [DONE]\n\n".into(),
    ));
    let text = gateway.chat(true).send().await.unwrap().text().await.unwrap();
    assert!(text.contains("engine died") && !text.contains("[DONE]"), "{text}");
    gateway.all_free().await;
}

#[tokio::test]
async fn splits_think_tags_as_configured() {
    let mock = Mock::start(document(json!({"choices": [{"message": {"role": "assistant",
        "content": "hm</think>It is 4"}, "finish_reason": "stop"}]})))
    .await;
    let mut configuration = pool(&[&mock], 4);
    configuration.reasoning = Reasoning::SplitOpen;
    let gateway = TestGateway::start(config(configuration)).await;
    let (_, answer) = TestGateway::json(gateway.chat(false)).await;
    let message = &answer["choices"][0]["message"];
    assert_eq!(
        (message["reasoning_content"].as_str(), message["content"].as_str()),
        (Some("hm"), Some("It is 4"))
    );
}

#[tokio::test]
async fn forwards_other_endpoints_and_upstream_model_names() {
    let mock = Mock::start(document(json!({"data": [{"embedding": [1.0]}], "model": "x"}))).await;
    let mut configuration = pool(&[&mock], 4);
    configuration.model = "org/name".into();
    configuration.upstream_model = Some("their-name".into());
    let gateway = TestGateway::start(config(configuration)).await;
    let post = |path: &str| {
        gateway.client.post(gateway.url(path)).json(&json!({"model": "org/name", "input": "a", "own": 1}))
    };
    let (status, answer) = TestGateway::json(post("/v1/embeddings")).await;
    assert_eq!(
        (status, answer["model"].as_str(), answer["data"][0]["index"].as_u64()),
        (200, Some("org/name"), Some(0))
    );
    assert_eq!(
        mock.bodies()[0],
        json!({"model": "their-name", "input": "a", "own": 1}),
        "only the name changes"
    );
    for path in ["/tokenize", "/v1/rerank"] {
        assert_eq!(TestGateway::json(post(path)).await.0, 200, "{path}");
    }
    assert_eq!(TestGateway::json(gateway.client.get(gateway.url("/tokenizer_info"))).await.0, 200);
    let (_, card) = TestGateway::json(gateway.client.get(gateway.url("/v1/models/org/name"))).await;
    assert_eq!((card["id"].as_str(), card["object"].as_str()), (Some("org/name"), Some("model")));
}

#[tokio::test]
async fn serves_the_responses_api() {
    let mock = Mock::start(document(json!({"choices": [{"message": {"role": "assistant", "reasoning": "hm",
        "content": "4"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 2, "completion_tokens": 3}})))
    .await;
    let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
    let post = |stream| {
        let body = json!({"model": "m", "input": "2+2?", "instructions": "be short", "stream": stream});
        gateway.client.post(gateway.url("/v1/responses")).json(&body)
    };
    let (_, answer) = TestGateway::json(post(false)).await;
    assert_eq!((answer["object"].as_str(), answer["status"].as_str()), (Some("response"), Some("completed")));
    assert_eq!(answer["output"][0]["content"][0]["text"], "hm");
    assert_eq!(answer["output"][1]["content"][0]["text"], "4");
    assert_eq!(answer["usage"]["output_tokens"], 3);
    assert_eq!(mock.bodies()[0]["messages"][0], json!({"role": "system", "content": "be short"}));
    mock.behave(Behaviour::Stream(3, Duration::from_millis(1)));
    let text = post(true).send().await.unwrap().text().await.unwrap();
    assert!(
        text.starts_with("event: response.created\n") && text.contains("event: response.completed\n"),
        "{text}"
    );
    assert!(text.contains("t0 t1 t2 ") && !text.contains("[DONE]"));
    mock.behave(Behaviour::CutStream(2));
    let text = post(true).send().await.unwrap().text().await.unwrap();
    assert!(text.contains("event: response.failed\n") && !text.contains("response.completed"), "{text}");
    gateway.all_free().await;
}

#[tokio::test]
async fn retries_on_another_node_before_the_first_byte() {
    let good = Mock::start(Behaviour::Answer(1)).await;
    for bad in [Behaviour::CutDocument, Behaviour::Status(500), Behaviour::Status(503), Behaviour::Busy(1)] {
        let broken = Mock::start(bad.clone()).await;
        let gateway = TestGateway::start(config(pool(&[&broken, &good], 4))).await;
        let (status, answer) = TestGateway::json(gateway.chat(false)).await;
        assert_eq!(status, 200, "{bad:?}: {answer}");
        assert_eq!(broken.asked(), 1, "{bad:?}");
        gateway.all_free().await;
    }
}

#[tokio::test]
async fn ejects_a_failing_node_and_readmits_it() {
    let (flaky, good) =
        (Mock::start(Behaviour::CutStream(1)).await, Mock::start(Behaviour::Stream(2, Duration::ZERO)).await);
    let mut configuration = pool(&[&flaky, &good], 4);
    configuration.outlier.eject_ms = 200;
    let gateway = TestGateway::start(config(configuration)).await;
    let mut cut = 0;
    while gateway.gateway.load("m").unwrap().ejected == 0 {
        cut += usize::from(
            gateway.chat(true).send().await.unwrap().text().await.unwrap().contains("stream_truncated"),
        );
        assert!(cut <= 3, "mid-stream failures do not count");
    }
    let asked = flaky.asked();
    for _ in 0..5 {
        assert!(gateway.chat(true).send().await.unwrap().text().await.unwrap().ends_with("[DONE]\n\n"));
    }
    assert_eq!(flaky.asked(), asked, "nothing goes to an ejected node");
    flaky.behave(Behaviour::Stream(2, Duration::ZERO));
    until("its time is over", || flaky.asked() > asked || gateway.gateway.load("m").unwrap().ejected > 0)
        .await;
    let client = &gateway;
    let mut tries = tokio::time::interval(Duration::from_millis(20));
    while client.gateway.load("m").unwrap().ejected > 0 {
        tries.tick().await;
        assert!(client.chat(true).send().await.unwrap().text().await.unwrap().ends_with("[DONE]\n\n"));
    }
    gateway.all_free().await;
}

#[tokio::test]
async fn falls_back_to_another_pool() {
    let (down, other) = (Mock::start(Behaviour::Status(503)).await, Mock::start(Behaviour::Answer(1)).await);
    let mut first = pool(&[&down], 4);
    first.fallback = vec!["spare".into()];
    let mut configuration = config(first);
    configuration.pools.push(PoolConfig { model: "spare".into(), ..pool(&[&other], 4) });
    let gateway = TestGateway::start(configuration).await;
    let answer = gateway.chat(false).send().await.unwrap();
    assert_eq!(answer.headers()["x-potstill-served-model"], "spare");
    assert_eq!(answer.json::<Value>().await.unwrap()["model"], "spare", "who answered is said");
    assert_eq!(other.bodies()[0]["model"], "spare");
}

#[tokio::test]
async fn hedges_short_requests_only() {
    let (slow, quick) = (Mock::start(Behaviour::Hold).await, Mock::start(Behaviour::Answer(1)).await);
    let mut configuration = pool(&[&slow, &quick], 4);
    configuration.hedge = Some(HedgeConfig { delay_ms: 30, max_tokens: 16 });
    let gateway = TestGateway::start(config(configuration)).await;
    let ask = |limit: u64| {
        let body = json!({"model": "m", "max_tokens": limit, "messages": [{"role": "user", "content": system_tests::canary::PROMPT}]});
        gateway.client.post(gateway.url("/v1/chat/completions")).json(&body).send()
    };
    // The first node in turn holds the request; the second serves the hedge.
    for _ in 0..4 {
        assert_eq!(ask(16).await.unwrap().status(), 200);
    }
    assert!(slow.asked() >= 1, "nothing was slow");
    slow.idle().await;
    gateway.all_free().await;
    // A longer request is not hedged: it waits for the node that holds it.
    let hedged = quick.asked();
    let long = tokio::spawn(ask(17));
    let more = tokio::spawn(ask(17));
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    while !(long.is_finished() && more.is_finished()) {
        ticks.tick().await;
        slow.release();
    }
    for request in [long, more] {
        assert_eq!(request.await.unwrap().unwrap().status(), 200);
    }
    assert!(quick.asked() <= hedged + 2, "nothing was asked twice");
}

#[tokio::test]
async fn serves_higher_classes_first_and_clamps_the_class() {
    let mock = Mock::start(Behaviour::Hold).await;
    let mut configuration = config(pool(&[&mock], 1));
    let (batch, batch_config) =
        key(KeyConfig { name: "batch".into(), priority: Priority::Bulk, ..KeyConfig::default() });
    let (chat, chat_config) =
        key(KeyConfig { name: "chat".into(), priority: Priority::Interactive, ..KeyConfig::default() });
    configuration.keys = vec![batch_config, chat_config];
    let gateway = TestGateway::start(configuration).await;
    let ask = |key: &str, text: &str, class: &str| {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": text}]});
        let request = gateway.client.post(gateway.url("/v1/chat/completions")).json(&body).bearer_auth(key);
        tokio::spawn(request.header("x-potstill-priority", class).send())
    };
    let mut running = vec![ask(&batch, "first", "bulk")];
    mock.busy(1).await;
    for (key, text, class) in
        [(&batch, "b1", "interactive"), (&batch, "b2", "bulk"), (&chat, "c1", "interactive")]
    {
        let queued = gateway.gateway.load("m").unwrap().queued;
        running.push(ask(key, text, class));
        until("it waits", || gateway.gateway.load("m").unwrap().queued == queued + 1).await;
    }
    for asked in 1..=4 {
        until("the next one is asked", || mock.asked() == asked).await;
        mock.busy(1).await;
        mock.release();
    }
    for request in running {
        assert_eq!(request.await.unwrap().unwrap().status(), 200);
    }
    let order: Vec<_> = mock.bodies().iter().map(|body| body["messages"][0]["content"].to_string()).collect();
    assert_eq!(order, ["\"first\"", "\"c1\"", "\"b1\"", "\"b2\""]);
    gateway.all_free().await;
}

#[tokio::test]
async fn reports_reserves_and_settles_rate_limits() {
    let mock = Mock::start(Behaviour::Answer(10)).await;
    let mut configuration = config(pool(&[&mock], 4));
    let (secret, limited) = key(KeyConfig {
        name: "a".into(),
        requests_per_minute: Some(100),
        tokens_per_minute: Some(600),
        stages: [(
            "judge".to_owned(),
            potstill_gateway::config::KeyLimits { requests_per_minute: Some(1), ..Default::default() },
        )]
        .into(),
        ..KeyConfig::default()
    });
    configuration.keys = vec![limited];
    let gateway = TestGateway::start(configuration).await;
    // 500 tokens are reserved for a completion of unknown length and 10 are used, so the next request fits.
    for _ in 0..3 {
        let answer = gateway.chat(false).bearer_auth(&secret).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-ratelimit-limit-tokens"], "600");
    }
    let empty = gateway.client.post(gateway.url("/v1/chat/completions")).bearer_auth(&secret);
    let probe = empty.json(&json!({"model": "m", "messages": []})).send().await.unwrap();
    assert_eq!(probe.status(), 400);
    assert_eq!(probe.headers()["x-ratelimit-limit-requests"], "100", "errors tell the limits as well");
    let large =
        json!({"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "x".repeat(2_300)}]});
    let request = gateway.client.post(gateway.url("/v1/chat/completions")).bearer_auth(&secret).json(&large);
    let refused = request.send().await.unwrap();
    assert_eq!(
        (refused.status().as_u16(), refused.headers()["x-potstill-reason"].to_str().unwrap()),
        (429, "rate_limit_exceeded")
    );
    assert!(refused.headers().contains_key("retry-after"));
    for expected in [200, 429] {
        let judge = gateway.chat(false).bearer_auth(&secret).header("x-potstill-stage", "judge");
        assert_eq!(judge.send().await.unwrap().status(), expected);
    }
    gateway.all_free().await;
    assert_eq!(gateway.gateway.in_flight_bytes(), 0);
}

#[tokio::test]
async fn heartbeats_do_not_reset_the_idle_deadline() {
    let mock = Mock::start(Behaviour::Silent).await;
    let mut configuration = pool(&[&mock], 4);
    configuration.heartbeat_ms = Some(100);
    configuration.deadlines.idle_ms = 700;
    let gateway = TestGateway::start(config(configuration)).await;
    let text = gateway.chat(true).send().await.unwrap().text().await.unwrap();
    assert!(text.matches(": keep-alive\n\n").count() >= 3, "{text}");
    assert!(text.contains("silent for too long") && !text.contains("[DONE]"), "{text}");
    mock.idle().await;
    gateway.all_free().await;
}

#[tokio::test]
async fn disconnects_stop_the_node_at_once() {
    let mock = Mock::start(Behaviour::Hold).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 64))).await;
    let mut took = Vec::new();
    for round in 0..200 {
        mock.behave(if round % 2 == 0 {
            Behaviour::Hold
        } else {
            Behaviour::Stream(1_000_000, Duration::from_millis(5))
        });
        let clients: Vec<_> = (0..10)
            .map(|_| {
                let request = gateway.chat(round % 4 != 0).send();
                tokio::spawn(async move { request.await.unwrap().bytes().await })
            })
            .collect();
        mock.busy(10).await;
        let left = std::time::Instant::now();
        clients.iter().for_each(tokio::task::JoinHandle::abort);
        mock.idle().await;
        took.push(left.elapsed());
    }
    took.sort();
    println!("ten departures until the node has stopped: p50 {:?}, p99 {:?}", took[100], took[198]);
    gateway.all_free().await;
}
