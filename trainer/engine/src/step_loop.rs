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
use crate::device::in_pool;
use crate::error::EngineError;
use crate::foreign::{ForeignLm, State};
use crate::kv::{KvCache, Table};
use crate::request::{FinishReason, Goal, Pooling, Request, Sampled, Update};
use crate::sampler::likeliest;
use crate::schedule::{Schedule, Sequence};
use crate::scheduler::{Shared, Waiting, locked};
use crate::sharded::ShardedLm;
use crate::text_end::TextEnd;
use crate::tokenizer::Tokenizer;

/// Rows of a prompt whose logits are held in memory at a time.
const SCORED_ROWS: usize = 64;

/// State of a sequence besides its tokens.
pub(crate) struct Running {
    request: Request,
    updates: mpsc::Sender<Update>,
    rng: ChaCha8Rng,
    text: TextEnd,
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
    state: Option<State>,
    finished: bool,
}

/// The model behind the step loop.
pub(crate) enum Model {
    /// Native family: all sequences in one batch, with one KV cache per device.
    Own(ShardedLm, Vec<KvCache>),
    /// Candle family: one sequence after the other.
    Foreign(ForeignLm),
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
            state: None,
            finished: false,
            request,
            updates,
        }
    }

    fn send(&self, update: Update) {
        let _gone = self.updates.try_send(update);
    }

    /// Returns the forced token if the reasoning has used up its budget: the next of the closing tokens.
    /// Also detects that the model has closed the reasoning.
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

/// Everything that the thread of the engine owns.
pub(crate) struct StepLoop {
    shared: Arc<Shared>,
    model: Model,
    tokenizer: Tokenizer,
    /// Token ids that end a turn.
    eos: Vec<u32>,
    schedule: Schedule<Running>,
}

impl StepLoop {
    pub(crate) fn new(
        shared: Arc<Shared>,
        model: Model,
        tokenizer: Tokenizer,
        eos: Vec<u32>,
        schedule: Schedule<Running>,
    ) -> Self {
        Self { shared, model, tokenizer, eos, schedule }
    }

    /// Runs steps until the engine is dropped. An error of a step fails all sequences.
    pub(crate) fn run(&mut self) {
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

    /// Removes canceled sequences and admits arrived requests. Blocks while the engine is idle. Returns
    /// false once the engine has stopped.
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
                // Prompt logprobs and mean pooling need the hidden state of every prompt row, so the prefix
                // cache is no help.
                let sharing = matches!(self.model, Model::Own(..))
                    && request.prompt_log_probs.is_none()
                    && request.goal != Goal::Embed(Pooling::Mean);
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
        let logits = match &mut self.model {
            Model::Own(model, caches) => step_together(model, caches, &mut self.schedule, &rows)?,
            Model::Foreign(model) => step_each(model, &mut self.schedule, &rows)?,
        };
        self.count(&rows);
        self.schedule.computed(&rows);
        self.pick(logits)?;
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

    /// Samples the next token of each sequence in `picking` from its logits, in parallel, and sends the
    /// updates.
    fn pick(&mut self, mut picking: Vec<(usize, Vec<f32>)>) -> Result<(), EngineError> {
        let mut chosen = Vec::with_capacity(picking.len());
        // `picking` is in the order of the running sequences.
        let mut wanted = picking.iter_mut().peekable();
        for (at, sequence) in self.schedule.running().iter_mut().enumerate() {
            if let Some((_, logits)) = wanted.next_if(|(wanted, _)| *wanted == at) {
                chosen.push((sequence, logits));
            }
        }
        let eos = &self.eos;
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

/// Logits of the sequences without pending tokens, each with its index among the running sequences.
type Logits = Vec<(usize, Vec<f32>)>;

/// Computes all sequences in one batch (native family). Sends prompt logprobs and embeddings on the way.
fn step_together(
    model: &ShardedLm,
    caches: &mut [KvCache],
    schedule: &mut Schedule<Running>,
    rows: &[usize],
) -> Result<Logits, EngineError> {
    let active = || rows.iter().enumerate().filter(|(_, rows)| **rows > 0).map(|(at, rows)| (at, *rows));
    let running = schedule.running();
    let batch = Batch::new(active().map(|(at, rows)| (running[at].rows(rows), running[at].computed())));
    let tables: Vec<Table<'_>> = active().map(|(at, _)| running[at].table()).collect();
    let hidden = model.hidden(&batch, caches, &tables)?;

    let (mut places, mut last_rows) = (Vec::new(), Vec::new());
    for ((at, rows), segment) in active().zip(batch.segments.iter()) {
        let sequence = &mut running[at];
        let mine = |first: usize, rows: usize| hidden.narrow(0, segment.start + first, rows);
        if sequence.payload.request.prompt_log_probs.is_some() {
            score(model, sequence, segment.past, segment.len, mine)?;
        }
        let complete = sequence.pending() == rows;
        if let Goal::Embed(pooling) = sequence.payload.request.goal {
            embed(sequence, pooling, segment.past, &mine(0, segment.len)?, complete)?;
        } else if complete && sequence.payload.request.max_tokens == 0 {
            finish(sequence, FinishReason::Length);
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
fn step_each(
    model: &ForeignLm,
    schedule: &mut Schedule<Running>,
    rows: &[usize],
) -> Result<Logits, EngineError> {
    // A preempted sequence is recomputed from the start, so its decoder state is dropped.
    schedule.without_blocks().for_each(|running| running.state = None);
    let mut logits = Vec::new();
    for (at, rows) in rows.iter().copied().enumerate().filter(|(_, rows)| *rows > 0) {
        let sequence = &mut schedule.running()[at];
        let mut state = sequence.payload.state.take().unwrap_or_else(|| model.state());
        let behind = state.forward(sequence.rows(rows), sequence.computed());
        match behind.and_then(|behind| Ok(behind.to_vec1()?)) {
            Ok(behind) => {
                if sequence.pending() == rows {
                    logits.push((at, behind));
                }
                sequence.payload.state = Some(state);
            }
            // The other sequences are independent of this one and continue.
            Err(error) => {
                sequence.payload.finished = true;
                sequence.payload.send(Update::Failed(error.to_string()));
            }
        }
    }
    Ok(logits)
}

fn finish(sequence: &mut Sequence<Running>, reason: FinishReason) {
    let completion_tokens = sequence.completion().len();
    let cached_tokens = sequence.found();
    sequence.payload.finished = true;
    sequence.payload.send(Update::Finished { reason, completion_tokens, cached_tokens });
}

/// Samples one token from `logits`, unless a closing token is forced. Applies the grammar and sends the
/// logprobs.
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

/// Sends the logprobs of the prompt tokens that follow the rows `past .. past + rows`.
fn score(
    model: &ShardedLm,
    sequence: &mut Sequence<Running>,
    past: usize,
    rows: usize,
    hidden: impl Fn(usize, usize) -> candle_core::Result<Tensor>,
) -> Result<(), EngineError> {
    let top = sequence.payload.request.prompt_log_probs.unwrap_or(0);
    // Row `at` predicts token `at + 1`. Logprobs sent before a preemption are not sent again.
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

/// Adds the rows of this step to the embedding; sends the embedding when the prompt is complete.
fn embed(
    sequence: &mut Sequence<Running>,
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
        sequence.payload.send(Update::Embedding(vector));
        finish(sequence, FinishReason::Stop);
    }
    Ok(())
}

/// Log-softmax of one row of logits, kept until the token is known.
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
