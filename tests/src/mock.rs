//! A mock node with scripted behavior: it responds, streams, breaks streams, rejects requests or hangs. It counts
//! requests and the streams that are still running.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};

/// Behavior of a mock node.
#[derive(Debug, Clone, PartialEq)]
pub enum Behaviour {
    /// Responds at once, with this number of completion tokens in `usage`.
    Answer(u64),
    /// Responds after the test calls [`Mock::release`].
    Hold,
    /// Streams this number of chunks with a pause between them, then ends correctly.
    Stream(usize, Duration),
    /// Streams this number of chunks, then closes the connection.
    CutStream(usize),
    /// Streams this number of chunks, then ends the body without `[DONE]`.
    EndStreamEarly(usize),
    /// Responds with this status.
    Status(u16),
    /// Streams without end, as fast as the client reads.
    Endless,
    /// Responds with this status and body.
    Document(u16, String),
    /// Streams these bytes.
    Events(String),
    /// Responds with 429 and this `Retry-After`.
    Busy(u64),
    /// Breaks off within a response that is not streamed.
    CutDocument,
    /// Sends the head of a stream and then nothing.
    Silent,
}

struct Shared {
    behaviour: Mutex<Behaviour>,
    asked: AtomicUsize,
    writing: AtomicUsize,
    bytes: AtomicUsize,
    bodies: Mutex<Vec<Value>>,
    headers: Mutex<Vec<HashMap<String, String>>>,
    release: Notify,
    left: Notify,
    healthy: std::sync::atomic::AtomicBool,
    killed: std::sync::atomic::AtomicBool,
}

/// A running mock node.
pub struct Mock {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
}

/// Counts a stream until it is dropped.
struct Writing(Arc<Shared>);

impl Writing {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.writing.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(shared))
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.writing.fetch_sub(1, Ordering::SeqCst);
        self.0.left.notify_waiters();
    }
}

impl Mock {
    /// Starts a mock node on a free port.
    pub async fn start(behaviour: Behaviour) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), behaviour).await
    }

    /// Starts a mock node at `address`.
    pub async fn start_at(address: SocketAddr, behaviour: Behaviour) -> Self {
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(behaviour),
            asked: AtomicUsize::new(0),
            writing: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            bodies: Mutex::default(),
            headers: Mutex::default(),
            release: Notify::new(),
            left: Notify::new(),
            healthy: true.into(),
            killed: false.into(),
        });
        let router = Router::new()
            .route("/v1/chat/completions", post(chat))
            .route("/v1/completions", post(chat))
            .route("/v1/embeddings", post(chat))
            .route("/v1/rerank", post(chat))
            .route("/tokenize", post(chat))
            .route("/tokenizer_info", get(chat))
            .route("/v1/traces", post(chat))
            .route("/health", get(health))
            .with_state(Arc::clone(&shared));
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            tokio::select! {
                served = async { axum::serve(listener, router).await } => served.unwrap(),
                _ = stopped => {}
            }
        });
        Self { shared, address, stop: Some(stop) }
    }

    /// Base URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Number of requests so far.
    pub fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }

    /// Number of streamed bytes so far.
    pub fn bytes(&self) -> usize {
        self.shared.bytes.load(Ordering::SeqCst)
    }

    /// Request bodies so far.
    pub fn bodies(&self) -> Vec<Value> {
        self.shared.bodies.lock().unwrap().clone()
    }

    /// Request headers so far.
    pub fn headers(&self) -> Vec<HashMap<String, String>> {
        self.shared.headers.lock().unwrap().clone()
    }

    /// Sets the behavior for further requests.
    pub fn behave(&self, behaviour: Behaviour) {
        *self.shared.behaviour.lock().unwrap() = behaviour;
    }

    /// Releases held requests.
    pub fn release(&self) {
        self.shared.release.notify_waiters();
    }

    /// Sets the result of health checks.
    pub fn set_healthy(&self, healthy: bool) {
        self.shared.healthy.store(healthy, Ordering::SeqCst);
    }

    /// Makes the node healthy after `wait`.
    pub fn set_healthy_after(&self, wait: Duration) {
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            shared.healthy.store(true, Ordering::SeqCst);
        });
    }

    /// Number of running responses.
    pub fn writing(&self) -> usize {
        self.shared.writing.load(Ordering::SeqCst)
    }

    /// Waits until no response is running or held.
    pub async fn idle(&self) {
        let waited = tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                let left = self.shared.left.notified();
                if self.shared.writing.load(Ordering::SeqCst) == 0 {
                    return;
                }
                let _woken = tokio::time::timeout(Duration::from_millis(20), left).await;
            }
        });
        waited.await.expect("the node went on writing after its client had left");
    }

    /// Waits until this number of requests is running or held.
    pub async fn busy(&self, requests: usize) {
        until("the node is busy", || self.shared.writing.load(Ordering::SeqCst) >= requests).await;
    }

    /// Stops listening and cuts running streams.
    pub fn kill(&mut self) {
        self.shared.killed.store(true, Ordering::SeqCst);
        self.stop();
    }

    /// Stops listening; open connections continue.
    pub fn stop(&mut self) {
        drop(self.stop.take());
    }
}

/// Waits until `condition` holds, at most 10 s.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    for _ in 0..2000 {
        ticks.tick().await;
        if condition() {
            return;
        }
    }
    panic!("waited in vain until {what}");
}

async fn health(State(shared): State<Arc<Shared>>) -> StatusCode {
    if shared.healthy.load(Ordering::SeqCst) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Returns one chunk of a stream.
pub fn chunk(text: &str, finish: Option<&str>) -> Bytes {
    let body = json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "mock",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "mock_extra": 7});
    format!("data: {body}\n\n").into()
}

async fn chat(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    shared.asked.fetch_add(1, Ordering::SeqCst);
    shared.bodies.lock().unwrap().push(serde_json::from_slice(&body).unwrap_or(Value::Null));
    let seen = headers
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned()))
        .collect();
    shared.headers.lock().unwrap().push(seen);
    let writing = Writing::new(&shared);
    let behaviour = shared.behaviour.lock().unwrap().clone();
    let whole = |tokens: u64| {
        axum::Json(json!({"id": "c", "object": "chat.completion", "created": 1, "model": "mock", "mock_extra": 7,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}}))
        .into_response()
    };
    match behaviour {
        Behaviour::Answer(tokens) => whole(tokens),
        Behaviour::Hold => {
            shared.release.notified().await;
            drop(writing);
            whole(1)
        }
        Behaviour::Status(status) => (
            StatusCode::from_u16(status).unwrap(),
            [("content-type", "application/json")],
            json!({"error": {"message": "scripted", "type": "t", "param": null, "code": "scripted"}})
                .to_string(),
        )
            .into_response(),
        Behaviour::Stream(chunks, pause) => events(shared, writing, chunks, pause, End::Well),
        // The pause lets the chunks reach the network; closing the connection discards buffered data.
        Behaviour::CutStream(chunks) => events(shared, writing, chunks, Duration::from_millis(5), End::Cut),
        Behaviour::EndStreamEarly(chunks) => events(shared, writing, chunks, Duration::ZERO, End::Early),
        Behaviour::Document(status, body) => {
            (StatusCode::from_u16(status).unwrap(), [("content-type", "application/json")], body)
                .into_response()
        }
        Behaviour::Events(text) => ([("content-type", "text/event-stream")], text).into_response(),
        Behaviour::Busy(seconds) => {
            (StatusCode::TOO_MANY_REQUESTS, [("retry-after", seconds.to_string())], "busy").into_response()
        }
        Behaviour::CutDocument => {
            let pieces = [Ok(Bytes::from_static(b"{\"id\":")), Err(std::io::Error::other("scripted cut"))];
            let body = stream::iter(pieces).then(|piece| async {
                tokio::time::sleep(Duration::from_millis(5)).await;
                piece
            });
            ([("content-type", "application/json")], Body::from_stream(body)).into_response()
        }
        Behaviour::Silent => {
            let body = stream::once(async move {
                let _writing = writing;
                std::future::pending::<Result<Bytes, std::io::Error>>().await
            });
            ([("content-type", "text/event-stream")], Body::from_stream(body)).into_response()
        }
        Behaviour::Endless => events(shared, writing, usize::MAX, Duration::ZERO, End::Well),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Well,
    Early,
    Cut,
}

fn events(shared: Arc<Shared>, writing: Writing, chunks: usize, pause: Duration, end: End) -> Response {
    let body = stream::unfold((0usize, writing, shared), move |(at, writing, shared)| async move {
        if at > 0 && at <= chunks && !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let bytes: Result<Bytes, std::io::Error> = if shared.killed.load(Ordering::SeqCst) {
            Err(std::io::Error::other("killed"))
        } else if at < chunks {
            let text = if chunks == usize::MAX { "x".repeat(16 << 10) } else { format!("t{at} ") };
            Ok(chunk(&text, None))
        } else if at == chunks && end == End::Well {
            Ok([&chunk("", Some("stop"))[..], b"data: [DONE]\n\n"].concat().into())
        } else if at == chunks && end == End::Cut {
            Err(std::io::Error::other("scripted cut"))
        } else {
            return None;
        };
        shared.bytes.fetch_add(bytes.as_ref().map_or(0, Bytes::len), Ordering::SeqCst);
        Some((bytes, (at + 1, writing, shared)))
    });
    ([("content-type", "text/event-stream")], Body::from_stream(body)).into_response()
}
