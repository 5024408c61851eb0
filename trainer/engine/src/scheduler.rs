//! The front of the engine: accepts requests within bounds and passes them to one OS thread that computes
//! all of them in batches ([`crate::step_loop`]). A dropped receiver cancels its request at the next step.

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

/// Upper bound on the number of KV cache blocks.
const MAX_BLOCKS: usize = 1 << 17;

/// Bounds of the engine.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Maximum number of sequences per step (vLLM: `max_num_seqs`).
    pub max_running: usize,
    /// Maximum number of waiting requests. Further requests fail with [`EngineError::Busy`].
    pub max_waiting: usize,
    /// Target number of rows per step (vLLM: `max_num_batched_tokens`). Larger values raise the throughput
    /// a little; smaller values shorten the delay that prefill adds to decoding.
    pub step_tokens: usize,
    /// Size of the KV cache in bytes. The CPU allocates the blocks on first use.
    pub kv_bytes: usize,
    /// Devices for tensor parallelism (see [`crate::sharded`]). If empty, the model runs where its weights
    /// are.
    pub devices: Vec<Device>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { max_running: 64, max_waiting: 512, step_tokens: 512, kv_bytes: 4 << 30, devices: Vec::new() }
    }
}

/// Counters of the engine.
#[derive(Debug, Default)]
pub struct Stats {
    /// Sequences with blocks in the KV cache.
    pub running: AtomicUsize,
    /// Requests that wait for their start or, after a preemption, for their restart.
    pub waiting: AtomicUsize,
    /// Computed prompt tokens, including recomputation after a preemption.
    pub prompt_tokens: AtomicU64,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: AtomicU64,
    /// Generated tokens.
    pub completion_tokens: AtomicU64,
    /// Completed steps.
    pub steps: AtomicU64,
    /// Preemptions: sequences whose blocks were taken back.
    pub preempted: AtomicU64,
    /// KV cache blocks in use.
    pub blocks_used: AtomicUsize,
}

/// A submitted request that the step loop has not admitted yet.
pub(crate) struct Waiting {
    pub(crate) request: Request,
    pub(crate) updates: mpsc::Sender<Update>,
}

/// Queue between the clients and the step loop.
#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) arrived: VecDeque<Waiting>,
    /// Sequences in the scheduler's waiting list.
    pub(crate) taken: usize,
    /// Asks the step loop to empty the prefix cache because the weights have changed.
    pub(crate) forget: bool,
    /// Reason for the end of the engine, once stopped.
    pub(crate) stopped: Option<String>,
}

/// State shared by the front and the step loop.
pub(crate) struct Shared {
    queue: Mutex<Queue>,
    pub(crate) wake: Condvar,
    pub(crate) stats: Stats,
}

/// Locks the queue, also after a panic of another holder.
pub(crate) fn locked(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running engine. Dropping the engine ends the step loop and joins the thread.
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
    /// Starts the step loop on a thread of its own. Fails if a candle family is given several devices or if
    /// `kv_bytes` holds no block.
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
            // With a candle family the blocks only limit the number of tokens. Each sequence holds its keys
            // and values in its decoder state.
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

    /// Submits a request and returns the receiver of its updates. Dropping the receiver cancels the
    /// request. Fails if a parameter is invalid, the context is too long, the queue is full or the engine
    /// has stopped.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Update>, EngineError> {
        let receiver = self.submit_all(vec![request])?.pop();
        receiver.ok_or_else(|| EngineError::Stopped("it took no request".to_owned()))
    }

    /// Submits several requests, all or none. An idle engine starts them in the given order, so the batches
    /// and their rounding are reproducible.
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
            // Room for every token, every text piece and the end: sending never blocks the step loop.
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

    /// Empties the prefix cache after a change of the weights. Must be called while no request is running.
    pub fn forget(&self) {
        locked(&self.shared).forget = true;
    }

    /// Validates a request against the vocabulary, context length and supported results of the model.
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

    /// Returns the counters.
    pub fn stats(&self) -> &Stats {
        &self.shared.stats
    }

    /// Returns the reason why the engine has stopped, or `None` while running.
    pub fn stopped(&self) -> Option<String> {
        locked(&self.shared).stopped.clone()
    }

    /// Returns the maximum context length in tokens: the model's, or less if the KV cache is smaller.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Returns the number of KV cache blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Returns the maximum number of sequences per step.
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

/// Marks the engine as stopped when its thread ends, also by a panic. Otherwise clients would wait forever.
struct EndMark(Arc<Shared>);

impl Drop for EndMark {
    fn drop(&mut self) {
        let mut queue = locked(&self.0);
        queue.stopped.get_or_insert_with(|| "its step loop ended".to_owned());
        queue.arrived.clear();
    }
}
