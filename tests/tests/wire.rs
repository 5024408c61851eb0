//! Hostile input on the wire: malformed heads and bodies, request smuggling, slow clients and floods.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use potstill_gateway::config::Config;
use system_tests::gateway::{TestGateway, config, pool};
use system_tests::mock::{Behaviour, Mock, until};
use system_tests::raw::{BODY, listen, post, say};
use system_tests::started::Started;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_millis(1500);

fn strict(mock: &Mock) -> Config {
    let mut config = config(pool(&[mock], 64));
    config.limits.first_byte_ms = 300;
    config.limits.head_ms = 300;
    config.limits.body_idle_ms = 300;
    config.limits.body_bytes = 100_000;
    config
}

#[tokio::test]
async fn malformed_requests_are_rejected() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let gateway = TestGateway::start(strict(&mock)).await;
    let length = format!("host: x\r\ncontent-length: {}\r\n", BODY.len());
    let many = (0..101).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    let chunked = |body: &str| post("host: x\r\ntransfer-encoding: chunked\r\n", body);
    let json = |body: &str| post(&format!("host: x\r\ncontent-length: {}\r\n", body.len()), body);
    let deep = format!(r#"{{"model":"m","messages":[{{}}],"x":{}{}}}"#, "[".repeat(128), "]".repeat(128));
    let cases: Vec<(&str, String, &[u16])> = vec![
        ("half a head", "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n".into(), &[408]),
        ("silence", String::new(), &[]),
        ("a stalled body", post("host: x\r\ncontent-length: 999\r\n", "{"), &[408]),
        ("100 headers and more", post(&format!("{length}{many}"), BODY), &[431]),
        ("a header of 300 KB", post(&format!("{length}x: {}\r\n", "a".repeat(300 << 10)), BODY), &[431]),
        (
            "a target of 70 KB",
            format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "a".repeat(70 << 10)),
            &[414, 431],
        ),
        ("two lengths", post(&format!("{length}content-length: 3\r\n"), BODY), &[400]),
        ("a list of lengths", post("host: x\r\ncontent-length: 3, 3\r\n", "abc"), &[400]),
        ("a length with a sign", post("host: x\r\ncontent-length: +3\r\n", "abc"), &[400]),
        ("a length in hex", post("host: x\r\ncontent-length: 0x3\r\n", "abc"), &[400]),
        ("an unknown coding", post("host: x\r\ntransfer-encoding: xchunked\r\n", "0\r\n\r\n"), &[400]),
        (
            "chunked not last",
            post("host: x\r\ntransfer-encoding: chunked, identity\r\n", "0\r\n\r\n"),
            &[400],
        ),
        ("gzip, chunked", post("host: x\r\ntransfer-encoding: gzip, chunked\r\n", "0\r\n\r\n"), &[400]),
        (
            "codings on two lines",
            post("host: x\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n"),
            &[400],
        ),
        ("space before the colon", post("host: x\r\ncontent-length : 3\r\n", "abc"), &[400]),
        ("a folded header", post("host: x\r\nx: a\r\n b\r\ncontent-length: 3\r\n", "abc"), &[400]),
        ("NUL in a header", post("host: x\r\nx: a\0b\r\ncontent-length: 3\r\n", "abc"), &[400]),
        (
            "HTTP/1.0 and chunked",
            "POST /v1/chat/completions HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
                .into(),
            &[400],
        ),
        ("a chunk size that overflows", chunked("fffffffffffffffff\r\nab\r\n0\r\n\r\n"), &[400]),
        (
            "a chunk extension of 20 KB",
            chunked(&format!("2;{}\r\nab\r\n0\r\n\r\n", "x".repeat(20 << 10))),
            &[400],
        ),
        ("a chunk with a bare line feed", chunked("2\nab\n0\n\n"), &[400, 408]),
        (
            "no host",
            format!("POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len()),
            &[400],
        ),
        ("two hosts", post(&format!("{length}host: y\r\n"), BODY), &[400]),
        ("an empty host", post(&format!("host:\r\ncontent-length: {}\r\n", BODY.len()), BODY), &[400]),
        ("a body too large", post("host: x\r\ncontent-length: 100001\r\n", ""), &[413]),
        ("an encoded body", post(&format!("{length}content-encoding: gzip\r\n"), BODY), &[415]),
        ("JSON too deep", json(&deep), &[400]),
        ("a key twice", json(r#"{"model":"m","model":"m","messages":[{}]}"#), &[400]),
        ("trailing garbage", json(&format!("{BODY}x")), &[400]),
        ("no JSON", json("model=m"), &[400]),
        ("an unknown path", "GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n".into(), &[404]),
        ("a wrong method", "GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n".into(), &[405]),
        ("a method with a space", "PO ST / HTTP/1.1\r\nhost: x\r\n\r\n".into(), &[400]),
        ("HTTP/9.9", "GET / HTTP/9.9\r\nhost: x\r\n\r\n".into(), &[400]),
        ("no HTTP", "\x16\x03\x01\x02\0\x01\0".into(), &[400]),
    ];
    for (name, bytes, expected) in &cases {
        let heard = say(gateway.address(), bytes.as_bytes(), PATIENCE).await;
        match heard.statuses().first() {
            Some(status) => assert!(expected.contains(status), "{name}: {heard:?}"),
            // A silent connection gets no response. hyper may close a connection without one when it rejects a head.
            None => assert!(heard.closed, "{name}: {heard:?}"),
        }
        if heard.text.contains("\r\n\r\n{") {
            assert!(heard.text.contains("\"error\":{\"message\""), "{name}: OpenAI's shape: {heard:?}");
        }
    }
    assert_eq!(mock.asked(), 0, "none of them reached the node");
    gateway.all_free().await;
}

#[tokio::test]
async fn payloads_cannot_smuggle_a_second_request() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let gateway = TestGateway::start(strict(&mock)).await;
    let hidden = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let mut payloads = Vec::new();
    let codings = [
        "transfer-encoding: chunked",
        "Transfer-Encoding: chunked",
        "transfer-encoding: Chunked",
        "transfer-encoding : chunked",
        "transfer-encoding:\tchunked",
        "transfer-encoding: x, chunked",
        "transfer-encoding: chunked, x",
        "transfer-encoding: \"chunked\"",
        "transfer-encoding: chunked\r\ntransfer-encoding: x",
        "x: y\r\n transfer-encoding: chunked",
        "transfer_encoding: chunked",
        "transfer-encoding: chunkedx",
        "transfer-encoding:\x0bchunked",
        "transfer-encoding: identity",
        "x: a\rtransfer-encoding: chunked",
    ];
    for coding in codings {
        for (length, body) in
            [(5, format!("0\r\n\r\n{hidden}")), (hidden.len() + 5, format!("0\r\n\r\n{hidden}"))]
        {
            payloads.push(post(&format!("host: x\r\ncontent-length: {length}\r\n{coding}\r\n"), &body));
            payloads.push(post(&format!("host: x\r\n{coding}\r\ncontent-length: {length}\r\n"), &body));
        }
    }
    for length in ["0", " 0", "00", "-1", "0,0", "1e1", "99999999999999999999"] {
        payloads.push(post(&format!("host: x\r\ncontent-length: {length}\r\n"), &hidden));
    }
    assert!(payloads.len() >= 60, "{}", payloads.len());
    for payload in &payloads {
        let before = mock.asked();
        let heard = say(gateway.address(), payload.as_bytes(), Duration::from_millis(60)).await;
        let good = heard.statuses().iter().filter(|status| **status == 200).count();
        assert_eq!(
            mock.asked() - before,
            good,
            "the node saw what the client was not answered: {payload:?} {heard:?}"
        );
    }
    for body in mock.bodies() {
        assert_eq!(body["messages"][0]["content"], "hi", "a body was torn");
    }
    assert!(mock.headers().iter().all(|headers| !headers.contains_key("transfer-encoding")));
    gateway.all_free().await;
}

#[tokio::test]
async fn slow_clients_do_not_delay_others() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let mut configuration = strict(&mock);
    configuration.limits.first_byte_ms = 2_000;
    configuration.limits.head_ms = 2_000;
    configuration.limits.body_idle_ms = 2_000;
    let gateway = TestGateway::start(configuration).await;
    // The first round opens the connections.
    good_clients(&gateway).await;
    let alone = good_clients(&gateway).await;
    let mut slow = Vec::new();
    for number in 0..500 {
        let mut socket = TcpStream::connect(gateway.address()).await.unwrap();
        let sent = match number % 3 {
            0 => String::new(),
            1 => "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n".to_owned(),
            _ => post("host: x\r\ncontent-length: 999\r\n", "{"),
        };
        socket.write_all(sent.as_bytes()).await.unwrap();
        slow.push(socket);
    }
    let beside = good_clients(&gateway).await;
    println!("99 % of good requests within {alone:?}, beside 500 slow connections within {beside:?}");
    for mut socket in slow {
        assert!(listen(&mut socket, Duration::from_secs(5)).await.closed, "a slow connection stays open");
    }
    assert_eq!(mock.asked(), 1_500);
}

/// Fifty clients send ten requests each, one after another. Returns the 99th percentile of their durations.
async fn good_clients(gateway: &TestGateway) -> Duration {
    let clients: Vec<_> = (0..50)
        .map(|_| {
            let requests: Vec<_> = (0..10).map(|_| gateway.chat(false)).collect();
            tokio::spawn(async move {
                let mut took = Vec::new();
                for request in requests {
                    let begin = std::time::Instant::now();
                    assert_eq!(request.send().await.unwrap().status(), 200);
                    took.push(begin.elapsed());
                }
                took
            })
        })
        .collect();
    let mut took = Vec::new();
    for client in clients {
        took.extend(client.await.unwrap());
    }
    took.sort();
    took[took.len() * 99 / 100]
}

#[tokio::test]
async fn connections_per_address_are_bounded() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let mut configuration = strict(&mock);
    configuration.limits.first_byte_ms = 60_000;
    configuration.limits.connections_per_address = 3;
    let gateway = TestGateway::start(configuration).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(TcpStream::connect(gateway.address()).await.unwrap());
    }
    let mut fourth = TcpStream::connect(gateway.address()).await.unwrap();
    assert!(listen(&mut fourth, Duration::from_secs(5)).await.closed, "the fourth one is let go");
    drop(held);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = gateway.url("/health");
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    for attempt in 0.. {
        ticks.tick().await;
        if client.get(&url).send().await.is_ok_and(|answer| answer.status() == 200) {
            break;
        }
        assert!(attempt < 200, "places do not come back");
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// HPACK with static indices: GET, http, /, and an authority.
const HEADERS: &[u8] = &[0x82, 0x86, 0x84, 0x41, 0x01, b'x'];

#[tokio::test]
async fn http2_floods_end_with_goaway() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let pool =
        format!("[[pools]]\nmodel = \"m\"\nnodes = [{{ url = \"{}\", max_concurrency = 4 }}]\n", mock.url());
    let gateway = Started::with(&pool, "info").await;
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], gateway.port));
    let begin = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[])].concat();
    let resets = (0..10_000u32)
        .flat_map(|n| [frame(1, 5, 2 * n + 1, HEADERS), frame(3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat());
    let continuations = std::iter::once(frame(1, 1, 1, HEADERS))
        .chain((0..1_000).map(|_| frame(9, 0, 1, &[0x40, 1, b'a', 1, b'b'].repeat(200))));
    let settings = (0..100_000).map(|_| frame(4, 0, 0, &[0, 4, 0, 0, 0xff, 0xff]));
    let before = gateway.memory_kb();
    for (name, flood) in [
        ("rapid resets", resets.collect::<Vec<u8>>()),
        ("continuations", continuations.flatten().collect()),
        ("settings", settings.flatten().collect()),
    ] {
        let heard = say(address, &[begin.clone(), flood].concat(), Duration::from_secs(3)).await;
        // A GOAWAY frame (type 7), or a closed connection. Settings frames are acknowledged one by one.
        assert!(heard.closed || name == "settings", "{name} goes on for ever");
    }
    let grown = gateway.memory_kb().saturating_sub(before);
    assert!(grown < 20 << 10, "{grown} KB more than before");
    // Then the gateway serves as before.
    let body = serde_json::json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for http2 in [false, true] {
        let client = reqwest::Client::builder().no_proxy();
        let client = if http2 { client.http2_prior_knowledge() } else { client }.build().unwrap();
        let url = format!("{}/v1/chat/completions", gateway.url);
        let answer = client.post(url).json(&body).send().await.unwrap();
        assert_eq!((answer.version() == http::Version::HTTP_2, answer.status().as_u16()), (http2, 200));
    }
}

/// A client never opens its flow-control window. Its connection answers pings, but its stream loses the slot.
#[tokio::test]
async fn closed_http2_window_does_not_hold_a_slot() {
    let mock = Mock::start(Behaviour::Endless).await;
    let mut configuration = config(pool(&[&mock], 4));
    configuration.limits.write_idle_ms = 500;
    configuration.limits.head_ms = 60_000;
    let gateway = TestGateway::start(configuration).await;
    // POST, http, and path and host as literals.
    let path = "/v1/chat/completions";
    let head = [&[0x83, 0x86, 0x04, path.len() as u8], path.as_bytes(), &[0x41, 0x01, b'x']].concat();
    let body = br#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
    let begin = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]),
        frame(1, 4, 1, &head),
        frame(0, 1, 1, body),
    ];
    let mut socket = TcpStream::connect(gateway.address()).await.unwrap();
    socket.write_all(&begin.concat()).await.unwrap();
    until("the node writes", || mock.writing() == 1).await;
    let heard = listen(&mut socket, Duration::from_secs(3)).await;
    assert!(!heard.closed, "the connection is not to blame: {heard:?}");
    gateway.all_free().await;
    until("the node is let go", || mock.writing() == 0).await;
}
