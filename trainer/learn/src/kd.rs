//! Logit distillation (white-box): `L = (1 - r) CE + r D(p, q)`, mean over the tokens in the loss mask. `p` is the
//! teacher's next-token distribution and `q` the student's.
//!
//! The teacher's top-`k` tokens represent its distribution. The remaining mass forms one further class, so nothing is
//! renormalized. DistilQwen2.5 argues that ten tokens hold nearly all of the mass. The tokens come from a loaded model,
//! a file, or a remote [`Teacher`].
//!
//! [`on_policy`] trains on the student's own completions (GKD, Agarwal et al. 2024; TRL: `GKDTrainer`). Teacher and
//! student must share one vocabulary.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use potstill_engine::checkpoint_files::write_tensors;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::linear_loss::linear_loss;
use potstill_engine::tokenizer::Tokenizer;
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};

use crate::curriculum::Phase;
use crate::divergence::Divergence;
use crate::error::LearnError;
use crate::examples::Example;
use crate::learner::Learner;
use crate::packing;
use crate::rollouts::{RolloutEngines, RolloutParams};
use crate::run::{
    RunConfig, RunReport, StepObserver, StepOutcome, plan_steps, run_hash, run_plan, tokens_hash,
};
use crate::sft::LossRows;

/// Settings of logit distillation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KdConfig {
    /// Divergence between teacher and student.
    pub divergence: Divergence,
    /// Weight `r` of the divergence in the loss, 0 to 1; cross-entropy has the rest.
    pub ratio: f64,
    /// Tokens per position of the teacher's distribution.
    pub top_k: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Number of passes over the examples.
    pub epochs: f64,
    /// On-policy only: maximum number of new tokens per completion.
    pub max_tokens: usize,
    /// Settings of the training loop.
    pub run: RunConfig,
}

impl KdConfig {
    /// Returns the settings without the devices, for the run's hash.
    fn without_devices(&self) -> Self {
        Self { run: self.run.without_devices(), ..self.clone() }
    }
}

impl Default for KdConfig {
    fn default() -> Self {
        Self {
            divergence: Divergence::ForwardKl,
            ratio: 0.5,
            top_k: 20,
            learning_rate: 2e-5,
            epochs: 3.0,
            max_tokens: 1024,
            run: RunConfig::default(),
        }
    }
}

/// The teacher's most likely tokens, at every token of one example that counts in the loss. One row per token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TopK {
    /// Number of teacher tokens per row.
    pub k: usize,
    /// Token ids, `[rows, k]`.
    pub ids: Vec<u32>,
    /// Log probabilities of these tokens, `[rows, k]`.
    pub log_probs: Vec<f32>,
}

impl TopK {
    /// Returns the number of rows.
    fn num_rows(&self) -> usize {
        self.ids.len().checked_div(self.k).unwrap_or(0)
    }
}

/// Source of a teacher's token distributions.
pub struct TeacherLogits<'a> {
    /// Identifies the teacher's weights in the run's hash.
    pub id: String,
    /// Maximum length of an example in tokens.
    pub max_positions: usize,
    /// Function that returns the teacher's rows.
    pub rows: Box<TopKFn<'a>>,
}

/// Returns the teacher's rows for each example, in order.
pub type TopKFn<'a> = dyn Fn(&[Example]) -> Result<Vec<TopK>, LearnError> + 'a;

impl<'a> TeacherLogits<'a> {
    /// Creates a teacher from a model loaded in this process. It computes on the device of its weights.
    pub fn local(model: &'a LoadedModel, config: &'a KdConfig) -> Result<Self, LearnError> {
        Ok(Self {
            id: run_hash(model, Vec::new())?,
            max_positions: model.config.max_positions,
            rows: Box::new(|examples| top_k(model, examples, config.top_k, config.run.micro_batch_tokens)),
        })
    }
}

/// Checks that both tokenizers assign the same token to every id that both have. Ids beyond the smaller vocabulary are
/// ignored, because they only pad the embedding.
pub fn check_same_vocabulary(teacher: &Tokenizer, student: &Tokenizer) -> Result<(), LearnError> {
    let both = teacher.len().min(student.len()) as u32;
    for id in 0..both {
        let (a, b) = (teacher.token_text(id), student.token_text(id));
        if a != b {
            return Err(LearnError::Data(format!(
                "teacher and student do not share a vocabulary: token {id} is {a:?} to one and {b:?} to the other; \
                 distil through text instead"
            )));
        }
    }
    Ok(())
}

/// Computes the teacher's `k` most likely tokens at every token of `examples` that counts in the loss. Ties go to the
/// smaller id. Fails if `k` is 0 or above the vocabulary size.
pub fn top_k(
    teacher: &LoadedModel,
    examples: &[Example],
    k: usize,
    micro_batch_tokens: usize,
) -> Result<Vec<TopK>, LearnError> {
    let words = teacher.tokenizer.len().min(teacher.config.vocab_size);
    if k == 0 || k > words {
        return Err(LearnError::Data(format!("`top_k` must be 1 to {words}, not {k}")));
    }
    let lm = CausalLm::new(&teacher.config, &teacher.weights.detached())?;
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let order: Vec<usize> = (0..examples.len()).collect();
    let mut all = Vec::with_capacity(examples.len());
    for chunk in packing::pack_chunks(&order, &lengths, micro_batch_tokens) {
        let learnt = LossRows::new(chunk.iter().map(|&index| &examples[index]));
        let hidden = learnt.hidden_states(&lm)?;
        let mut start = 0;
        for count in learnt.counts {
            let logits = lm.logits(&hidden.narrow(0, start, count)?)?.narrow(1, 0, words)?;
            let mut rows = TopK { k, ..TopK::default() };
            for row in logits.to_dtype(DType::F32)?.to_vec2::<f32>()? {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let normaliser = max + row.iter().map(|logit| (logit - max).exp()).sum::<f32>().ln();
                let mut order: Vec<u32> = (0..words as u32).collect();
                let falling = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
                if k < words {
                    order.select_nth_unstable_by(k - 1, falling);
                    order.truncate(k);
                }
                order.sort_unstable_by(falling);
                rows.log_probs.extend(order.iter().map(|&id| row[id as usize] - normaliser));
                rows.ids.extend(order);
            }
            start += count;
            all.push(rows);
        }
    }
    Ok(all)
}

/// Returns a hash of the tokenizer's JSON, as bytes.
fn vocabulary_hash(tokenizer: &Tokenizer) -> Result<Vec<u8>, LearnError> {
    Ok(ContentId::from_bytes(tokenizer.to_json()?.as_bytes()).to_string().into_bytes())
}

/// Writes the teacher's rows of all examples to one safetensors file.
///
/// Tensors: `ids` and `log_probs` (`[rows, k]`), `counts` (rows per example), and `vocabulary` (hash of the tokenizer).
pub fn write_top_k(path: &Path, rows: &[TopK], tokenizer: &Tokenizer) -> Result<(), LearnError> {
    let k = rows.iter().map(|row| row.k).max().unwrap_or(0);
    let ids: Vec<u32> = rows.iter().flat_map(|row| row.ids.iter().copied()).collect();
    let log_probs: Vec<f32> = rows.iter().flat_map(|row| row.log_probs.iter().copied()).collect();
    let counts: Vec<u32> = rows.iter().map(|row| row.num_rows() as u32).collect();
    let (all, hash) = (ids.len().checked_div(k).unwrap_or(0), vocabulary_hash(tokenizer)?);
    let tensors = HashMap::from([
        ("ids".to_owned(), Tensor::from_vec(ids, (all, k), &Device::Cpu)?),
        ("log_probs".to_owned(), Tensor::from_vec(log_probs, (all, k), &Device::Cpu)?),
        ("counts".to_owned(), Tensor::from_vec(counts, rows.len(), &Device::Cpu)?),
        ("vocabulary".to_owned(), Tensor::from_slice(&hash, hash.len(), &Device::Cpu)?),
    ]);
    Ok(write_tensors(path, &tensors)?)
}

/// Reads a file of [`write_top_k`]. Fails if the file belongs to another tokenizer or its tensors disagree in length.
pub fn read_top_k(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<TopK>, LearnError> {
    let broken = |problem: String| LearnError::Data(format!("`{}`: {problem}", path.display()));
    let file =
        candle_core::safetensors::load(path, &Device::Cpu).map_err(|error| broken(error.to_string()))?;
    let tensor = |name: &str| file.get(name).ok_or_else(|| broken(format!("tensor `{name}` is missing")));
    if tensor("vocabulary")?.to_vec1::<u8>()? != vocabulary_hash(tokenizer)? {
        return Err(broken("its token ids belong to another tokenizer".to_owned()));
    }
    let (ids, log_probs) = (tensor("ids")?.to_vec2::<u32>()?, tensor("log_probs")?.to_vec2::<f32>()?);
    let counts = tensor("counts")?.to_vec1::<u32>()?;
    let total: usize = counts.iter().map(|count| *count as usize).sum();
    if total != ids.len() || ids.len() != log_probs.len() {
        return Err(broken(format!(
            "{} rows of ids, {} of log-probabilities, {total} counted",
            ids.len(),
            log_probs.len()
        )));
    }
    let mut rows = ids.into_iter().zip(log_probs);
    Ok(counts
        .into_iter()
        .map(|count| {
            let mut all = TopK::default();
            for (ids, log_probs) in rows.by_ref().take(count as usize) {
                all.k = ids.len();
                all.ids.extend(ids);
                all.log_probs.extend(log_probs);
            }
            all
        })
        .collect())
}

/// Trains a copy of `model` on `examples` and the teacher's rows for them. Checkpoints and logs go to `folder`.
///
/// Examples longer than `max_length` or the model's context are dropped. Fails if none remains, or if the rows do not
/// match the examples.
pub fn kd(
    model: &LoadedModel,
    examples: &[Example],
    teacher: &[TopK],
    config: &KdConfig,
    folder: &Path,
    observe: StepObserver<'_>,
) -> Result<(Learner, RunReport), LearnError> {
    check_rows(model, examples, teacher)?;
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let max_length = config.run.max_length.min(model.config.max_positions);
    let too_long = lengths.iter().filter(|&&length| length > max_length).count();
    let phase = Phase {
        name: "kd".to_owned(),
        examples: (0..examples.len()).collect(),
        epochs: config.epochs,
        learning_rate: config.learning_rate,
    };
    let plan = plan_steps(&[phase], &lengths, max_length, &config.run);
    if plan.iter().all(|phase| phase.steps.is_empty()) {
        return Err(LearnError::Data(format!(
            "no example to train on: {} given, {too_long} longer than {max_length} tokens",
            examples.len()
        )));
    }
    let mut parts = vec![format!("kd {:?}", config.without_devices())];
    for (example, rows) in examples.iter().zip(teacher) {
        parts.push(tokens_hash(&example.tokens));
        parts.push(tokens_hash(&rows.ids));
    }
    let mut learner = Learner::new(model, &config.run, &[])?;
    let mut gradients = |learner: &Learner, _: usize, step: &[usize]| {
        let chosen: Vec<(&Example, &TopK)> =
            step.iter().map(|&index| (&examples[index], &teacher[index])).collect();
        accumulate_kd_gradients(learner, &chosen, config)
    };
    let hash = run_hash(model, parts)?;
    let report = run_plan(&mut learner, &plan, &config.run, hash, folder, &mut gradients, observe)?;
    Ok((learner, RunReport { examples: examples.len() - too_long, too_long, ..report }))
}

/// Trains a copy of `model` on its own completions of `prompts`, towards the teacher's distribution at each of their
/// tokens. Checkpoints and logs go to `folder`.
///
/// Completions are sampled at temperature 1. A step holds as many prompts as fit `run.batch_tokens`, each counted with
/// `max_tokens` new tokens. Prompts without room for them are dropped.
pub fn kd_on_policy(
    model: &LoadedModel,
    teacher: &TeacherLogits<'_>,
    prompts: &[Vec<u32>],
    config: &KdConfig,
    folder: &Path,
    observe: StepObserver<'_>,
) -> Result<(Learner, RunReport), LearnError> {
    let room = config.run.max_length.min(model.config.max_positions).min(teacher.max_positions);
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.len() + config.max_tokens).collect();
    let phase = Phase {
        name: "on-policy kd".to_owned(),
        examples: (0..prompts.len()).collect(),
        epochs: config.epochs,
        learning_rate: config.learning_rate,
    };
    let plan = plan_steps(&[phase], &lengths, room, &config.run);
    let largest = plan.iter().flat_map(|phase| &phase.steps).map(Vec::len).max().unwrap_or(0);
    if largest == 0 {
        return Err(LearnError::Data(format!(
            "no prompt leaves room for {} new tokens in a context of {room}",
            config.max_tokens
        )));
    }
    let mut parts = vec![format!("on-policy kd {:?}", config.without_devices()), teacher.id.clone()];
    parts.extend(prompts.iter().map(|prompt| tokens_hash(prompt)));
    let mut learner = Learner::new(model, &config.run, &[])?;
    let rollouts = RolloutEngines::start(&learner.inference_models(), largest)?;
    let draw = RolloutParams { group: 1, temperature: 1.0, top_p: 1.0, max_tokens: config.max_tokens };
    let mut gradients = |learner: &Learner, number: usize, step: &[usize]| {
        let asked: Vec<&[u32]> = step.iter().map(|&index| prompts[index].as_slice()).collect();
        let written = rollouts.sample(&asked, draw, &format!("{}/{number}", config.run.seed))?;
        let examples: Vec<Example> =
            asked.iter().zip(&written).map(|(prompt, group)| group[0].to_example(prompt)).collect();
        let rows = (teacher.rows)(&examples)?;
        check_rows(model, &examples, &rows)?;
        let chosen: Vec<(&Example, &TopK)> = examples.iter().zip(&rows).collect();
        accumulate_kd_gradients(learner, &chosen, config)
    };
    let hash = run_hash(model, parts)?;
    let report = run_plan(&mut learner, &plan, &config.run, hash, folder, &mut gradients, observe)?;
    Ok((learner, RunReport { examples: prompts.len(), ..report }))
}

/// Checks that each example has one teacher row per token in the loss, and that the student has all token ids.
fn check_rows(model: &LoadedModel, examples: &[Example], teacher: &[TopK]) -> Result<(), LearnError> {
    if examples.len() != teacher.len() {
        return Err(LearnError::Data(format!(
            "{} examples, but the teacher's rows of {}",
            examples.len(),
            teacher.len()
        )));
    }
    for (index, (example, rows)) in examples.iter().zip(teacher).enumerate() {
        if example.num_targets() != rows.num_rows() {
            return Err(LearnError::Data(format!(
                "example {index}: {} learnt tokens, but {} rows of the teacher",
                example.num_targets(),
                rows.num_rows()
            )));
        }
        if let Some(id) = rows.ids.iter().find(|&&id| id as usize >= model.config.vocab_size) {
            return Err(LearnError::Data(format!(
                "example {index}: the teacher names token {id}, the student has {}",
                model.config.vocab_size
            )));
        }
    }
    Ok(())
}

/// Accumulates the gradients of one step.
fn accumulate_kd_gradients(
    learner: &Learner,
    chosen: &[(&Example, &TopK)],
    config: &KdConfig,
) -> Result<StepOutcome, LearnError> {
    let lengths: Vec<usize> = chosen.iter().map(|(example, _)| example.tokens.len()).collect();
    let order: Vec<usize> = (0..chosen.len()).collect();
    let targets: usize = chosen.iter().map(|(example, _)| example.num_targets()).sum();
    let losses =
        learner.map_micro_batches(&order, &lengths, config.run.micro_batch_tokens, |replica, micro| {
            let part: Vec<(&Example, &TopK)> = micro.iter().map(|&index| chosen[index]).collect();
            let loss = kd_loss(&replica.lm, &part, config, targets as f64)?;
            replica.lm.backward(&loss)?;
            Ok(f64::from(loss.to_scalar::<f32>()?))
        })?;
    Ok(StepOutcome { loss: losses.iter().sum(), tokens: lengths.iter().sum(), ..StepOutcome::default() })
}

/// Computes the sum of the row losses of some examples, divided by `normaliser`. A scalar tensor with gradient.
pub fn kd_loss(
    lm: &CausalLm,
    chosen: &[(&Example, &TopK)],
    config: &KdConfig,
    normaliser: f64,
) -> Result<Tensor, LearnError> {
    let learnt = LossRows::new(chosen.iter().map(|(example, _)| *example));
    let rows: Vec<(&[u32], &[f32])> = chosen
        .iter()
        .flat_map(|(_, top)| top.ids.chunks_exact(top.k.max(1)).zip(top.log_probs.chunks_exact(top.k.max(1))))
        .collect();
    let row_loss = |row: usize, logits: &mut [f32]| {
        let (ids, log_probs) = rows[row];
        mixed_loss(logits, learnt.targets[row], ids, log_probs, config) / normaliser
    };
    let scaled = |row: usize, logits: &mut [f32]| {
        let loss = row_loss(row, logits);
        let factor = (1.0 / normaliser) as f32;
        logits.iter_mut().for_each(|gradient| *gradient *= factor);
        loss
    };
    Ok(linear_loss(&learnt.hidden_states(lm)?, lm.lm_head()?, lm.precision(), &scaled)?)
}

/// Computes `(1 - r) CE + r D` of one row and replaces `logits` by the gradient with respect to them.
///
/// Classes `b` are the teacher's tokens and one for the rest. With `g = ∂D/∂q`: `∂D/∂z_j = q_j (g_b(j) - Σ_b q_b g_b)`.
fn mixed_loss(logits: &mut [f32], target: u32, ids: &[u32], log_probs: &[f32], config: &KdConfig) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let at_target = logits[target as usize];
    logits.iter_mut().for_each(|logit| *logit = (*logit - max).exp());
    let total: f64 = logits.iter().map(|value| f64::from(*value)).sum();
    let inverse = 1.0 / total;
    let class = |values: &mut dyn Iterator<Item = f64>| {
        let mut classes: Vec<f64> = values.collect();
        let rest = (1.0 - classes.iter().sum::<f64>()).max(0.0);
        classes.push(rest);
        classes
    };
    let p = class(&mut log_probs.iter().map(|log_prob| f64::from(*log_prob).exp()));
    let q = class(&mut ids.iter().map(|&id| f64::from(logits[id as usize]) * inverse));
    let mut g = vec![0.0; p.len()];
    let divergence = config.divergence.value_and_gradient(&p, &q, &mut g);
    let average: f64 = q.iter().zip(&g).map(|(q, g)| q * g).sum();
    let (r, ce) = (config.ratio, 1.0 - config.ratio);
    let of_rest = (ce + r * (g[ids.len()] - average)) * inverse;
    let own: Vec<f32> = ids
        .iter()
        .zip(&g)
        .map(|(&id, g)| (f64::from(logits[id as usize]) * (ce + r * (g - average)) * inverse) as f32)
        .collect();
    logits.iter_mut().for_each(|value| *value = (f64::from(*value) * of_rest) as f32);
    for (&id, gradient) in ids.iter().zip(own) {
        logits[id as usize] = gradient;
    }
    logits[target as usize] -= ce as f32;
    ce * (f64::from(max - at_target) + total.ln()) + r * divergence
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Compares the gradient with central differences for three divergences, with and without a rest class.
        #[test]
        fn mixed_loss_gradient_matches_central_differences(
            logits in prop::collection::vec(-3.0f32..3.0, 6),
            teacher in prop::collection::vec(-3.0f32..3.0, 6),
            k in 1usize..=6,
            target in 0u32..6,
            ratio in 0.0f64..=1.0,
        ) {
            let normaliser = teacher.iter().map(|z| z.exp()).sum::<f32>().ln();
            let ids: Vec<u32> = (0..k as u32).map(|i| (i * 5 + 2) % 6).collect();
            let log_probs: Vec<f32> = ids.iter().map(|&id| teacher[id as usize] - normaliser).collect();
            for divergence in [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::Jsd(0.3)] {
                let config = KdConfig { divergence, ratio, ..KdConfig::default() };
                let mut gradient = logits.clone();
                mixed_loss(&mut gradient, target, &ids, &log_probs, &config);
                let sum: f32 = gradient.iter().sum();
                prop_assert!(sum.abs() < 1e-5, "a softmax's gradient sums to zero, not {sum}");
                for j in 0..6 {
                    let at = |h: f32| {
                        let mut shifted = logits.clone();
                        shifted[j] += h;
                        mixed_loss(&mut shifted, target, &ids, &log_probs, &config)
                    };
                    let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                    prop_assert!((slope - f64::from(gradient[j])).abs() < 3e-3 * (1.0 + slope.abs()), "{divergence:?} {j}: {slope} against {}", gradient[j]);
                }
            }
        }
    }
}
