//! `POST /v1/chat/completions` and `/v1/completions`. Each choice of a request is one engine request. The response is
//! collected here or streamed by `stream.rs`. Dropping the response drops the receivers, which cancels the choices.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use futures_util::{Stream, StreamExt};
use potstill_engine::EngineError;
use potstill_engine::scheduler::{Request, RequestUpdate};
use potstill_shared::id::unique_id;
use potstill_shared::openai::{
    ChatChoice, ChatMessage, ChatRequest, ChatResponse, CompletionChoice, CompletionRequest,
    CompletionResponse, Content, Delta, Extra, GenerationParams, Prompt, unix_time_s,
};
use potstill_shared::reasoning::{CLOSE_TAG, OPEN_TAG};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::ServedModel;
use super::active_request::{ActiveRequest, TokenCounts};
use super::choice::{ChoiceBuilder, ResponseKind};
use super::error::NodeError;
use super::forms;
use super::options::{self, invalid_field};
use super::stream::stream_response;
use super::tools::{self, ToolFormat};

/// Maximum number of choices per request, over all prompts.
const MAX_CHOICES: u32 = 64;

/// Parses a request body.
pub(super) fn parse_body<T: for<'de> serde::Deserialize<'de>>(body: &[u8]) -> Result<T, NodeError> {
    serde_json::from_slice(body).map_err(|error| NodeError::InvalidJson(error.to_string()))
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(node): State<Arc<ServedModel>>, body: Bytes) -> Result<Response, NodeError> {
    let request: ChatRequest = parse_body(&body)?;
    check_model(&node, &request.model)?;
    if request.messages.is_empty() {
        return Err(invalid_field("messages", "must hold at least one message"));
    }
    let messages: Vec<Value> = request.messages.iter().map(template_message).collect();
    let mut extra = request.extra.get("chat_template_kwargs").cloned().unwrap_or_else(|| json!({}));
    let tools = tool_format(&node, &request.extra)?;
    if let (Some(_), Some(object)) = (tools, extra.as_object_mut()) {
        object.insert("tools".to_owned(), request.extra["tools"].clone());
    }
    let text = node.template.render(&Value::Array(messages), true, &extra)?;
    let inside = text.trim_end().ends_with(OPEN_TAG);
    let prompt = node.tokenizer.encode(&text)?;
    let mut wanted = options::engine_request(&request.params, &request.extra)?;
    wanted.logprobs = options::chat_logprobs(&request.extra)?;
    wanted.thinking_budget = options::thinking_budget(&node, &request.extra)?;
    if let Some(form) = forms::chat_grammar(&request.extra, tools)? {
        wanted.grammar = Some(forms::compile_grammar(&node, form).await?);
        if inside {
            wanted.grammar_start_tokens = node.tokenizer.encode(CLOSE_TAG)?;
        }
    }
    let shape = ResponseKind::Chat { inside, tools };
    let job = submit(&node, vec![(prompt, String::new())], wanted, &request.params, shape)?;
    respond(job, &request.params).await
}

/// Returns the format of tool calls if the request allows them. Fails if the model's chat template has no tools.
fn tool_format(node: &ServedModel, extra: &Extra) -> Result<Option<ToolFormat>, NodeError> {
    let some = extra.get("tools").and_then(Value::as_array).is_some_and(|tools| !tools.is_empty());
    if !some || extra.get("tool_choice").is_some_and(|choice| choice == "none") {
        return Ok(None);
    }
    let format = ToolFormat::detect(node.template.source());
    format.map(Some).ok_or_else(|| invalid_field("tools", "are not known to this model's chat template"))
}

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(node): State<Arc<ServedModel>>,
    body: Bytes,
) -> Result<Response, NodeError> {
    let request: CompletionRequest = parse_body(&body)?;
    check_model(&node, &request.model)?;
    let echo = request.echo.unwrap_or(false);
    let from_text =
        |text: String| Ok((node.tokenizer.encode(&text)?, if echo { text } else { String::new() }));
    let from_ids = |ids: Vec<u32>| {
        if let Some(id) = ids.iter().find(|&&id| node.tokenizer.token_text(id).is_none()) {
            return Err(invalid_field("prompt", format!("holds token {id}, which the vocabulary does not")));
        }
        let text = if echo { node.tokenizer.decode(&ids)? } else { String::new() };
        Ok((ids, text))
    };
    let prompts: Vec<(Vec<u32>, String)> = match request.prompt {
        Prompt::Text(text) => vec![from_text(text)?],
        Prompt::Texts(texts) => texts.into_iter().map(from_text).collect::<Result<_, NodeError>>()?,
        Prompt::Tokens(ids) => vec![from_ids(ids)?],
        Prompt::TokenLists(lists) => lists.into_iter().map(from_ids).collect::<Result<_, NodeError>>()?,
    };
    if prompts.is_empty() || prompts.len() > MAX_CHOICES as usize {
        return Err(invalid_field("prompt", format!("must hold 1 to {MAX_CHOICES} prompts")));
    }
    let mut wanted = options::engine_request(&request.params, &request.extra)?;
    wanted.logprobs = options::text_logprobs(&request.extra)?;
    if let Some(form) = forms::text_grammar(&request.extra)? {
        wanted.grammar = Some(forms::compile_grammar(&node, form).await?);
    }
    if echo {
        wanted.prompt_logprobs = wanted.logprobs;
    }
    let mut options = request.params;
    // OpenAI's default for this endpoint.
    options.max_tokens = options.max_new_tokens().or(Some(16));
    // vLLM's field. The texts of different tokens can be equal, ids cannot.
    let by_id = request.extra.get("return_tokens_as_token_ids") == Some(&Value::Bool(true));
    let job = submit(&node, prompts, wanted, &options, ResponseKind::Text { by_id })?;
    respond(job, &options).await
}

/// Checks that the node serves `model`.
pub(super) fn check_model(node: &ServedModel, model: &str) -> Result<(), NodeError> {
    if model == node.name { Ok(()) } else { Err(NodeError::ModelNotFound(model.to_owned())) }
}

/// Converts a message to the form that chat templates expect: content as plain text, other fields unchanged.
fn template_message(message: &ChatMessage) -> Value {
    let mut value = Value::Object(message.extra.clone());
    value["role"] = json!(message.role);
    value["content"] = json!(message.plain_text());
    if let Some(thinking) = message.reasoning_text() {
        value["reasoning_content"] = json!(thinking);
    }
    if let Some(calls) = message.extra.get("tool_calls") {
        value["tool_calls"] = tools::for_template(calls);
    }
    value
}

/// Submits one engine request per choice. Choices of a request get consecutive seeds.
fn submit(
    node: &Arc<ServedModel>,
    prompts: Vec<(Vec<u32>, String)>,
    wanted: Request,
    options: &GenerationParams,
    shape: ResponseKind,
) -> Result<ActiveRequest, NodeError> {
    let n = options.n.unwrap_or(1);
    if n == 0 || n as usize * prompts.len() > MAX_CHOICES as usize {
        return Err(invalid_field("n", format!("must give 1 to {MAX_CHOICES} choices")));
    }
    let (mut requests, mut prefixes, mut choices) = (Vec::new(), Vec::new(), Vec::new());
    let mut counts = TokenCounts { cached: u64::MAX, ..TokenCounts::default() };
    for (prompt, prefix) in prompts {
        counts.prompt += prompt.len() as u64;
        let room = node.engine.max_context_tokens().saturating_sub(prompt.len());
        // The engine rejects a prompt without room for a token, with a detailed message.
        let max_tokens = options.max_new_tokens().map_or(room.max(1), |limit| limit as usize);
        for _ in 0..n {
            let mut request = Request { prompt: prompt.clone(), max_tokens, ..wanted.clone() };
            request.sampling.seed = request.sampling.seed.wrapping_add(requests.len() as u64);
            let mut choice = ChoiceBuilder::new(shape);
            if let (Some(_), Some(first)) = (request.prompt_logprobs, prompt.first()) {
                choice.push_first_prompt_token(&node.tokenizer, *first);
            }
            requests.push(request);
            choices.push(choice);
            prefixes.push(prefix.clone());
        }
    }
    let receivers = node.engine.submit_all(requests)?;
    let numbered = (0..).zip(receivers).map(|(index, receiver)| indexed_updates(index, receiver).boxed());
    Ok(ActiveRequest {
        node: Arc::clone(node),
        id: unique_id(if matches!(shape, ResponseKind::Text { .. }) { "cmpl" } else { "chatcmpl" }),
        created: unix_time_s(),
        started: Instant::now(),
        shape,
        choices,
        prefixes,
        include_usage: options.stream_options.as_ref().is_some_and(|options| options.include_usage),
        counts,
        updates: numbered.collect(),
    })
}

/// Returns the updates of one choice with its index. A channel that closes without a final update means that the engine
/// has stopped.
fn indexed_updates(
    index: u32,
    receiver: mpsc::Receiver<RequestUpdate>,
) -> impl Stream<Item = (u32, RequestUpdate)> {
    stream::unfold(Some(receiver), move |receiver| async move {
        let mut receiver = receiver?;
        match receiver.recv().await {
            Some(last @ (RequestUpdate::Finished { .. } | RequestUpdate::Failed(_))) => {
                Some(((index, last), None))
            }
            Some(update) => Some(((index, update), Some(receiver))),
            None => Some(((index, RequestUpdate::Failed("the engine has stopped".to_owned())), None)),
        }
    })
}

/// Returns the response, streamed or collected.
async fn respond(job: ActiveRequest, options: &GenerationParams) -> Result<Response, NodeError> {
    if options.is_streamed() { Ok(stream_response(job)) } else { collect(job).await }
}

/// A choice of a collected response.
#[derive(Default)]
struct CollectedChoice {
    text: String,
    thinking: Option<String>,
    calls: Vec<Value>,
    finish_reason: Option<String>,
}

impl CollectedChoice {
    /// Appends deltas.
    fn append(&mut self, deltas: Vec<Delta>) {
        for delta in deltas {
            self.text.push_str(delta.content.as_deref().unwrap_or_default());
            if let Some(text) = delta.reasoning_content {
                self.thinking.get_or_insert_default().push_str(&text);
            }
            if let Some(Value::Array(calls)) = delta.extra.get("tool_calls") {
                self.calls.extend(calls.iter().cloned().map(|mut call| {
                    // Only chunks of a stream contain the index of a call.
                    call.as_object_mut().map(|call| call.remove("index"));
                    call
                }));
            }
        }
    }

    /// Returns the chat message.
    fn into_message(self) -> ChatMessage {
        let mut message = ChatMessage {
            role: "assistant".to_owned(),
            content: (!self.text.is_empty() || self.calls.is_empty()).then_some(Content::Text(self.text)),
            reasoning_content: self.thinking,
            ..ChatMessage::default()
        };
        if !self.calls.is_empty() {
            message.extra.insert("tool_calls".to_owned(), Value::Array(self.calls));
        }
        message
    }
}

/// Waits for all choices and returns the whole response. Fails if the engine fails.
async fn collect(mut job: ActiveRequest) -> Result<Response, NodeError> {
    let mut all: Vec<CollectedChoice> = job
        .prefixes
        .iter()
        .map(|prefix| CollectedChoice { text: prefix.clone(), ..CollectedChoice::default() })
        .collect();
    let tokenizer = job.node.tokenizer.clone();
    while let Some((index, update)) = job.updates.next().await {
        let (choice, collected) = (&mut job.choices[index as usize], &mut all[index as usize]);
        match update {
            RequestUpdate::Sampled(sampled) | RequestUpdate::Prompt(sampled) => {
                choice.push_token(&tokenizer, &sampled)
            }
            RequestUpdate::Text(text) => collected.append(choice.push(&text)),
            RequestUpdate::Embedding(_) => {}
            RequestUpdate::Finished { reason, completion_tokens, cached_tokens } => {
                job.counts.add_finished(completion_tokens, cached_tokens);
                let (deltas, reason) = choice.finish(reason);
                collected.append(deltas);
                collected.finish_reason = Some(reason.to_owned());
                job.node.metrics.record_finished(&job.node.name, reason, job.started.elapsed());
            }
            RequestUpdate::Failed(reason) => {
                job.node.metrics.record_finished(&job.node.name, "failed", job.started.elapsed());
                return Err(NodeError::Engine(EngineError::Stopped(reason)));
            }
        }
    }
    let usage = Some(job.counts.usage());
    let log_probs: Vec<Option<Value>> = job.choices.iter_mut().map(ChoiceBuilder::take_logprobs).collect();
    let choices = all.into_iter().zip(log_probs).zip(0u32..);
    Ok(match job.shape {
        ResponseKind::Text { .. } => axum::Json(CompletionResponse {
            id: job.id,
            object: "text_completion".to_owned(),
            created: job.created,
            model: job.node.name.clone(),
            choices: choices
                .map(|((choice, logprobs), index)| CompletionChoice {
                    index,
                    text: choice.text,
                    logprobs,
                    finish_reason: choice.finish_reason,
                })
                .collect(),
            usage,
        })
        .into_response(),
        ResponseKind::Chat { .. } => axum::Json(ChatResponse {
            id: job.id,
            object: "chat.completion".to_owned(),
            created: job.created,
            model: job.node.name.clone(),
            choices: choices
                .map(|((choice, log_probs), index)| chat_choice(choice, log_probs, index))
                .collect(),
            usage,
            ..ChatResponse::default()
        })
        .into_response(),
    })
}

/// Returns OpenAI's chat choice.
fn chat_choice(mut collected: CollectedChoice, log_probs: Option<Value>, index: u32) -> ChatChoice {
    let finish_reason = collected.finish_reason.take();
    let mut choice =
        ChatChoice { index, message: Some(collected.into_message()), finish_reason, ..ChatChoice::default() };
    if let Some(log_probs) = log_probs {
        choice.extra.insert("logprobs".to_owned(), log_probs);
    }
    choice
}
