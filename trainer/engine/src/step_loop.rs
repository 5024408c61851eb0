//! The step loop: runs one forward pass per step over a ragged batch of all running sequences. Here are the
//! model, token sampling, prompt logprobs and embeddings. [`crate::schedule`] decides which rows a step
//! computes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use candle_core::{DType, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use tokio::sync::mpsc;

use crate::batch::Batch;
use crate::device::run_in_pool;
use crate::error::EngineError;
use crate::foreign::{CandleLm, DecoderState};
use crate::kv::{BlockTable, KvCache};
use crate::request::{FinishReason, OutputKind, Pooling, Request, RequestUpdate, TokenLogprobs};
use crate::request_queue::{EngineShared, QueuedRequest, lock_queue};
use crate::sampler::top_tokens;
use crate::schedule::{Scheduler, Sequence};
use crate::sharded::TensorParallelLm;
use crate::text_end::IncrementalDetokenizer;
use crate::tokenizer::Tokenizer;

/// Rows of a prompt whose logits are held in memory at a time.
const LOGPROB_CHUNK_ROWS: usize = 64;

/// State of a sequence besides its tokens.
pub(crate) struct SequenceState {
    request: Request,
    updates: mpsc::Sender<RequestUpdate>,
    rng: ChaCha8Rng,
    text: IncrementalDetokenizer,
    /// Number of prompt tokens with sent logprobs, plus the first token, which has none.
    scored: usize,
    /// Sum of the hidden states so far (mean pooling), or the last hidden state.
    sum: Vec<f32>,
    /// Number of forced closing tokens so far; `None` without a reasoning budget or after the end of the
    /// reasoning.
    ending: Option<usize>,
    /// Whether the grammar applies to the next token.
    constrained: bool,
    /// Whether the completion satisfies the grammar and cannot continue.
    whole: bool,
    /// Decoder state of a candle family.
    state: Option<DecoderState>,
    finished: bool,
}

/// The model behind the step loop.
pub(crate) enum DecoderBackend {
    /// Native family: all sequences in one batch, with one KV cache per device.
    Own(TensorParallelLm, Vec<KvCache>),
    /// Candle family: one sequence after the other.
    Foreign(CandleLm),
}

impl SequenceState {
    fn new(QueuedRequest { request, updates }: QueuedRequest) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(request.sampling.seed),
            text: IncrementalDetokenizer::new(request.stop_strings.clone()),
            scored: 1,
            sum: Vec::new(),
            ending: request.thinking_budget.is_some().then_some(0),
            constrained: request.grammar_start_tokens.is_empty(),
            whole: false,
            state: None,
            finished: false,
            request,
            updates,
        }
    }

    fn send(&self, update: RequestUpdate) {
        let _gone = self.updates.try_send(update);
    }

    /// Returns the forced token if the reasoning has used up its budget: the next of the closing tokens.
    /// Also detects that the model has closed the reasoning.
    fn forced_token(&mut self, completion: &[u32]) -> Option<u32> {
        let (limit, written) = (self.request.thinking_budget.as_ref()?, self.ending?);
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

/// Everything that the thread of the engine owns.
pub(crate) struct StepLoop {
    shared: Arc<EngineShared>,
    model: DecoderBackend,
    tokenizer: Tokenizer,
    /// Token ids that end a turn.
    eos_token_ids: Vec<u32>,
    scheduler: Scheduler<SequenceState>,
}

impl StepLoop {
    pub(crate) fn new(
        shared: Arc<EngineShared>,
        model: DecoderBackend,
        tokenizer: Tokenizer,
        eos: Vec<u32>,
        schedule: Scheduler<SequenceState>,
    ) -> Self {
        Self { shared, model, tokenizer, eos_token_ids: eos, scheduler: schedule }
    }

    /// Runs steps until the engine is dropped. An error of a step fails all sequences.
    pub(crate) fn run(&mut self) {
        while self.admit_requests() {
            if let Err(error) = run_in_pool(|| self.run_step()) {
                tracing::error!(%error, "a step failed; the running requests end with an error");
                self.fail_all(&error.to_string());
            }
        }
        self.fail_all("the engine was shut down");
    }

    fn fail_all(&mut self, reason: &str) {
        for running in self.scheduler.drain() {
            running.send(RequestUpdate::Failed(reason.to_owned()));
        }
    }

    /// Removes canceled sequences and admits arrived requests. Blocks while the engine is idle. Returns
    /// false once the engine has stopped.
    fn admit_requests(&mut self) -> bool {
        self.scheduler.retain(|sequence| !sequence.payload.updates.is_closed());
        let mut queue = lock_queue(&self.shared);
        loop {
            if queue.stopped.is_some() {
                queue.arrived.clear();
                return false;
            }
            if std::mem::take(&mut queue.forget) {
                self.scheduler.invalidate_prefix_cache();
            }
            for waiting in queue.arrived.drain(..).filter(|waiting| !waiting.updates.is_closed()) {
                let request = &waiting.request;
                // Prompt logprobs and mean pooling need the hidden state of every prompt row, so the prefix
                // cache is no help.
                let sharing = matches!(self.model, DecoderBackend::Own(..))
                    && request.prompt_logprobs.is_none()
                    && request.output != OutputKind::Embed(Pooling::Mean);
                self.scheduler.add(request.prompt.clone(), sharing, SequenceState::new(waiting));
            }
            queue.taken = self.scheduler.waiting();
            let stats = &self.shared.stats;
            stats.waiting.store(queue.taken, Ordering::Relaxed);
            stats.running.store(self.scheduler.running().len(), Ordering::Relaxed);
            stats.blocks_used.store(self.scheduler.block_usage().0, Ordering::Relaxed);
            if !self.scheduler.is_empty() {
                return true;
            }
            queue = self.shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run_step(&mut self) -> Result<(), EngineError> {
        let rows = self.scheduler.schedule_step();
        let logits = match &mut self.model {
            DecoderBackend::Own(model, caches) => step_batched(model, caches, &mut self.scheduler, &rows)?,
            DecoderBackend::Foreign(model) => step_sequentially(model, &mut self.scheduler, &rows)?,
        };
        self.update_stats(&rows);
        self.scheduler.complete_step(&rows);
        self.sample_tokens(logits)?;
        self.scheduler.retain(|sequence| !sequence.payload.finished);
        Ok(())
    }

    fn update_stats(&mut self, rows: &[usize]) {
        let stats = &self.shared.stats;
        stats.steps.fetch_add(1, Ordering::Relaxed);
        stats.preempted.store(self.scheduler.preemptions(), Ordering::Relaxed);
        for (sequence, rows) in self.scheduler.running().iter().zip(rows) {
            let left = sequence.prompt().len().saturating_sub(sequence.computed_tokens());
            stats.prompt_tokens.fetch_add(left.min(*rows) as u64, Ordering::Relaxed);
        }
    }

    /// Samples the next token of each sequence in `picking` from its logits, in parallel, and sends the
    /// updates.
    fn sample_tokens(&mut self, mut picking: Vec<(usize, Vec<f32>)>) -> Result<(), EngineError> {
        let mut chosen = Vec::with_capacity(picking.len());
        // `picking` is in the order of the running sequences.
        let mut wanted = picking.iter_mut().peekable();
        for (at, sequence) in self.scheduler.running().iter_mut().enumerate() {
            if let Some((_, logits)) = wanted.next_if(|(wanted, _)| *wanted == at) {
                chosen.push((sequence, logits));
            }
        }
        let eos = &self.eos_token_ids;
        let tokens: Vec<Result<u32, EngineError>> =
            chosen.into_par_iter().map(|(sequence, logits)| sample_token(sequence, logits, eos)).collect();
        for ((at, _), token) in picking.iter().zip(tokens) {
            let token = match token {
                Ok(token) => token,
                Err(error) => {
                    let running = &mut self.scheduler.running()[*at].payload;
                    running.finished = true;
                    running.send(RequestUpdate::Failed(error.to_string()));
                    continue;
                }
            };
            self.scheduler.append_token(*at, token);
            self.shared.stats.completion_tokens.fetch_add(1, Ordering::Relaxed);
            let sequence = &mut self.scheduler.running()[*at];
            let completion_tokens = sequence.completion().len();
            if completion_tokens == 1 {
                self.shared.stats.cached_tokens.fetch_add(sequence.cached_tokens() as u64, Ordering::Relaxed);
            }
            let running = &mut sequence.payload;
            let ended = !running.request.ignore_eos && eos.contains(&token);
            let ended_by_form = running.whole;
            let full = completion_tokens >= running.request.max_tokens;
            let (text, stopped) =
                running.text.push_token(&self.tokenizer, token, ended, ended || ended_by_form || full)?;
            if !text.is_empty() {
                running.send(RequestUpdate::Text(text));
            }
            if ended || ended_by_form || stopped {
                finish_sequence(sequence, FinishReason::Stop);
            } else if full {
                finish_sequence(sequence, FinishReason::Length);
            }
        }
        Ok(())
    }
}

/// Logits of the sequences without pending tokens, each with its index among the running sequences.
type SequenceLogits = Vec<(usize, Vec<f32>)>;

/// Computes all sequences in one batch (native family). Sends prompt logprobs and embeddings on the way.
fn step_batched(
    model: &TensorParallelLm,
    caches: &mut [KvCache],
    schedule: &mut Scheduler<SequenceState>,
    rows: &[usize],
) -> Result<SequenceLogits, EngineError> {
    let active = || rows.iter().enumerate().filter(|(_, rows)| **rows > 0).map(|(at, rows)| (at, *rows));
    let running = schedule.running();
    let batch =
        Batch::new(active().map(|(at, rows)| (running[at].next_tokens(rows), running[at].computed_tokens())));
    let tables: Vec<BlockTable<'_>> = active().map(|(at, _)| running[at].block_table()).collect();
    let hidden = model.hidden_states(&batch, caches, &tables)?;

    let (mut places, mut last_rows) = (Vec::new(), Vec::new());
    for ((at, rows), segment) in active().zip(batch.segments.iter()) {
        let sequence = &mut running[at];
        let mine = |first: usize, rows: usize| hidden.narrow(0, segment.start + first, rows);
        if sequence.payload.request.prompt_logprobs.is_some() {
            send_prompt_logprobs(model, sequence, segment.past, segment.len, mine)?;
        }
        let complete = sequence.pending_tokens() == rows;
        if let OutputKind::Embed(pooling) = sequence.payload.request.output {
            accumulate_embedding(sequence, pooling, segment.past, &mine(0, segment.len)?, complete)?;
        } else if complete && sequence.payload.request.max_tokens == 0 {
            finish_sequence(sequence, FinishReason::Length);
        } else if complete {
            places.push(at);
            last_rows.push((segment.start + segment.len - 1) as u32);
        }
    }
    if places.is_empty() {
        return Ok(Vec::new());
    }
    let last_rows = Tensor::from_vec(last_rows, places.len(), hidden.device())?;
    let logits = model.logits(&hidden.index_select(&last_rows, 0)?)?.to_dtype(DType::F32)?;
    Ok(places.into_iter().zip(logits.to_vec2::<f32>()?).collect())
}

/// Computes one sequence after the other, each with a decoder state of its own (candle family).
fn step_sequentially(
    model: &CandleLm,
    schedule: &mut Scheduler<SequenceState>,
    rows: &[usize],
) -> Result<SequenceLogits, EngineError> {
    // A preempted sequence is recomputed from the start, so its decoder state is dropped.
    schedule.waiting_payloads().for_each(|running| running.state = None);
    let mut logits = Vec::new();
    for (at, rows) in rows.iter().copied().enumerate().filter(|(_, rows)| *rows > 0) {
        let sequence = &mut schedule.running()[at];
        let mut state = sequence.payload.state.take().unwrap_or_else(|| model.new_state());
        let behind = state.forward(sequence.next_tokens(rows), sequence.computed_tokens());
        match behind.and_then(|behind| Ok(behind.to_vec1()?)) {
            Ok(behind) => {
                if sequence.pending_tokens() == rows {
                    logits.push((at, behind));
                }
                sequence.payload.state = Some(state);
            }
            // The other sequences are independent of this one and continue.
            Err(error) => {
                sequence.payload.finished = true;
                sequence.payload.send(RequestUpdate::Failed(error.to_string()));
            }
        }
    }
    Ok(logits)
}

fn finish_sequence(sequence: &mut Sequence<SequenceState>, reason: FinishReason) {
    let completion_tokens = sequence.completion().len();
    let cached_tokens = sequence.cached_tokens();
    sequence.payload.finished = true;
    sequence.payload.send(RequestUpdate::Finished { reason, completion_tokens, cached_tokens });
}

/// Samples one token from `logits`, unless a closing token is forced. Applies the grammar and sends the
/// logprobs.
fn sample_token(
    sequence: &mut Sequence<SequenceState>,
    logits: &mut [f32],
    eos: &[u32],
) -> Result<u32, EngineError> {
    let (prompt, completion, running) = sequence.split_mut();
    let distribution = running.request.logprobs.map(|top| TokenDistribution::from_logits(logits, top));
    if !running.constrained && completion.ends_with(&running.request.grammar_start_tokens) {
        running.constrained = true;
    }
    let forced = running.forced_token(completion);
    let constraint = running.request.grammar.as_mut().filter(|_| running.constrained && forced.is_none());
    let token = match (forced, constraint) {
        (Some(token), _) => token,
        (None, None) => running.request.sampling.sample(logits, prompt, completion, &mut running.rng),
        (None, Some(constraint)) => {
            constraint.mask_logits(logits)?;
            let token = running.request.sampling.sample(logits, prompt, completion, &mut running.rng);
            running.whole = !eos.contains(&token) && constraint.accept_token(token)?;
            token
        }
    };
    if let Some(distribution) = distribution {
        running.send(RequestUpdate::Sampled(distribution.token_logprobs(token)));
    }
    Ok(token)
}

/// Sends the logprobs of the prompt tokens that follow the rows `past .. past + rows`.
fn send_prompt_logprobs(
    model: &TensorParallelLm,
    sequence: &mut Sequence<SequenceState>,
    past: usize,
    rows: usize,
    hidden: impl Fn(usize, usize) -> candle_core::Result<Tensor>,
) -> Result<(), EngineError> {
    let top = sequence.payload.request.prompt_logprobs.unwrap_or(0);
    // Row `at` predicts token `at + 1`. Logprobs sent before a preemption are not sent again.
    let first = (sequence.payload.scored - 1).max(past);
    let end = (past + rows).min(sequence.prompt().len() - 1);
    for from in (first..end).step_by(LOGPROB_CHUNK_ROWS) {
        let count = LOGPROB_CHUNK_ROWS.min(end - from);
        let logits = model.logits(&hidden(from - past, count)?)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        for (at, logits) in (from..).zip(logits) {
            let told = TokenDistribution::from_logits(&logits, top).token_logprobs(sequence.prompt()[at + 1]);
            sequence.payload.send(RequestUpdate::Prompt(told));
        }
        sequence.payload.scored = from + count + 1;
    }
    Ok(())
}

/// Adds the rows of this step to the embedding; sends the embedding when the prompt is complete.
fn accumulate_embedding(
    sequence: &mut Sequence<SequenceState>,
    pooling: Pooling,
    past: usize,
    hidden: &Tensor,
    complete: bool,
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
    if complete {
        // Scaling to length 1 makes the division by the number of rows unnecessary.
        let mut vector = std::mem::take(&mut sequence.payload.sum);
        let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt().max(1e-12);
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        sequence.payload.send(RequestUpdate::Embedding(vector));
        finish_sequence(sequence, FinishReason::Stop);
    }
    Ok(())
}

/// Log-softmax of one row of logits, kept until the token is known.
struct TokenDistribution {
    logits: Vec<f32>,
    normaliser: f32,
    top: Vec<(u32, f32)>,
}

impl TokenDistribution {
    fn from_logits(logits: &[f32], top: usize) -> Self {
        let max = crate::ops::max(logits);
        let normaliser = max + crate::ops::sum_exp(logits, max).ln();
        let top = top_tokens(logits, top).into_iter().map(|id| (id, logits[id as usize] - normaliser));
        Self { top: top.collect(), normaliser, logits: logits.to_vec() }
    }

    fn token_logprobs(self, token: u32) -> TokenLogprobs {
        TokenLogprobs { token, log_prob: self.logits[token as usize] - self.normaliser, top: self.top }
    }
}
