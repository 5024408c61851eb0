//! A teacher as the pipeline sees it: a question by content, answered from the journal or by one call through the
//! gateway. Calls are retried with growing pauses; the gateway's `Retry-After` wins.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use potstill_data::journal::{Entry, Journal};
use potstill_shared::client::{CallError, Client};
use potstill_shared::id::ContentId;
use potstill_shared::openai::{ChatMessage, ChatRequest, GenerationOptions};
use serde_json::json;

use crate::executor::StageError;

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
    /// Tokens of prompts.
    pub prompt_tokens: AtomicU64,
    /// Tokens written.
    pub completion_tokens: AtomicU64,
}

/// Asks teachers through one endpoint, with one journal.
#[derive(Clone)]
pub struct Teachers {
    client: Client,
    journal: Arc<Journal>,
    patience: Patience,
    spent: Arc<Spent>,
}

impl Teachers {
    /// Joins endpoint and journal.
    pub fn new(client: Client, journal: Arc<Journal>, patience: Patience) -> Self {
        Self { client, journal, patience, spent: Arc::default() }
    }

    /// What was spent so far.
    pub fn spent(&self) -> &Spent {
        &self.spent
    }

    /// The endpoint.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Answers a question, from the journal when it was answered before.
    pub async fn ask(&self, question: &Question) -> Result<Arc<Entry>, AskError> {
        let id = question.id();
        if let Some(entry) = self.journal.get(&id) {
            self.spent.remembered.fetch_add(1, Ordering::Relaxed);
            return Ok(entry);
        }
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
        let headers = [("idempotency-key", id.as_str()), ("x-potstill-stage", question.stage)];
        let mut pause = self.patience.pause;
        let mut attempt = 1;
        let completion = loop {
            match self.client.chat(&request, &headers).await {
                Ok(completion) => break completion,
                Err(CallError::Retry { message, after }) => {
                    if attempt >= self.patience.attempts {
                        return Err(AskError::Row(format!("{message} ({attempt} attempts)")));
                    }
                    tracing::debug!(
                        stage = question.stage,
                        attempt,
                        message,
                        "a call failed; it is tried again"
                    );
                    self.spent.retries.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(after.unwrap_or(pause)).await;
                    pause = (pause * 2).min(Duration::from_secs(30));
                    attempt += 1;
                }
                Err(CallError::Refused { message, status, code }) => {
                    let stage = question.stage;
                    // A wrong key or model name will not get better row by row.
                    return Err(if matches!(status, 0 | 401 | 403 | 404) {
                        AskError::Run(StageError { stage, problem: message })
                    } else {
                        AskError::Row(format!("{message} ({})", code.unwrap_or_default()))
                    });
                }
            }
        };
        self.spent.calls.fetch_add(1, Ordering::Relaxed);
        self.spent.prompt_tokens.fetch_add(completion.usage.prompt_tokens, Ordering::Relaxed);
        self.spent.completion_tokens.fetch_add(completion.usage.completion_tokens, Ordering::Relaxed);
        let entry = Entry {
            id,
            content: completion.content,
            reasoning: completion.reasoning,
            finish_reason: completion.finish_reason,
            prompt_tokens: completion.usage.prompt_tokens,
            completion_tokens: completion.usage.completion_tokens,
        };
        let journal = Arc::clone(&self.journal);
        let stage = question.stage;
        let stop = |problem: String| AskError::Run(StageError { stage, problem });
        tokio::task::spawn_blocking(move || journal.commit(entry))
            .await
            .map_err(|error| stop(error.to_string()))?
            .map_err(|error| stop(error.to_string()))
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
