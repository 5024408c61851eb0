//! Supervised fine-tuning: `L = -1/N Σ log p(token | before)` over the assistant's tokens of a step, phase after phase.
//!
//! One step: pack examples up to the token budget, forward and backward in micro-batches that add up to the same mean,
//! clip, AdamW. A checkpoint every so many steps; a run that is started again goes on from the newest one and gives the
//! same weights, bit for bit on a CPU with a fixed number of threads.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use potstill_engine::batch::Batch;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::cross_entropy::linear_cross_entropy;
use potstill_shared::durable::{create_folder, write_file};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::adamw::{AdamW, AdamWConfig};
use crate::checkpoint::{self, Cursor, LogEntry};
use crate::curriculum::Phase;
use crate::error::LearnError;
use crate::examples::Example;
use crate::packing;
use crate::schedule::Cosine;
use crate::tensorboard::{Scalar, write_events};

/// Settings of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
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
    /// Seed of the data order.
    pub seed: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Checkpoints kept.
    pub keep_checkpoints: usize,
    /// At most so many steps per phase; 0 for no limit.
    pub max_steps: usize,
}

impl Default for SftConfig {
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
            seed: 0,
            checkpoint_every: 200,
            keep_checkpoints: 2,
            max_steps: 0,
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
    /// Of the last step.
    pub loss: f64,
    /// Tokens of the last step.
    pub tokens: usize,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SftReport {
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
    /// The step it went on from; 0 for a fresh run.
    pub resumed_from: usize,
}

/// Trains a copy of `model`. Checkpoints, `trainer_state.json` and TensorBoard events go to `folder`. `observe` sees every
/// step and stops the run (with a checkpoint) by returning false.
pub fn sft(
    model: &LoadedModel,
    examples: &[Example],
    phases: &[Phase],
    config: &SftConfig,
    folder: &Path,
    observe: &mut dyn FnMut(&Progress<'_>) -> bool,
) -> Result<(LoadedModel, SftReport), LearnError> {
    create_folder(folder)?;
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let max_length = config.max_length.min(model.config.max_positions);
    let usable = |phase: &Phase| -> Vec<usize> {
        phase.examples.iter().copied().filter(|&index| lengths[index] <= max_length).collect()
    };
    let too_long = lengths.iter().filter(|&&length| length > max_length).count();
    if phases.iter().all(|phase| usable(phase).is_empty()) {
        return Err(LearnError::Data(format!(
            "no example to train on: {} given, {too_long} longer than {max_length} tokens",
            examples.len()
        )));
    }
    let (weights, variables) = model.weights.trainable()?;
    let lm = CausalLm::new(&model.config, &weights)?;
    let mut optimiser = AdamW::new(
        variables.clone(),
        AdamWConfig {
            beta1: config.beta1,
            beta2: config.beta2,
            eps: 1e-8,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
        },
    )?;
    let run_hash = hash(model, examples, phases, config)?;
    let mut cursor = checkpoint::resume(folder, &run_hash, &variables, &mut optimiser)?
        .unwrap_or_else(|| Cursor { run_hash, ..Cursor::default() });
    let resumed_from = cursor.global_step;
    let mut trained_tokens = 0;

    while let Some(phase) = phases.get(cursor.phase) {
        let indices = usable(phase);
        let steps = plan(&indices, &lengths, phase, cursor.phase, config);
        let schedule = Cosine {
            peak: phase.learning_rate,
            steps: steps.len(),
            warmup_ratio: config.warmup_ratio,
            floor_ratio: config.floor_ratio,
        };
        while cursor.step < steps.len() {
            let step = &steps[cursor.step];
            let (gradients, loss, tokens) = gradients(&lm, &variables, examples, step, &lengths, config)?;
            let not_finite =
                |what| LearnError::NotFinite { phase: phase.name.clone(), step: cursor.step, what };
            if !loss.is_finite() {
                return Err(not_finite("the loss"));
            }
            let norm = optimiser.gradient_norm(&gradients)?;
            if !norm.is_finite() {
                return Err(not_finite("the gradient"));
            }
            let rate = schedule.rate(cursor.step);
            optimiser.step(&gradients, norm, rate)?;
            trained_tokens += tokens;
            cursor.step += 1;
            cursor.global_step += 1;
            cursor.log.push(LogEntry {
                step: cursor.global_step,
                epoch: phase.epochs * cursor.step as f64 / steps.len() as f64,
                loss,
                grad_norm: norm,
                learning_rate: rate,
                wall_time: now(),
            });
            let progress =
                Progress { phase: &phase.name, step: cursor.step, steps: steps.len(), loss, tokens };
            let go_on = observe(&progress);
            if !go_on || cursor.global_step.is_multiple_of(config.checkpoint_every.max(1)) {
                cursor.optimiser_step = optimiser.state().1;
                checkpoint::save(folder, &cursor, &variables, &optimiser, config.keep_checkpoints)?;
            }
            if !go_on {
                return Err(LearnError::Stopped { phase: phase.name.clone(), step: cursor.step });
            }
        }
        cursor.phase += 1;
        cursor.step = 0;
        optimiser.reset()?;
    }
    cursor.optimiser_step = 0;
    checkpoint::save(folder, &cursor, &variables, &optimiser, config.keep_checkpoints)?;
    write_logs(folder, &cursor)?;
    let tail = &cursor.log[cursor.log.len() - cursor.log.len().div_ceil(10)..];
    let report = SftReport {
        steps: cursor.global_step,
        examples: examples.len() - too_long,
        too_long,
        tokens: trained_tokens,
        final_loss: tail.iter().map(|entry| entry.loss).sum::<f64>() / tail.len().max(1) as f64,
        resumed_from,
    };
    let trained = weights.to(variables_device(&variables), candle_core::DType::F32)?;
    Ok((LoadedModel { weights: trained, ..model.clone() }, report))
}

fn variables_device(variables: &BTreeMap<String, Var>) -> &candle_core::Device {
    variables.values().next().map_or(&candle_core::Device::Cpu, |variable| variable.device())
}

fn now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// All steps of a phase: whole epochs, the last one cut where the number of epochs is a fraction.
fn plan(
    indices: &[usize],
    lengths: &[usize],
    phase: &Phase,
    number: usize,
    config: &SftConfig,
) -> Vec<Vec<usize>> {
    let mut steps = Vec::new();
    let mut left = phase.epochs;
    for epoch in 0u64.. {
        if left <= 1e-9 || indices.is_empty() {
            break;
        }
        let seed = ContentId::of(&[&config.seed.to_string(), &number.to_string(), &epoch.to_string()]).seed();
        let mut of_epoch = packing::epoch(indices, lengths, config.batch_tokens, seed, true);
        if left < 1.0 {
            of_epoch.truncate((of_epoch.len() as f64 * left).ceil() as usize);
        }
        steps.extend(of_epoch);
        left -= 1.0;
    }
    if config.max_steps > 0 {
        steps.truncate(config.max_steps);
    }
    steps
}

/// Gradients and mean loss of one step, summed over micro-batches.
fn gradients(
    lm: &CausalLm,
    variables: &BTreeMap<String, Var>,
    examples: &[Example],
    step: &[usize],
    lengths: &[usize],
    config: &SftConfig,
) -> Result<(GradStore, f64, usize), LearnError> {
    let targets: usize = step.iter().map(|&index| examples[index].targets()).sum();
    let tokens = step.iter().map(|&index| lengths[index]).sum();
    let mut total: Option<GradStore> = None;
    let mut loss = 0.0;
    for micro in packing::chunks(step, lengths, config.micro_batch_tokens) {
        let part = sft_loss(lm, micro.iter().map(|&index| &examples[index]), targets as f64)?;
        loss += f64::from(part.to_scalar::<f32>()?);
        let fresh = part.backward()?;
        match &mut total {
            None => total = Some(fresh),
            Some(total) => {
                for (name, variable) in variables {
                    let missing = || LearnError::NoGradient(name.clone());
                    let sum = (total.get(variable).ok_or_else(missing)?
                        + fresh.get(variable).ok_or_else(missing)?)?;
                    total.insert(variable, sum);
                }
            }
        }
    }
    total.map(|total| (total, loss, tokens)).ok_or_else(|| LearnError::Data("an empty step".to_owned()))
}

/// Sum of the losses of the learnt tokens, divided by `normaliser`: row `i` predicts token `i + 1`.
pub fn sft_loss<'a>(
    lm: &CausalLm,
    examples: impl IntoIterator<Item = &'a Example>,
    normaliser: f64,
) -> Result<Tensor, LearnError> {
    let examples: Vec<&Example> = examples.into_iter().collect();
    let batch = Batch::new(examples.iter().map(|example| (example.tokens.as_slice(), 0)));
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for (example, segment) in examples.iter().zip(batch.segments.iter()) {
        for at in 1..example.tokens.len() {
            if example.learnt[at] {
                rows.push((segment.start + at - 1) as u32);
                targets.push(example.tokens[at]);
            }
        }
    }
    let hidden = lm.hidden(&batch)?;
    let rows = Tensor::from_slice(&rows, rows.len(), hidden.device())?;
    Ok(linear_cross_entropy(&hidden.index_select(&rows, 0)?, lm.head(), &targets, normaliser)?)
}

fn hash(
    model: &LoadedModel,
    examples: &[Example],
    phases: &[Phase],
    config: &SftConfig,
) -> Result<String, LearnError> {
    let mut parts = vec![format!("{config:?}"), format!("{phases:?}"), model.config.to_json().to_string()];
    for example in examples {
        let bytes: Vec<u8> = example.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        parts.push(ContentId::of_bytes(&bytes).to_string());
        parts.push(example.targets().to_string());
    }
    // The first norm and a slice of the embedding tell base models of one shape apart.
    for name in ["model.norm.weight", "model.embed_tokens.weight"] {
        let values = model.weights.get(name)?.flatten_all()?;
        let head = values.narrow(0, 0, values.elem_count().min(4096))?.to_vec1::<f32>()?;
        parts.push(
            ContentId::of_bytes(&head.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()).to_string(),
        );
    }
    Ok(ContentId::of(&parts.iter().map(String::as_str).collect::<Vec<_>>()).to_string())
}

/// `trainer_state.json` with Hugging Face's field names, and TensorBoard events.
fn write_logs(folder: &Path, cursor: &Cursor) -> Result<(), LearnError> {
    let state = json!({
        "global_step": cursor.global_step,
        "epoch": cursor.log.last().map_or(0.0, |entry| entry.epoch),
        "log_history": cursor.log,
    });
    write_file(&folder.join("trainer_state.json"), format!("{state:#}\n").as_bytes())?;
    let scalars: Vec<Scalar> = cursor
        .log
        .iter()
        .flat_map(|entry| {
            let scalar = |tag, value: f64| Scalar {
                wall_time: entry.wall_time,
                step: entry.step as u64,
                tag,
                value: value as f32,
            };
            [
                scalar("train/loss", entry.loss),
                scalar("train/grad_norm", entry.grad_norm),
                scalar("train/learning_rate", entry.learning_rate),
            ]
        })
        .collect();
    Ok(write_events(&folder.join("events.out.tfevents.potstill"), &scalars)?)
}
