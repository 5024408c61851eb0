//! Direct preference optimization (Rafailov et al. 2023, equation 7) with a `beta` per pair (CogPO, Cai et al. 2025).
//!
//! `L = -log σ(β [(log π(c) - log π₀(c)) - (log π(r) - log π₀(r))]) + α · NLL(c)`, mean over pairs. `c` is the chosen
//! and `r` the rejected completion, and `π₀` the starting model. `NLL(c)` is the mean loss of the chosen tokens (TRL:
//! `rpo_alpha`).
//!
//! Reference log probabilities are computed once, before training, and stored beside the checkpoints. No reference
//! model stays in memory.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use potstill_engine::checkpoint_files::write_tensors;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::log_prob::linear_log_prob;
use potstill_shared::durable::create_folder;
use serde::{Deserialize, Serialize};

use crate::curriculum::Phase;
use crate::error::LearnError;
use crate::examples::Example;
use crate::learner::Learner;
use crate::packing;
use crate::run::{
    RunConfig, RunReport, StepObserver, StepOutcome, plan_steps, run_hash, run_plan, tokens_hash,
};
use crate::sft::LossRows;

/// A preference between two completions of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferencePair {
    /// Prompt with the better completion.
    pub chosen: Example,
    /// Prompt with the worse completion.
    pub rejected: Example,
    /// `beta` of this pair; `None` uses the run's `beta`.
    pub beta: Option<f64>,
}

/// Settings of DPO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DpoConfig {
    /// Strength of the pull towards the reference model (TRL: `beta`).
    pub beta: f64,
    /// Weight α of the NLL term of the chosen completion (TRL: `rpo_alpha`); 0 turns the term off.
    pub nll: f64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Number of passes over the pairs.
    pub epochs: f64,
    /// Settings of the training loop.
    pub run: RunConfig,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self { beta: 0.1, nll: 0.1, learning_rate: 5e-7, epochs: 1.0, run: RunConfig::default() }
    }
}

/// Trains a copy of `model` on `pairs`. Checkpoints, logs and the reference log probabilities go to `folder`.
///
/// Pairs with a completion longer than `max_length` or the model's context are dropped. Fails if none remains, if both
/// completions of a pair are equal, or if a `beta` is not positive.
pub fn dpo(
    model: &LoadedModel,
    pairs: &[PreferencePair],
    config: &DpoConfig,
    folder: &Path,
    observe: StepObserver<'_>,
) -> Result<(Learner, RunReport), LearnError> {
    for (row, pair) in pairs.iter().enumerate() {
        if pair.chosen.tokens == pair.rejected.tokens {
            return Err(LearnError::Data(format!("pair {row}: chosen and rejected are the same tokens")));
        }
        if pair.beta.is_some_and(|beta| !(beta > 0.0 && beta.is_finite())) {
            return Err(LearnError::Data(format!("pair {row}: `beta` must be above 0, not {:?}", pair.beta)));
        }
    }
    let lengths: Vec<usize> =
        pairs.iter().map(|pair| pair.chosen.tokens.len() + pair.rejected.tokens.len()).collect();
    let longest = config.run.max_length.min(model.config.max_positions);
    let fits = |pair: &PreferencePair| pair.chosen.tokens.len().max(pair.rejected.tokens.len()) <= longest;
    let usable: Vec<usize> = (0..pairs.len()).filter(|&index| fits(&pairs[index])).collect();
    let too_long = pairs.len() - usable.len();
    if usable.is_empty() {
        return Err(LearnError::Data(format!(
            "no pair to train on: {} given, {too_long} longer than {longest} tokens",
            pairs.len()
        )));
    }
    let phase = Phase {
        name: "dpo".to_owned(),
        examples: usable,
        epochs: config.epochs,
        learning_rate: config.learning_rate,
    };
    let plan = plan_steps(&[phase], &lengths, usize::MAX, &config.run);
    let mut parts =
        vec![format!("dpo {:?}", DpoConfig { run: config.run.without_devices(), ..config.clone() })];
    for pair in pairs {
        parts.push(tokens_hash(&pair.chosen.tokens));
        parts.push(tokens_hash(&pair.rejected.tokens));
        parts.push(format!("{} {} {:?}", pair.chosen.num_targets(), pair.rejected.num_targets(), pair.beta));
    }
    let hash = run_hash(model, parts)?;
    create_folder(folder)?;
    let reference = reference_log_probs(model, pairs, &lengths, config, folder, &hash)?;
    let mut learner = Learner::new(model, &config.run, &[])?;
    let mut gradients = |learner: &Learner, _: usize, step: &[usize]| {
        let parts =
            learner.map_micro_batches(step, &lengths, config.run.micro_batch_tokens, |replica, micro| {
                let chunk: Vec<&PreferencePair> = micro.iter().map(|&index| &pairs[index]).collect();
                let from: Vec<[f32; 2]> = micro.iter().map(|&index| reference[index]).collect();
                let part = dpo_loss(&replica.lm, &chunk, &from, config, step.len() as f64)?;
                replica.lm.backward(&part.loss)?;
                Ok((f64::from(part.loss.to_scalar::<f32>()?), part.metric_sums))
            })?;
        let tokens = step.iter().map(|&index| lengths[index]).sum();
        let mut outcome = StepOutcome { tokens, ..StepOutcome::default() };
        for (loss, sums) in parts {
            outcome.loss += loss;
            for (name, value) in sums {
                *outcome.metrics.entry(name.to_owned()).or_default() += value / step.len() as f64;
            }
        }
        Ok(outcome)
    };
    let report = run_plan(&mut learner, &plan, &config.run, hash, folder, &mut gradients, observe)?;
    Ok((learner, RunReport { examples: pairs.len() - too_long, too_long, ..report }))
}

/// Loss of some pairs, with statistics.
pub struct DpoLoss {
    /// Sum of the pairs' losses divided by the normalizer, a scalar with gradient.
    pub loss: Tensor,
    /// Named metrics, each summed over the pairs: accuracy, margin, rewards of chosen and rejected.
    pub metric_sums: [(&'static str, f64); 4],
}

/// Computes the sum of the pairs' losses, divided by `normaliser`. `reference` holds `log π₀` of chosen and rejected
/// for each pair.
pub fn dpo_loss(
    lm: &CausalLm,
    pairs: &[&PreferencePair],
    reference: &[[f32; 2]],
    config: &DpoConfig,
    normaliser: f64,
) -> Result<DpoLoss, LearnError> {
    let n = pairs.len();
    let sums = sequence_log_probs(lm, pairs)?;
    let device = sums.device();
    // Rows alternate: chosen, rejected, chosen, rejected, …
    let policy = sums.reshape((n, 2))?;
    let start = Tensor::from_slice(&reference.concat(), (n, 2), device)?;
    let gain = (&policy - start)?;
    let (chosen, rejected) = (gain.narrow(1, 0, 1)?.squeeze(1)?, gain.narrow(1, 1, 1)?.squeeze(1)?);
    let betas: Vec<f32> = pairs.iter().map(|pair| pair.beta.unwrap_or(config.beta) as f32).collect();
    let beta = Tensor::from_slice(&betas, n, device)?;
    let margin = ((&chosen - &rejected)? * &beta)?;
    let mut loss = softplus(&margin.neg()?)?.sum_all()?;
    if config.nll > 0.0 {
        let inverse: Vec<f32> = pairs.iter().map(|pair| 1.0 / pair.chosen.num_targets() as f32).collect();
        let of_chosen = policy.narrow(1, 0, 1)?.squeeze(1)?;
        let nll = (of_chosen * Tensor::from_slice(&inverse, n, device)?)?.sum_all()?.neg()?;
        loss = (loss + (nll * config.nll)?)?;
    }
    let total = |t: &Tensor| -> Result<f64, LearnError> { Ok(f64::from(t.sum_all()?.to_scalar::<f32>()?)) };
    let right = margin.detach().to_vec1::<f32>()?.iter().filter(|margin| **margin > 0.0).count();
    let sums = [
        ("rewards/accuracy", right as f64),
        ("rewards/margin", total(&margin.detach())?),
        ("rewards/chosen", total(&(chosen.detach() * &beta)?)?),
        ("rewards/rejected", total(&(rejected.detach() * &beta)?)?),
    ];
    Ok(DpoLoss { loss: (loss / normaliser)?, metric_sums: sums })
}

/// Computes `log(1 + exp(x))` without overflow.
pub(crate) fn softplus(x: &Tensor) -> candle_core::Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// Returns `log π` of each completion, summed over its tokens: `[2 n]` in the order chosen, rejected, chosen, …
fn sequence_log_probs(lm: &CausalLm, pairs: &[&PreferencePair]) -> Result<Tensor, LearnError> {
    let learnt = LossRows::new(pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]));
    let each = linear_log_prob(&learnt.hidden_states(lm)?, lm.lm_head()?, &learnt.targets, lm.precision())?;
    Ok(segment_sums(&each, &learnt.counts)?)
}

/// Sums consecutive segments of `values`; segment `i` has `counts[i]` values.
pub(crate) fn segment_sums(values: &Tensor, counts: &[usize]) -> candle_core::Result<Tensor> {
    let owner: Vec<u32> =
        counts.iter().enumerate().flat_map(|(run, &count)| std::iter::repeat_n(run as u32, count)).collect();
    let owner = Tensor::from_vec(owner, values.dim(0)?, values.device())?;
    Tensor::zeros(counts.len(), values.dtype(), values.device())?.index_add(&owner, values, 0)
}

/// Returns `log π₀` of chosen and rejected for every pair. Reads the file that an earlier start of the same run stored,
/// or computes and writes it.
fn reference_log_probs(
    model: &LoadedModel,
    pairs: &[PreferencePair],
    lengths: &[usize],
    config: &DpoConfig,
    folder: &Path,
    hash: &str,
) -> Result<Vec<[f32; 2]>, LearnError> {
    let path = folder.join(format!("reference-{}.safetensors", hash.get(..16).unwrap_or(hash)));
    if path.exists() {
        let broken = |problem: String| LearnError::Checkpoint { path: path.clone(), problem };
        let file =
            candle_core::safetensors::load(&path, &Device::Cpu).map_err(|error| broken(error.to_string()))?;
        let rows = file.get("log_probs").map(Tensor::to_vec2::<f32>).transpose()?.unwrap_or_default();
        if rows.len() != pairs.len() || rows.iter().any(|row| row.len() != 2) {
            return Err(broken("holds another number of pairs; remove it".to_owned()));
        }
        return Ok(rows.into_iter().map(|row| [row[0], row[1]]).collect());
    }
    let device = config.run.parse_devices()?.swap_remove(0);
    let weights = model.weights.detached().to_device(&device, DType::F32)?;
    let lm = CausalLm::with_precision(&model.config, &weights, config.run.dtype)?;
    let order: Vec<usize> = (0..pairs.len()).collect();
    let mut values = Vec::with_capacity(pairs.len());
    for chunk in packing::pack_chunks(&order, lengths, config.run.micro_batch_tokens) {
        let chunk: Vec<&PreferencePair> = chunk.iter().map(|&index| &pairs[index]).collect();
        let sums = sequence_log_probs(&lm, &chunk)?.to_vec1::<f32>()?;
        values.extend(sums.chunks_exact(2).map(|pair| [pair[0], pair[1]]));
    }
    let tensor = Tensor::from_slice(&values.concat(), (pairs.len(), 2), &Device::Cpu)?;
    write_tensors(&path, &HashMap::from([("log_probs".to_owned(), tensor)]))?;
    Ok(values)
}
