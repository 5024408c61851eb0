//! The step loop: one OS thread decodes all running requests together, a ragged batch per step.
//!
//! Each step takes one row from every decoding request and fills the rest of its token budget with prompt chunks of the
//! newest ones. A request starts only when its prompt and limit fit the KV budget, so nothing is ever evicted. A request
//! whose receiver is gone leaves at the next step. Deliberately absent here: paging and prefix sharing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use candle_core::{DType, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;

use crate::batch::Batch;
use crate::cache::KvCache;
use crate::device::in_pool;
use crate::error::EngineError;
use crate::loader::LoadedModel;
use crate::model::CausalLm;
use crate::sampler::{Sampling, likeliest};
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// Bounds of the step loop.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Requests decoded together.
    pub max_running: usize,
    /// Requests that may wait; more are refused as busy.
    pub max_waiting: usize,
    /// Rows per step.
    pub step_tokens: usize,
    /// Tokens that all running requests may hold in their caches.
    pub kv_tokens: usize,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { max_running: 64, max_waiting: 512, step_tokens: 2048, kv_tokens: 1 << 18 }
    }
}

/// One completion to make.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// At most so many new tokens.
    pub max_tokens: usize,
    /// How to pick tokens.
    pub sampling: Sampling,
    /// Strings that end the completion; they are left out of it.
    pub stop: Vec<String>,
    /// Report every token with its log-probability and so many of the likeliest alternatives.
    pub log_probs: Option<usize>,
}

/// A token that was picked, with the distribution that it was picked from before temperature and filters.
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
    /// A token was picked; its text follows, now or with a later one. Only where the request asks for it.
    Sampled(Sampled),
    /// More text.
    Text(String),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens written, the end token included.
        completion_tokens: usize,
    },
    /// The engine failed; the completion is not whole.
    Failed(String),
}

/// Counters of a step loop.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests being decoded.
    pub running: AtomicUsize,
    /// Requests waiting.
    pub waiting: AtomicUsize,
    /// Prompt tokens computed.
    pub prompt_tokens: AtomicU64,
    /// Tokens written.
    pub completion_tokens: AtomicU64,
    /// Steps taken.
    pub steps: AtomicU64,
}

struct Waiting {
    request: Request,
    updates: mpsc::Sender<Update>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
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
    vocabulary: usize,
}

impl Engine {
    /// Starts the step loop over `model`.
    pub fn start(model: &LoadedModel, config: SchedulerConfig) -> Result<Self, EngineError> {
        let lm = model.causal_lm()?;
        let context = model.config.max_positions.min(config.kv_tokens);
        let shared =
            Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new(), stats: Stats::default() });
        let mut steps = StepLoop {
            shared: Arc::clone(&shared),
            model: lm,
            tokenizer: model.tokenizer.clone(),
            config: config.clone(),
            running: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _ended = EndMark(Arc::clone(&steps.shared));
                steps.run();
            })
            .map_err(|error| EngineError::Stopped(error.to_string()))?;
        Ok(Self { shared, thread: Some(thread), config, context, vocabulary: model.config.vocab_size })
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
        if queue.waiting.len() + requests.len() > self.config.max_waiting {
            return Err(EngineError::Busy { waiting: queue.waiting.len() });
        }
        let mut receivers = Vec::with_capacity(requests.len());
        for request in requests {
            // Room for every token, every text piece and the end: sending never waits.
            let per_token = if request.log_probs.is_some() { 2 } else { 1 };
            let (updates, receiver) = mpsc::channel(per_token * request.max_tokens + 2);
            queue.waiting.push_back(Waiting { request, updates });
            receivers.push(receiver);
        }
        self.shared.stats.waiting.store(queue.waiting.len(), Ordering::Relaxed);
        drop(queue);
        self.shared.wake.notify_one();
        Ok(receivers)
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        request.sampling.check()?;
        let prompt = request.prompt.len();
        let requested = prompt + request.max_tokens;
        let limit = self.context;
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= self.vocabulary) {
            let expected = "token ids of the model's vocabulary";
            return Err(EngineError::Parameter { name: "prompt", expected, found: id.to_string() });
        }
        if prompt == 0 || request.max_tokens == 0 {
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

    /// Requests that it decodes together.
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
        queue.waiting.clear();
    }
}

struct Running {
    request: Request,
    updates: mpsc::Sender<Update>,
    cache: KvCache,
    /// Rows computed of prompt plus completion.
    completion: Vec<u32>,
    rng: ChaCha8Rng,
    text: TextEnd,
}

impl Running {
    fn reserved(&self) -> usize {
        self.request.prompt.len() + self.request.max_tokens
    }

    /// What the cache does not hold yet, at most `limit` tokens.
    fn pending(&self, limit: usize) -> &[u32] {
        let done = self.cache.len();
        let prompt = &self.request.prompt;
        if done < prompt.len() {
            &prompt[done..prompt.len().min(done + limit)]
        } else {
            &self.completion[done - prompt.len()..]
        }
    }

    fn finish(&mut self, reason: FinishReason) {
        let update = Update::Finished { reason, completion_tokens: self.completion.len() };
        let _gone = self.updates.try_send(update);
    }
}

struct StepLoop {
    shared: Arc<Shared>,
    model: CausalLm,
    tokenizer: Tokenizer,
    config: SchedulerConfig,
    running: Vec<Running>,
}

impl StepLoop {
    fn run(&mut self) {
        while self.admit() {
            if let Err(error) = in_pool(|| self.step()) {
                tracing::error!(%error, "a step failed; the running requests end with an error");
                for running in self.running.drain(..) {
                    let _gone = running.updates.try_send(Update::Failed(error.to_string()));
                }
            }
            self.shared.stats.running.store(self.running.len(), Ordering::Relaxed);
        }
        for running in self.running.drain(..) {
            let _gone = running.updates.try_send(Update::Failed("the engine was shut down".to_owned()));
        }
    }

    /// Moves waiting requests in while they fit; waits while there is nothing to do. False when the engine ends.
    fn admit(&mut self) -> bool {
        self.running.retain(|running| !running.updates.is_closed());
        let mut queue = locked(&self.shared);
        loop {
            if queue.stopped.is_some() {
                queue.waiting.clear();
                return false;
            }
            queue.waiting.retain(|waiting| !waiting.updates.is_closed());
            let mut held: usize = self.running.iter().map(Running::reserved).sum();
            while let Some(next) = queue.waiting.front() {
                let needed = next.request.prompt.len() + next.request.max_tokens;
                if self.running.len() >= self.config.max_running || held + needed > self.config.kv_tokens {
                    break;
                }
                held += needed;
                if let Some(Waiting { request, updates }) = queue.waiting.pop_front() {
                    let rng = ChaCha8Rng::seed_from_u64(request.sampling.seed);
                    let text = TextEnd::new(request.stop.clone());
                    let cache = KvCache::default();
                    self.running.push(Running { request, updates, cache, completion: Vec::new(), rng, text });
                }
            }
            self.shared.stats.waiting.store(queue.waiting.len(), Ordering::Relaxed);
            self.shared.stats.running.store(self.running.len(), Ordering::Relaxed);
            if !self.running.is_empty() {
                return true;
            }
            queue = self.shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let decoding = |running: &Running| running.cache.len() >= running.request.prompt.len();
        let mut budget = self.config.step_tokens.max(1);
        budget = budget.saturating_sub(self.running.iter().filter(|running| decoding(running)).count());
        let mut rows = Vec::with_capacity(self.running.len());
        for running in &self.running {
            if decoding(running) {
                rows.push(running.pending(1).to_vec());
            } else {
                let chunk = running.pending(budget).to_vec();
                budget -= chunk.len();
                rows.push(chunk);
            }
        }
        // Prompts that got no budget sit this step out.
        let mut active: Vec<(&mut Running, Vec<u32>)> =
            self.running.iter_mut().zip(rows).filter(|(_, rows)| !rows.is_empty()).collect();
        let batch = Batch::new(active.iter().map(|(running, rows)| (rows.as_slice(), running.cache.len())));
        let mut caches: Vec<&mut KvCache> =
            active.iter_mut().map(|(running, _)| &mut running.cache).collect();
        let hidden = self.model.hidden_cached(&batch, &mut caches)?;
        drop(caches);
        let stats = &self.shared.stats;
        stats.steps.fetch_add(1, Ordering::Relaxed);

        // Only requests whose prompt is complete by now get a token.
        let last_rows = batch.last_rows();
        let mut sampled = Vec::new();
        for ((running, rows), last) in active.iter_mut().zip(last_rows) {
            if running.completion.is_empty() {
                stats.prompt_tokens.fetch_add(rows.len() as u64, Ordering::Relaxed);
            }
            if running.cache.len() >= running.request.prompt.len() {
                sampled.push((&mut **running, last));
            }
        }
        if sampled.is_empty() {
            return Ok(());
        }
        let wanted: Vec<u32> = sampled.iter().map(|(_, row)| *row).collect();
        let wanted = Tensor::from_slice(&wanted, wanted.len(), hidden.device())?;
        let logits =
            self.model.logits(&hidden.index_select(&wanted, 0)?)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let eos = &self.model.config().eos;
        let mut done = Vec::new();
        for ((running, _), mut logits) in sampled.into_iter().zip(logits) {
            let request = &running.request;
            let distribution = request.log_probs.map(|top| Distribution::of(&logits, top));
            let token =
                request.sampling.pick(&mut logits, &request.prompt, &running.completion, &mut running.rng);
            running.completion.push(token);
            if let Some(distribution) = distribution {
                let _gone = running.updates.try_send(Update::Sampled(distribution.sampled(token)));
            }
            stats.completion_tokens.fetch_add(1, Ordering::Relaxed);
            if let Some(reason) = deliver(running, token, &self.tokenizer, eos)? {
                running.finish(reason);
                done.push(std::ptr::from_ref(running));
            }
        }
        self.running.retain(|running| !done.contains(&std::ptr::from_ref(running)));
        Ok(())
    }
}

/// Log-probabilities of one step: kept until the token is known.
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

/// Sends the text that `token` completes; says whether the request is over.
fn deliver(
    running: &mut Running,
    token: u32,
    tokenizer: &Tokenizer,
    eos: &[u32],
) -> Result<Option<FinishReason>, EngineError> {
    let ended = eos.contains(&token);
    let full = running.completion.len() >= running.request.max_tokens;
    let mut piece = if ended { String::new() } else { running.text.decoder.push(tokenizer, token)? };
    if ended || full {
        piece.push_str(&running.text.decoder.finish(tokenizer)?);
    }
    let (text, stopped) = running.text.push(&piece, ended || full);
    if !text.is_empty() {
        let _gone = running.updates.try_send(Update::Text(text));
    }
    Ok(if ended || stopped {
        Some(FinishReason::Stop)
    } else if full {
        Some(FinishReason::Length)
    } else {
        None
    })
}

/// Cuts the text at the first stop string, which may lie across tokens: text that could begin one is held back.
struct TextEnd {
    decoder: StreamDecoder,
    stop: Vec<String>,
    held: String,
}

impl TextEnd {
    fn new(mut stop: Vec<String>) -> Self {
        stop.retain(|text| !text.is_empty());
        Self { decoder: StreamDecoder::default(), stop, held: String::new() }
    }

    fn push(&mut self, piece: &str, last: bool) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep =
            if last { 0 } else { self.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0) };
        let ready = self.held.len() - keep;
        (self.held.drain(..ready).collect(), false)
    }
}

/// Length of the longest suffix of `text` that is a proper prefix of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .skip(1)
        .filter(|&at| text.ends_with(&stop[..at]))
        .last()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn stop_strings_cut_the_same_for_every_chunking(text in "[ab é]{0,30}", stop in "[ab é]{1,4}", cuts in prop::collection::vec(1usize..4, 1..30)) {
            let mut ends = TextEnd::new(vec![stop.clone()]);
            let (mut got, mut over) = (String::new(), false);
            let mut characters = text.chars().peekable();
            for cut in cuts {
                let piece: String = characters.by_ref().take(cut).collect();
                if !over {
                    let (more, stopped) = ends.push(&piece, false);
                    got.push_str(&more);
                    over = stopped;
                }
            }
            if !over {
                let rest: String = characters.collect();
                let (more, _) = ends.push(&rest, true);
                got.push_str(&more);
            }
            prop_assert_eq!(got, text.split(&stop).next().unwrap());
        }
    }
}
