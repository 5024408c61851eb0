//! `potstill serve`: an OpenAI-compatible server for one model, with the engine behind axum. The gateway treats it like
//! any other node. Authentication and TLS are left to the gateway.

mod active_request;
mod choice;
mod error;
mod forms;
mod generate;
mod log_probs;
mod metrics;
mod options;
mod rewards;
mod stream;
mod tools;
mod vectors;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use axum::extract::{DefaultBodyLimit, Path as AtPath, State};
use axum::response::IntoResponse;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use http::{Uri, header};
use potstill_engine::grammar::GrammarCompiler;
use potstill_engine::loader::load_for_serving;
use potstill_engine::scheduler::{Engine, EngineConfig};
use potstill_engine::template::ChatTemplate;
use potstill_engine::tokenizer::Tokenizer;
use potstill_engine::{EngineError, device};
use potstill_shared::openai::{ModelCard, ModelList, unix_time_s};
use serde_json::json;
use tokio::net::TcpListener;

use error::NodeError;
use metrics::NodeMetrics;
pub use rewards::RewardArgument;
use rewards::RewardModels;

/// Maximum size of a request body in bytes.
const MAX_BODY_BYTES: usize = 32 << 20;

/// Arguments of `potstill serve`.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeArguments {
    /// Model folder (safetensors) or `.gguf` file.
    #[arg(long, required_unless_present = "reward")]
    pub model: Option<PathBuf>,
    /// Reward model as NAME=FOLDER, for `/v1/score` and `/rerank`; may be repeated.
    #[arg(long)]
    pub reward: Vec<RewardArgument>,
    /// Model name for clients; the file or folder name if left out.
    #[arg(long)]
    pub name: Option<String>,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Port to listen on.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Threads for the model; all available cores if left out.
    #[arg(long)]
    pub threads: Option<usize>,
    /// `cpu`, `cuda` or `cuda:N`; several separated by commas use tensor parallelism.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Quantize unquantized matrices of `--model` to 8 bits while loading (CPU only). Saves two thirds to three
    /// quarters of the memory and speeds up decoding several times. `potstill bench --text` measures the loss of
    /// quality.
    #[arg(long)]
    pub eight_bits: bool,
    /// Maximum number of sequences in a step.
    #[arg(long, default_value_t = 64)]
    pub max_running: usize,
    /// Maximum number of waiting requests; further ones get status 429.
    #[arg(long, default_value_t = 512)]
    pub max_waiting: usize,
    /// Memory of the KV cache in MiB; evicted blocks are recomputed when needed.
    #[arg(long, default_value_t = 4096)]
    pub kv_mib: usize,
    /// Maximum number of tokens in a step; longer prompts are prefilled in chunks.
    #[arg(long, default_value_t = 512)]
    pub step_tokens: usize,
    /// Exit when standard input closes, so that a node does not outlive its parent process.
    #[arg(long)]
    pub exit_with_parent: bool,
}

/// State for requests to the model.
pub(crate) struct ServedModel {
    pub(crate) name: String,
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Arc<ChatTemplate>,
    pub(crate) metrics: NodeMetrics,
    /// Vocabulary size of the model, and its end-of-sequence tokens.
    pub(crate) vocabulary: (usize, Vec<u32>),
    /// Compiler for structured output, created on first use because it processes the whole vocabulary. Holds the error
    /// if that failed.
    pub(crate) grammars: OnceLock<Result<GrammarCompiler, String>>,
}

/// State of the server: the model and the reward models.
pub(crate) struct ServerState {
    node: Option<Arc<ServedModel>>,
    rewards: RewardModels,
    created: u64,
}

/// Loads the models and serves until SIGTERM, Ctrl-C, or the end of standard input with `--exit-with-parent`.
pub async fn serve(arguments: ServeArguments) -> anyhow::Result<()> {
    if let Some(threads) = arguments.threads {
        device::set_threads(threads);
    }
    let started = std::time::Instant::now();
    let served = tokio::task::spawn_blocking({
        let arguments = arguments.clone();
        move || load_models(&arguments)
    })
    .await??;
    let address = SocketAddr::new(arguments.host, arguments.port);
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on `{address}`"))?;
    tracing::info!(
        models = model_cards(&served).iter().map(|card| card.id.as_str()).collect::<Vec<_>>().join(", "),
        address = %listener.local_addr()?,
        seconds = started.elapsed().as_secs_f64(),
        "serving"
    );
    let stop = stop_signal(arguments.exit_with_parent)?;
    axum::serve(listener, router(Arc::new(served))).with_graceful_shutdown(stop).await?;
    Ok(())
}

/// Loads all models.
fn load_models(arguments: &ServeArguments) -> anyhow::Result<ServerState> {
    let rewards = RewardModels::load(&arguments.reward)?;
    let node = match &arguments.model {
        Some(path) => Some(Arc::new(
            start_model(path, arguments).with_context(|| format!("cannot serve `{}`", path.display()))?,
        )),
        None => None,
    };
    Ok(ServerState { node, rewards, created: unix_time_s() })
}

/// Loads the model and starts the engine. Fails for a reward model.
fn start_model(path: &Path, arguments: &ServeArguments) -> anyhow::Result<ServedModel> {
    let devices = device::open_devices(&arguments.device)?;
    let model = load_for_serving(path, &devices, arguments.eight_bits)?;
    anyhow::ensure!(model.config.num_labels == 0, "it is a reward model: serve it with --reward NAME=FOLDER");
    let stem = || path.file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy());
    let config = EngineConfig {
        max_running: arguments.max_running,
        max_waiting: arguments.max_waiting,
        step_tokens: arguments.step_tokens,
        kv_bytes: arguments.kv_mib << 20,
        devices,
    };
    Ok(ServedModel {
        name: arguments.name.clone().unwrap_or_else(|| stem().into_owned()),
        engine: Engine::start(&model, config)?,
        tokenizer: model.tokenizer.clone(),
        template: Arc::clone(&model.chat_template),
        metrics: NodeMetrics::new()?,
        vocabulary: (model.config.vocab_size, model.config.eos_token_ids.clone()),
        grammars: OnceLock::new(),
    })
}

/// Returns a future that resolves on SIGTERM, on Ctrl-C, or at the end of standard input if `with_parent` is set.
fn stop_signal(with_parent: bool) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let (sender, parent_gone) = tokio::sync::oneshot::channel::<()>();
    if with_parent {
        // A detached thread, because a blocking read in the runtime would delay its shutdown, possibly forever.
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

/// Returns the routes. Reward routes exist only with reward models, generation routes only with a model.
fn router(served: Arc<ServerState>) -> Router {
    let mut router = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/health", get(health))
        .route("/metrics", get(metrics));
    if served.rewards.names().next().is_some() {
        router = router
            .route("/v1/score", post(rewards::score))
            .route("/score", post(rewards::score))
            .route("/v1/rerank", post(rewards::rerank))
            .route("/rerank", post(rewards::rerank));
    }
    let mut router = router.with_state(Arc::clone(&served));
    if let Some(node) = &served.node {
        let generation = Router::new()
            .route("/v1/chat/completions", post(generate::chat))
            .route("/v1/completions", post(generate::completions))
            .route("/v1/embeddings", post(vectors::embeddings))
            .route("/tokenize", post(vectors::tokenize))
            .route("/detokenize", post(vectors::detokenize))
            .route("/tokenizer_info", get(vectors::tokenizer_info));
        router = router.merge(generation.with_state(Arc::clone(node)));
    }
    router
        .method_not_allowed_fallback(async || NodeError::MethodNotAllowed)
        .fallback(async |uri: Uri| NodeError::NotFound(uri.path().to_owned()))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
}

/// Returns OpenAI's model objects of all served models.
fn model_cards(served: &ServerState) -> Vec<ModelCard> {
    let card = |name: &str| ModelCard::new(name, served.created, "potstill");
    let model = served.node.iter().map(|node| {
        let mut card = card(&node.name);
        card.extra.insert("max_model_len".to_owned(), json!(node.engine.max_context_tokens()));
        card
    });
    model.chain(served.rewards.names().map(|name| card(name))).collect()
}

/// `GET /health`: fails if the engine has stopped.
async fn health(State(served): State<Arc<ServerState>>) -> Result<&'static str, NodeError> {
    match served.node.as_ref().and_then(|node| node.engine.stop_reason()) {
        None => Ok("ok"),
        Some(reason) => Err(EngineError::Stopped(reason).into()),
    }
}

/// `GET /v1/models`.
async fn models(State(served): State<Arc<ServerState>>) -> Json<ModelList> {
    Json(ModelList::new(model_cards(&served)))
}

/// `GET /v1/models/{model}`.
async fn model(
    State(served): State<Arc<ServerState>>,
    AtPath(name): AtPath<String>,
) -> Result<Json<ModelCard>, NodeError> {
    let card = model_cards(&served).into_iter().find(|card| card.id == name);
    card.map(Json).ok_or(NodeError::ModelNotFound(name))
}

/// `GET /metrics` in Prometheus' text format.
async fn metrics(State(served): State<Arc<ServerState>>) -> Response {
    let text = served.node.as_ref().map(|node| node.metrics.render(&node.name, node.engine.stats()));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text.unwrap_or_default()).into_response()
}
