//! The one small loop that every algorithm shares: steps of a plan, clip, AdamW, log, checkpoint, resume.
//!
//! An algorithm hands in a plan (which items in which step) and a function that adds up the gradients of one step. A run
//! that is started again goes on from the newest checkpoint and gives the same weights, bit for bit on a CPU with a fixed
//! number of threads, as long as that function depends on nothing but the weights, the items and their numbers.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use potstill_engine::device;
use potstill_engine::loader::LoadedModel;
use potstill_engine::ops::Precision;
use potstill_shared::durable::{create_folder, write_file};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{self, Cursor, LogEntry};
use crate::curriculum::Phase;
use crate::error::LearnError;
use crate::learner::{Learner, Replica};
use crate::lora::LoraConfig;
use crate::packing;
use crate::schedule::Cosine;
use crate::tensorboard::{Scalar, write_events};

/// Settings of a run, whatever the algorithm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Tokens per optimiser step.
    pub batch_tokens: usize,
    /// Tokens per forward pass; bounds the memory.
    pub micro_batch_tokens: usize,
    /// Longer examples are dropped and counted.
    pub max_length: usize,
    /// Share of a phase's steps that warm up.
    pub warmup_ratio: f64,
    /// Last learning rate as a share of the peak.
    pub floor_ratio: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Largest gradient norm.
    pub max_grad_norm: f64,
    /// Keep the optimiser's moments in eight bits instead of 32; on the CPU only.
    pub eight_bit_moments: bool,
    /// Seed of the data order.
    pub seed: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Checkpoints kept.
    pub keep_checkpoints: usize,
    /// At most so many steps per phase; 0 for no limit.
    pub max_steps: usize,
    /// Compute every block again in the backward pass: memory of one block instead of all, a third more work.
    pub recompute: bool,
    /// What the sides of products are rounded to, where the processor can; weights, moments and sums are f32 always. On a GPU the
    /// results of the blocks' products are rounded too.
    pub dtype: Precision,
    /// Train adapters instead of all weights.
    pub lora: Option<LoraConfig>,
    /// `cpu`, `cuda` or `cuda:N`. Several have a copy each and share out the micro-batches of a step.
    pub devices: Vec<String>,
}

impl RunConfig {
    /// What tells runs apart: everything but where they are computed.
    pub(crate) fn anywhere(&self) -> Self {
        Self { devices: Vec::new(), ..self.clone() }
    }

    /// The devices by these names.
    pub fn devices(&self) -> Result<Vec<Device>, LearnError> {
        Ok(device::parse_all(&self.devices.join(","))?)
    }
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            batch_tokens: 1 << 16,
            micro_batch_tokens: 1 << 13,
            max_length: 1 << 14,
            warmup_ratio: 0.1,
            floor_ratio: 0.1,
            weight_decay: 0.05,
            beta1: 0.9,
            beta2: 0.999,
            max_grad_norm: 1.0,
            eight_bit_moments: false,
            seed: 0,
            checkpoint_every: 200,
            keep_checkpoints: 2,
            max_steps: 0,
            recompute: false,
            dtype: Precision::F32,
            lora: None,
            devices: vec!["cpu".to_owned()],
        }
    }
}

/// Where a run stands, for progress bars.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress<'a> {
    /// Name of the phase.
    pub phase: &'a str,
    /// Steps done in the phase.
    pub step: usize,
    /// Steps of the phase.
    pub steps: usize,
    /// What the last step was like.
    pub entry: &'a LogEntry,
    /// Tokens of the last step.
    pub tokens: usize,
    /// Something that the model wrote in it.
    pub sample: Option<&'a str>,
}

/// Sees every step; stops the run, with a checkpoint, by returning false.
pub type Observe<'a> = &'a mut dyn FnMut(&Progress<'_>) -> bool;

/// What a run did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Steps in all.
    pub steps: usize,
    /// Examples used.
    pub examples: usize,
    /// Examples longer than `max_length`, dropped.
    pub too_long: usize,
    /// Tokens trained on, this process only.
    pub tokens: usize,
    /// Mean loss of the last tenth of the steps.
    pub final_loss: f64,
    /// Other measures of the algorithm, likewise.
    pub final_metrics: BTreeMap<String, f64>,
    /// The step it went on from; 0 for a fresh run.
    pub resumed_from: usize,
}

/// Adds up the gradients of one step in the learner: number of the step over all phases, its items.
pub type Gradients<'a> = &'a mut dyn FnMut(&Learner, usize, &[usize]) -> Result<StepOutcome, LearnError>;

/// All steps of a phase: item numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedPhase {
    /// For logs and errors.
    pub name: String,
    /// Times the data are seen.
    pub epochs: f64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// The items of each step.
    pub steps: Vec<Vec<usize>>,
}

/// One step, before the optimiser moves.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutcome {
    /// Mean loss.
    pub loss: f64,
    /// Tokens computed.
    pub tokens: usize,
    /// Further measures.
    pub metrics: BTreeMap<String, f64>,
    /// Something that the model wrote.
    pub sample: Option<String>,
    /// There was nothing to learn from: the optimiser stands still.
    pub skipped: bool,
}

/// Plans whole epochs over items of the given lengths, a fraction of the last one where the number of epochs is one.
/// Items longer than `max_length` are left out.
pub fn plan(phases: &[Phase], lengths: &[usize], max_length: usize, config: &RunConfig) -> Vec<PlannedPhase> {
    let planned = phases.iter().enumerate().map(|(number, phase)| {
        let usable = |index: &usize| lengths[*index] <= max_length;
        let indices: Vec<usize> = phase.examples.iter().copied().filter(usable).collect();
        let mut steps = Vec::new();
        let mut left = phase.epochs;
        for epoch in 0u64.. {
            if left <= 1e-9 || indices.is_empty() {
                break;
            }
            let parts = [config.seed.to_string(), number.to_string(), epoch.to_string()];
            let seed = ContentId::of(&parts.each_ref().map(String::as_str)).seed();
            let mut of_epoch = packing::epoch(&indices, lengths, config.batch_tokens, seed, true);
            if left < 1.0 {
                of_epoch.truncate((of_epoch.len() as f64 * left).ceil() as usize);
            }
            steps.extend(of_epoch);
            left -= 1.0;
        }
        if config.max_steps > 0 {
            steps.truncate(config.max_steps);
        }
        let Phase { name, epochs, learning_rate, .. } = phase.clone();
        PlannedPhase { name, epochs, learning_rate, steps }
    });
    planned.collect()
}

/// Runs the plan.
pub fn run(
    learner: &mut Learner,
    plan: &[PlannedPhase],
    config: &RunConfig,
    run_hash: String,
    folder: &Path,
    gradients: Gradients<'_>,
    observe: Observe<'_>,
) -> Result<RunReport, LearnError> {
    create_folder(folder)?;
    let mut found = None;
    for replica in learner.replicas_mut() {
        found = checkpoint::resume(folder, &run_hash, &replica.variables, &mut replica.optimiser)?;
    }
    let mut cursor = found.unwrap_or_else(|| Cursor { run_hash, ..Cursor::default() });
    let resumed_from = cursor.global_step;
    let mut tokens = 0;
    while let Some(phase) = plan.get(cursor.phase) {
        let schedule = Cosine {
            peak: phase.learning_rate,
            steps: phase.steps.len(),
            warmup_ratio: config.warmup_ratio,
            floor_ratio: config.floor_ratio,
        };
        while let Some(items) = phase.steps.get(cursor.step) {
            let outcome = gradients(learner, cursor.global_step, items)?;
            let not_finite =
                |what| LearnError::NotFinite { phase: phase.name.clone(), step: cursor.step, what };
            if !outcome.loss.is_finite() {
                return Err(not_finite("the loss"));
            }
            let rate = schedule.rate(cursor.step);
            let mut norm = 0.0;
            if !outcome.skipped {
                norm = learner.update(rate)?;
                if !norm.is_finite() {
                    return Err(not_finite("the gradient"));
                }
            }
            tokens += outcome.tokens;
            cursor.step += 1;
            cursor.global_step += 1;
            let entry = LogEntry {
                step: cursor.global_step,
                epoch: phase.epochs * cursor.step as f64 / phase.steps.len() as f64,
                loss: outcome.loss,
                grad_norm: norm,
                learning_rate: rate,
                wall_time: now(),
                metrics: outcome.metrics,
            };
            let go_on = observe(&Progress {
                phase: &phase.name,
                step: cursor.step,
                steps: phase.steps.len(),
                entry: &entry,
                tokens: outcome.tokens,
                sample: outcome.sample.as_deref(),
            });
            cursor.log.push(entry);
            if !go_on || cursor.global_step.is_multiple_of(config.checkpoint_every.max(1)) {
                save(folder, &mut cursor, learner, config)?;
            }
            if !go_on {
                return Err(LearnError::Stopped { phase: phase.name.clone(), step: cursor.step });
            }
        }
        cursor.phase += 1;
        cursor.step = 0;
        learner.replicas_mut().iter_mut().try_for_each(|replica| replica.optimiser.reset())?;
    }
    save(folder, &mut cursor, learner, config)?;
    write_logs(folder, &cursor)?;
    let tail = &cursor.log[cursor.log.len() - cursor.log.len().div_ceil(10)..];
    let mean =
        |value: &dyn Fn(&LogEntry) -> f64| tail.iter().map(value).sum::<f64>() / tail.len().max(1) as f64;
    let names = tail.iter().flat_map(|entry| entry.metrics.keys().cloned());
    let of = |name: &str| mean(&|entry| entry.metrics.get(name).copied().unwrap_or_default());
    Ok(RunReport {
        steps: cursor.global_step,
        examples: 0,
        too_long: 0,
        tokens,
        final_loss: mean(&|entry| entry.loss),
        final_metrics: names.map(|name| (name.clone(), of(&name))).collect(),
        resumed_from,
    })
}

fn save(folder: &Path, cursor: &mut Cursor, learner: &Learner, config: &RunConfig) -> Result<(), LearnError> {
    // All replicas are the same.
    let Replica { variables, optimiser, .. } = learner.first();
    cursor.optimiser_step = optimiser.steps();
    checkpoint::save(folder, cursor, variables, optimiser, config.keep_checkpoints)
}

fn now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// Identifies a run: settings, data and the model that it starts from.
pub(crate) fn run_hash(model: &LoadedModel, parts: Vec<String>) -> Result<String, LearnError> {
    let mut parts = parts;
    parts.push(model.config.to_json().to_string());
    // The first norm and a slice of the embedding tell base models of one shape apart.
    for name in ["model.norm.weight", "model.embed_tokens.weight"] {
        let values = model.weights.get(name)?.flatten_all()?.to_dtype(DType::F32)?;
        let head = values.narrow(0, 0, values.elem_count().min(4096))?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = head.iter().flat_map(|value| value.to_le_bytes()).collect();
        parts.push(ContentId::of_bytes(&bytes).to_string());
    }
    Ok(ContentId::of(&parts.iter().map(String::as_str).collect::<Vec<_>>()).to_string())
}

/// Identifies a row of tokens.
pub(crate) fn tokens_hash(tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    ContentId::of_bytes(&bytes).to_string()
}

/// `trainer_state.json` with Hugging Face's field names, and TensorBoard events.
fn write_logs(folder: &Path, cursor: &Cursor) -> Result<(), LearnError> {
    let state = json!({
        "global_step": cursor.global_step,
        "epoch": cursor.log.last().map_or(0.0, |entry| entry.epoch),
        "log_history": cursor.log,
    });
    write_file(&folder.join("trainer_state.json"), format!("{state:#}\n").as_bytes())?;
    let mut scalars = Vec::new();
    for entry in &cursor.log {
        let fixed =
            [("loss", entry.loss), ("grad_norm", entry.grad_norm), ("learning_rate", entry.learning_rate)];
        let measured = entry.metrics.iter().map(|(name, value)| (name.as_str(), *value));
        scalars.extend(fixed.into_iter().chain(measured).map(|(name, value)| Scalar {
            wall_time: entry.wall_time,
            step: entry.step as u64,
            tag: format!("train/{name}"),
            value: value as f32,
        }));
    }
    Ok(write_events(&folder.join("events.out.tfevents.potstill"), &scalars)?)
}
