//! `POST /v1/embeddings`, `/tokenize`, `/detokenize` and `GET /tokenizer_info`, as in OpenAI and vLLM. Reward models
//! have their own endpoints in `rewards.rs`.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use potstill_engine::EngineError;
use potstill_engine::scheduler::{OutputKind, Pooling, Request, RequestUpdate};
use potstill_shared::openai::{ChatMessage, Prompt};
use serde::Deserialize;
use serde_json::{Value, json};

use super::ServedModel;
use super::error::NodeError;
use super::generate::{check_model, parse_body};
use super::options::invalid_field;

/// Maximum number of texts per request.
const MAX_INPUTS: usize = 256;

/// Body of `/v1/embeddings`.
#[derive(Deserialize)]
struct EmbeddingRequest {
    model: String,
    input: Prompt,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
    /// `last` (the default, as decoder-based embedding models are trained) or `mean`.
    pooling: Option<String>,
}

/// `POST /v1/embeddings`: hidden state of the last token, or the mean over all tokens, normalized to length 1.
pub(super) async fn embeddings(
    State(node): State<Arc<ServedModel>>,
    body: Bytes,
) -> Result<Json<Value>, NodeError> {
    let request: EmbeddingRequest = parse_body(&body)?;
    check_model(&node, &request.model)?;
    let pooling = match request.pooling.as_deref() {
        None | Some("last") => Pooling::Last,
        Some("mean") => Pooling::Mean,
        Some(_) => return Err(invalid_field("pooling", "must be `last` or `mean`")),
    };
    let base64 = match request.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(invalid_field("encoding_format", "must be `float` or `base64`")),
    };
    let encode = |text: String| node.tokenizer.encode(&text);
    let inputs: Vec<Vec<u32>> = match request.input {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.into_iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Tokens(ids) => vec![ids],
        Prompt::TokenLists(lists) => lists,
    };
    if inputs.is_empty() || inputs.len() > MAX_INPUTS {
        return Err(invalid_field("input", format!("must hold 1 to {MAX_INPUTS} texts")));
    }
    let tokens: usize = inputs.iter().map(Vec::len).sum();
    let goal = OutputKind::Embed(pooling);
    let requests =
        inputs.into_iter().map(|prompt| Request { prompt, output: goal, ..Request::default() }).collect();
    let mut data = Vec::new();
    for (index, mut updates) in node.engine.submit_all(requests)?.into_iter().enumerate() {
        let mut vector = match updates.recv().await {
            Some(RequestUpdate::Embedding(vector)) => vector,
            Some(RequestUpdate::Failed(reason)) => return Err(EngineError::Stopped(reason).into()),
            _ => return Err(EngineError::Stopped("it gave no embedding".to_owned()).into()),
        };
        if let Some(dimensions) = request.dimensions {
            if dimensions == 0 || dimensions > vector.len() {
                return Err(invalid_field("dimensions", format!("must be 1 to {}", vector.len())));
            }
            // Shortened vectors are normalized again, as OpenAI does.
            vector.truncate(dimensions);
            let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            vector.iter_mut().for_each(|x| *x /= norm);
        }
        let embedding = if base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            json!(STANDARD.encode(bytes))
        } else {
            json!(vector)
        };
        data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
    }
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": node.name, "usage": usage})))
}

/// Body of `/tokenize`: a text or messages.
#[derive(Deserialize)]
struct TokenizeRequest {
    prompt: Option<String>,
    messages: Option<Vec<ChatMessage>>,
    #[serde(default)]
    return_token_strs: bool,
}

/// `POST /tokenize`: token ids of a text, or of messages rendered with the chat template.
pub(super) async fn tokenize(
    State(node): State<Arc<ServedModel>>,
    body: Bytes,
) -> Result<Json<Value>, NodeError> {
    let request: TokenizeRequest = parse_body(&body)?;
    let text = match (request.prompt, request.messages) {
        (Some(text), None) => text,
        (None, Some(messages)) => node.template.render(&json!(messages), true, &json!({}))?,
        _ => return Err(invalid_field("prompt", "or else `messages` must be given")),
    };
    let tokens = node.tokenizer.encode(&text)?;
    let context = node.engine.max_context_tokens();
    let mut answer = json!({"count": tokens.len(), "max_model_len": context, "tokens": tokens});
    if request.return_token_strs {
        let text = |id: &u32| String::from_utf8_lossy(&node.tokenizer.token_bytes(*id)).into_owned();
        answer["token_strs"] = tokens.iter().map(text).collect();
    }
    Ok(Json(answer))
}

/// Body of `/detokenize`.
#[derive(Deserialize)]
struct DetokenizeRequest {
    tokens: Vec<u32>,
}

/// `POST /detokenize`: text of token ids, including special tokens.
pub(super) async fn detokenize(
    State(node): State<Arc<ServedModel>>,
    body: Bytes,
) -> Result<Json<Value>, NodeError> {
    let request: DetokenizeRequest = parse_body(&body)?;
    let bytes: Vec<u8> = request.tokens.iter().flat_map(|id| node.tokenizer.token_bytes(*id)).collect();
    Ok(Json(json!({"prompt": String::from_utf8_lossy(&bytes)})))
}

/// `GET /tokenizer_info`: chat template, special tokens and vocabulary size, for clients that render prompts
/// themselves.
pub(super) async fn tokenizer_info(State(node): State<Arc<ServedModel>>) -> Json<Value> {
    let text = |text: &str| if text.is_empty() { Value::Null } else { json!(text) };
    Json(json!({
        "bos_token": text(node.template.bos_token()),
        "eos_token": text(node.template.eos_token()),
        "chat_template": node.template.source(),
        "vocab_size": node.vocabulary.0,
    }))
}
