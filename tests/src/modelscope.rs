//! ModelScope for tests: a listing in pages, and downloads that break and resume.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, StatusCode};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// A file: path, bytes, and the SHA-256 in the listing.
pub type File = (String, Bytes, String);

struct Shared {
    files: Vec<File>,
    cut: Mutex<Option<usize>>,
    downloads: AtomicUsize,
    resumed: AtomicUsize,
}

/// A running hub with one dataset, `owner/name`. Dropping it stops it.
pub struct ModelScope {
    shared: Arc<Shared>,
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Drop for ModelScope {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl ModelScope {
    /// Starts the hub.
    pub async fn start(files: Vec<File>) -> Self {
        let shared = Arc::new(Shared {
            files,
            cut: Mutex::default(),
            downloads: AtomicUsize::new(0),
            resumed: AtomicUsize::new(0),
        });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { shared, address, serving }
    }

    /// Base URL, for `MODELSCOPE_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Breaks the next download after this number of bytes.
    pub fn cut_next(&self, bytes: usize) {
        *self.shared.cut.lock().unwrap() = Some(bytes);
    }

    /// Number of downloads, and of those that resumed a broken one.
    pub fn downloads(&self) -> (usize, usize) {
        (self.shared.downloads.load(Ordering::SeqCst), self.shared.resumed.load(Ordering::SeqCst))
    }
}

fn query(request: &Request, name: &str) -> String {
    let query = request.uri().query().unwrap_or_default();
    let value = query.split('&').find_map(|pair| pair.strip_prefix(&format!("{name}=")));
    value.unwrap_or_default().replace("%20", " ")
}

async fn answer(State(shared): State<Arc<Shared>>, headers: HeaderMap, request: Request) -> Response {
    match request.uri().path() {
        "/api/v1/datasets/owner/name/repo/tree" => {
            let number = |name: &str| query(&request, name).parse::<usize>().unwrap();
            let (page, size) = (number("PageNumber"), number("PageSize"));
            let files: Vec<_> = shared
                .files
                .iter()
                .skip((page - 1) * size)
                .take(size)
                .map(|(path, bytes, sha256)| json!({ "Path": path, "Name": path, "Type": "blob", "Size": bytes.len(), "Sha256": sha256 }))
                .collect();
            axum::Json(
                json!({ "Code": 200, "Success": true, "Message": "success", "Data": { "Files": files } }),
            )
            .into_response()
        }
        "/api/v1/datasets/owner/name/repo" => {
            let path = query(&request, "FilePath");
            let Some((_, bytes, _)) = shared.files.iter().find(|(name, _, _)| *name == path) else {
                return StatusCode::NOT_FOUND.into_response();
            };
            shared.downloads.fetch_add(1, Ordering::SeqCst);
            let range = headers.get("range").and_then(|range| range.to_str().ok());
            let from: usize =
                range.map_or(0, |range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
            let status = if from > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
            shared.resumed.fetch_add(usize::from(from > 0), Ordering::SeqCst);
            let rest = bytes.slice(from..);
            let cut = shared.cut.lock().unwrap().take();
            let length = [("content-length", rest.len().to_string())];
            let Some(cut) = cut else { return (status, length, rest).into_response() };
            let sent = stream::iter([Ok(rest.slice(..cut))]);
            // While the stream waits, the server sends the data that it has.
            let broken = stream::once(async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            });
            (status, length, Body::from_stream(sent.chain(broken))).into_response()
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}
