//! The step loop: one OS thread computes all running requests together, a ragged batch per step. What a step computes is decided
//! in [`crate::schedule`]; here are the front that takes requests in, the model, and what is done with its hidden states.
//!
//! A request whose receiver is gone leaves at the next step.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use candle_core::{DType, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use tokio::sync::mpsc;

use crate::batch::Batch;
use crate::device::{compute_type, in_pool};
use crate::error::EngineError;
use crate::grammar::Constraint;
use crate::kv::blocks::Blocks;
use crate::kv::{KvCache, Table};
use crate::loader::LoadedModel;
use crate::model::CausalLm;
use crate::sampler::{Sampling, likeliest};
use crate::schedule::{Limits, Schedule, Sequence};
use crate::text_end::TextEnd;
use crate::tokenizer::Tokenizer;

/// Tokens of a block of the KV cache.
const BLOCK: usize = 16;
/// Most blocks, however small they are.
const MAX_BLOCKS: usize = 1 << 17;
/// Rows of a prompt whose logits are looked at together.
const SCORED_ROWS: usize = 64;

/// Bounds of the step loop.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Requests computed together.
    pub max_running: usize,
    /// Requests that may wait; more are refused as busy.
    pub max_waiting: usize,
    /// Rows per step: more are computed a little faster, fewer let those who write wait less for prompts.
    pub step_tokens: usize,
    /// Memory of the KV cache in bytes. On the CPU it is taken as it is used.
    pub kv_bytes: usize,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { max_running: 64, max_waiting: 512, step_tokens: 512, kv_bytes: 4 << 30 }
    }
}

/// What a request wants to know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Goal {
    /// A completion.
    #[default]
    Complete,
    /// The last hidden state of the prompt, or the mean of all, of length 1.
    Embed(Pooling),
}

/// Which hidden states an embedding is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// When thinking has to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThinkingLimit {
    /// Most tokens before the end of the thinking.
    pub tokens: usize,
    /// What is written then, whatever the model would write.
    pub ending: Vec<u32>,
    /// The tokens that end the thinking, as the model writes them.
    pub mark: Vec<u32>,
}

/// One completion to make, or something to find out about a prompt.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// What for.
    pub goal: Goal,
    /// At most so many new tokens; 0 only to look at the prompt.
    pub max_tokens: usize,
    /// How to pick tokens.
    pub sampling: Sampling,
    /// Strings that end the completion; they are left out of it.
    pub stop: Vec<String>,
    /// Go on behind end tokens.
    pub ignore_end: bool,
    /// Report every token with its log-probability and so many of the likeliest alternatives.
    pub log_probs: Option<usize>,
    /// The same for the tokens of the prompt behind the first.
    pub prompt_log_probs: Option<usize>,
    /// When thinking has to end.
    pub thinking: Option<ThinkingLimit>,
    /// The form of the answer.
    pub constraint: Option<Constraint>,
    /// The form holds behind these tokens only: the end of the thinking.
    pub free_until: Vec<u32>,
}

/// A token with the distribution that it was picked from, before temperature and filters.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
    /// The likeliest tokens with theirs, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// The limit on new tokens.
    Length,
}

impl FinishReason {
    /// OpenAI's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a request's receiver gets, in order; the last is `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// How likely a token of the prompt is behind those before it: from the second on, in order.
    Prompt(Sampled),
    /// A token was picked; its text follows, now or with a later one. Only where the request asks for it.
    Sampled(Sampled),
    /// More text.
    Text(String),
    /// The embedding.
    Embedding(Vec<f32>),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens written, the end token included.
        completion_tokens: usize,
        /// Tokens of the prompt that were at hand from requests before.
        cached_tokens: usize,
    },
    /// The engine failed; the completion is not whole.
    Failed(String),
}

/// Counters of a step loop.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests being computed.
    pub running: AtomicUsize,
    /// Requests waiting.
    pub waiting: AtomicUsize,
    /// Prompt tokens computed.
    pub prompt_tokens: AtomicU64,
    /// Prompt tokens that were at hand.
    pub cached_tokens: AtomicU64,
    /// Tokens written.
    pub completion_tokens: AtomicU64,
    /// Steps taken.
    pub steps: AtomicU64,
    /// Requests that gave their blocks back to be computed again.
    pub preempted: AtomicU64,
    /// Blocks of the KV cache in use.
    pub blocks_used: AtomicUsize,
}

struct Waiting {
    request: Request,
    updates: mpsc::Sender<Update>,
}

#[derive(Default)]
struct Queue {
    arrived: VecDeque<Waiting>,
    /// Those that the step loop has taken in and not started.
    taken: usize,
    /// The weights are others now.
    forget: bool,
    stopped: Option<String>,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    stats: Stats,
}

fn locked(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running engine; dropping it ends the step loop and joins its thread.
pub struct Engine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    config: SchedulerConfig,
    context: usize,
    blocks: usize,
    vocabulary: usize,
}

impl Engine {
    /// Starts the step loop over `model`.
    pub fn start(model: &LoadedModel, config: SchedulerConfig) -> Result<Self, EngineError> {
        let lm = model.causal_lm()?;
        let device = lm.head().device().clone();
        let dtype = compute_type(&device);
        let block_bytes = BLOCK * KvCache::bytes_per_token(&model.config, dtype);
        let blocks = (config.kv_bytes / block_bytes).min(MAX_BLOCKS);
        if blocks == 0 {
            let expected = "room for one block of the KV cache";
            let found = format!("{} bytes, a block takes {block_bytes}", config.kv_bytes);
            return Err(EngineError::Parameter { name: "kv_bytes", expected, found });
        }
        let context = model.config.max_positions.min(blocks * BLOCK);
        let shared =
            Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new(), stats: Stats::default() });
        let limits = Limits { running: config.max_running.max(1), rows: config.step_tokens.max(1) };
        let mut steps = StepLoop {
            shared: Arc::clone(&shared),
            model: lm,
            tokenizer: model.tokenizer.clone(),
            cache: KvCache::new(&model.config, BLOCK, blocks, &device, dtype)?,
            schedule: Schedule::new(Blocks::new(BLOCK, blocks), limits),
        };
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _ended = EndMark(Arc::clone(&steps.shared));
                steps.run();
            })
            .map_err(|error| EngineError::Stopped(error.to_string()))?;
        let vocabulary = model.config.vocab_size;
        Ok(Self { shared, thread: Some(thread), config, context, blocks, vocabulary })
    }

    /// Hands in a request. The receiver gets its text; dropping the receiver cancels it.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Update>, EngineError> {
        let receiver = self.submit_all(vec![request])?.pop();
        receiver.ok_or_else(|| EngineError::Stopped("it took no request".to_owned()))
    }

    /// Hands in many at once, all or none: an idle engine then takes them in order, so that its steps, and with them every
    /// rounding, are the same each time.
    pub fn submit_all(&self, requests: Vec<Request>) -> Result<Vec<mpsc::Receiver<Update>>, EngineError> {
        requests.iter().try_for_each(|request| self.check(request))?;
        let mut queue = locked(&self.shared);
        if let Some(reason) = &queue.stopped {
            return Err(EngineError::Stopped(reason.clone()));
        }
        let waiting = queue.arrived.len() + queue.taken;
        if waiting + requests.len() > self.config.max_waiting {
            return Err(EngineError::Busy { waiting });
        }
        let mut receivers = Vec::with_capacity(requests.len());
        for request in requests {
            // Room for every token, every text piece and the end: sending never waits.
            let per_token = if request.log_probs.is_some() { 2 } else { 1 };
            let scored = if request.prompt_log_probs.is_some() { request.prompt.len() } else { 0 };
            let (updates, receiver) = mpsc::channel(per_token * request.max_tokens + scored + 3);
            queue.arrived.push_back(Waiting { request, updates });
            receivers.push(receiver);
        }
        self.shared.stats.waiting.store(queue.arrived.len() + queue.taken, Ordering::Relaxed);
        drop(queue);
        self.shared.wake.notify_one();
        Ok(receivers)
    }

    /// The weights have changed: what was computed with the old ones is not shared any more. Call it while no request is under
    /// way.
    pub fn forget(&self) {
        locked(&self.shared).forget = true;
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        request.sampling.check(self.vocabulary)?;
        let prompt = request.prompt.len();
        let requested = prompt + request.max_tokens;
        let limit = self.context;
        let given = request.thinking.iter().flat_map(|thinking| &thinking.ending);
        if let Some(id) = request.prompt.iter().chain(given).find(|&&id| id as usize >= self.vocabulary) {
            let expected = "token ids of the model's vocabulary";
            return Err(EngineError::Parameter { name: "prompt", expected, found: id.to_string() });
        }
        let nothing_wanted =
            request.max_tokens == 0 && request.prompt_log_probs.is_none() && request.goal == Goal::Complete;
        if prompt == 0 || nothing_wanted {
            let name = if prompt == 0 { "prompt" } else { "max_tokens" };
            return Err(EngineError::Parameter {
                name,
                expected: "at least one token",
                found: "none".into(),
            });
        }
        if requested > limit {
            return Err(EngineError::ContextTooLong { limit, requested, prompt });
        }
        Ok(())
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.shared.stats
    }

    /// Why it takes no more requests, when it does not.
    pub fn stopped(&self) -> Option<String> {
        locked(&self.shared).stopped.clone()
    }

    /// Longest context.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Blocks of the KV cache.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Requests that it computes together.
    pub fn slots(&self) -> usize {
        self.config.max_running
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        locked(&self.shared).stopped.get_or_insert_with(|| "it was shut down".to_owned());
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Marks the engine as stopped when its thread ends, by a panic too: nobody shall wait for an engine that is gone.
struct EndMark(Arc<Shared>);

impl Drop for EndMark {
    fn drop(&mut self) {
        let mut queue = locked(&self.0);
        queue.stopped.get_or_insert_with(|| "its step loop ended".to_owned());
        queue.arrived.clear();
    }
}

/// What belongs to a sequence besides its tokens.
struct Running {
    request: Request,
    updates: mpsc::Sender<Update>,
    rng: ChaCha8Rng,
    text: TextEnd,
    /// Tokens of the prompt that were reported.
    scored: usize,
    /// Sum of the hidden states so far.
    sum: Vec<f32>,
    /// How much of the ending of the thinking is written; `None` once the thinking is over.
    ending: Option<usize>,
    /// Whether the form of the answer holds by now.
    constrained: bool,
    /// The form is fulfilled and nothing may follow.
    whole: bool,
    finished: bool,
}

impl Running {
    fn new(Waiting { request, updates }: Waiting) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(request.sampling.seed),
            text: TextEnd::new(request.stop.clone()),
            scored: 1,
            sum: Vec::new(),
            ending: request.thinking.is_some().then_some(0),
            constrained: request.free_until.is_empty(),
            whole: false,
            finished: false,
            request,
            updates,
        }
    }

    fn send(&self, update: Update) {
        let _gone = self.updates.try_send(update);
    }

    /// The token that has to come now, whatever the model would write: the ending of a thinking that is too long.
    fn forced(&mut self, completion: &[u32]) -> Option<u32> {
        let (limit, written) = (self.request.thinking.as_ref()?, self.ending?);
        if written == 0 && !limit.mark.is_empty() && completion.ends_with(&limit.mark) {
            self.ending = None;
            return None;
        }
        if written == 0 && completion.len() < limit.tokens {
            return None;
        }
        match limit.ending.get(written) {
            Some(token) => {
                self.ending = Some(written + 1);
                Some(*token)
            }
            None => {
                self.ending = None;
                None
            }
        }
    }
}

struct StepLoop {
    shared: Arc<Shared>,
    model: CausalLm,
    tokenizer: Tokenizer,
    cache: KvCache,
    schedule: Schedule<Running>,
}

impl StepLoop {
    fn run(&mut self) {
        while self.admit() {
            if let Err(error) = in_pool(|| self.step()) {
                tracing::error!(%error, "a step failed; the running requests end with an error");
                self.fail(&error.to_string());
            }
        }
        self.fail("the engine was shut down");
    }

    fn fail(&mut self, reason: &str) {
        for running in self.schedule.drain() {
            running.send(Update::Failed(reason.to_owned()));
        }
    }

    /// Takes in what arrived; waits while there is nothing to do. False when the engine ends.
    fn admit(&mut self) -> bool {
        self.schedule.retain(|sequence| !sequence.payload.updates.is_closed());
        let mut queue = locked(&self.shared);
        loop {
            if queue.stopped.is_some() {
                queue.arrived.clear();
                return false;
            }
            if std::mem::take(&mut queue.forget) {
                self.schedule.forget();
            }
            for waiting in queue.arrived.drain(..).filter(|waiting| !waiting.updates.is_closed()) {
                let request = &waiting.request;
                // What has to be looked at row by row is computed row by row.
                let sharing =
                    request.prompt_log_probs.is_none() && request.goal != Goal::Embed(Pooling::Mean);
                self.schedule.add(request.prompt.clone(), sharing, Running::new(waiting));
            }
            queue.taken = self.schedule.waiting();
            let stats = &self.shared.stats;
            stats.waiting.store(queue.taken, Ordering::Relaxed);
            stats.running.store(self.schedule.running().len(), Ordering::Relaxed);
            stats.blocks_used.store(self.schedule.usage().0, Ordering::Relaxed);
            if !self.schedule.is_empty() {
                return true;
            }
            queue = self.shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let rows = self.schedule.plan();
        let active = || rows.iter().enumerate().filter(|(_, rows)| **rows > 0).map(|(at, rows)| (at, *rows));
        let running = self.schedule.running();
        let batch = Batch::new(active().map(|(at, rows)| (running[at].rows(rows), running[at].computed())));
        let tables: Vec<Table<'_>> = active().map(|(at, _)| running[at].table()).collect();
        let hidden = self.model.hidden_cached(&batch, &mut self.cache, &tables)?;
        self.count(&rows);
        self.schedule.computed(&rows);

        let mut picking = Vec::new();
        for ((at, _), segment) in active().zip(batch.segments.iter()) {
            let sequence = &mut self.schedule.running()[at];
            let mine = |first: usize, rows: usize| hidden.narrow(0, segment.start + first, rows);
            if sequence.payload.request.prompt_log_probs.is_some() {
                score(&self.model, sequence, segment.past, segment.len, mine)?;
            }
            if let Goal::Embed(pooling) = sequence.payload.request.goal {
                embed(sequence, pooling, segment.past, &mine(0, segment.len)?)?;
            } else if sequence.is_complete() {
                if sequence.payload.request.max_tokens == 0 {
                    finish(sequence, FinishReason::Length);
                } else {
                    picking.push((at, (segment.start + segment.len - 1) as u32));
                }
            }
        }
        self.pick(&hidden, &picking)?;
        self.schedule.retain(|sequence| !sequence.payload.finished);
        Ok(())
    }

    fn count(&mut self, rows: &[usize]) {
        let stats = &self.shared.stats;
        stats.steps.fetch_add(1, Ordering::Relaxed);
        stats.preempted.store(self.schedule.preempted(), Ordering::Relaxed);
        for (sequence, rows) in self.schedule.running().iter().zip(rows) {
            let left = sequence.prompt().len().saturating_sub(sequence.computed());
            stats.prompt_tokens.fetch_add(left.min(*rows) as u64, Ordering::Relaxed);
        }
    }

    /// Picks the next token of every sequence `at` whose last row is `row`.
    fn pick(&mut self, hidden: &Tensor, picking: &[(usize, u32)]) -> Result<(), EngineError> {
        if picking.is_empty() {
            return Ok(());
        }
        let rows: Vec<u32> = picking.iter().map(|(_, row)| *row).collect();
        let rows = Tensor::from_vec(rows, picking.len(), hidden.device())?;
        let logits = self.model.logits(&hidden.index_select(&rows, 0)?)?.to_dtype(DType::F32)?;
        let mut logits = logits.to_vec2::<f32>()?;
        let mut chosen = Vec::with_capacity(picking.len());
        // In the order of the sequences, which is the order of `picking`.
        let mut wanted = picking.iter().zip(&mut logits).peekable();
        for (at, sequence) in self.schedule.running().iter_mut().enumerate() {
            if let Some((_, logits)) = wanted.next_if(|((wanted, _), _)| *wanted == at) {
                chosen.push((sequence, logits));
            }
        }
        let eos = &self.model.config().eos;
        let tokens: Vec<Result<u32, EngineError>> =
            chosen.into_par_iter().map(|(sequence, logits)| choose(sequence, logits, eos)).collect();
        for ((at, _), token) in picking.iter().zip(tokens) {
            let token = match token {
                Ok(token) => token,
                Err(error) => {
                    let running = &mut self.schedule.running()[*at].payload;
                    running.finished = true;
                    running.send(Update::Failed(error.to_string()));
                    continue;
                }
            };
            self.schedule.push(*at, token);
            self.shared.stats.completion_tokens.fetch_add(1, Ordering::Relaxed);
            let sequence = &mut self.schedule.running()[*at];
            let completion_tokens = sequence.completion().len();
            if completion_tokens == 1 {
                self.shared.stats.cached_tokens.fetch_add(sequence.found() as u64, Ordering::Relaxed);
            }
            let running = &mut sequence.payload;
            let ended = !running.request.ignore_end && eos.contains(&token);
            let ended_by_form = running.whole;
            let full = completion_tokens >= running.request.max_tokens;
            let (text, stopped) =
                running.text.token(&self.tokenizer, token, ended, ended || ended_by_form || full)?;
            if !text.is_empty() {
                running.send(Update::Text(text));
            }
            if ended || ended_by_form || stopped {
                finish(sequence, FinishReason::Stop);
            } else if full {
                finish(sequence, FinishReason::Length);
            }
        }
        Ok(())
    }
}

fn finish(sequence: &mut Sequence<Running>, reason: FinishReason) {
    let completion_tokens = sequence.completion().len();
    let cached_tokens = sequence.found();
    sequence.payload.finished = true;
    sequence.payload.send(Update::Finished { reason, completion_tokens, cached_tokens });
}

/// One token from its logits.
fn choose(sequence: &mut Sequence<Running>, logits: &mut [f32], eos: &[u32]) -> Result<u32, EngineError> {
    let (prompt, completion, running) = sequence.parts();
    let distribution = running.request.log_probs.map(|top| Distribution::of(logits, top));
    if !running.constrained && completion.ends_with(&running.request.free_until) {
        running.constrained = true;
    }
    let forced = running.forced(completion);
    let constraint = running.request.constraint.as_mut().filter(|_| running.constrained && forced.is_none());
    let token = match (forced, constraint) {
        (Some(token), _) => token,
        (None, None) => running.request.sampling.pick(logits, prompt, completion, &mut running.rng),
        (None, Some(constraint)) => {
            constraint.mask(logits)?;
            let token = running.request.sampling.pick(logits, prompt, completion, &mut running.rng);
            running.whole = !eos.contains(&token) && constraint.push(token)?;
            token
        }
    };
    if let Some(distribution) = distribution {
        running.send(Update::Sampled(distribution.sampled(token)));
    }
    Ok(token)
}

/// Reports how likely the prompt's tokens are behind the rows `past .. past + rows`.
fn score(
    model: &CausalLm,
    sequence: &mut Sequence<Running>,
    past: usize,
    rows: usize,
    hidden: impl Fn(usize, usize) -> candle_core::Result<Tensor>,
) -> Result<(), EngineError> {
    let top = sequence.payload.request.prompt_log_probs.unwrap_or(0);
    // Row `at` tells about token `at + 1`; what was told before a pause is not told again.
    let first = (sequence.payload.scored - 1).max(past);
    let end = (past + rows).min(sequence.prompt().len() - 1);
    for from in (first..end).step_by(SCORED_ROWS) {
        let count = SCORED_ROWS.min(end - from);
        let logits = model.logits(&hidden(from - past, count)?)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        for (at, logits) in (from..).zip(logits) {
            let told = Distribution::of(&logits, top).sampled(sequence.prompt()[at + 1]);
            sequence.payload.send(Update::Prompt(told));
        }
        sequence.payload.scored = from + count + 1;
    }
    Ok(())
}

fn embed(
    sequence: &mut Sequence<Running>,
    pooling: Pooling,
    past: usize,
    hidden: &Tensor,
) -> Result<(), EngineError> {
    let rows = hidden.dim(0)?;
    let part = match pooling {
        Pooling::Last => hidden.get(rows - 1)?,
        Pooling::Mean => hidden.sum(0)?,
    };
    let part = part.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let sum = &mut sequence.payload.sum;
    if past == 0 || pooling == Pooling::Last {
        *sum = part;
    } else {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    if sequence.is_complete() {
        // Of length 1, so that the mean needs no division.
        let mut vector = std::mem::take(&mut sequence.payload.sum);
        let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt().max(1e-12);
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        sequence.payload.send(Update::Embedding(vector));
        finish(sequence, FinishReason::Stop);
    }
    Ok(())
}

/// Log-probabilities of one place: kept until the token is known.
struct Distribution {
    logits: Vec<f32>,
    normaliser: f32,
    top: Vec<(u32, f32)>,
}

impl Distribution {
    fn of(logits: &[f32], top: usize) -> Self {
        let max = crate::ops::max(logits);
        let normaliser = max + crate::ops::sum_exp(logits, max).ln();
        let top = likeliest(logits, top).into_iter().map(|id| (id, logits[id as usize] - normaliser));
        Self { top: top.collect(), normaliser, logits: logits.to_vec() }
    }

    fn sampled(self, token: u32) -> Sampled {
        Sampled { token, log_prob: self.logits[token as usize] - self.normaliser, top: self.top }
    }
}
