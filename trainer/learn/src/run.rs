//! Training loop that all algorithms share: gradients, clipping, AdamW, log, checkpoint, resume.
//!
//! An algorithm supplies a plan (the items of each step) and a function that accumulates the gradients of one step. A
//! restarted run continues from the newest checkpoint. It ends with the same weights, bit for bit, on a CPU with a
//! fixed number of threads. The gradient function must therefore depend only on the weights, the items and the step
//! number.
//!
//! Losses and the choice of phases live elsewhere.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;
use potstill_engine::loader::LoadedModel;
use potstill_shared::durable::{create_folder, write_file};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checkpoint::{self, Cursor, LogEntry};
use crate::curriculum::Phase;
use crate::error::LearnError;
use crate::learner::{Learner, Replica};
use crate::packing;
pub use crate::run_config::RunConfig;
use crate::schedule::CosineSchedule;
use crate::tensorboard::{Scalar, write_events};

/// Progress of a run after a step, for progress bars and dashboards.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress<'a> {
    /// Name of the phase.
    pub phase: &'a str,
    /// Steps done in the phase.
    pub step: usize,
    /// Steps of the phase in total.
    pub steps: usize,
    /// Log entry of the last step.
    pub entry: &'a LogEntry,
    /// Tokens computed in the last step.
    pub tokens: usize,
    /// One completion sampled in the last step, with its problem and reward (GRPO only).
    pub sample: Option<&'a str>,
}

/// Callback after every step. Returning false saves a checkpoint and stops the run.
pub type StepObserver<'a> = &'a mut dyn FnMut(&Progress<'_>) -> bool;

/// Summary of a finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Optimizer steps of all phases, including those before a resume.
    pub steps: usize,
    /// Number of examples in the training set.
    pub examples: usize,
    /// Number of examples dropped because they exceed the maximum length.
    pub too_long: usize,
    /// Tokens computed since this process started the run.
    pub tokens: usize,
    /// Mean loss of the last tenth of the steps.
    pub final_loss: f64,
    /// Mean of each further metric over the last tenth of the steps.
    pub final_metrics: BTreeMap<String, f64>,
    /// Global step from which the run resumed; 0 for a fresh run.
    pub resumed_from: usize,
}

/// Function that accumulates the gradients of one step in the learner. Arguments: learner, global step, items of the
/// step.
pub type GradientFn<'a> = &'a mut dyn FnMut(&Learner, usize, &[usize]) -> Result<StepOutcome, LearnError>;

/// One phase, divided into steps.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedPhase {
    /// Name of the phase, for logs and errors.
    pub name: String,
    /// Number of passes over the phase's items.
    pub epochs: f64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Item indices of each step.
    pub steps: Vec<Vec<usize>>,
}

/// Result of the forward and backward passes of one step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutcome {
    /// Mean loss of the step.
    pub loss: f64,
    /// Number of tokens computed.
    pub tokens: usize,
    /// Further metrics by name.
    pub metrics: BTreeMap<String, f64>,
    /// One sampled completion, for display.
    pub sample: Option<String>,
    /// Whether the step has no gradient. The optimizer update is then skipped.
    pub skip_update: bool,
}

/// Divides phases into steps of at most `config.batch_tokens` tokens. `lengths` holds the length of each item in
/// tokens.
///
/// Items longer than `max_length` are left out. If `epochs` is not an integer, the last epoch is cut to its fraction of
/// steps, rounded up.
pub fn plan_steps(
    phases: &[Phase],
    lengths: &[usize],
    max_length: usize,
    config: &RunConfig,
) -> Vec<PlannedPhase> {
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
            let seed = ContentId::from_parts(&parts.each_ref().map(String::as_str)).seed();
            let mut of_epoch = packing::pack_epoch(&indices, lengths, config.batch_tokens, seed, true);
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

/// Runs all steps of `plan` and returns a summary. The caller fills in `examples` and `too_long`.
///
/// Resumes from the newest checkpoint in `folder`. Fails with [`LearnError::OtherRun`] if the checkpoint has another
/// `run_hash`. Each phase starts with fresh moments and its own learning rate schedule.
///
/// Writes checkpoints, `trainer_state.json` and TensorBoard events to `folder`.
pub fn run_plan(
    learner: &mut Learner,
    plan: &[PlannedPhase],
    config: &RunConfig,
    run_hash: String,
    folder: &Path,
    gradients: GradientFn<'_>,
    observe: StepObserver<'_>,
) -> Result<RunReport, LearnError> {
    create_folder(folder)?;
    let mut found = None;
    for replica in learner.replicas_mut() {
        found = checkpoint::load_newest(folder, &run_hash, &replica.variables, &mut replica.optimizer)?;
    }
    let mut cursor = found.unwrap_or_else(|| Cursor { run_hash, ..Cursor::default() });
    let resumed_from = cursor.global_step;
    let mut tokens = 0;
    while let Some(phase) = plan.get(cursor.phase) {
        let schedule = CosineSchedule {
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
            if !outcome.skip_update {
                norm = learner.optimizer_step(rate)?;
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
                wall_time: unix_time_s(),
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
                save_checkpoint(folder, &mut cursor, learner, config)?;
            }
            if !go_on {
                return Err(LearnError::Stopped { phase: phase.name.clone(), step: cursor.step });
            }
        }
        cursor.phase += 1;
        cursor.step = 0;
        learner.replicas_mut().iter_mut().try_for_each(|replica| replica.optimizer.reset())?;
    }
    save_checkpoint(folder, &mut cursor, learner, config)?;
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

/// Saves a checkpoint and deletes old ones beyond `keep_checkpoints`.
fn save_checkpoint(
    folder: &Path,
    cursor: &mut Cursor,
    learner: &Learner,
    config: &RunConfig,
) -> Result<(), LearnError> {
    // Any replica will do: all hold equal weights and moments.
    let Replica { variables, optimizer: optimiser, .. } = learner.rank0();
    cursor.optimiser_step = optimiser.steps();
    checkpoint::save_checkpoint(folder, cursor, variables, optimiser, config.keep_checkpoints)
}

/// Returns the Unix time in seconds.
fn unix_time_s() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// Returns a hash over `parts` (settings and data) and the base model. A checkpoint resumes only a run with the same
/// hash.
pub(crate) fn run_hash(model: &LoadedModel, parts: Vec<String>) -> Result<String, LearnError> {
    let mut parts = parts;
    parts.push(model.config.to_json().to_string());
    // Hashing every weight would take too long. The final norm and the start of the embedding distinguish models of one
    // shape.
    for name in ["model.norm.weight", "model.embed_tokens.weight"] {
        let values = model.weights.get(name)?.flatten_all()?.to_dtype(DType::F32)?;
        let head = values.narrow(0, 0, values.elem_count().min(4096))?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = head.iter().flat_map(|value| value.to_le_bytes()).collect();
        parts.push(ContentId::from_bytes(&bytes).to_string());
    }
    Ok(ContentId::from_parts(&parts.iter().map(String::as_str).collect::<Vec<_>>()).to_string())
}

/// Returns a hash of token ids.
pub(crate) fn tokens_hash(tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    ContentId::from_bytes(&bytes).to_string()
}

/// Writes `trainer_state.json` with the field names of transformers, and a TensorBoard event file.
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
