//! Reward models that predict a teacher's score of a chain of thought: reasoning verbosity or cognitive difficulty
//! (section 3.3 of "Thinking with DistilQwen"). Scores are 0 to 9, predictions 0 to 1.
//!
//! The output layer of the language model is replaced by a linear head without bias over the last token's hidden state.
//! transformers' `…ForSequenceClassification` has the same form.
//!
//! Losses: Huber of `σ(logit)` against `score / 9` (default), ten classes (`ordinal`), and Bradley-Terry over pairs.
//! Rewards are computed from the predictions in [`crate::rewards`].

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use potstill_engine::batch::Batch;
use potstill_engine::config::ModelConfig;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::curriculum::Phase;
use crate::dpo::softplus;
use crate::error::LearnError;
use crate::learner::Learner;
use crate::packing;
use crate::run::{
    RunConfig, RunReport, StepObserver, StepOutcome, plan_steps, run_hash, run_plan, tokens_hash,
};

/// Name of the head's weight, as in transformers.
const HEAD_WEIGHT: &str = "score.weight";
/// Highest score.
pub const MAX_SCORE: f64 = 9.0;

/// Loss of a reward model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardLoss {
    /// Huber loss with delta 0.1 between `σ(logit)` and `score / 9`.
    #[default]
    Huber,
    /// Cross-entropy over the ten scores. The prediction is the expected score divided by 9.
    Ordinal,
    /// `-log σ(logit of the higher score - logit of the lower score)` over pairs of traces with different scores.
    BradleyTerry,
}

impl RewardLoss {
    /// Returns the number of outputs of the head.
    fn classes(self) -> usize {
        if self == Self::Ordinal { 10 } else { 1 }
    }
}

/// Settings of reward model training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// Loss that training minimizes.
    pub loss: RewardLoss,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Number of passes over the traces (for Bradley-Terry, over the pairs).
    pub epochs: f64,
    /// Fraction of the problems held out to measure the model, 0 to 1; at least one problem.
    pub held_out: f64,
    /// Settings of the training loop.
    pub run: RunConfig,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self {
            loss: RewardLoss::Huber,
            learning_rate: 1e-5,
            epochs: 2.0,
            held_out: 0.02,
            run: RunConfig::default(),
        }
    }
}

/// A chain of thought with its score.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredTrace {
    /// Token ids of problem and trace, as from [`RewardModel::encode`].
    pub tokens: Vec<u32>,
    /// Score by the teacher, 0 to 9.
    pub score: u8,
    /// Id of the problem. All traces of a problem are either used for training or held out.
    pub problem: String,
}

/// A model that predicts scores.
pub struct RewardModel {
    model: LoadedModel,
    lm: CausalLm,
    head: Tensor,
}

impl RewardModel {
    /// Creates a reward model from a model with a classification head, such as one that [`train`] wrote. Fails unless
    /// the head has 1 or 10 outputs. It computes on the device of its weights.
    pub fn new(model: LoadedModel) -> Result<Self, LearnError> {
        if ![1, 10].contains(&model.config.num_labels) {
            return Err(LearnError::Data(format!(
                "a reward model has a head with 1 or 10 outputs, this one has {}",
                model.config.num_labels
            )));
        }
        let weights = model.weights.detached();
        let lm = CausalLm::new(&model.config, &weights)?;
        Ok(Self { head: weights.get(HEAD_WEIGHT)?, lm, model })
    }

    /// Returns the underlying model with configuration, weights and tokenizer.
    pub fn model(&self) -> &LoadedModel {
        &self.model
    }

    /// Renders problem and completion with the chat template and returns their token ids.
    pub fn encode(model: &LoadedModel, problem: &str, completion: &str) -> Result<Vec<u32>, LearnError> {
        let messages = json!([
            {"role": "user", "content": problem},
            {"role": "assistant", "content": completion},
        ]);
        Ok(model.tokenizer.encode(&model.chat_template.render(&messages, false, &json!({}))?)?)
    }

    /// Returns predictions, 0 to 1, in the order of `rows`. Rows longer than the model's context lose tokens at their
    /// start.
    pub fn predict(&self, rows: &[Vec<u32>], micro_batch_tokens: usize) -> Result<Vec<f32>, LearnError> {
        let most = self.model.config.max_positions;
        let rows: Vec<&[u32]> = rows.iter().map(|row| &row[row.len().saturating_sub(most)..]).collect();
        let lengths: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let order: Vec<usize> = (0..rows.len()).collect();
        let mut predictions = Vec::with_capacity(rows.len());
        for chunk in packing::pack_chunks(&order, &lengths, micro_batch_tokens) {
            let rows: Vec<&[u32]> = chunk.iter().map(|&index| rows[index]).collect();
            let logits = logits(&self.lm, &self.head, &rows)?.to_vec2::<f32>()?;
            predictions.extend(logits.iter().map(|logits| prediction(logits)));
        }
        Ok(predictions)
    }
}

/// Returns the head's outputs at the last token of each row, `[rows, classes]`.
fn logits(lm: &CausalLm, head: &Tensor, rows: &[&[u32]]) -> Result<Tensor, LearnError> {
    let batch = Batch::new(rows.iter().map(|row| (*row, 0)));
    let hidden = lm.hidden_states(&batch)?;
    let last = batch.last_row_indices();
    let last = Tensor::from_slice(&last, last.len(), hidden.device())?;
    Ok(hidden.index_select(&last, 0)?.matmul(&head.t()?)?.to_dtype(DType::F32)?)
}

/// Returns the prediction, 0 to 1: the sigmoid of one output, or the expected score of ten classes divided by 9.
fn prediction(logits: &[f32]) -> f32 {
    if let [logit] = logits {
        return 1.0 / (1.0 + (-logit).exp());
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let expected: f32 = weights.iter().enumerate().map(|(score, weight)| score as f32 * weight).sum();
    expected / weights.iter().sum::<f32>() / MAX_SCORE as f32
}

/// Returns `model` with a classification head in place of the output layer. The head is zero, so all traces start with
/// equal predictions.
fn with_head(model: &LoadedModel, loss: RewardLoss) -> Result<LoadedModel, LearnError> {
    let config = ModelConfig { num_labels: loss.classes(), ..model.config.clone() };
    let mut tensors: std::collections::BTreeMap<String, Tensor> =
        model.weights.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    tensors.remove("lm_head.weight");
    let head = Tensor::zeros((config.num_labels, config.hidden_size), DType::F32, &Device::Cpu)?;
    tensors.insert(HEAD_WEIGHT.to_owned(), head);
    let weights = potstill_engine::weights::Weights::new(tensors, &config)?;
    Ok(LoadedModel { config, weights, ..model.clone() })
}

/// Trains a reward model on a copy of `model` and measures it on held-out problems. Checkpoints and logs go to
/// `folder`.
///
/// Traces longer than `max_length` or the model's context are dropped. Fails if a score exceeds 9, or if no trace
/// remains for training or measurement.
pub fn train_reward_model(
    model: &LoadedModel,
    traces: &[ScoredTrace],
    config: &RewardConfig,
    folder: &Path,
    observe: StepObserver<'_>,
) -> Result<(RewardModel, RunReport, Agreement), LearnError> {
    if let Some(trace) = traces.iter().find(|trace| f64::from(trace.score) > MAX_SCORE) {
        return Err(LearnError::Data(format!("a score of {} is outside 0 to {MAX_SCORE}", trace.score)));
    }
    let start = with_head(model, config.loss)?;
    let longest = config.run.max_length.min(model.config.max_positions);
    let (learnt, held_out) = split_by_problem(traces, config.held_out, config.run.seed);
    let fits = |index: &usize| traces[*index].tokens.len() <= longest && !traces[*index].tokens.is_empty();
    let learnt: Vec<usize> = learnt.into_iter().filter(fits).collect();
    let held_out: Vec<usize> = held_out.into_iter().filter(fits).collect();
    let too_long = traces.len() - learnt.len() - held_out.len();
    let items: Vec<TrainingItem> = match config.loss {
        RewardLoss::BradleyTerry => pair_by_score(traces, &learnt, config.run.seed),
        _ => learnt.iter().map(|&index| TrainingItem { high: index, low: None }).collect(),
    };
    if items.is_empty() || held_out.is_empty() {
        return Err(LearnError::Data(format!(
            "nothing to train or measure a reward model on: {} traces, {} to learn from, {} held out, {too_long} too long",
            traces.len(),
            items.len(),
            held_out.len()
        )));
    }
    let length = |index: usize| traces[index].tokens.len();
    let lengths: Vec<usize> =
        items.iter().map(|item| length(item.high) + item.low.map_or(0, length)).collect();
    let phase = Phase {
        name: "reward".to_owned(),
        examples: (0..items.len()).collect(),
        epochs: config.epochs,
        learning_rate: config.learning_rate,
    };
    let plan = plan_steps(&[phase], &lengths, usize::MAX, &config.run);
    let mut parts =
        vec![format!("reward {:?}", RewardConfig { run: config.run.without_devices(), ..config.clone() })];
    for trace in traces {
        parts.push(format!("{} {}", tokens_hash(&trace.tokens), trace.score));
    }
    let mut learner = Learner::new(&start, &config.run, &[HEAD_WEIGHT])?;
    let mut gradients = |learner: &Learner, _: usize, step: &[usize]| {
        let losses =
            learner.map_micro_batches(step, &lengths, config.run.micro_batch_tokens, |replica, micro| {
                let items: Vec<&TrainingItem> = micro.iter().map(|&index| &items[index]).collect();
                let rows: Vec<&[u32]> = items
                    .iter()
                    .flat_map(|item| [Some(item.high), item.low])
                    .flatten()
                    .map(|index| traces[index].tokens.as_slice())
                    .collect();
                let scores: Vec<u8> = items.iter().map(|item| traces[item.high].score).collect();
                let logits = logits(&replica.lm, &replica.tensor(HEAD_WEIGHT)?, &rows)?;
                let part = (reward_loss(&logits, &scores, config.loss)? / step.len() as f64)?;
                replica.lm.backward(&part)?;
                Ok(f64::from(part.to_scalar::<f32>()?))
            })?;
        let tokens = step.iter().map(|&index| lengths[index]).sum();
        Ok(StepOutcome { loss: losses.iter().sum(), tokens, ..StepOutcome::default() })
    };
    let hash = run_hash(&start, parts)?;
    let report = run_plan(&mut learner, &plan, &config.run, hash, folder, &mut gradients, observe)?;
    let trained = RewardModel::new(learner.trained_model()?)?;
    let rows: Vec<Vec<u32>> = held_out.iter().map(|&index| traces[index].tokens.clone()).collect();
    let predicted = trained.predict(&rows, config.run.micro_batch_tokens)?;
    let scores: Vec<u8> = held_out.iter().map(|&index| traces[index].score).collect();
    let agreement = Agreement::compare(&predicted, &scores);
    Ok((trained, RunReport { examples: learnt.len(), too_long, ..report }, agreement))
}

/// Index of a trace, or indices of a pair in which `high` has the higher score.
struct TrainingItem {
    high: usize,
    low: Option<usize>,
}

/// Returns the sum of the losses, a scalar with gradient. `logits` has shape `[rows, classes]`. For Bradley-Terry, rows
/// alternate between higher and lower score, and `scores` has one entry per pair.
pub fn reward_loss(logits: &Tensor, scores: &[u8], loss: RewardLoss) -> Result<Tensor, LearnError> {
    let n = scores.len();
    let device = logits.device();
    Ok(match loss {
        RewardLoss::Huber => {
            const DELTA: f64 = 0.1;
            let target: Vec<f32> = scores.iter().map(|score| f32::from(*score) / MAX_SCORE as f32).collect();
            // σ(x) = 1 / (1 + exp(-x)) is correct for every finite f32 x, even if exp(-x) is infinite.
            let predicted = (logits.squeeze(1)?.neg()?.exp()? + 1.0)?.recip()?;
            let error = (predicted - Tensor::from_vec(target, n, device)?)?.abs()?;
            // Huber loss without a branch: e²/2 up to delta, delta (e - delta/2) beyond. With c = min(e, delta), both
            // are c (e - c/2).
            let capped = error.minimum(&(error.ones_like()? * DELTA)?)?;
            (&capped * (&error - (&capped * 0.5)?)?)?.sum_all()?
        }
        RewardLoss::Ordinal => {
            let classes: Vec<u32> = scores.iter().map(|score| u32::from(*score)).collect();
            let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
            let log_probs = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?;
            log_probs.gather(&Tensor::from_vec(classes, (n, 1), device)?, 1)?.sum_all()?.neg()?
        }
        RewardLoss::BradleyTerry => {
            let both = logits.reshape((n, 2))?;
            softplus(&(both.narrow(1, 1, 1)? - both.narrow(1, 0, 1)?)?)?.sum_all()?
        }
    })
}

/// Splits traces by problem and returns the indices for training and those held out. About `share` of the problems are
/// held out, at least one.
fn split_by_problem(traces: &[ScoredTrace], share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut problems: Vec<&str> = traces.iter().map(|trace| trace.problem.as_str()).collect();
    problems.sort_unstable();
    problems.dedup();
    problems.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let count = ((problems.len() as f64 * share).ceil() as usize).max(1);
    let held: std::collections::HashSet<&str> = problems.into_iter().take(count).collect();
    (0..traces.len()).partition(|&index| !held.contains(traces[index].problem.as_str()))
}

/// Returns one pair per trace: the trace and another one with a different score, chosen by `seed`. Traces without a
/// partner are left out.
fn pair_by_score(traces: &[ScoredTrace], learnt: &[usize], seed: u64) -> Vec<TrainingItem> {
    let mut order = learnt.to_vec();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let mut items = Vec::new();
    for (at, &first) in order.iter().enumerate() {
        let others = order.iter().cycle().skip(at + 1).take(order.len() - 1);
        if let Some(&second) = others.clone().find(|&&other| traces[other].score != traces[first].score) {
            let (high, low) =
                if traces[first].score > traces[second].score { (first, second) } else { (second, first) };
            items.push(TrainingItem { high, low: Some(low) });
        }
    }
    items
}

/// Agreement of predictions with the teacher's scores on held-out problems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Number of traces compared.
    pub traces: usize,
    /// Mean absolute error in points of the scale 0 to 9.
    pub mae: f64,
    /// Mean absolute error, in points, of always predicting the mean score; the baseline for `mae`.
    pub mae_of_mean: f64,
    /// Spearman's rank correlation, -1 to 1.
    pub spearman: f64,
    /// Fraction of predictions within one point of the score, 0 to 1.
    pub within_one: f64,
    /// By band of two scores, such as `4-5`: number of traces and mean prediction in points.
    pub by_band: std::collections::BTreeMap<String, (usize, f64)>,
}

impl Agreement {
    /// Compares predictions (0 to 1) with scores (0 to 9).
    pub fn compare(predicted: &[f32], scores: &[u8]) -> Self {
        let n = scores.len().max(1) as f64;
        let points: Vec<f64> = predicted.iter().map(|value| f64::from(*value) * MAX_SCORE).collect();
        let truth: Vec<f64> = scores.iter().map(|score| f64::from(*score)).collect();
        let mean = truth.iter().sum::<f64>() / n;
        let error =
            |by: &dyn Fn(usize) -> f64| (0..truth.len()).map(|i| (by(i) - truth[i]).abs()).sum::<f64>() / n;
        let close = points.iter().zip(&truth).filter(|(p, t)| (*p - *t).abs() <= 1.0).count();
        let mut by_band = std::collections::BTreeMap::<String, (usize, f64)>::new();
        for (point, score) in points.iter().zip(scores) {
            let low = score / 2 * 2;
            let band = by_band.entry(format!("{low}-{}", low + 1)).or_default();
            band.0 += 1;
            band.1 += point;
        }
        by_band.values_mut().for_each(|(count, sum)| *sum /= *count as f64);
        Self {
            traces: scores.len(),
            mae: error(&|i| points[i]),
            mae_of_mean: error(&|_| mean),
            spearman: spearman(&points, &truth),
            within_one: close as f64 / n,
            by_band,
        }
    }
}

/// Returns Spearman's rank correlation, with mean ranks for ties. Returns 0 if one side is constant.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let n = a.len().max(1) as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n;
    let (ma, mb) = (mean(&a), mean(&b));
    let product = |x: &[f64], mx: f64, y: &[f64], my: f64| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum()
    };
    let spread = (product(&a, ma, &a, ma) * product(&b, mb, &b, mb)).sqrt();
    if spread > 0.0 { product(&a, ma, &b, mb) / spread } else { 0.0 }
}

/// Returns the rank of each value, from 0, with mean ranks for ties.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut at = 0;
    while at < order.len() {
        let same =
            order[at..].iter().take_while(|&&i| values[i].total_cmp(&values[order[at]]).is_eq()).count();
        for &index in &order[at..at + same] {
            ranks[index] = at as f64 + (same as f64 - 1.0) / 2.0;
        }
        at += same;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spearman_and_agreement_match_known_values() {
        assert!((spearman(&[1.0, 2.0, 3.0], &[10.0, 20.0, 30.0]) - 1.0).abs() < 1e-12);
        assert!((spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        assert_eq!(ranks(&[5.0, 1.0, 5.0]), [1.5, 0.0, 1.5]);
        // scipy.stats.spearmanr([1, 2, 2, 4], [2, 1, 3, 4]).statistic
        assert!((spearman(&[1.0, 2.0, 2.0, 4.0], &[2.0, 1.0, 3.0, 4.0]) - 0.632_455_532).abs() < 1e-8);
        let agreement = Agreement::compare(&[0.0, 1.0, 5.0 / 9.0], &[0, 9, 7]);
        assert!((agreement.mae - 2.0 / 3.0).abs() < 1e-6, "{agreement:?}");
        assert!((agreement.within_one - 2.0 / 3.0).abs() < 1e-6);
        assert_eq!(agreement.by_band["8-9"].0, 1);
    }

    #[test]
    fn split_keeps_the_traces_of_a_problem_together() {
        let traces: Vec<ScoredTrace> = (0..60)
            .map(|i| ScoredTrace { tokens: vec![1], score: (i % 10) as u8, problem: format!("p{}", i / 3) })
            .collect();
        let (learnt, held) = split_by_problem(&traces, 0.2, 3);
        assert_eq!(held.len(), 12, "four of twenty problems");
        for index in &held {
            assert!(learnt.iter().all(|other| traces[*other].problem != traces[*index].problem));
        }
        for item in pair_by_score(&traces, &learnt, 1) {
            assert!(traces[item.high].score > traces[item.low.unwrap()].score);
        }
    }
}
