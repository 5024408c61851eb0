//! The gateway over real sockets: routing, relay, cancellation, retries, limits and drain.

use std::io::{Read, Write};
use std::time::Duration;

use futures_util::StreamExt;
use potstill_gateway::config::KeyConfig;
use serde_json::json;
use system_tests::gateway::{TestGateway, config, pool};
use system_tests::mock::{Behaviour, Mock, until};

const TICK: Duration = Duration::from_millis(10);

#[tokio::test]
async fn forwards_unknown_fields() {
    let mock = Mock::start(Behaviour::Answer(3)).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
    let body = json!({"model": "m", "messages": [{"role": "user", "content": system_tests::canary::PROMPT, "name": "bob"}], "top_k": 5,
        "chat_template_kwargs": {"enable_thinking": false}});
    let request =
        gateway.client.post(gateway.url("/v1/chat/completions")).json(&body).header("x-request-id", "mine");
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine");
    let answer: serde_json::Value = response.json().await.unwrap();
    assert_eq!(answer["mock_extra"], 7, "unknown response fields reach the client");
    assert_eq!(mock.bodies()[0], body, "the node gets exactly what the client sent");
    gateway.all_free().await;
    let metrics = gateway.client.get(gateway.url("/metrics")).send().await.unwrap().text().await.unwrap();
    for line in [
        "potstill_gateway_requests_total{model=\"m\",outcome=\"complete\",status=\"200\"} 1",
        "potstill_gateway_tokens_total{direction=\"completion\",model=\"m\"} 3",
        "potstill_gateway_in_flight_tokens{model=\"m\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn relays_a_stream_with_the_public_model_name() {
    let mock = Mock::start(Behaviour::Stream(20, Duration::from_millis(2))).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
    let text = gateway.chat(true).send().await.unwrap().text().await.unwrap();
    let mut expected: Vec<u8> =
        (0..20).flat_map(|i| system_tests::mock::chunk(&format!("t{i} "), None)).collect();
    expected.extend_from_slice(&system_tests::mock::chunk("", Some("stop")));
    expected.extend_from_slice(b"data: [DONE]\n\n");
    let expected = String::from_utf8(expected).unwrap().replace("\"model\":\"mock\"", "\"model\":\"m\"");
    assert_eq!(text, expected);
    gateway.all_free().await;
}

#[tokio::test]
async fn broken_stream_ends_with_one_error_event() {
    for behaviour in [Behaviour::CutStream(3), Behaviour::EndStreamEarly(3)] {
        let mock = Mock::start(behaviour.clone()).await;
        let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
        let text = gateway.chat(true).send().await.unwrap().text().await.unwrap();
        assert!(text.contains("t2 "), "{behaviour:?}: what was written arrives");
        assert_eq!(text.matches("stream_truncated").count(), 1, "{behaviour:?}: {text}");
        assert!(!text.contains("[DONE]"), "{behaviour:?}");
        assert_eq!(mock.asked(), 1, "nothing is asked again once a byte was answered");
        gateway.all_free().await;
    }
}

#[tokio::test]
async fn disconnect_stops_the_node_in_every_phase() {
    for (behaviour, stream) in [
        (Behaviour::Hold, false),
        (Behaviour::Hold, true),
        (Behaviour::Stream(1_000_000, TICK), true),
        (Behaviour::Endless, true),
    ] {
        let mock = Mock::start(behaviour.clone()).await;
        let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
        let request = gateway.chat(stream).send();
        let client = tokio::spawn(async move {
            let mut stream = request.await.unwrap().bytes_stream();
            while stream.next().await.is_some() {}
        });
        mock.busy(1).await;
        client.abort();
        mock.idle().await;
        gateway.all_free().await;
    }
}

#[tokio::test]
async fn disconnect_leaves_the_queue() {
    let mock = Mock::start(Behaviour::Hold).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 1))).await;
    let first = tokio::spawn(gateway.chat(false).send());
    mock.busy(1).await;
    let waiting = tokio::spawn(gateway.chat(false).send());
    until("the second one waits", || gateway.gateway.load("m").unwrap().queued == 1).await;
    waiting.abort();
    until("its place is free", || gateway.gateway.load("m").unwrap().queued == 0).await;
    mock.release();
    assert_eq!(first.await.unwrap().unwrap().status(), 200);
    assert_eq!(mock.asked(), 1);
    gateway.all_free().await;
}

#[tokio::test]
async fn random_disconnects_release_all_permits() {
    let mock = Mock::start(Behaviour::Stream(10, Duration::from_millis(3))).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 8))).await;
    let mut clients = Vec::new();
    for i in 0..200u64 {
        let request = gateway.chat(i % 3 != 0).send();
        clients.push(tokio::spawn(async move {
            let read = async {
                let _whole_or_cut = request.await.unwrap().text().await;
            };
            let _in_time_or_left = tokio::time::timeout(Duration::from_millis(i % 53), read).await;
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    gateway.all_free().await;
    mock.idle().await;
    let text = gateway.chat(true).send().await.unwrap().text().await.unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "it still works");
}

#[tokio::test]
async fn slow_reader_slows_its_node() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mock = Mock::start(Behaviour::Endless).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
    let mut socket = tokio::net::TcpStream::connect(gateway.address()).await.unwrap();
    let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}]}"#;
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    mock.busy(1).await;
    // The client reads nothing, so the node stops once the socket buffers are full. A stop is not an event: the count
    // is polled until it is stable.
    let mut taken = usize::MAX;
    while taken != mock.bytes() {
        taken = mock.bytes();
        assert!(taken < 64 << 20, "{taken} bytes were taken from the node for a client that reads nothing");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut buffer = vec![0; 4 << 20];
    socket.read_exact(&mut buffer).await.unwrap();
    until("it goes on", || mock.bytes() > taken).await;
    drop(socket);
    mock.idle().await;
    gateway.all_free().await;
}

#[tokio::test]
async fn client_that_stops_reading_is_disconnected() {
    use tokio::io::AsyncWriteExt;
    let mock = Mock::start(Behaviour::Endless).await;
    let mut configuration = config(pool(&[&mock], 4));
    configuration.limits.write_idle_ms = 200;
    let gateway = TestGateway::start(configuration).await;
    let mut socket = tokio::net::TcpStream::connect(gateway.address()).await.unwrap();
    let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}]}"#;
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    mock.busy(1).await;
    mock.idle().await;
    gateway.all_free().await;
}

#[tokio::test]
async fn stopped_node_costs_one_retry() {
    let mut dead = Mock::start(Behaviour::Answer(1)).await;
    let good = Mock::start(Behaviour::Answer(1)).await;
    let mut pool = pool(&[&dead, &good], 64);
    pool.health.interval_ms = 60_000;
    let gateway = TestGateway::start(config(pool)).await;
    dead.stop();
    until("it refuses connections", || {
        std::net::TcpStream::connect(dead.url().trim_start_matches("http://")).is_err()
    })
    .await;
    for _ in 0..20 {
        assert_eq!(TestGateway::json(gateway.chat(false)).await.0, 200);
    }
    assert_eq!(good.asked(), 20);
    let load = gateway.gateway.load("m").unwrap();
    assert_eq!((load.ready, load.unhealthy), (1, 1), "the dead node is out after its first failure");
    gateway.all_free().await;
}

#[tokio::test]
async fn busy_node_is_retried_elsewhere_and_last_error_is_forwarded() {
    let (busy, good) = (Mock::start(Behaviour::Status(503)).await, Mock::start(Behaviour::Answer(1)).await);
    let gateway = TestGateway::start(config(pool(&[&busy, &good], 4))).await;
    assert_eq!(TestGateway::json(gateway.chat(false)).await.0, 200);
    let only = TestGateway::start(config(pool(&[&busy], 4))).await;
    let (status, body) = TestGateway::json(only.chat(false)).await;
    assert_eq!(
        (status, body["error"]["code"].as_str()),
        (503, Some("scripted")),
        "without a second node, its own words"
    );
    let refusing = Mock::start(Behaviour::Status(400)).await;
    let gateway = TestGateway::start(config(pool(&[&refusing], 4))).await;
    let (status, body) = TestGateway::json(gateway.chat(false)).await;
    assert_eq!(
        (status, body["error"]["code"].as_str()),
        (400, Some("scripted")),
        "a node's own error passes unchanged"
    );
    assert_eq!(refusing.asked(), 1);
}

#[tokio::test]
async fn unhealthy_node_gets_no_requests_until_it_recovers() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let gateway = TestGateway::start(config(pool(&[&mock], 4))).await;
    mock.set_healthy(false);
    until("it is out", || gateway.gateway.load("m").unwrap().unhealthy == 1).await;
    let response = gateway.chat(false).send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(mock.asked(), 0);
    mock.set_healthy(true);
    until("it is back", || gateway.gateway.load("m").unwrap().ready == 1).await;
    assert_eq!(TestGateway::json(gateway.chat(false)).await.0, 200);
}

#[tokio::test]
async fn prefers_the_node_with_fewer_outstanding_tokens() {
    let (a, b) = (Mock::start(Behaviour::Hold).await, Mock::start(Behaviour::Hold).await);
    let gateway = TestGateway::start(config(pool(&[&a, &b], 8))).await;
    let long = json!({"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "x".repeat(40_000)}]});
    let first = tokio::spawn(gateway.client.post(gateway.url("/v1/chat/completions")).json(&long).send());
    until("the long one runs", || a.asked() + b.asked() == 1).await;
    let (holder, other) = if a.asked() == 1 { (&a, &b) } else { (&b, &a) };
    let mut short = Vec::new();
    for n in 1..=4 {
        short.push(tokio::spawn(gateway.chat(false).send()));
        until("it runs", || other.asked() == n).await;
    }
    assert_eq!(holder.asked(), 1, "four short ones weigh less than one long one");
    a.release();
    b.release();
    for request in short.into_iter().chain([first]) {
        assert_eq!(request.await.unwrap().unwrap().status(), 200);
    }
    gateway.all_free().await;
}

#[tokio::test]
async fn full_queue_returns_429_with_retry_after() {
    let mock = Mock::start(Behaviour::Hold).await;
    let mut pool = pool(&[&mock], 1);
    pool.queue.requests = 1;
    let gateway = TestGateway::start(config(pool)).await;
    let first = tokio::spawn(gateway.chat(false).send());
    mock.busy(1).await;
    let second = tokio::spawn(gateway.chat(false).send());
    until("the second one waits", || gateway.gateway.load("m").unwrap().queued == 1).await;
    let third = gateway.chat(false).send().await.unwrap();
    assert_eq!(third.status(), 429);
    assert!(third.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    mock.release();
    assert_eq!(first.await.unwrap().unwrap().status(), 200);
    mock.busy(1).await;
    mock.release();
    assert_eq!(second.await.unwrap().unwrap().status(), 200);
    gateway.all_free().await;
}

#[tokio::test]
async fn errors_have_openai_form() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let mut configuration = config(pool(&[&mock], 4));
    configuration.limits.body_bytes = 1000;
    let gateway = TestGateway::start(configuration).await;
    let post = |body: String| gateway.client.post(gateway.url("/v1/chat/completions")).body(body);
    for (request, status, code) in [
        (post("{".into()), 400, "invalid_json"),
        (post("{}".into()), 400, "missing_required_parameter"),
        (post(r#"{"model":"nope","messages":[{}]}"#.into()), 404, "model_not_found"),
        (post(r#"{"model":"m","messages":[]}"#.into()), 400, "invalid_value"),
        (post("x".repeat(2000)), 413, "request_too_large"),
        (gateway.client.get(gateway.url("/v1/nothing")), 404, "not_found"),
        (gateway.client.get(gateway.url("/v1/chat/completions")), 405, "method_not_allowed"),
        (gateway.client.get(gateway.url("/v1/models/nope")), 404, "model_not_found"),
    ] {
        let (found, body) = TestGateway::json(request).await;
        assert_eq!((found, body["error"]["code"].as_str()), (status, Some(code)), "{body}");
        assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string());
    }
    let (_, list) = TestGateway::json(gateway.client.get(gateway.url("/v1/models"))).await;
    assert_eq!(list["data"][0]["id"], "m");
    assert_eq!(mock.asked(), 0);
}

#[tokio::test]
async fn keys_restrict_models_and_are_not_forwarded() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let (key, hash) = potstill_gateway::auth::keys::generate_key();
    let mut configuration = config(pool(&[&mock], 4));
    configuration.keys.push(KeyConfig {
        name: "a".into(),
        hash: Some(hash),
        requests_per_minute: Some(2),
        models: vec!["m".into()],
        ..KeyConfig::default()
    });
    let gateway = TestGateway::start(configuration).await;
    assert_eq!(TestGateway::json(gateway.chat(false)).await.0, 401);
    assert_eq!(TestGateway::json(gateway.client.get(gateway.url("/v1/models"))).await.0, 401);
    for _ in 0..2 {
        assert_eq!(TestGateway::json(gateway.chat(false).bearer_auth(&key)).await.0, 200);
    }
    let limited = gateway.chat(false).bearer_auth(&key).send().await.unwrap();
    assert_eq!(limited.status(), 429);
    assert!(limited.headers().contains_key("retry-after"));
    assert!(mock.headers().iter().all(|headers| !headers.contains_key("authorization")));
}

#[tokio::test]
async fn closes_silent_and_slow_connections() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let mut configuration = config(pool(&[&mock], 4));
    configuration.limits.first_byte_ms = 100;
    configuration.limits.head_ms = 100;
    configuration.limits.body_idle_ms = 100;
    let gateway = TestGateway::start(configuration).await;
    for sent in [
        "",
        "POST /v1/chat/completions HT",
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    ] {
        let address = gateway.address();
        let answer = tokio::task::spawn_blocking(move || {
            let mut socket = std::net::TcpStream::connect(address).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            socket.write_all(sent.as_bytes()).unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).expect("the gateway keeps the connection open");
            answer
        })
        .await
        .unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{sent:?}: {answer}");
    }
}

#[tokio::test]
async fn drain_finishes_streams_and_rejects_new_requests() {
    let mock = Mock::start(Behaviour::Stream(30, TICK)).await;
    let mut gateway = TestGateway::start(config(pool(&[&mock], 64))).await;
    let streams: Vec<_> = (0..20)
        .map(|_| {
            let request = gateway.chat(true).send();
            tokio::spawn(async move { request.await.unwrap().text().await.unwrap() })
        })
        .collect();
    mock.busy(20).await;
    gateway.begin_drain();
    until("nobody is let in", || std::net::TcpStream::connect(gateway.address()).is_err()).await;
    for stream in streams {
        assert!(stream.await.unwrap().ends_with("data: [DONE]\n\n"), "a stream was broken by the drain");
    }
    gateway.stopped(Duration::from_secs(5)).await;
}
