//! Tests of the HTTP/1.1 client over real sockets, against nodes with valid and invalid responses. A property test
//! compares the parser with hyper's client: both must read the same wherever both accept the input.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use potstill_gateway::upstream::address::AddressPolicy;
use potstill_gateway::upstream::connect::Connector;
use potstill_gateway::upstream::endpoint::Endpoint;
use potstill_gateway::upstream::exchange::{SendError, send};
use potstill_gateway::upstream::read_body::read_full_body;
use potstill_gateway::upstream::request::UpstreamRequest;
use potstill_gateway::upstream::response_head::parse_response_head;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const LONG: Duration = Duration::from_secs(30);

/// Behavior of a node on its connections: it reads a request and writes the parts.
#[derive(Clone)]
struct Script {
    parts: Vec<Bytes>,
    /// Whether the connection is closed after the response.
    close: bool,
    /// Whether the node responds before it has read the body.
    early: bool,
    /// Whether a kept connection is closed as soon as the next request arrives on it.
    one_each: bool,
}

impl Script {
    fn says(parts: &[&[u8]]) -> Self {
        let parts = parts.iter().map(|part| Bytes::copy_from_slice(part)).collect();
        Self { parts, close: false, early: false, one_each: false }
    }
}

/// A node, with a count of its connections and the requests that it read.
struct Peer {
    endpoint: Arc<Endpoint>,
    connector: Connector,
    opened: Arc<AtomicUsize>,
    asked: Arc<std::sync::Mutex<Vec<Vec<u8>>>>,
}

impl Peer {
    async fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let opened = Arc::new(AtomicUsize::new(0));
        let asked = Arc::default();
        let (count, log) = (Arc::clone(&opened), Arc::clone(&asked));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream, script.clone(), Arc::clone(&log)));
            }
        });
        let endpoint = Arc::new(Endpoint::new(&url, None, AddressPolicy::Trusted).unwrap());
        Self { endpoint, connector: Connector::default(), opened, asked }
    }

    async fn ask(&self, body: Bytes) -> Result<(u16, Bytes), SendError> {
        let mut client = HeaderMap::new();
        client.insert("content-type", HeaderValue::from_static("application/json"));
        let path = PathAndQuery::from_static("/v1/x");
        let outgoing = UpstreamRequest { method: Method::POST, path, client_headers: client, body };
        let now = tokio::time::Instant::now();
        let mut exchange = send(&self.connector, &self.endpoint, &outgoing, now, LONG, LONG).await?;
        let body = read_full_body(&mut exchange.body, LONG, now + LONG).await?;
        Ok((exchange.head.status.as_u16(), body))
    }

    fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }
}

async fn serve(mut stream: TcpStream, script: Script, log: Arc<std::sync::Mutex<Vec<Vec<u8>>>>) {
    stream.set_nodelay(true).unwrap();
    for round in 0.. {
        let mut request = Vec::new();
        let head = loop {
            if let Some(at) = request.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                return;
            }
        };
        if script.one_each && round > 0 {
            return;
        }
        if !script.early {
            let text = String::from_utf8_lossy(&request[..head]).into_owned();
            let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
            let length: usize = length.parse().unwrap();
            while request.len() < head + length {
                if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                    return;
                }
            }
        }
        log.lock().unwrap().push(request);
        for part in &script.parts {
            if stream.write_all(part).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        if script.close {
            return;
        }
    }
}

/// Sends two requests to a node. Returns the responses and the number of connections.
async fn twice(script: Script) -> (Vec<Result<(u16, Bytes), String>>, usize) {
    let peer = Peer::start(script).await;
    let mut answers = Vec::new();
    for _ in 0..2 {
        let answer = peer.ask(Bytes::from_static(b"{}")).await;
        answers.push(answer.map_err(|error| error.to_string()));
    }
    (answers, peer.opened())
}

#[tokio::test]
async fn reads_whole_responses_and_reuses_connections() {
    let chunks = "5\r\nhello\r\n6;a=\"b\"\r\n world\r\n0\r\nx-trailer: y\r\n\r\n";
    for (answer, body, connections) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello world".to_owned(), "hello world", 1),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_owned(), "", 1),
        ("HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok".to_owned(), "ok", 1),
        (format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{chunks}"), "hello world", 1),
        (
            format!("HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{chunks}"),
            "hello world",
            2,
        ),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(), "ok", 1),
        ("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(), "ok", 2),
        ("HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\ncontent-length: 2\r\n\r\nok".to_owned(), "ok", 1),
    ] {
        let bytes: Vec<&[u8]> = answer.as_bytes().chunks(1).collect();
        for parts in [vec![answer.as_bytes()], bytes] {
            let single = parts.len() > 1;
            let (answers, opened) = twice(Script::says(&parts)).await;
            for read in answers {
                assert_eq!(read, Ok((200, Bytes::copy_from_slice(body.as_bytes()))), "{answer}");
            }
            assert_eq!(opened, connections, "{answer}, byte by byte: {single}");
        }
    }
    // Unexpected bytes after a response close the connection; they must not count as the next response.
    let two = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n";
    let (answers, opened) = twice(Script::says(&[two])).await;
    assert!(answers.iter().all(|read| *read == Ok((200, Bytes::from_static(b"ok")))), "{answers:?}");
    assert_eq!(opened, 2);
    let until_closed = Script { close: true, ..Script::says(&[b"HTTP/1.1 200 OK\r\n\r\nhello", b" world"]) };
    let (answers, opened) = twice(until_closed).await;
    assert_eq!(answers[1], Ok((200, Bytes::from_static(b"hello world"))));
    assert_eq!(opened, 2);
}

#[tokio::test]
async fn reports_truncated_and_malformed_responses() {
    for (answer, words) in [
        ("", "without an answer"),
        ("HTTP/1.1 200 OK\r\ncontent-le", "within its answer"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell", "within its answer"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", "within its answer"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", "within its answer"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", "size is not a number"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10000000000000000\r\n", "size is too large"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello!", "does not end where"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\nhello", "size is not a number"),
        ("garbage", "malformed"),
        ("HTTP/1.1 101 Switching Protocols\r\n\r\n", "changes the protocol"),
    ] {
        let script = Script { close: true, ..Script::says(&[answer.as_bytes()]) };
        let (answers, opened) = twice(script).await;
        let error = answers[0].as_ref().unwrap_err();
        assert!(error.contains(words), "{answer:?}: {error}");
        assert_eq!(opened, 2, "{answer:?}: a broken connection is not used again");
    }
    let extra = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;{}", "x".repeat(20 << 10));
    let (answers, _) = twice(Script { close: true, ..Script::says(&[extra.as_bytes()]) }).await;
    assert!(answers[0].as_ref().unwrap_err().contains("too much else"));
}

#[tokio::test]
async fn retries_on_a_new_connection_when_a_kept_one_was_closed() {
    let script =
        Script { one_each: true, ..Script::says(&[b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"]) };
    let (answers, opened) = twice(script).await;
    assert!(answers.iter().all(|answer| *answer == Ok((200, Bytes::from_static(b"ok")))), "{answers:?}");
    assert_eq!(opened, 2);
}

#[tokio::test]
async fn sends_long_requests_and_reads_early_responses() {
    let body: Bytes = (0..8 << 20).map(|index: u32| (index % 251) as u8).collect();
    let peer = Peer::start(Script::says(&[b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"])).await;
    for _ in 0..2 {
        assert_eq!(peer.ask(body.clone()).await, Ok((200, Bytes::from_static(b"ok"))));
    }
    assert_eq!(peer.opened(), 1);
    let asked = peer.asked.lock().unwrap().clone();
    assert!(asked.iter().all(|request| request.ends_with(&body)), "every byte in its place");

    let refusal = b"HTTP/1.1 413 Too Large\r\ncontent-length: 4\r\n\r\nlong";
    let early = Script { early: true, close: true, ..Script::says(&[refusal]) };
    let peer = Peer::start(early).await;
    let mut refused = 0;
    for _ in 0..20 {
        // A reset can overtake the response, which is then lost.
        match peer.ask(body.clone()).await {
            Ok(answer) => {
                assert_eq!(answer, (413, Bytes::from_static(b"long")));
                refused += 1;
            }
            Err(error) => assert!(matches!(error, SendError::Failed(_)), "{error}"),
        }
    }
    assert!(refused > 0, "an early answer counts for more than what was not written");
    assert_eq!(peer.opened(), 20, "what was not read to its end is not used again");
}

#[tokio::test]
async fn reads_a_large_chunked_response() {
    let body: Vec<u8> = (0..3 << 20).map(|index: u32| (index % 253) as u8).collect();
    let mut answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for chunk in body.chunks(70_001) {
        answer.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        answer.extend_from_slice(chunk);
        answer.extend_from_slice(b"\r\n");
    }
    answer.extend_from_slice(b"0\r\n\r\n");
    let (answers, opened) = twice(Script::says(&[&answer])).await;
    assert!(answers.into_iter().all(|read| read.unwrap().1 == body));
    assert_eq!(opened, 1);
}

/// Response and body that our parser reads from `parts`, followed by the end of the connection.
fn ours(parts: &[&[u8]]) -> Option<(u16, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut parts = parts.iter();
    let (head, length) = loop {
        bytes.extend_from_slice(parts.next()?);
        if let Some(found) = parse_response_head(&bytes, &Method::GET).ok()? {
            break found;
        }
    };
    let mut framing = head.framing;
    let mut body = Vec::new();
    for mut input in [&bytes[length..]].into_iter().chain(parts.copied()) {
        loop {
            let piece = framing.next_data(&mut input).ok()?;
            if piece.is_empty() {
                break;
            }
            body.extend_from_slice(piece);
        }
    }
    framing.on_close().ok()?;
    Some((head.status.as_u16(), body))
}

/// Response and body that hyper reads from the same bytes.
async fn theirs(bytes: &[u8]) -> Option<(u16, Vec<u8>)> {
    let (near, mut far) = tokio::io::duplex(1 << 20);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(near)).await.unwrap();
    let driven = tokio::spawn(connection);
    let request =
        sender.send_request(http::Request::get("/").header("host", "h").body(Empty::new()).unwrap());
    let bytes = bytes.to_vec();
    let node = async move {
        let mut request = [0; 256];
        let _read = far.read(&mut request).await;
        let _written = far.write_all(&bytes).await;
        drop(far);
    };
    let (response, ()) = tokio::join!(request, node);
    let response = response.ok()?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.ok()?;
    driven.abort();
    Some((status, body.to_bytes().to_vec()))
}

/// Encodes a chunked body.
fn chunked(chunks: &[Vec<u8>], extension: &str, trailer: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for chunk in chunks.iter().filter(|chunk| !chunk.is_empty()) {
        bytes.extend_from_slice(format!("{:X}{extension}\r\n", chunk.len()).as_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(format!("0{extension}\r\n{trailer}\r\n").as_bytes());
    bytes
}

proptest! {
    #[test]
    fn chunked_body_does_not_depend_on_read_boundaries(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..6),
        extension in prop_oneof![Just(""), Just(";a"), Just(" ; a=\"b\"")],
        trailer in prop_oneof![Just(""), Just("a: b\r\n"), Just("a: b\r\nc: d\r\n")],
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
    ) {
        let mut bytes = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        bytes.extend(chunked(&chunks, extension, trailer));
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let parts: Vec<_> = cuts.windows(2).map(|two| &bytes[two[0]..two[1]]).collect();
        prop_assert_eq!(ours(&parts), Some((200, chunks.concat())));
    }

    #[test]
    fn agrees_with_hyper_where_both_accept(
        version in prop_oneof![4 => Just("1.1"), 1 => Just("1.0"), 1 => Just("2")],
        status in prop_oneof![4 => Just(200u16), 1 => Just(204), 1 => Just(304), 1 => Just(100), 1 => Just(500)],
        fields in proptest::collection::vec(prop_oneof![
            Just("content-length: 5"), Just("Content-Length: 0"), Just("content-length: 5, 5"), Just("content-length: x"),
            Just("transfer-encoding: chunked"), Just("Transfer-Encoding: Chunked"), Just("transfer-encoding: gzip"),
            Just("connection: close"), Just("connection: keep-alive"), Just("x: y"), Just("x : y"), Just(" folded"), Just("a:"),
        ], 0..4),
        body in prop_oneof![
            Just(b"hello".to_vec()), Just(b"hell".to_vec()), Just(Vec::new()), Just(b"5\r\nhello\r\n0\r\n\r\n".to_vec()),
            Just(b"5;x\r\nhello\r\n0\r\na: b\r\n\r\n".to_vec()), Just(b"5\r\nhello\r\n".to_vec()), Just(b"5\nhello\r\n0\r\n\r\n".to_vec()),
        ],
        flip in proptest::option::weighted(0.3, (any::<proptest::sample::Index>(), any::<u8>())),
    ) {
        let mut bytes = format!("HTTP/{version} {status} X\r\n").into_bytes();
        for field in fields {
            bytes.extend_from_slice(format!("{field}\r\n").as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&body);
        if let Some((at, byte)) = flip {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (ours, theirs) = (ours(&[&bytes]), runtime.block_on(theirs(&bytes)));
        // Each parser rejects something that the other accepts. Where both accept, the results must be equal.
        if let (Some(ours), Some(theirs)) = (ours, theirs) {
            prop_assert_eq!(ours, theirs, "{}", bytes.escape_ascii());
        }
    }
}
