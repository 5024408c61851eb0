//! Operation of the gateway as a program: reload, drain, metrics, keys and certificates.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]
#![expect(clippy::disallowed_methods, reason = "files of a test need not outlive a crash")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};
use system_tests::mock::{Behaviour, Mock, until};
use system_tests::programs::program;
use system_tests::started::Started;
use tokio::io::AsyncWriteExt;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

const CANARY: &str = system_tests::canary::PROMPT;

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn pool_of(mock: &Mock, model: &str) -> String {
    format!(
        "[[pools]]\nmodel = \"{model}\"\nnodes = [{{ url = \"{}\", max_concurrency = 512 }}]\n",
        mock.url()
    )
}

fn chat(gateway: &Started, model: &str, stream: bool) -> reqwest::RequestBuilder {
    let body = json!({"model": model, "stream": stream, "messages": [{"role": "user", "content": CANARY}]});
    client().post(format!("{}/v1/chat/completions", gateway.url)).json(&body)
}

#[tokio::test]
async fn sigterm_finishes_streams_and_rejects_new_requests() {
    let mock = Mock::start(Behaviour::Stream(60, Duration::from_millis(20))).await;
    let mut gateway = Started::with(&format!("drain_seconds = 20\n{}", pool_of(&mock, "m")), "info").await;
    let streams: Vec<_> = (0..200)
        .map(|_| {
            let request = chat(&gateway, "m", true).send();
            tokio::spawn(async move { request.await.unwrap().text().await.unwrap() })
        })
        .collect();
    mock.busy(200).await;
    gateway.signal("TERM");
    until("nobody is let in", || std::net::TcpStream::connect(("127.0.0.1", gateway.port)).is_err()).await;
    for stream in streams {
        assert!(stream.await.unwrap().ends_with("data: [DONE]\n\n"), "a stream was broken by the drain");
    }
    gateway.ended(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_under_load_fail_no_request() {
    let (first, second) = (Mock::start(Behaviour::Answer(1)).await, Mock::start(Behaviour::Answer(1)).await);
    let gateway = Started::with(
        &format!("{}[admin]\nlisten = \"127.0.0.1:0\"\nenv = \"PATH\"\n", pool_of(&first, "m")),
        "error",
    )
    .await;
    let text = std::fs::read_to_string(gateway.config()).unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let load: Vec<_> = (0..8)
        .map(|_| {
            let (request, stopped) = (chat(&gateway, "m", false), stopped.clone());
            tokio::spawn(async move {
                let mut served = 0;
                while !*stopped.borrow() {
                    let answer = request.try_clone().unwrap().send().await.unwrap();
                    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
                    served += 1;
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
                served
            })
        })
        .collect();
    let metric = async |outcome: &str| {
        let metrics =
            client().get(format!("{}/metrics", gateway.url)).send().await.unwrap().text().await.unwrap();
        let name = format!("potstill_gateway_config_reloads_total{{outcome=\"{outcome}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse::<u64>().ok()).unwrap_or(0)
    };
    for round in 0..1_000 {
        let other = text.replace(&first.url(), &second.url());
        // Replaced atomically by a rename, as editors and config maps do it.
        let beside = gateway.folder.path().join("next");
        std::fs::write(&beside, if round % 2 == 0 { &other } else { &text }).unwrap();
        std::fs::rename(&beside, gateway.config()).unwrap();
        gateway.signal("HUP");
        if round % 50 == 49 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // Signals in quick succession are merged.
    assert!(metric("applied").await >= 20, "{}", metric("applied").await);
    let taken = metric("applied").await;
    for (broken, why) in [("", "names no pools"), ("listen = 5", "expected socket address")] {
        std::fs::write(gateway.config(), broken).unwrap();
        gateway.signal("HUP");
        until("it says why", || gateway.printed().contains(why)).await;
    }
    stop.send(true).unwrap();
    for client in load {
        assert!(client.await.unwrap() > 0);
    }
    assert_eq!(metric("applied").await, taken, "the old one stays");
    assert!(
        first.asked() > 0 && second.asked() > 0,
        "{} {}: both configurations have served\n{}",
        first.asked(),
        second.asked(),
        gateway.printed()
    );
}

#[tokio::test]
async fn admin_api_shows_changes_and_no_secrets() {
    let (mock, added) = (Mock::start(Behaviour::Answer(5)).await, Mock::start(Behaviour::Answer(5)).await);
    let (admin_key, admin_hash) = potstill_gateway::auth::keys::generate_key();
    let port = system_tests::programs::free_port();
    let node_key = "node-secret-51b2";
    let config = format!(
        "keys_file = \"keys.toml\"\naccess_log = true\n[admin]\nlisten = \"127.0.0.1:{port}\"\nhash = \"{admin_hash}\"\nallow_private = true\n{}price = {{ prompt = 1.0, completion = 2.0 }}\n",
        pool_of(&mock, "m")
    );
    let gateway = Started::with(&config, "trace").await;
    let url = |path: &str| format!("http://127.0.0.1:{port}/admin/{path}");
    let call = async |request: reqwest::RequestBuilder| -> (u16, Value) {
        let answer = request.bearer_auth(&admin_key).send().await.unwrap();
        let status = answer.status().as_u16();
        (status, serde_json::from_str(&answer.text().await.unwrap()).unwrap_or(Value::Null))
    };
    assert_eq!(client().get(url("pools")).send().await.unwrap().status(), 401);
    assert_eq!(client().get(url("pools")).bearer_auth("wrong").send().await.unwrap().status(), 401);
    assert_eq!(chat(&gateway, "m", false).send().await.unwrap().status(), 401, "no key yet");
    let new = json!({"name": "ann", "priority": "bulk", "requests_per_minute": 100});
    let (status, made) = call(client().post(url("keys")).json(&new)).await;
    assert_eq!(status, 201, "{made}");
    let key = made["key"].as_str().unwrap();
    let ask = chat(&gateway, "m", false).bearer_auth(key).header("x-potstill-stage", "generate");
    assert_eq!(ask.send().await.unwrap().status(), 200);
    assert_eq!(call(client().post(url("keys")).json(&new)).await.0, 400, "a second one of that name");
    let node = json!({"model": "m", "url": added.url(), "slots": 4});
    assert_eq!(call(client().post(url("nodes")).json(&node)).await.0, 201);
    for forbidden in ["http://169.254.169.254", "ftp://x", "http://u:p@x"] {
        let node = json!({"model": "m", "url": forbidden});
        let (status, answer) = call(client().post(url("nodes")).json(&node)).await;
        // Names are resolved when a connection is opened, so this node is added but never becomes ready.
        assert!(status == 400 || forbidden.contains("169.254"), "{forbidden}: {answer}");
    }
    let ready = async || {
        let (_, pools) = call(client().get(url("pools"))).await;
        pools["pools"][0]["nodes"].as_array().unwrap().iter().filter(|node| node["state"] == "ready").count()
    };
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    while ready().await < 2 {
        ticks.tick().await;
    }
    let drain = json!({"model": "m", "url": added.url()});
    assert_eq!(call(client().post(url("nodes/drain")).json(&drain)).await.0, 200);
    until("it has answered", || mock.asked() == 1).await;
    let (_, usage) = call(client().get(url("usage"))).await;
    let row = &usage["usage"][0];
    assert_eq!((row["key"].as_str(), row["stage"].as_str()), (Some("ann"), Some("generate")), "{usage}");
    assert_eq!((row["completion_tokens"].as_u64(), row["cost"].as_f64()), (Some(5), Some(11e-6)));
    assert_eq!(call(client().get(url("stages"))).await.1["stages"][0]["stage"], "generate");
    let shown =
        format!("{}{}", call(client().get(url("pools"))).await.1, call(client().get(url("keys"))).await.1);
    assert_eq!(call(client().delete(url("keys/ann"))).await.0, 204);
    assert_eq!(chat(&gateway, "m", false).bearer_auth(key).send().await.unwrap().status(), 401, "revoked");
    // The canary: even at the most verbose level no prompt, key or secret appears in output, API or metrics.
    let metrics =
        client().get(format!("{}/metrics", gateway.url)).send().await.unwrap().text().await.unwrap();
    until("the access log has a line", || gateway.printed().contains("\"stage\":\"generate\"")).await;
    let all = format!("{}{metrics}{shown}", gateway.printed());
    for secret in [CANARY, key, &admin_key, node_key] {
        assert!(!all.contains(secret), "`{secret}` was printed or shown");
    }
    assert!(!shown.contains(&admin_hash), "not even a hash");
    assert_eq!(call(client().post(url("drain"))).await.0, 202);
}

fn certificates(folder: &Path, name: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (certificate, key) = (folder.join(format!("{name}.pem")), folder.join(format!("{name}.key")));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    (certificate.display().to_string(), key.display().to_string())
}

/// Sends a request over TLS, with or without a client certificate, and returns the status line.
async fn tls_request(port: u16, trust: &str, own: Option<(&str, &str)>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(trust).unwrap()).unwrap();
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap(),
    };
    let socket = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut text = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut text).await.ok();
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn authenticates_client_certificates_and_reloads_tls() {
    let mock = Mock::start(Behaviour::Answer(1)).await;
    let folder = tempfile::tempdir().unwrap();
    let (server, server_key) = certificates(folder.path(), "server");
    let (ann, ann_key) = certificates(folder.path(), "ann");
    let (bob, bob_key) = certificates(folder.path(), "bob");
    let hash = std::process::Command::new(program("potstill-gateway"))
        .args(["key", "certificate", &ann])
        .output()
        .unwrap();
    let hash = String::from_utf8(hash.stdout).unwrap();
    let port = system_tests::programs::free_port();
    let path = folder.path().join("gateway.toml");
    std::fs::write(
        &path,
        format!(
            "listen = \"127.0.0.1:{port}\"\ntls = {{ certificate = \"server.pem\", key = \"server.key\", client_ca = \"ann.pem\" }}\n[[keys]]\nname = \"ann\"\ncertificate = \"{}\"\n{}",
            hash.trim(),
            pool_of(&mock, "m")
        ),
    )
    .unwrap();
    let child =
        std::process::Command::new(program("potstill-gateway")).arg("serve").arg(&path).spawn().unwrap();
    let running = system_tests::programs::Running(child);
    until("it listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()).await;
    assert_eq!(tls_request(port, &server, Some((&ann, &ann_key))).await.unwrap(), "HTTP/1.1 200 OK");
    assert_eq!(tls_request(port, &server, None).await.unwrap(), "HTTP/1.1 401 Unauthorized");
    let stranger = tls_request(port, &server, Some((&bob, &bob_key))).await;
    assert!(!stranger.is_ok_and(|line| line.contains("200")), "a certificate of another authority");
    // A new certificate is used after reload. An invalid one is rejected and the old one stays.
    let old = std::fs::read(&server).unwrap();
    let (new, _) = certificates(folder.path(), "server");
    assert_ne!(std::fs::read(&new).unwrap(), old);
    let hup = || {
        assert!(
            std::process::Command::new("kill")
                .args(["-HUP", &running.0.id().to_string()])
                .status()
                .unwrap()
                .success()
        )
    };
    hup();
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    for attempt in 0.. {
        ticks.tick().await;
        if tls_request(port, &new, Some((&ann, &ann_key))).await.is_ok() {
            break;
        }
        assert!(attempt < 100, "the new certificate is not taken");
    }
    std::fs::write(&server_key, "no key").unwrap();
    hup();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(tls_request(port, &new, Some((&ann, &ann_key))).await.unwrap(), "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn exports_spans_to_the_collector() {
    let (mock, collector) =
        (Mock::start(Behaviour::Answer(3)).await, Mock::start(Behaviour::Answer(1)).await);
    let config = format!("otlp_endpoint = \"{}\"\n{}", collector.url(), pool_of(&mock, "m"));
    let gateway = Started::with(&config, "info").await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let asked = chat(&gateway, "m", false).header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"));
    assert_eq!(asked.send().await.unwrap().status(), 200);
    until("the collector has it", || !collector.bodies().is_empty()).await;
    let span = &collector.bodies()[0]["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
    assert_eq!(
        (span["traceId"].as_str(), span["parentSpanId"].as_str()),
        (Some(trace), Some("b7ad6b7169203331"))
    );
    let attributes = span["attributes"].to_string();
    assert!(
        attributes.contains("gen_ai.usage.output_tokens") && !attributes.contains(CANARY),
        "{attributes}"
    );
}

#[tokio::test]
async fn memory_is_bounded_for_idle_streams_and_slow_readers() {
    let mock = Mock::start(Behaviour::Stream(1_000_000, Duration::from_millis(500))).await;
    let gateway = Started::with(&pool_of(&mock, "m").replace("512", "5000"), "info").await;
    let fresh = gateway.memory_kb();
    let mut streams = Vec::new();
    for _ in 0..1_000 {
        let mut stream = chat(&gateway, "m", true).send().await.unwrap().bytes_stream();
        stream.next().await.unwrap().unwrap();
        streams.push(stream);
    }
    let each = (gateway.memory_kb() - fresh) / 1_000;
    println!("{each} KB a stream");
    assert!(each <= 64, "{each} KB a stream");
    drop(streams);
    mock.idle().await;
    mock.behave(Behaviour::Endless);
    // The first slow reader fills buffers that are allocated once; the second must add almost nothing.
    let mut before = 0;
    for round in 0..2 {
        before = if round == 1 { gateway.memory_kb() } else { before };
        let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", gateway.port)).await.unwrap();
        let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}]}"#;
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let taken = mock.bytes();
        let mut read = 0;
        while read < 100 << 20 {
            let mut buffer = vec![0u8; 1 << 20];
            read += tokio::io::AsyncReadExt::read(&mut socket, &mut buffer).await.unwrap();
        }
        assert!(mock.bytes() - taken >= 100 << 20);
        drop(socket);
        mock.idle().await;
    }
    let grown = gateway.memory_kb().saturating_sub(before);
    println!("{grown} KB more after 100 MB to a slow reader");
    assert!(grown <= 2 << 10, "{grown} KB");
}

#[tokio::test]
async fn configuration_errors_name_the_problem() {
    let check = |text: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gateway.toml");
        std::fs::write(&path, text).unwrap();
        let output = std::process::Command::new(program("potstill-gateway"))
            .env("RUST_BACKTRACE", "0")
            .arg("check")
            .arg(&path)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (text, named) in [
        ("nonsense = 1", "nonsense"),
        ("[[pools]]\nmodel = \"../m\"\nnodes = []", "`model` must be"),
        ("[[pools]]\nmodel = \"m\"", "no nodes"),
        ("[[keys]]\nname = \"a\"\nhash = \"abc\"", "64 digits"),
        ("[tls]\ncertificate = \"x\"", "key"),
        (
            "keys_file = \"missing-is-fine.toml\"\n[jwt]\nsecret_env = \"NO_SUCH_VARIABLE\"",
            "NO_SUCH_VARIABLE",
        ),
        ("[limits]\nin_flight_bytes = 1", "in_flight_bytes"),
        ("[[pools]]\nmodel = \"m\"\nbalance = \"best\"\nnodes = [{url = \"http://x\"}]", "best"),
    ] {
        let (fine, words) = check(text);
        assert!(!fine && words.contains(named), "{text}: {words}");
    }
    let (fine, words) = check("[[pools]]\nmodel = \"m\"\nnodes = [{ url = \"http://127.0.0.1:1\" }]");
    assert!(fine, "{words}");
}
