//! A scripted teacher: the test decides its completions by stage, and it records all requests.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// A request to the teacher.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Stage that sent the request.
    pub stage: String,
    /// Message of the user.
    pub prompt: String,
    /// Request body.
    pub body: Value,
    /// Number of earlier requests with the same prompt.
    pub before: usize,
}

/// Response of the teacher.
#[derive(Debug, Clone)]
pub enum Said {
    /// A text that ends by itself.
    Text(String),
    /// Reasoning and answer in separate fields. In a stream the other field is null, as with DeepSeek-R1.
    Apart(String, String),
    /// A text that was cut at the token limit.
    Cut(String),
    /// An error status.
    Status(u16),
}

type Speak = dyn Fn(&Asked) -> Said + Send + Sync;

struct Shared {
    speak: Box<Speak>,
    asked: Mutex<HashMap<String, usize>>,
    stages: Mutex<HashMap<String, usize>>,
}

/// A running teacher. Dropping it stops it.
pub struct Teacher {
    shared: Arc<Shared>,
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Drop for Teacher {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Teacher {
    /// Starts a teacher with the model `m`.
    pub async fn start(speak: impl Fn(&Asked) -> Said + Send + Sync + 'static) -> Self {
        let shared =
            Arc::new(Shared { speak: Box::new(speak), asked: Mutex::default(), stages: Mutex::default() });
        let models = || async {
            axum::Json(
                json!({ "object": "list", "data": [{ "id": "m", "object": "model", "created": 1, "owned_by": "m" }] }),
            )
        };
        let router = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/chat/completions", post(chat))
            .with_state(Arc::clone(&shared));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { shared, address, serving }
    }

    /// Base URL, which ends in `/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Number of calls by stage.
    pub fn calls(&self) -> HashMap<String, usize> {
        self.shared.stages.lock().unwrap().clone()
    }

    /// Number of calls, and of different prompts among them.
    pub fn questions(&self) -> (usize, usize) {
        let asked = self.shared.asked.lock().unwrap();
        (asked.values().sum(), asked.len())
    }
}

async fn chat(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let text =
        |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (id, stage) = (text("idempotency-key"), text("x-potstill-stage"));
    let before = {
        let mut asked = shared.asked.lock().unwrap();
        let count = asked.entry(id).or_default();
        *count += 1;
        *count - 1
    };
    *shared.stages.lock().unwrap().entry(stage.clone()).or_default() += 1;
    let prompt = body["messages"][0]["content"].as_str().unwrap_or_default().to_owned();
    let said = (shared.speak)(&Asked { stage, prompt, body, before });
    let event = |delta: Value, reason: Option<&str>| {
        let choice = json!([{ "index": 0, "delta": delta, "finish_reason": reason }]);
        format!(
            "data: {}\n\n",
            json!({ "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choice })
        )
    };
    let (events, reason) = match said {
        Said::Status(status) => {
            let error = json!({ "error": { "message": "the test says so", "type": "server_error", "code": null, "param": null } });
            return (StatusCode::from_u16(status).unwrap(), axum::Json(error)).into_response();
        }
        Said::Text(text) => (event(json!({ "role": "assistant", "content": text }), None), "stop"),
        Said::Cut(text) => (event(json!({ "role": "assistant", "content": text }), None), "length"),
        Said::Apart(thinking, answer) => {
            let first =
                event(json!({ "role": "assistant", "content": null, "reasoning_content": thinking }), None);
            (first + &event(json!({ "content": answer, "reasoning_content": null }), None), "stop")
        }
    };
    let usage = json!({ "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [],
        "usage": { "prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30 } });
    let stream = format!("{events}{}data: {usage}\n\ndata: [DONE]\n\n", event(json!({}), Some(reason)));
    ([("content-type", "text/event-stream")], stream).into_response()
}
