//! Reward models behind `POST /v1/score` and `/rerank`: verbosity (RV) and difficulty (CD) of a chain of thought, 0 to
//! 1. Training them is in `potstill-learn`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use candle_core::{DType, Device};
use potstill_engine::EngineError;
use potstill_engine::loader::load;
use potstill_learn::reward_model::RewardModel;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::ServerState;
use super::error::NodeError;
use super::generate::parse_body;
use super::options::invalid_field;

/// Maximum number of pairs per request.
const MAX_PAIRS: usize = 256;
/// Maximum number of tokens per forward pass.
const BATCH_TOKENS: usize = 4096;

/// `NAME=FOLDER` on the command line.
#[derive(Debug, Clone)]
pub struct RewardArgument {
    /// Model name for clients, such as `rv`.
    pub name: String,
    /// Folder written by `potstill reward`.
    pub path: PathBuf,
}

impl FromStr for RewardArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.to_owned(), path: path.into() })
            }
            _ => Err("must be NAME=FOLDER, such as rv=runs/demo/models/reward-rv".to_owned()),
        }
    }
}

/// Reward models of a node. Each model processes one request at a time.
#[derive(Default)]
pub(crate) struct RewardModels {
    models: BTreeMap<String, Mutex<RewardModel>>,
}

impl RewardModels {
    /// Loads the reward models on the CPU. Fails if two have the same name.
    pub(crate) fn load(arguments: &[RewardArgument]) -> anyhow::Result<Self> {
        let mut models = BTreeMap::new();
        for RewardArgument { name, path } in arguments {
            let model = load(path, &Device::Cpu, DType::F32)
                .map_err(anyhow::Error::from)
                .and_then(|model| Ok(RewardModel::new(model)?))
                .with_context(|| format!("cannot serve `{}` as a reward model", path.display()))?;
            let before = models.insert(name.clone(), Mutex::new(model));
            anyhow::ensure!(before.is_none(), "two reward models are called `{name}`");
        }
        Ok(Self { models })
    }

    /// Returns the names of the models.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.models.keys()
    }

    /// Returns the predictions of each wanted model, in the order of `pairs`, and the total number of tokens. Fails if
    /// a pair exceeds a model's context.
    fn predict(
        &self,
        wanted: &[String],
        pairs: &[(String, String)],
    ) -> Result<(Vec<Vec<f32>>, usize), NodeError> {
        let failed =
            |error: &dyn std::fmt::Display| NodeError::Engine(EngineError::Stopped(error.to_string()));
        let (mut all, mut tokens) = (Vec::with_capacity(wanted.len()), 0);
        for name in wanted {
            let model = self.models.get(name).ok_or_else(|| NodeError::ModelNotFound(name.clone()))?;
            let model = model.lock().unwrap_or_else(PoisonError::into_inner);
            let rows = pairs
                .iter()
                .map(|(problem, completion)| RewardModel::encode(model.model(), problem, completion))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| failed(&error))?;
            if let Some(long) = rows.iter().find(|row| row.len() > model.model().config.max_positions) {
                let limit = model.model().config.max_positions;
                return Err(NodeError::Engine(EngineError::ContextTooLong {
                    limit,
                    requested: long.len(),
                    prompt: long.len(),
                }));
            }
            tokens += rows.iter().map(Vec::len).sum::<usize>();
            all.push(model.predict(&rows, BATCH_TOKENS).map_err(|error| failed(&error))?);
        }
        Ok((all, tokens))
    }

    /// Returns the named model, or all models if none is named.
    fn select(&self, model: Option<&str>) -> Result<Vec<String>, NodeError> {
        match model {
            Some(name) if self.models.contains_key(name) => Ok(vec![name.to_owned()]),
            Some(name) => Err(NodeError::ModelNotFound(name.to_owned())),
            None => Ok(self.models.keys().cloned().collect()),
        }
    }
}

/// A text or a list of texts.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// Body of `/v1/score`. Aliases are the field names of vLLM.
#[derive(Deserialize)]
struct ScoreRequest {
    /// Name of a reward model; all models if left out.
    model: Option<String>,
    #[serde(alias = "text_1", alias = "queries")]
    problem: OneOrMany,
    #[serde(alias = "text_2", alias = "items")]
    completion: OneOrMany,
}

/// Returns pairs of problem and completion. A single problem is used for all completions.
fn pair_texts(problems: Vec<String>, completions: Vec<String>) -> Result<Vec<(String, String)>, NodeError> {
    if completions.is_empty() || completions.len() > MAX_PAIRS {
        return Err(invalid_field("completion", format!("must hold 1 to {MAX_PAIRS} texts")));
    }
    match problems.len() {
        1 => Ok(completions.into_iter().map(|text| (problems[0].clone(), text)).collect()),
        count if count == completions.len() => Ok(problems.into_iter().zip(completions).collect()),
        _ => Err(invalid_field("problem", "must be one text, or as many as there are completions")),
    }
}

/// Computes predictions on a blocking thread.
async fn predict_blocking(
    served: Arc<ServerState>,
    wanted: Vec<String>,
    pairs: Vec<(String, String)>,
) -> Result<(Vec<Vec<f32>>, usize), NodeError> {
    let work = tokio::task::spawn_blocking(move || served.rewards.predict(&wanted, &pairs));
    work.await.map_err(|error| NodeError::Engine(EngineError::Stopped(error.to_string())))?
}

/// `POST /v1/score`: scores completions of problems. A row has `scores` by model, and `score` if there is one model.
pub(super) async fn score(
    State(served): State<Arc<ServerState>>,
    body: Bytes,
) -> Result<Json<Value>, NodeError> {
    let request: ScoreRequest = parse_body(&body)?;
    let wanted = served.rewards.select(request.model.as_deref())?;
    let pairs = pair_texts(request.problem.into_vec(), request.completion.into_vec())?;
    let count = pairs.len();
    let (values, tokens) = predict_blocking(served, wanted.clone(), pairs).await?;
    let data: Vec<Value> = (0..count)
        .map(|at| {
            let scores: Map<String, Value> =
                wanted.iter().zip(&values).map(|(name, values)| (name.clone(), json!(values[at]))).collect();
            let mut row = json!({"index": at, "object": "score", "scores": scores});
            if let [only] = values.as_slice() {
                row["score"] = json!(only[at]);
            }
            row
        })
        .collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Json(json!({"object": "list", "model": request.model, "data": data, "usage": usage})))
}

/// Body of `/rerank`, as in vLLM.
#[derive(Deserialize)]
struct RerankRequest {
    model: Option<String>,
    query: String,
    documents: Vec<String>,
    top_n: Option<usize>,
}

/// `POST /rerank`: ranks documents (completions of the query) by falling score of one model.
pub(super) async fn rerank(
    State(served): State<Arc<ServerState>>,
    body: Bytes,
) -> Result<Json<Value>, NodeError> {
    let request: RerankRequest = parse_body(&body)?;
    let wanted = served.rewards.select(request.model.as_deref())?;
    let [name] = wanted.as_slice() else {
        let names = wanted.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        return Err(invalid_field("model", format!("must be one of {names}")));
    };
    let name = name.clone();
    let pairs = pair_texts(vec![request.query], request.documents.clone())?;
    let (values, tokens) = predict_blocking(served, wanted, pairs).await?;
    let scores = values.into_iter().next().unwrap_or_default();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(request.top_n.unwrap_or(order.len()));
    let results: Vec<Value> = order
        .into_iter()
        .map(|at| json!({"index": at, "document": {"text": request.documents[at]}, "relevance_score": scores[at]}))
        .collect();
    Ok(Json(json!({"model": name, "results": results, "usage": {"total_tokens": tokens}})))
}
