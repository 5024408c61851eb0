//! The front of the engine: it takes requests in, within bounds, and hands them to one OS thread that computes all of them together
//! ([`crate::step_loop`]). Dropping a receiver cancels its request at the next step.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use candle_core::Device;
use tokio::sync::mpsc;

use crate::error::EngineError;
use crate::foreign::ForeignLm;
use crate::kv::blocks::Blocks;
use crate::kv::{BLOCK, KvCache};
use crate::loader::LoadedModel;
pub use crate::request::{FinishReason, Goal, Pooling, Request, Sampled, ThinkingLimit, Update};
use crate::schedule::{Limits, Schedule};
use crate::sharded::ShardedLm;
use crate::step_loop::{Model, StepLoop};

/// Most blocks, however small they are.
const MAX_BLOCKS: usize = 1 << 17;

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
    /// Devices that share the model out (see [`crate::sharded`]); none: it stays where its weights are.
    pub devices: Vec<Device>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { max_running: 64, max_waiting: 512, step_tokens: 512, kv_bytes: 4 << 30, devices: Vec::new() }
    }
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

/// A request that nobody has looked at yet.
pub(crate) struct Waiting {
    pub(crate) request: Request,
    pub(crate) updates: mpsc::Sender<Update>,
}

#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) arrived: VecDeque<Waiting>,
    /// Those that the step loop has taken in and not started.
    pub(crate) taken: usize,
    /// The weights are others now.
    pub(crate) forget: bool,
    pub(crate) stopped: Option<String>,
}

/// What the front and the step loop both see.
pub(crate) struct Shared {
    queue: Mutex<Queue>,
    pub(crate) wake: Condvar,
    pub(crate) stats: Stats,
}

pub(crate) fn locked(shared: &Shared) -> MutexGuard<'_, Queue> {
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
    foreign: Option<&'static str>,
}

impl Engine {
    /// Starts the step loop over `model`.
    pub fn start(model: &LoadedModel, config: SchedulerConfig) -> Result<Self, EngineError> {
        let own = match &model.config.foreign {
            None => Ok(ShardedLm::new(model, &config.devices)?),
            Some(_) if config.devices.len() > 1 => {
                let problem = "it cannot be shared out over several devices".to_owned();
                return Err(EngineError::Foreign { family: model.config.family.name(), problem });
            }
            Some(foreign) => Err(foreign),
        };
        let dtype = match &own {
            Ok(own) => own.kv_dtype(),
            Err(_) => model.weights.get("model.embed_tokens.weight")?.dtype(),
        };
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
        let lm = match own {
            Ok(own) => {
                let caches = own.caches(blocks)?;
                Model::Own(own, caches)
            }
            // Blocks only count then: what they stand for lies with each sequence.
            Err(foreign) => Model::Foreign(ForeignLm::new(foreign, &model.weights)?),
        };
        let schedule = Schedule::new(Blocks::new(BLOCK, blocks), limits);
        let (tokenizer, eos) = (model.tokenizer.clone(), model.config.eos.clone());
        let mut steps = StepLoop::new(Arc::clone(&shared), lm, tokenizer, eos, schedule);
        let mark = EndMark(Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _ended = mark;
                steps.run();
            })
            .map_err(|error| EngineError::Stopped(error.to_string()))?;
        let vocabulary = model.config.vocab_size;
        let foreign = model.config.foreign.is_some().then(|| model.config.family.name());
        Ok(Self { shared, thread: Some(thread), config, context, blocks, vocabulary, foreign })
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
        let rows_wanted = request.prompt_log_probs.is_some() || request.goal != Goal::Complete;
        if let (Some(family), true) = (self.foreign, rows_wanted) {
            return Err(EngineError::Parameter {
                name: "model",
                expected: "a model of the families `qwen2`, `qwen3` or `llama` for embeddings and for probabilities of a prompt",
                found: format!("one of the family `{family}`"),
            });
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
