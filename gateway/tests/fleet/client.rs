//! Clients that read every byte of a response and compare it with their request.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use potstill_gateway::Gateway;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::network::token;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    /// With the whole response and nothing else.
    Whole,
    /// With an error response.
    Refused,
    /// With a part of the response and an error event.
    Broken,
    /// The client disconnected.
    Left,
    /// The gateway was shutting down and closed the connection between two requests.
    TurnedAway,
}

/// The gateway as clients see it.
pub(crate) struct Door {
    pub(crate) gateway: Gateway,
    /// Whether shutdown has begun.
    pub(crate) stopping: AtomicBool,
    served: Mutex<Vec<JoinHandle<()>>>,
}

impl Door {
    pub(crate) fn new(gateway: Gateway) -> Arc<Self> {
        Arc::new(Self { gateway, stopping: AtomicBool::new(false), served: Mutex::default() })
    }

    /// Waits until all connections have ended. Fails if one panicked or outlives its client.
    pub(crate) async fn close(&self) {
        let served = std::mem::take(&mut *self.served.lock().unwrap());
        for connection in served {
            timeout(Duration::from_secs(60), connection)
                .await
                .expect("connections end with their clients")
                .unwrap();
        }
    }
}

/// Connection of a client.
pub(crate) struct Client {
    stream: DuplexStream,
    seen: Vec<u8>,
    random: ChaCha8Rng,
    /// Whether the client reads slowly.
    slow: bool,
    door: Arc<Door>,
}

impl Client {
    pub(crate) fn connect(door: &Arc<Door>, mut random: ChaCha8Rng) -> Self {
        let (near, far) = tokio::io::duplex(2 << 10);
        let gateway = door.gateway.clone();
        let served = tokio::spawn(async move { gateway.serve_connection(far).await });
        door.served.lock().unwrap().push(served);
        let slow = random.random_bool(0.1);
        Self { stream: near, seen: Vec::new(), random, slow, door: Arc::clone(door) }
    }

    /// The gateway closed the connection before it responded. This is valid only during shutdown, for requests that
    /// were sent after its start.
    fn turned_away(&self, stopping: bool) -> (End, bool) {
        assert!(stopping, "turned away by a gateway that did not stop");
        (End::TurnedAway, false)
    }

    /// Sends a request. Returns how it ended, and whether another request may follow.
    pub(crate) async fn ask(&mut self, id: &str) -> (End, bool) {
        let patience = self.random.random_bool(0.15).then(|| self.random.random_range(0..3_000));
        match patience {
            None => self.exchange(id).await,
            Some(ms) => {
                timeout(Duration::from_millis(ms), self.exchange(id)).await.unwrap_or((End::Left, false))
            }
        }
    }

    async fn exchange(&mut self, id: &str) -> (End, bool) {
        let stream = self.random.random_bool(0.6);
        let tokens = self.random.random_range(1..20);
        let text = "x".repeat(self.random.random_range(0..3_000));
        let body = format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}],"stream":{stream},"max_tokens":{tokens},"user":"{id}"}}"#
        );
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let stopping = self.door.stopping.load(Ordering::Relaxed);
        if self.stream.write_all(request.as_bytes()).await.is_err() {
            return self.turned_away(stopping);
        }
        let Some(head) = self.until(b"\r\n\r\n").await else { return self.turned_away(stopping) };
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
        let open = field("connection:") != Some("close");
        assert!(field("x-request-id:").is_some());
        if field("content-type:").is_some_and(|kind| kind.starts_with("text/event-stream")) {
            assert!(stream && status == 200);
            return (self.events(id, tokens).await, open);
        }
        let length = field("content-length:").unwrap().parse().unwrap();
        let body = self.take(length).await.expect("an answer has as many bytes as it says");
        let body: Value = serde_json::from_slice(&body).unwrap();
        if status != 200 {
            assert!(matches!(status, 429 | 500 | 502 | 503 | 504), "{status} {body}");
            assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string());
            assert!(!matches!(status, 429 | 503) || field("retry-after:").is_some(), "{head}");
            return (End::Refused, open);
        }
        assert!(!stream);
        let content: String = (0..tokens).map(|number| token(id, number)).collect();
        assert_eq!(body["choices"][0]["message"]["content"], *content);
        assert_eq!(body["usage"]["completion_tokens"], tokens);
        (End::Whole, open)
    }

    /// Reads an event stream to its last chunk and checks every token.
    async fn events(&mut self, id: &str, tokens: u64) -> End {
        let mut text = String::new();
        loop {
            let size = self.until(b"\r\n").await.expect("a stream ends with its last chunk");
            let size = usize::from_str_radix(std::str::from_utf8(&size).unwrap().trim(), 16).unwrap();
            let piece = self.take(size + 2).await.expect("a chunk is as long as it says");
            text.push_str(std::str::from_utf8(&piece[..size]).unwrap());
            if size == 0 {
                break;
            }
            if self.slow {
                sleep(Duration::from_millis(self.random.random_range(0..200))).await;
            }
        }
        let (mut number, mut finished) = (0, false);
        let mut events =
            text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).peekable();
        while let Some(event) = events.next() {
            if event == "[DONE]" {
                assert_eq!((events.peek(), number, finished), (None, tokens, true), "{text}");
                return End::Whole;
            }
            let event: Value = serde_json::from_str(event).unwrap();
            if event.get("error").is_some() {
                assert_eq!(events.peek(), None, "nothing follows an error");
                assert!(event["error"]["message"].is_string());
                return End::Broken;
            }
            let choice = &event["choices"][0];
            if let Some(content) = choice["delta"]["content"].as_str() {
                assert_eq!(content, token(id, number), "every token once, in order, and its own");
                number += 1;
            }
            finished |= choice["finish_reason"] == "stop";
        }
        panic!("a stream without an end: {text}");
    }

    async fn more(&mut self) -> io::Result<bool> {
        let mut piece = [0; 512];
        let read = self.stream.read(&mut piece).await?;
        self.seen.extend_from_slice(&piece[..read]);
        Ok(read > 0)
    }

    async fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = memchr::memmem::find(&self.seen, end) {
                let rest = self.seen.split_off(at + end.len());
                return Some(std::mem::replace(&mut self.seen, rest));
            }
            if !self.more().await.unwrap_or(false) {
                assert!(
                    self.seen.is_empty(),
                    "cut off within a head: {:?}",
                    String::from_utf8_lossy(&self.seen)
                );
                return None;
            }
        }
    }

    async fn take(&mut self, length: usize) -> Option<Vec<u8>> {
        while self.seen.len() < length {
            if !self.more().await.unwrap_or(false) {
                return None;
            }
        }
        let rest = self.seen.split_off(length);
        Some(std::mem::replace(&mut self.seen, rest))
    }
}
