//! The front of the engine: accepts requests within bounds and passes them to one OS thread that computes
//! all of them in batches ([`crate::step_loop`]). A dropped receiver cancels its request at the next step.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use candle_core::Device;
use tokio::sync::mpsc;

use crate::error::EngineError;
use crate::foreign::CandleLm;
use crate::kv::blocks::BlockAllocator;
use crate::kv::{BLOCK_TOKENS, KvCache};
use crate::loader::LoadedModel;
pub use crate::request::{
    FinishReason, OutputKind, Pooling, Request, RequestUpdate, ThinkingBudget, TokenLogprobs,
};
pub use crate::request_queue::EngineStats;
use crate::request_queue::{EngineShared, QueuedRequest, lock_queue};
use crate::schedule::{Scheduler, StepLimits};
use crate::sharded::TensorParallelLm;
use crate::step_loop::{DecoderBackend, StepLoop};

/// Upper bound on the number of KV cache blocks.
const MAX_KV_BLOCKS: usize = 1 << 17;

/// Bounds of the engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
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

impl Default for EngineConfig {
    fn default() -> Self {
        Self { max_running: 64, max_waiting: 512, step_tokens: 512, kv_bytes: 4 << 30, devices: Vec::new() }
    }
}

/// A running engine. Dropping the engine ends the step loop and joins the thread.
pub struct Engine {
    shared: Arc<EngineShared>,
    thread: Option<JoinHandle<()>>,
    config: EngineConfig,
    max_context_tokens: usize,
    kv_block_count: usize,
    vocab_size: usize,
    candle_family: Option<&'static str>,
}

impl Engine {
    /// Starts the step loop on a thread of its own. Fails if a candle family is given several devices or if
    /// `kv_bytes` holds no block.
    pub fn start(model: &LoadedModel, config: EngineConfig) -> Result<Self, EngineError> {
        let own = match &model.config.candle {
            None => Ok(TensorParallelLm::new(model, &config.devices)?),
            Some(_) if config.devices.len() > 1 => {
                let problem = "it cannot be shared out over several devices".to_owned();
                return Err(EngineError::CandleFamily { family: model.config.family.name(), problem });
            }
            Some(foreign) => Err(foreign),
        };
        let dtype = match &own {
            Ok(own) => own.kv_dtype(),
            Err(_) => model.weights.get("model.embed_tokens.weight")?.dtype(),
        };
        let block_bytes = BLOCK_TOKENS * KvCache::bytes_per_token(&model.config, dtype);
        let blocks = (config.kv_bytes / block_bytes).min(MAX_KV_BLOCKS);
        if blocks == 0 {
            let expected = "room for one block of the KV cache";
            let found = format!("{} bytes, a block takes {block_bytes}", config.kv_bytes);
            return Err(EngineError::InvalidParameter { name: "kv_bytes", expected, found });
        }
        let context = model.config.max_positions.min(blocks * BLOCK_TOKENS);
        let shared = Arc::new(EngineShared {
            queue: Mutex::default(),
            wake: Condvar::new(),
            stats: EngineStats::default(),
        });
        let limits = StepLimits { running: config.max_running.max(1), rows: config.step_tokens.max(1) };
        let lm = match own {
            Ok(own) => {
                let caches = own.new_kv_caches(blocks)?;
                DecoderBackend::Own(own, caches)
            }
            // With a candle family the blocks only limit the number of tokens. Each sequence holds its keys
            // and values in its decoder state.
            Err(foreign) => DecoderBackend::Foreign(CandleLm::new(foreign, &model.weights)?),
        };
        let schedule = Scheduler::new(BlockAllocator::new(BLOCK_TOKENS, blocks), limits);
        let (tokenizer, eos) = (model.tokenizer.clone(), model.config.eos_token_ids.clone());
        let mut steps = StepLoop::new(Arc::clone(&shared), lm, tokenizer, eos, schedule);
        let mark = StopGuard(Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _ended = mark;
                steps.run();
            })
            .map_err(|error| EngineError::Stopped(error.to_string()))?;
        let vocabulary = model.config.vocab_size;
        let foreign = model.config.candle.is_some().then(|| model.config.family.name());
        Ok(Self {
            shared,
            thread: Some(thread),
            config,
            max_context_tokens: context,
            kv_block_count: blocks,
            vocab_size: vocabulary,
            candle_family: foreign,
        })
    }

    /// Submits a request and returns the receiver of its updates. Dropping the receiver cancels the
    /// request. Fails if a parameter is invalid, the context is too long, the queue is full or the engine
    /// has stopped.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<RequestUpdate>, EngineError> {
        let receiver = self.submit_all(vec![request])?.pop();
        receiver.ok_or_else(|| EngineError::Stopped("it took no request".to_owned()))
    }

    /// Submits several requests, all or none. An idle engine starts them in the given order, so the batches
    /// and their rounding are reproducible.
    pub fn submit_all(
        &self,
        requests: Vec<Request>,
    ) -> Result<Vec<mpsc::Receiver<RequestUpdate>>, EngineError> {
        requests.iter().try_for_each(|request| self.validate(request))?;
        let mut queue = lock_queue(&self.shared);
        if let Some(reason) = &queue.stopped {
            return Err(EngineError::Stopped(reason.clone()));
        }
        let waiting = queue.arrived.len() + queue.taken;
        if waiting + requests.len() > self.config.max_waiting {
            return Err(EngineError::QueueFull { waiting });
        }
        let mut receivers = Vec::with_capacity(requests.len());
        for request in requests {
            // Room for every token, every text piece and the end: sending never blocks the step loop.
            let per_token = if request.logprobs.is_some() { 2 } else { 1 };
            let scored = if request.prompt_logprobs.is_some() { request.prompt.len() } else { 0 };
            let (updates, receiver) = mpsc::channel(per_token * request.max_tokens + scored + 3);
            queue.arrived.push_back(QueuedRequest { request, updates });
            receivers.push(receiver);
        }
        self.shared.stats.waiting.store(queue.arrived.len() + queue.taken, Ordering::Relaxed);
        drop(queue);
        self.shared.wake.notify_one();
        Ok(receivers)
    }

    /// Empties the prefix cache after a change of the weights. Must be called while no request is running.
    pub fn invalidate_prefix_cache(&self) {
        lock_queue(&self.shared).forget = true;
    }

    /// Validates a request against the vocabulary, context length and supported results of the model.
    fn validate(&self, request: &Request) -> Result<(), EngineError> {
        request.sampling.validate(self.vocab_size)?;
        let prompt = request.prompt.len();
        let requested = prompt + request.max_tokens;
        let limit = self.max_context_tokens;
        let given = request.thinking_budget.iter().flat_map(|thinking| &thinking.ending);
        if let Some(id) = request.prompt.iter().chain(given).find(|&&id| id as usize >= self.vocab_size) {
            let expected = "token ids of the model's vocabulary";
            return Err(EngineError::InvalidParameter { name: "prompt", expected, found: id.to_string() });
        }
        let rows_wanted = request.prompt_logprobs.is_some() || request.output != OutputKind::Complete;
        if let (Some(family), true) = (self.candle_family, rows_wanted) {
            return Err(EngineError::InvalidParameter {
                name: "model",
                expected: "a model of the families `qwen2`, `qwen3` or `llama` for embeddings and for probabilities of a prompt",
                found: format!("one of the family `{family}`"),
            });
        }
        let nothing_wanted = request.max_tokens == 0
            && request.prompt_logprobs.is_none()
            && request.output == OutputKind::Complete;
        if prompt == 0 || nothing_wanted {
            let name = if prompt == 0 { "prompt" } else { "max_tokens" };
            return Err(EngineError::InvalidParameter {
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
    pub fn stats(&self) -> &EngineStats {
        &self.shared.stats
    }

    /// Returns the reason why the engine has stopped, or `None` while running.
    pub fn stop_reason(&self) -> Option<String> {
        lock_queue(&self.shared).stopped.clone()
    }

    /// Returns the maximum context length in tokens: the model's, or less if the KV cache is smaller.
    pub fn max_context_tokens(&self) -> usize {
        self.max_context_tokens
    }

    /// Returns the number of KV cache blocks.
    pub fn kv_block_count(&self) -> usize {
        self.kv_block_count
    }

    /// Returns the maximum number of sequences per step.
    pub fn max_num_seqs(&self) -> usize {
        self.config.max_running
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        lock_queue(&self.shared).stopped.get_or_insert_with(|| "it was shut down".to_owned());
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Marks the engine as stopped when its thread ends, also by a panic. Otherwise clients would wait forever.
struct StopGuard(Arc<EngineShared>);

impl Drop for StopGuard {
    fn drop(&mut self) {
        let mut queue = lock_queue(&self.0);
        queue.stopped.get_or_insert_with(|| "its step loop ended".to_owned());
        queue.arrived.clear();
    }
}
