//! A Hugging Face Hub for tests: revisions with files, range requests, gated repositories, and downloads that break.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, StatusCode, header};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// Commit of every branch.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Token that gives access to gated repositories.
pub const TOKEN: &str = "hf_test";

struct Inner {
    /// Bytes and ETag by repository and path.
    files: BTreeMap<(String, String), (Bytes, String)>,
    gated: Option<String>,
    /// Number of bytes after which the next download breaks.
    cut: Mutex<Option<usize>>,
    downloads: AtomicUsize,
    resumed: AtomicUsize,
}

/// A running hub.
pub struct Hub {
    inner: Arc<Inner>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
}

impl Hub {
    /// Serves `(repository, path, bytes, etag)`. The repository `gated` requires the token.
    pub async fn start(files: &[(&str, &str, Bytes, &str)], gated: Option<&str>) -> Self {
        let files = files.iter().map(|(repository, path, bytes, etag)| {
            (((*repository).to_owned(), (*path).to_owned()), (bytes.clone(), (*etag).to_owned()))
        });
        let inner = Arc::new(Inner {
            files: files.collect(),
            gated: gated.map(str::to_owned),
            cut: Mutex::default(),
            downloads: AtomicUsize::new(0),
            resumed: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&inner));
        tokio::spawn(async move {
            tokio::select! {
                served = axum::serve(listener, router) => served.unwrap(),
                _ = stopped => {}
            }
        });
        Self { inner, address, stop: Some(stop) }
    }

    /// Base URL, for `HF_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Breaks the next download after this number of bytes.
    pub fn cut_next(&self, bytes: usize) {
        *self.inner.cut.lock().unwrap() = Some(bytes);
    }

    /// Number of downloads, and of those that resumed a broken one.
    pub fn downloads(&self) -> (usize, usize) {
        (self.inner.downloads.load(Ordering::SeqCst), self.inner.resumed.load(Ordering::SeqCst))
    }

    /// Stops the hub.
    pub fn stop(&mut self) {
        self.stop.take();
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let gated = inner.gated.as_deref().is_some_and(|repository| path.contains(repository));
    let bearer = format!("Bearer {TOKEN}");
    if gated
        && request
            .headers()
            .get(header::AUTHORIZATION)
            .is_none_or(|given| given.as_bytes() != bearer.as_bytes())
    {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if let Some(rest) = path.strip_prefix("/api/datasets/") {
        let Some((repository, _revision)) = rest.split_once("/revision/") else {
            return StatusCode::NOT_FOUND.into_response();
        };
        let files: Vec<_> = inner
            .files
            .keys()
            .filter(|(of, _)| of == repository)
            .map(|(_, path)| json!({"rfilename": path}))
            .collect();
        if files.is_empty() {
            return StatusCode::NOT_FOUND.into_response();
        }
        return axum::Json(json!({"sha": COMMIT, "siblings": files})).into_response();
    }
    let found = path.strip_prefix("/datasets/").and_then(|rest| rest.split_once("/resolve/")).and_then(
        |(repository, rest)| {
            let (_revision, file) = rest.split_once('/')?;
            inner.files.get(&(repository.to_owned(), file.to_owned()))
        },
    );
    match found {
        None => StatusCode::NOT_FOUND.into_response(),
        Some((bytes, etag)) => download(&inner, bytes, etag, request.headers()),
    }
}

fn download(inner: &Inner, bytes: &Bytes, etag: &str, headers: &HeaderMap) -> Response {
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok()).unwrap_or("bytes=0-");
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let (first, end) =
        (first.parse::<usize>().unwrap(), last.parse().map_or(bytes.len(), |last: usize| last + 1));
    if first >= bytes.len() {
        return StatusCode::RANGE_NOT_SATISFIABLE.into_response();
    }
    let part = bytes.slice(first..end.min(bytes.len()));
    if last.is_empty() {
        inner.downloads.fetch_add(1, Ordering::SeqCst);
        inner.resumed.fetch_add(usize::from(first > 0), Ordering::SeqCst);
    }
    let length = part.len();
    let cut = if last.is_empty() { inner.cut.lock().unwrap().take() } else { None };
    let body = match cut {
        None => Body::from(part),
        Some(cut) => {
            let sent = stream::iter([Ok(part.slice(..cut.min(length)))]);
            // While the stream waits, the server sends the data that it has.
            let broken = stream::once(async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(sent.chain(broken))
        }
    };
    let head = [
        (header::ETAG, format!("\"{etag}\"")),
        (header::CONTENT_RANGE, format!("bytes {first}-{}/{}", first + length - 1, bytes.len())),
        (header::CONTENT_LENGTH, length.to_string()),
        (header::HeaderName::from_static("x-repo-commit"), COMMIT.to_owned()),
    ];
    (StatusCode::PARTIAL_CONTENT, head, body).into_response()
}
