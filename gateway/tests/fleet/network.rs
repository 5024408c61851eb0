//! Nodes without sockets: they serve HTTP/1.1 over in-memory pipes on simulated time, and fail as their condition says.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use potstill_gateway::upstream::connect::{DialFuture, Socket};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// Condition of a node, which the gateway has to detect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Condition {
    Well,
    /// Slower by this factor.
    Slow(u32),
    /// Cut off from the gateway: no data arrives in either direction, and connections stay open.
    Silent,
    /// Stopped, and all its connections are closed.
    Down,
    /// Responses break.
    Breaks,
    /// Responses are invalid.
    Nonsense,
    /// Every request is rejected with this status.
    Refuses(u16),
    /// Health checks fail, requests succeed.
    Ill,
}

/// A node as the network sees it.
pub(crate) struct Host {
    pub(crate) condition: watch::Sender<Condition>,
    slots: usize,
    connections: Mutex<Vec<Weak<AtomicBool>>>,
    /// Number of requests that arrived.
    pub(crate) asked: AtomicUsize,
    /// Number of requests on reused connections that were lost before the first byte of the response. The gateway may
    /// send these once more.
    pub(crate) stale: AtomicUsize,
}

/// All nodes, by the last octet of their address.
pub(crate) struct Network {
    hosts: BTreeMap<u8, Arc<Host>>,
    random: Mutex<ChaCha8Rng>,
    nodes: Mutex<Vec<JoinHandle<()>>>,
}

impl Network {
    pub(crate) fn new(hosts: u8, slots: usize, seed: u64) -> Arc<Self> {
        let host = || {
            Arc::new(Host {
                condition: watch::Sender::new(Condition::Well),
                slots,
                connections: Mutex::default(),
                asked: AtomicUsize::new(0),
                stale: AtomicUsize::new(0),
            })
        };
        let hosts = (1..=hosts).map(|number| (number, host())).collect();
        Arc::new(Self { hosts, random: Mutex::new(ChaCha8Rng::seed_from_u64(seed)), nodes: Mutex::default() })
    }

    pub(crate) fn host(&self, number: u8) -> &Arc<Host> {
        &self.hosts[&number]
    }

    pub(crate) fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.hosts.values()
    }

    pub(crate) fn url(number: u8) -> String {
        format!("http://10.0.0.{number}:80")
    }

    /// Fails if a node's task has panicked.
    pub(crate) async fn check(&self) {
        let ended = self.nodes.lock().unwrap().extract_if(.., |node| node.is_finished()).collect::<Vec<_>>();
        for node in ended {
            node.await.unwrap();
        }
    }

    /// Opens a connection to a node.
    pub(crate) fn dial(self: &Arc<Self>, address: SocketAddr) -> DialFuture {
        let SocketAddr::V4(address) = address else { unreachable!("addresses are of version 4") };
        let host = Arc::clone(&self.hosts[&address.ip().octets()[3]]);
        let random = ChaCha8Rng::from_rng(&mut *self.random.lock().unwrap());
        let network = Arc::clone(self);
        Box::pin(async move {
            sleep(Duration::from_millis(1)).await;
            let mut condition = host.condition.subscribe();
            // During a network split the connection opens only when the split is over.
            let found = *condition.wait_for(|now| *now != Condition::Silent).await.unwrap();
            if found == Condition::Down {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (near, far) = tokio::io::duplex(4 << 10);
            let busy = Arc::new(AtomicBool::new(false));
            host.connections.lock().unwrap().push(Arc::downgrade(&busy));
            let node = Node {
                stream: far,
                busy: Arc::downgrade(&busy),
                served: 0,
                begun: false,
                host,
                condition,
                random,
            };
            network.nodes.lock().unwrap().push(tokio::spawn(node.run()));
            Ok(Box::new(Link { stream: near, _busy: busy }) as Box<dyn Socket>)
        })
    }
}

/// The gateway's end of a connection. Once it is dropped, no request of the gateway counts on the node.
struct Link {
    stream: DuplexStream,
    _busy: Arc<AtomicBool>,
}

impl AsyncRead for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The node's end of a connection.
struct Node {
    stream: DuplexStream,
    busy: Weak<AtomicBool>,
    /// Number of requests served on this connection.
    served: usize,
    /// Whether a byte of the response has been written.
    begun: bool,
    host: Arc<Host>,
    condition: watch::Receiver<Condition>,
    random: ChaCha8Rng,
}

/// Text of a token. It contains the request id, so that tokens of another request cannot pass as its own.
pub(crate) fn token(id: &str, number: u64) -> String {
    format!("{id}.{number} ")
}

impl Node {
    async fn run(mut self) {
        let mut condition = self.condition.clone();
        tokio::select! {
            // A node that stops closes its connections.
            _ = condition.wait_for(|now| *now == Condition::Down) => self.lost(),
            _ = self.serve() => {}
        }
        // This side works on no request any more, whether the gateway has noticed or not.
        self.release();
    }

    fn lost(&self) {
        let busy = self.busy.upgrade().is_some_and(|busy| busy.load(Ordering::Relaxed));
        if busy && self.served > 0 && !self.begun {
            self.host.stale.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn serve(&mut self) -> io::Result<()> {
        loop {
            let (path, body) = self.request().await?;
            if path == "/health" {
                let well = self.now().await != Condition::Ill;
                let status = if well { 200 } else { 503 };
                self.write(answer(status, "{}").as_bytes()).await?;
                continue;
            }
            self.hold();
            self.begun = false;
            let kept = self.answer(&body).await?;
            self.release();
            self.served += 1;
            if !kept {
                return Ok(());
            }
        }
    }

    /// Returns the condition, once the network is whole.
    async fn now(&mut self) -> Condition {
        *self.condition.wait_for(|now| *now != Condition::Silent).await.unwrap()
    }

    fn hold(&self) {
        self.host.asked.fetch_add(1, Ordering::Relaxed);
        let Some(busy) = self.busy.upgrade() else { return };
        busy.store(true, Ordering::Relaxed);
        let mut connections = self.host.connections.lock().unwrap();
        connections.retain(|connection| connection.strong_count() > 0);
        let busy = |connection: &Weak<AtomicBool>| {
            connection.upgrade().is_some_and(|busy| busy.load(Ordering::Relaxed))
        };
        let held = connections.iter().filter(|connection| busy(connection)).count();
        drop(connections);
        assert!(held <= self.host.slots, "a node holds {held} requests with {} slots", self.host.slots);
    }

    /// Frees the slot. The gateway may treat the slot as free from here on.
    fn release(&self) {
        if let Some(busy) = self.busy.upgrade() {
            busy.store(false, Ordering::Relaxed);
        }
    }

    async fn request(&mut self) -> io::Result<(String, Vec<u8>)> {
        let mut seen = Vec::new();
        let end = loop {
            let mut piece = [0; 1024];
            let read = self.stream.read(&mut piece).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            seen.extend_from_slice(&piece[..read]);
            if let Some(at) = memchr::memmem::find(&seen, b"\r\n\r\n") {
                break at + 4;
            }
        };
        let head = String::from_utf8(seen[..end].to_vec()).unwrap().to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = seen.split_off(end);
        let missing = length.map_or(0, |text| text.parse().unwrap()) - body.len();
        let from = body.len();
        body.resize(from + missing, 0);
        self.stream.read_exact(&mut body[from..]).await?;
        self.now().await;
        Ok((head.split(' ').nth(1).unwrap().to_owned(), body))
    }

    /// Writes in pieces of random length, and pauses during a network split.
    async fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.now().await;
            self.begun = true;
            let piece = if self.random.random_bool(0.8) {
                bytes.len()
            } else {
                self.random.random_range(1..=bytes.len())
            };
            self.stream.write_all(&bytes[..piece]).await?;
            bytes = &bytes[piece..];
            if !bytes.is_empty() {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Works for `ms` milliseconds. Fails if the gateway closes the connection.
    async fn work(&mut self, ms: u64) -> io::Result<()> {
        let slower = match self.now().await {
            Condition::Slow(times) => u64::from(times),
            _ => 1,
        };
        tokio::select! {
            () = sleep(Duration::from_millis(ms * slower)) => Ok(()),
            // The gateway sends no data while a request is running.
            _ = self.stream.read_u8() => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Responds to a request. Returns whether the connection may be reused.
    async fn answer(&mut self, body: &[u8]) -> io::Result<bool> {
        let body: Value = serde_json::from_slice(body).unwrap();
        let (id, tokens) = (body["user"].as_str().unwrap().to_owned(), body["max_tokens"].as_u64().unwrap());
        let ms = self.random.random_range(1..800);
        self.work(ms).await?;
        let condition = self.now().await;
        match condition {
            Condition::Refuses(status) => {
                let error = answer(status, r#"{"error":{"message":"scripted","type":"server_error"}}"#);
                self.release();
                return self.write(error.as_bytes()).await.map(|()| true);
            }
            Condition::Nonsense => {
                let said = NONSENSE[self.random.random_range(0..NONSENSE.len())];
                // Some of the invalid data begins with a whole response.
                self.release();
                self.write(said.as_bytes()).await?;
                // Waits until the gateway closes the connection or sends another request.
                if self.stream.read_u8().await.is_ok() {
                    self.host.stale.fetch_add(1, Ordering::Relaxed);
                }
                return Ok(false);
            }
            _ => {}
        }
        let breaks = (condition == Condition::Breaks).then(|| self.random.random_range(0..=tokens));
        if body["stream"] == true {
            self.stream_tokens(&id, tokens, breaks).await
        } else {
            self.whole(&id, tokens, breaks).await
        }
    }

    async fn whole(&mut self, id: &str, tokens: u64, breaks: Option<u64>) -> io::Result<bool> {
        let content: String = (0..tokens).map(|number| token(id, number)).collect();
        let whole = format!(
            r#"{{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":1,"completion_tokens":{tokens},"total_tokens":{}}}}}"#,
            tokens + 1
        );
        let said = answer(200, &whole);
        if breaks.is_some() {
            let cut = self.random.random_range(0..said.len());
            self.write(&said.as_bytes()[..cut]).await?;
            if cut == 0 {
                self.lost();
            }
            return Ok(false);
        }
        self.release();
        self.write(said.as_bytes()).await.map(|()| true)
    }

    async fn stream_tokens(&mut self, id: &str, tokens: u64, breaks: Option<u64>) -> io::Result<bool> {
        // The stream ends with a last chunk or with the connection.
        let chunked = self.random.random_bool(0.7);
        let ends = if chunked { "transfer-encoding: chunked" } else { "connection: close" };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{ends}\r\n\r\n");
        self.write(head.as_bytes()).await?;
        for number in 0..tokens {
            if breaks == Some(number) {
                return Ok(false);
            }
            let role = if number == 0 { r#""role":"assistant","# } else { "" };
            let delta = format!(r#"{{{role}"content":"{}"}}"#, token(id, number));
            self.write(&event(&delta, "null", chunked)).await?;
            self.work(20).await?;
        }
        self.write(&event("{}", r#""stop""#, chunked)).await?;
        if breaks.is_some() {
            return Ok(false);
        }
        self.release();
        let end: &[u8] = if chunked { b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" } else { b"data: [DONE]\n\n" };
        self.write(end).await.map(|()| chunked)
    }
}

fn event(delta: &str, reason: &str, chunked: bool) -> Vec<u8> {
    let event = format!(
        "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{reason}}}]}}\n\n"
    );
    if chunked { format!("{:x}\r\n{event}\r\n", event.len()).into_bytes() } else { event.into_bytes() }
}

fn answer(status: u16, body: &str) -> String {
    let pause = if status == 429 { "retry-after: 1\r\n" } else { "" };
    format!(
        "HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\n{pause}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

const NONSENSE: [&str; 6] = [
    "\0\0\0\0",
    "SSH-2.0-OpenSSH_9.9\r\n\r\n",
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n<html>no ",
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: not json\n\n",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
];
