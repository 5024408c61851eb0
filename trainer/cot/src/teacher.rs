//! A teacher as the pipeline sees it: a question by content, answered from the journal or by one call through the
//! gateway. Calls are retried with growing pauses; the gateway's `Retry-After` wins.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use potstill_data::journal::{Entry, Totals};
use potstill_data::store::Store;
use potstill_shared::client::{CallError, Client, Completion, Given, Likeliest};
use potstill_shared::id::ContentId;
use potstill_shared::openai::{ChatMessage, ChatRequest, GenerationOptions};
use serde_json::json;
use tokio::sync::Mutex as AsyncMutex;

use crate::executor::StageError;
use crate::gate::{Gate, Gates};
use crate::ledger::Ledger;

/// So many questions given up without an answer between them stop the run.
const MAX_FAILED_IN_A_ROW: u64 = 16;
/// Longest pause before a call is tried again, whatever the endpoint asks for.
const MAX_PAUSE: Duration = Duration::from_secs(300);

/// What is asked.
#[derive(Debug, Clone)]
pub struct Question {
    /// The stage that asks; part of the id and sent along for the gateway's records.
    pub stage: &'static str,
    /// The model.
    pub model: String,
    /// The user's message.
    pub prompt: String,
    /// Sampling temperature.
    pub temperature: f64,
    /// Nucleus sampling.
    pub top_p: f64,
    /// Limit on new tokens.
    pub max_tokens: u32,
    /// Seed of the sampler.
    pub seed: i64,
    /// Which weights answer, where the name alone does not tell (a student between two trainings).
    pub revision: Option<String>,
}

impl Question {
    /// Identifies the question by its content. Another parameter is another question; nothing else is.
    pub fn id(&self) -> ContentId {
        let sampling =
            json!([self.temperature, self.top_p, self.max_tokens, self.seed, self.revision]).to_string();
        ContentId::of(&[self.stage, &self.model, &self.prompt, &sampling])
    }
}

/// Why a question got no answer.
#[derive(Debug)]
pub enum AskError {
    /// This row cannot be answered (it does not fit the context, for example).
    Row(String),
    /// The run must stop.
    Run(StageError),
}

/// How calls behave.
#[derive(Debug, Clone)]
pub struct Patience {
    /// Calls per question.
    pub attempts: u32,
    /// Pause after the first failure; doubles each time.
    pub pause: Duration,
    /// Read answers as streams, so that silence is noticed while a long answer is written.
    pub stream: bool,
}

impl Default for Patience {
    fn default() -> Self {
        Self { attempts: 8, pause: Duration::from_millis(500), stream: true }
    }
}

/// Tokens and calls of a run.
#[derive(Debug, Default)]
pub struct Spent {
    /// Calls that were answered.
    pub calls: AtomicU64,
    /// Questions answered from the journal.
    pub remembered: AtomicU64,
    /// Calls that failed and were tried again.
    pub retries: AtomicU64,
    /// Questions given up since the last answer.
    pub failed_in_a_row: AtomicU64,
    /// Tokens of prompts.
    pub prompt_tokens: AtomicU64,
    /// Tokens written.
    pub completion_tokens: AtomicU64,
}

/// Asks teachers through one endpoint, with one store of answers and one budget.
#[derive(Clone)]
pub struct Teachers {
    client: Client,
    store: Arc<Store>,
    patience: Patience,
    gates: Arc<Gates>,
    ledger: Arc<Ledger>,
    spent: Arc<Spent>,
    tally: Arc<Mutex<Totals>>,
    under_way: Arc<UnderWay>,
}

/// Questions that are being asked, each with the gate that its askers pass one by one.
#[derive(Default)]
struct UnderWay {
    gates: Mutex<HashMap<ContentId, Arc<AsyncMutex<()>>>>,
}

/// A place at a gate; the last one to leave takes the gate away.
struct Turn<'a> {
    under_way: &'a UnderWay,
    id: ContentId,
    gate: Arc<AsyncMutex<()>>,
}

impl UnderWay {
    fn turn(&self, id: &ContentId) -> Turn<'_> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let gate = Arc::clone(gates.entry(id.clone()).or_default());
        Turn { under_way: self, id: id.clone(), gate }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut gates = self.under_way.gates.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's own reference and this one.
        if Arc::strong_count(&self.gate) == 2 {
            gates.remove(&self.id);
        }
    }
}

impl Teachers {
    /// Joins endpoint and store: no budget, and no more open requests than the stages make.
    pub fn new(client: Client, store: Arc<Store>, patience: Patience) -> Self {
        Self {
            client,
            store,
            patience,
            gates: Arc::new(Gates::new(u32::MAX as usize)),
            ledger: Arc::default(),
            spent: Arc::default(),
            tally: Arc::default(),
            under_way: Arc::default(),
        }
    }

    /// The same within these limits.
    #[must_use]
    pub fn within(self, gates: Gates, ledger: Arc<Ledger>) -> Self {
        Self { gates: Arc::new(gates), ledger, ..self }
    }

    /// What was spent so far.
    pub fn spent(&self) -> &Spent {
        &self.spent
    }

    /// The same, counted apart.
    #[must_use]
    pub fn with_own_tally(&self) -> Self {
        Self { tally: Arc::default(), ..self.clone() }
    }

    /// What all answers took that were given here, from the journal or by a call.
    pub fn tally(&self) -> Totals {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn count(&self, entry: &Entry) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (entry.stage.clone(), entry.model.clone());
        tally.entry(key).or_default().add(entry.prompt_tokens, entry.completion_tokens, entry.seconds);
    }

    /// The endpoint.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// How many requests may be open.
    pub fn gates(&self) -> &Arc<Gates> {
        &self.gates
    }

    /// The budget.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Where the answers are kept.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Answers a question, from the journal when it was answered before.
    pub async fn ask(&self, question: &Question) -> Result<Arc<Entry>, AskError> {
        let id = question.id();
        if let Some(entry) = self.remembered(question, &id).await? {
            return Ok(entry);
        }
        // The same question may be under way (two traces that were rewritten to the same text): one call serves both.
        let turn = self.under_way.turn(&id);
        let _mine = turn.gate.lock().await;
        if let Some(entry) = self.remembered(question, &id).await? {
            return Ok(entry);
        }
        let gate = self.gates.of(&question.model);
        let _place = gate.enter().await;
        let stop = |problem: String| AskError::Run(StageError { stage: question.stage, problem });
        // A token is a byte at least; templates add some.
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
        self.called(&entry);
        self.store.commit(entry).await.map_err(|error| stop(error.to_string()))
    }

    /// What `model` would have written at every place of `given`: its `k` likeliest tokens. Counted and paid like an answer, but
    /// the caller keeps it.
    pub async fn likeliest(
        &self,
        stage: &'static str,
        model: &str,
        given: Given<'_>,
        k: usize,
    ) -> Result<Likeliest, AskError> {
        let (text, at_most) = match given {
            Given::Tokens(tokens) => (json!(tokens).to_string(), tokens.len() as u64),
            Given::Text(text) => (text.to_owned(), text.len() as u64 + 64),
        };
        let id = ContentId::of(&[stage, model, &text, &k.to_string()]);
        let gate = self.gates.of(model);
        let _place = gate.enter().await;
        let stop = |problem: String| AskError::Run(StageError { stage, problem });
        let reserved = self.ledger.reserve(stage, model, at_most, 1).await.map_err(stop)?;
        let headers = [("idempotency-key", id.as_str()), ("x-potstill-stage", stage)];
        let call = || self.client.likeliest(model, given, k, &headers);
        let (found, seconds) = self.patiently(stage, &gate, call).await?;
        let (prompt_tokens, completion_tokens) = (found.usage.prompt_tokens, found.usage.completion_tokens);
        reserved.settle(prompt_tokens, completion_tokens);
        // The journal knows what it cost.
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
        self.called(&entry);
        self.store.commit(entry).await.map_err(|error| stop(error.to_string()))?;
        Ok(found)
    }

    fn called(&self, entry: &Entry) {
        self.spent.calls.fetch_add(1, Ordering::Relaxed);
        self.spent.failed_in_a_row.store(0, Ordering::Relaxed);
        self.spent.prompt_tokens.fetch_add(entry.prompt_tokens, Ordering::Relaxed);
        self.spent.completion_tokens.fetch_add(entry.completion_tokens, Ordering::Relaxed);
        self.count(entry);
    }

    async fn call(
        &self,
        question: &Question,
        id: &ContentId,
        gate: &Gate,
    ) -> Result<(Completion, f64), AskError> {
        let stage = question.stage;
        let request = ChatRequest {
            model: question.model.clone(),
            messages: vec![ChatMessage::text("user", question.prompt.as_str())],
            options: GenerationOptions {
                stream: Some(self.patience.stream),
                max_tokens: Some(question.max_tokens),
                temperature: Some(question.temperature),
                top_p: (question.top_p < 1.0).then_some(question.top_p),
                seed: Some(question.seed),
                ..GenerationOptions::default()
            },
            ..ChatRequest::default()
        };
        let headers = [("idempotency-key", id.as_str()), ("x-potstill-stage", stage)];
        self.patiently(stage, gate, || self.client.chat(&request, &headers)).await
    }

    /// Calls until an answer comes, patience ends, or the answer is no; gives the answer and the seconds of the call that brought it.
    async fn patiently<T, F>(
        &self,
        stage: &'static str,
        gate: &Gate,
        call: impl Fn() -> F,
    ) -> Result<(T, f64), AskError>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        let mut pause = self.patience.pause;
        let mut attempt = 1;
        loop {
            let begun = Instant::now();
            match call().await {
                Ok(completion) => {
                    gate.answered();
                    return Ok((completion, begun.elapsed().as_secs_f64()));
                }
                Err(CallError::Retry { message, after, busy }) => {
                    if busy {
                        gate.busy(Instant::now());
                    }
                    if attempt >= self.patience.attempts {
                        let failed = self.spent.failed_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
                        let message = format!("{message} ({attempt} attempts)");
                        // One question may be poison; many in a row mean that the endpoint is gone.
                        return Err(if failed < MAX_FAILED_IN_A_ROW {
                            AskError::Row(message)
                        } else {
                            let problem =
                                format!("{message}, and so for the last {failed} questions; nothing is lost");
                            AskError::Run(StageError { stage, problem })
                        });
                    }
                    tracing::debug!(stage, attempt, message, "a call failed; it is tried again");
                    self.spent.retries.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(after.unwrap_or(pause).min(MAX_PAUSE)).await;
                    pause = (pause * 2).min(Duration::from_secs(30));
                    attempt += 1;
                }
                Err(CallError::Refused { message, status, code }) => {
                    // A wrong key or model name will not get better row by row.
                    return Err(if matches!(status, 0 | 401 | 402 | 403 | 404) {
                        AskError::Run(StageError { stage, problem: message })
                    } else {
                        AskError::Row(format!("{message} ({})", code.unwrap_or_default()))
                    });
                }
            }
        }
    }

    async fn remembered(&self, question: &Question, id: &ContentId) -> Result<Option<Arc<Entry>>, AskError> {
        let found = self.store.get(id).await.map_err(|error| {
            AskError::Run(StageError { stage: question.stage, problem: error.to_string() })
        })?;
        if let Some(entry) = &found {
            self.spent.remembered.fetch_add(1, Ordering::Relaxed);
            self.count(entry);
        }
        Ok(found)
    }

    /// Asks a short question until `read` understands the answer: once as configured, then with other seeds.
    pub async fn ask_for<T>(
        &self,
        question: &Question,
        reasks: u32,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, AskError> {
        for attempt in 0..=reasks {
            let mut question = question.clone();
            if attempt > 0 {
                question.seed += i64::from(attempt);
                question.temperature = question.temperature.max(0.3);
            }
            let entry = self.ask(&question).await?;
            if entry.finish_reason == "stop"
                && let Some(value) = read(&entry.content)
            {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}
