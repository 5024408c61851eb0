//! Teacher client: serves each request from the store or by an HTTP request through the gateway.
//!
//! Failed requests are retried with exponential backoff; the gateway's `Retry-After` takes precedence. Concurrency
//! limits (`gate`) and budget (`ledger`) apply to every request. Deliberately absent: prompts and the meaning of
//! completions.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use potstill_data::journal::{Entry, UsageTotals};
use potstill_data::store::Store;
use potstill_shared::client::prompt_logprobs::{PromptLogprobs, ScoreInput};
use potstill_shared::client::{CallError, Client, Completion};
use potstill_shared::id::ContentId;
use potstill_shared::openai::{ChatMessage, ChatRequest, GenerationParams};
use serde_json::json;
use tokio::sync::Mutex as AsyncMutex;

use crate::executor::StageError;
use crate::gate::{ConcurrencyLimiter, ConcurrencyLimits};
use crate::ledger::Ledger;

/// Consecutive requests without a completion, after all retries, that stop the run.
const MAX_CONSECUTIVE_FAILURES: u64 = 16;
/// Longest delay before a retry, even if `Retry-After` is longer.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(300);

/// Request for a completion. Its content determines its id.
#[derive(Debug, Clone)]
pub struct CompletionRequest {
    /// Stage that sends the request. Part of the id, and sent as header `x-potstill-stage`.
    pub stage: &'static str,
    /// Name of the model at the gateway.
    pub model: String,
    /// Content of the single user message.
    pub prompt: String,
    /// Sampling temperature; 0 for greedy decoding.
    pub temperature: f64,
    /// Probability mass of nucleus sampling (`top_p`); 1 for no restriction.
    pub top_p: f64,
    /// Largest number of completion tokens.
    pub max_tokens: u32,
    /// Sampling seed, sent with the request.
    pub seed: i64,
    /// Version of the model's weights, where one name serves several versions (a student between two trainings). Part
    /// of the id only.
    pub revision: Option<String>,
}

impl CompletionRequest {
    /// Returns the hash of all fields. Requests with equal fields share one completion.
    pub fn id(&self) -> ContentId {
        let sampling =
            json!([self.temperature, self.top_p, self.max_tokens, self.seed, self.revision]).to_string();
        ContentId::from_parts(&[self.stage, &self.model, &self.prompt, &sampling])
    }
}

/// Error of a request after all retries.
#[derive(Debug)]
pub enum TeacherError {
    /// The request failed for this record only, for example because its prompt exceeds the context length.
    Row(String),
    /// The error affects all requests; the run must stop.
    Run(StageError),
}

/// Retry policy and transfer mode of requests.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Largest number of attempts per request.
    pub attempts: u32,
    /// Delay after the first failed attempt. Doubles with each attempt, up to 30 s.
    pub pause: Duration,
    /// Whether to stream responses. A stream shows a stalled endpoint during a long completion.
    pub stream: bool,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { attempts: 8, pause: Duration::from_millis(500), stream: true }
    }
}

/// Usage counters of a run in this process.
#[derive(Debug, Default)]
pub struct UsageCounters {
    /// Successful HTTP requests.
    pub calls: AtomicU64,
    /// Requests served from the store.
    pub remembered: AtomicU64,
    /// Failed attempts that were retried.
    pub retries: AtomicU64,
    /// Requests that failed after all retries, since the last success.
    pub failed_in_a_row: AtomicU64,
    /// Prompt tokens of successful HTTP requests.
    pub prompt_tokens: AtomicU64,
    /// Completion tokens of successful HTTP requests.
    pub completion_tokens: AtomicU64,
}

/// Client for teachers: one endpoint, one store, one budget. Cheap to clone; clones share all state.
#[derive(Clone)]
pub struct TeacherClient {
    client: Client,
    store: Arc<Store>,
    patience: RetryPolicy,
    gates: Arc<ConcurrencyLimits>,
    ledger: Arc<Ledger>,
    spent: Arc<UsageCounters>,
    tally: Arc<Mutex<UsageTotals>>,
    under_way: Arc<InFlight>,
}

/// Requests in flight, each with a lock that admits one caller at a time.
#[derive(Default)]
struct InFlight {
    gates: Mutex<HashMap<ContentId, Arc<AsyncMutex<()>>>>,
}

/// Handle to the lock of a request in flight. Dropping the last handle removes the lock.
struct InFlightLock<'a> {
    under_way: &'a InFlight,
    id: ContentId,
    gate: Arc<AsyncMutex<()>>,
}

impl InFlight {
    fn lock_for(&self, id: &ContentId) -> InFlightLock<'_> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let gate = Arc::clone(gates.entry(id.clone()).or_default());
        InFlightLock { under_way: self, id: id.clone(), gate }
    }
}

impl Drop for InFlightLock<'_> {
    fn drop(&mut self) {
        let mut gates = self.under_way.gates.lock().unwrap_or_else(PoisonError::into_inner);
        // Two references, of the map and of this handle: no other caller waits.
        if Arc::strong_count(&self.gate) == 2 {
            gates.remove(&self.id);
        }
    }
}

impl TeacherClient {
    /// Creates a client without a budget and without a concurrency limit.
    pub fn new(client: Client, store: Arc<Store>, patience: RetryPolicy) -> Self {
        Self {
            client,
            store,
            patience,
            gates: Arc::new(ConcurrencyLimits::new(u32::MAX as usize)),
            ledger: Arc::default(),
            spent: Arc::default(),
            tally: Arc::default(),
            under_way: Arc::default(),
        }
    }

    /// Applies concurrency limits and a budget.
    #[must_use]
    pub fn with_limits(self, gates: ConcurrencyLimits, ledger: Arc<Ledger>) -> Self {
        Self { gates: Arc::new(gates), ledger, ..self }
    }

    /// Returns the usage counters of this process.
    pub fn counters(&self) -> &UsageCounters {
        &self.spent
    }

    /// Returns a clone with an empty tally of its own. All other state is shared.
    #[must_use]
    pub fn with_own_usage(&self) -> Self {
        Self { tally: Arc::default(), ..self.clone() }
    }

    /// Returns the usage of all completions that this client returned, from the store or by HTTP.
    pub fn usage(&self) -> UsageTotals {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn count_usage(&self, entry: &Entry) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (entry.stage.clone(), entry.model.clone());
        tally.entry(key).or_default().add(entry.prompt_tokens, entry.completion_tokens, entry.seconds);
    }

    /// Returns the HTTP client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the concurrency limits.
    pub fn limits(&self) -> &Arc<ConcurrencyLimits> {
        &self.gates
    }

    /// Returns the budget and its usage.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Returns the store of completions.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Returns the completion of a request, from the store if present, else by HTTP. The completion is in the store
    /// on return.
    ///
    /// # Errors
    ///
    /// Returns [`AskError::Row`] if only this request failed, and [`AskError::Run`] if the run must stop.
    pub async fn complete(&self, question: &CompletionRequest) -> Result<Arc<Entry>, TeacherError> {
        let id = question.id();
        if let Some(entry) = self.lookup(question, &id).await? {
            return Ok(entry);
        }
        // An equal request may be in flight (two traces with one rewrite): one HTTP request serves both.
        let turn = self.under_way.lock_for(&id);
        let _mine = turn.gate.lock().await;
        if let Some(entry) = self.lookup(question, &id).await? {
            return Ok(entry);
        }
        let gate = self.gates.for_model(&question.model);
        let _place = gate.acquire().await;
        let stop = |problem: String| TeacherError::Run(StageError { stage: question.stage, reason: problem });
        // Upper bound: a token has at least one byte, and the chat template adds some tokens.
        let prompt_at_most = question.prompt.len() as u64 + 64;
        let reserved = self
            .ledger
            .reserve(question.stage, &question.model, prompt_at_most, u64::from(question.max_tokens))
            .await
            .map_err(stop)?;
        let (completion, seconds) = self.call(question, &id, &gate).await?;
        reserved.settle(completion.usage.prompt_tokens, completion.usage.completion_tokens);
        let entry = Entry {
            id,
            stage: question.stage.to_owned(),
            model: question.model.clone(),
            content: completion.content,
            reasoning: completion.reasoning,
            finish_reason: completion.finish_reason,
            prompt_tokens: completion.usage.prompt_tokens,
            completion_tokens: completion.usage.completion_tokens,
            seconds,
        };
        self.record_completion(&entry);
        self.store.commit(entry).await.map_err(|error| stop(error.to_string()))
    }

    /// Returns the `k` most likely tokens of `model` at each position of `given`, with log probabilities. The usage
    /// counts against the budget and is journaled without the rows, which the caller stores.
    pub async fn top_logprobs(
        &self,
        stage: &'static str,
        model: &str,
        given: ScoreInput<'_>,
        k: usize,
    ) -> Result<PromptLogprobs, TeacherError> {
        let (text, at_most) = match given {
            ScoreInput::Tokens(tokens) => (json!(tokens).to_string(), tokens.len() as u64),
            ScoreInput::Text(text) => (text.to_owned(), text.len() as u64 + 64),
        };
        let id = ContentId::from_parts(&[stage, model, &text, &k.to_string()]);
        let gate = self.gates.for_model(model);
        let _place = gate.acquire().await;
        let stop = |problem: String| TeacherError::Run(StageError { stage, reason: problem });
        let reserved = self.ledger.reserve(stage, model, at_most, 1).await.map_err(stop)?;
        let headers = [("idempotency-key", id.as_str()), ("x-potstill-stage", stage)];
        let call = || self.client.prompt_logprobs(model, given, k, &headers);
        let (found, seconds) = self.call_with_retries(stage, &gate, call).await?;
        let (prompt_tokens, completion_tokens) = (found.usage.prompt_tokens, found.usage.completion_tokens);
        reserved.settle(prompt_tokens, completion_tokens);
        // The entry records the usage only, for the budget and the totals of a resumed run.
        let entry = Entry {
            id,
            stage: stage.to_owned(),
            model: model.to_owned(),
            content: String::new(),
            reasoning: None,
            finish_reason: "stop".to_owned(),
            prompt_tokens,
            completion_tokens,
            seconds,
        };
        self.record_completion(&entry);
        self.store.commit(entry).await.map_err(|error| stop(error.to_string()))?;
        Ok(found)
    }

    fn record_completion(&self, entry: &Entry) {
        self.spent.calls.fetch_add(1, Ordering::Relaxed);
        self.spent.failed_in_a_row.store(0, Ordering::Relaxed);
        self.spent.prompt_tokens.fetch_add(entry.prompt_tokens, Ordering::Relaxed);
        self.spent.completion_tokens.fetch_add(entry.completion_tokens, Ordering::Relaxed);
        self.count_usage(entry);
    }

    async fn call(
        &self,
        question: &CompletionRequest,
        id: &ContentId,
        gate: &ConcurrencyLimiter,
    ) -> Result<(Completion, f64), TeacherError> {
        let stage = question.stage;
        let request = ChatRequest {
            model: question.model.clone(),
            messages: vec![ChatMessage::from_text("user", question.prompt.as_str())],
            params: GenerationParams {
                stream: Some(self.patience.stream),
                max_tokens: Some(question.max_tokens),
                temperature: Some(question.temperature),
                top_p: (question.top_p < 1.0).then_some(question.top_p),
                seed: Some(question.seed),
                ..GenerationParams::default()
            },
            ..ChatRequest::default()
        };
        let headers = [("idempotency-key", id.as_str()), ("x-potstill-stage", stage)];
        self.call_with_retries(stage, gate, || self.client.chat(&request, &headers)).await
    }

    /// Repeats a request until one attempt succeeds, one fails permanently, or all attempts are used. Returns the
    /// result with the seconds of the successful attempt.
    async fn call_with_retries<T, F>(
        &self,
        stage: &'static str,
        gate: &ConcurrencyLimiter,
        call: impl Fn() -> F,
    ) -> Result<(T, f64), TeacherError>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        let mut pause = self.patience.pause;
        let mut attempt = 1;
        loop {
            let begun = Instant::now();
            match call().await {
                Ok(completion) => {
                    gate.record_success();
                    return Ok((completion, begun.elapsed().as_secs_f64()));
                }
                Err(CallError::Temporary { message, retry_after: after, is_overloaded: busy }) => {
                    if busy {
                        gate.record_busy(Instant::now());
                    }
                    if attempt >= self.patience.attempts {
                        let failed = self.spent.failed_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
                        let message = format!("{message} ({attempt} attempts)");
                        // A single request may be at fault itself; many consecutive failures mean that the endpoint
                        // is down.
                        return Err(if failed < MAX_CONSECUTIVE_FAILURES {
                            TeacherError::Row(message)
                        } else {
                            let problem =
                                format!("{message}, and so for the last {failed} questions; nothing is lost");
                            TeacherError::Run(StageError { stage, reason: problem })
                        });
                    }
                    tracing::debug!(stage, attempt, message, "a call failed; it is tried again");
                    self.spent.retries.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(after.unwrap_or(pause).min(MAX_RETRY_DELAY)).await;
                    pause = (pause * 2).min(Duration::from_secs(30));
                    attempt += 1;
                }
                Err(CallError::Permanent { message, status, code }) => {
                    // Wrong keys and model names fail for every record alike.
                    return Err(if matches!(status, 0 | 401 | 402 | 403 | 404) {
                        TeacherError::Run(StageError { stage, reason: message })
                    } else {
                        TeacherError::Row(format!("{message} ({})", code.unwrap_or_default()))
                    });
                }
            }
        }
    }

    async fn lookup(
        &self,
        question: &CompletionRequest,
        id: &ContentId,
    ) -> Result<Option<Arc<Entry>>, TeacherError> {
        let found = self.store.get(id).await.map_err(|error| {
            TeacherError::Run(StageError { stage: question.stage, reason: error.to_string() })
        })?;
        if let Some(entry) = &found {
            self.spent.remembered.fetch_add(1, Ordering::Relaxed);
            self.count_usage(entry);
        }
        Ok(found)
    }

    /// Repeats a request with other seeds until `read` parses its completion, at most `reasks` further times.
    /// Repeated requests use a temperature of at least 0.3. Returns `None` if no completion could be parsed.
    pub async fn complete_parsed<T>(
        &self,
        question: &CompletionRequest,
        reasks: u32,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, TeacherError> {
        for attempt in 0..=reasks {
            let mut question = question.clone();
            if attempt > 0 {
                question.seed += i64::from(attempt);
                question.temperature = question.temperature.max(0.3);
            }
            let entry = self.complete(&question).await?;
            if entry.finish_reason == "stop"
                && let Some(value) = read(&entry.content)
            {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}
