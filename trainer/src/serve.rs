//! A student, or a small teacher, as an OpenAI-compatible node: the engine behind axum. The gateway treats it like any
//! other node.

mod error;
mod generate;
mod metrics;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::{Uri, header};
use potstill_engine::loader::{LoadedModel, load};
use potstill_engine::scheduler::{Engine, SchedulerConfig};
use potstill_engine::template::ChatTemplate;
use potstill_engine::tokenizer::Tokenizer;
use potstill_engine::{EngineError, device};
use potstill_shared::openai::{ModelCard, ModelList, now_seconds};
use serde_json::json;
use tokio::net::TcpListener;

use error::NodeError;
use metrics::NodeMetrics;

/// Largest request body.
const BODY_BYTES: usize = 32 << 20;

/// What to serve, and where.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeArguments {
    /// Model folder (safetensors) or `.gguf` file.
    #[arg(long)]
    pub model: PathBuf,
    /// Name that clients use; the file or folder name if left out.
    #[arg(long)]
    pub name: Option<String>,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Port to listen on.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Threads for the model; all cores that this process may use if left out.
    #[arg(long)]
    pub threads: Option<usize>,
    /// `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Requests decoded together.
    #[arg(long, default_value_t = 64)]
    pub max_running: usize,
    /// Requests that may wait; more are answered 429.
    #[arg(long, default_value_t = 512)]
    pub max_waiting: usize,
    /// Tokens that all running requests may hold in the KV cache.
    #[arg(long, default_value_t = 1 << 18)]
    pub kv_tokens: usize,
    /// Exit when standard input closes, so that a node never outlives who started it.
    #[arg(long)]
    pub exit_with_parent: bool,
}

/// What every request can reach.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Arc<ChatTemplate>,
    pub(crate) metrics: NodeMetrics,
    created: u64,
}

/// Loads the model and serves until SIGTERM, Ctrl-C, or the end of standard input where that was asked for.
pub async fn serve(arguments: ServeArguments) -> anyhow::Result<()> {
    if let Some(threads) = arguments.threads {
        device::set_threads(threads);
    }
    let device = device::parse(&arguments.device)?;
    let name = arguments.name.clone().unwrap_or_else(|| {
        arguments
            .model
            .file_stem()
            .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    });
    let path = arguments.model.clone();
    let started = std::time::Instant::now();
    let model = tokio::task::spawn_blocking(move || load(&path, &device, device::compute_type(&device)))
        .await?
        .with_context(|| format!("cannot serve `{}`", arguments.model.display()))?;
    let node = Arc::new(start(
        &model,
        name,
        SchedulerConfig {
            max_running: arguments.max_running,
            max_waiting: arguments.max_waiting,
            kv_tokens: arguments.kv_tokens,
            ..SchedulerConfig::default()
        },
    )?);
    let parameters = model.config.parameters();
    drop(model);
    let address = SocketAddr::new(arguments.host, arguments.port);
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on `{address}`"))?;
    tracing::info!(
        model = node.name,
        parameters,
        address = %listener.local_addr()?,
        seconds = started.elapsed().as_secs_f64(),
        "serving"
    );
    let stop = stop_signal(arguments.exit_with_parent)?;
    axum::serve(listener, router(node)).with_graceful_shutdown(stop).await?;
    Ok(())
}

fn start(model: &LoadedModel, name: String, config: SchedulerConfig) -> Result<Node, EngineError> {
    Ok(Node {
        engine: Engine::start(model, config)?,
        tokenizer: model.tokenizer.clone(),
        template: Arc::clone(&model.template),
        metrics: NodeMetrics::new().map_err(|error| EngineError::Stopped(error.to_string()))?,
        created: now_seconds(),
        name,
    })
}

fn stop_signal(with_parent: bool) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let (sender, parent_gone) = tokio::sync::oneshot::channel::<()>();
    if with_parent {
        // A thread of its own: the runtime waits for its blocking reads when it ends, and this one may never return.
        std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
            let _ended = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            drop(sender);
        })?;
    } else {
        drop(sender);
    }
    Ok(async move {
        let parent_gone = async {
            let _closed = parent_gone.await;
            if !with_parent {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
            () = parent_gone => {}
        }
    })
}

fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(async || NodeError::MethodNotAllowed)
        .fallback(async |uri: Uri| NodeError::NotFound(uri.path().to_owned()))
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .with_state(node)
}

fn card(node: &Node) -> ModelCard {
    let mut card = ModelCard::new(&node.name, node.created, "potstill");
    card.extra.insert("max_model_len".to_owned(), json!(node.engine.context()));
    card
}

async fn health(State(node): State<Arc<Node>>) -> Result<&'static str, NodeError> {
    match node.engine.stopped() {
        None => Ok("ok"),
        Some(reason) => Err(EngineError::Stopped(reason).into()),
    }
}

async fn models(State(node): State<Arc<Node>>) -> Json<ModelList> {
    Json(ModelList::new(vec![card(&node)]))
}

async fn model(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<ModelCard>, NodeError> {
    if name == node.name { Ok(Json(card(&node))) } else { Err(NodeError::ModelNotFound(name)) }
}

#[derive(serde::Deserialize)]
struct Tokenize {
    prompt: String,
}

async fn tokenize(State(node): State<Arc<Node>>, body: bytes::Bytes) -> Result<Response, NodeError> {
    let request: Tokenize = generate::read(&body)?;
    let tokens = node.tokenizer.encode(&request.prompt)?;
    let context = node.engine.context();
    Ok(Json(json!({"count": tokens.len(), "max_model_len": context, "tokens": tokens})).into_response())
}

async fn metrics(State(node): State<Arc<Node>>) -> Response {
    let text = node.metrics.render(&node.name, node.engine.stats());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
