//! Reward models that predict a teacher's score of a chain of thought: Reasoning Verbosity or Cognitive Difficulty, 0 to 9
//! in the teacher's words, 0 to 1 here (section 3.3 of "Thinking with DistilQwen").
//!
//! The language model loses its output layer and gets one linear head without bias over the hidden state of the last token,
//! as transformers' `…ForSequenceClassification` has it. Three losses: Huber of `σ(logit)` against `score / 9` (the
//! default), ten classes with the expectation as prediction (`ordinal`), and Bradley-Terry over pairs of traces.

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
use crate::run::{Observe, RunConfig, RunReport, StepOutcome, plan, run, run_hash, tokens_hash};

const HEAD: &str = "score.weight";
/// Highest score.
pub const TOP: f64 = 9.0;

/// What is minimised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardLoss {
    /// Huber with delta 0.1 between `σ(logit)` and `score / 9`.
    #[default]
    Huber,
    /// Cross-entropy over the ten scores; the prediction is the expectation over 9.
    Ordinal,
    /// `-log σ(logit of the higher - logit of the lower)` over pairs of traces with different scores.
    BradleyTerry,
}

impl RewardLoss {
    fn classes(self) -> usize {
        if self == Self::Ordinal { 10 } else { 1 }
    }
}

/// Settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// What is minimised.
    pub loss: RewardLoss,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Times that each trace is seen.
    pub epochs: f64,
    /// Share of the problems that is held out to measure the model.
    pub held_out: f64,
    /// Steps, optimiser, checkpoints.
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
pub struct Scored {
    /// Problem and trace, as [`RewardModel::encode`] gives them.
    pub tokens: Vec<u32>,
    /// 0 to 9.
    pub score: u8,
    /// Which problem it belongs to: a problem is either learnt from or held out.
    pub problem: String,
}

/// A model that predicts scores.
pub struct RewardModel {
    model: LoadedModel,
    lm: CausalLm,
    head: Tensor,
}

impl RewardModel {
    /// Over the weights of a classifier: a folder that [`train`] wrote, read back.
    pub fn new(model: LoadedModel) -> Result<Self, LearnError> {
        if ![1, 10].contains(&model.config.classes) {
            return Err(LearnError::Data(format!(
                "a reward model has a head with 1 or 10 outputs, this one has {}",
                model.config.classes
            )));
        }
        let weights = model.weights.detached();
        let lm = CausalLm::new(&model.config, &weights)?;
        Ok(Self { head: weights.get(HEAD)?, lm, model })
    }

    /// What it was made of.
    pub fn loaded(&self) -> &LoadedModel {
        &self.model
    }

    /// Tokens of a problem and a completion.
    pub fn encode(model: &LoadedModel, problem: &str, completion: &str) -> Result<Vec<u32>, LearnError> {
        let messages = json!([
            {"role": "user", "content": problem},
            {"role": "assistant", "content": completion},
        ]);
        Ok(model.tokenizer.encode(&model.template.render(&messages, false, &json!({}))?)?)
    }

    /// Predictions, 0 to 1, in the order of `rows`. Rows longer than the model's context are cut at their front.
    pub fn predict(&self, rows: &[Vec<u32>], micro_batch_tokens: usize) -> Result<Vec<f32>, LearnError> {
        let most = self.model.config.max_positions;
        let rows: Vec<&[u32]> = rows.iter().map(|row| &row[row.len().saturating_sub(most)..]).collect();
        let lengths: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let order: Vec<usize> = (0..rows.len()).collect();
        let mut predictions = Vec::with_capacity(rows.len());
        for chunk in packing::chunks(&order, &lengths, micro_batch_tokens) {
            let rows: Vec<&[u32]> = chunk.iter().map(|&index| rows[index]).collect();
            let logits = logits(&self.lm, &self.head, &rows)?.to_vec2::<f32>()?;
            predictions.extend(logits.iter().map(|logits| prediction(logits)));
        }
        Ok(predictions)
    }
}

/// Outputs of the head over the last token of each row, `[rows, classes]`.
fn logits(lm: &CausalLm, head: &Tensor, rows: &[&[u32]]) -> Result<Tensor, LearnError> {
    let batch = Batch::new(rows.iter().map(|row| (*row, 0)));
    let hidden = lm.hidden(&batch)?;
    let last = batch.last_rows();
    let last = Tensor::from_slice(&last, last.len(), hidden.device())?;
    Ok(hidden.index_select(&last, 0)?.matmul(&head.t()?)?.to_dtype(DType::F32)?)
}

/// One value from the outputs: a sigmoid, or the expectation of ten classes over nine.
fn prediction(logits: &[f32]) -> f32 {
    if let [logit] = logits {
        return 1.0 / (1.0 + (-logit).exp());
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let expected: f32 = weights.iter().enumerate().map(|(score, weight)| score as f32 * weight).sum();
    expected / weights.iter().sum::<f32>() / TOP as f32
}

/// The starting point: `model` without its output layer, with a head of zeros (every trace scores the same at first).
fn with_head(model: &LoadedModel, loss: RewardLoss) -> Result<LoadedModel, LearnError> {
    let config = ModelConfig { classes: loss.classes(), ..model.config.clone() };
    let mut tensors: std::collections::BTreeMap<String, Tensor> =
        model.weights.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    tensors.remove("lm_head.weight");
    let head = Tensor::zeros((config.classes, config.hidden_size), DType::F32, &Device::Cpu)?;
    tensors.insert(HEAD.to_owned(), head);
    let weights = potstill_engine::weights::Weights::new(tensors, &config)?;
    Ok(LoadedModel { config, weights, ..model.clone() })
}

/// Trains a reward model on a copy of `model`; measures it on problems that it did not see. Files go to `folder`.
pub fn train(
    model: &LoadedModel,
    traces: &[Scored],
    config: &RewardConfig,
    folder: &Path,
    observe: Observe<'_>,
) -> Result<(RewardModel, RunReport, Agreement), LearnError> {
    if let Some(trace) = traces.iter().find(|trace| f64::from(trace.score) > TOP) {
        return Err(LearnError::Data(format!("a score of {} is outside 0 to {TOP}", trace.score)));
    }
    let start = with_head(model, config.loss)?;
    let longest = config.run.max_length.min(model.config.max_positions);
    let (learnt, held_out) = split(traces, config.held_out, config.run.seed);
    let fits = |index: &usize| traces[*index].tokens.len() <= longest && !traces[*index].tokens.is_empty();
    let learnt: Vec<usize> = learnt.into_iter().filter(fits).collect();
    let held_out: Vec<usize> = held_out.into_iter().filter(fits).collect();
    let too_long = traces.len() - learnt.len() - held_out.len();
    let items: Vec<Item> = match config.loss {
        RewardLoss::BradleyTerry => pairs(traces, &learnt, config.run.seed),
        _ => learnt.iter().map(|&index| Item { high: index, low: None }).collect(),
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
    let plan = plan(&[phase], &lengths, usize::MAX, &config.run);
    let mut parts =
        vec![format!("reward {:?}", RewardConfig { run: config.run.anywhere(), ..config.clone() })];
    for trace in traces {
        parts.push(format!("{} {}", tokens_hash(&trace.tokens), trace.score));
    }
    let mut learner = Learner::new(&start, &config.run, &[HEAD])?;
    let mut gradients = |learner: &Learner, _: usize, step: &[usize]| {
        let losses = learner.share(step, &lengths, config.run.micro_batch_tokens, |replica, micro| {
            let items: Vec<&Item> = micro.iter().map(|&index| &items[index]).collect();
            let rows: Vec<&[u32]> = items
                .iter()
                .flat_map(|item| [Some(item.high), item.low])
                .flatten()
                .map(|index| traces[index].tokens.as_slice())
                .collect();
            let scores: Vec<u8> = items.iter().map(|item| traces[item.high].score).collect();
            let logits = logits(&replica.lm, &replica.tensor(HEAD)?, &rows)?;
            let part = (reward_loss(&logits, &scores, config.loss)? / step.len() as f64)?;
            replica.lm.backward(&part)?;
            Ok(f64::from(part.to_scalar::<f32>()?))
        })?;
        let tokens = step.iter().map(|&index| lengths[index]).sum();
        Ok(StepOutcome { loss: losses.iter().sum(), tokens, ..StepOutcome::default() })
    };
    let hash = run_hash(&start, parts)?;
    let report = run(&mut learner, &plan, &config.run, hash, folder, &mut gradients, observe)?;
    let trained = RewardModel::new(learner.finish()?)?;
    let rows: Vec<Vec<u32>> = held_out.iter().map(|&index| traces[index].tokens.clone()).collect();
    let predicted = trained.predict(&rows, config.run.micro_batch_tokens)?;
    let scores: Vec<u8> = held_out.iter().map(|&index| traces[index].score).collect();
    let agreement = Agreement::of(&predicted, &scores);
    Ok((trained, RunReport { examples: learnt.len(), too_long, ..report }, agreement))
}

/// A trace, or a pair of which `high` has the higher score.
struct Item {
    high: usize,
    low: Option<usize>,
}

/// Sum of the losses. `logits`: `[rows, classes]`; for Bradley-Terry rows are high, low, high, low, …
pub fn reward_loss(logits: &Tensor, scores: &[u8], loss: RewardLoss) -> Result<Tensor, LearnError> {
    let n = scores.len();
    let device = logits.device();
    Ok(match loss {
        RewardLoss::Huber => {
            const DELTA: f64 = 0.1;
            let target: Vec<f32> = scores.iter().map(|score| f32::from(*score) / TOP as f32).collect();
            // σ(x) = 1 / (1 + exp(-x)), exact for every finite x in f32.
            let predicted = (logits.squeeze(1)?.neg()?.exp()? + 1.0)?.recip()?;
            let error = (predicted - Tensor::from_vec(target, n, device)?)?.abs()?;
            // e²/2 up to delta, delta (e - delta/2) beyond: with c = min(e, delta), c (e - c/2).
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

/// Splits by problem: about `share` of them are held out, at least one.
fn split(traces: &[Scored], share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut problems: Vec<&str> = traces.iter().map(|trace| trace.problem.as_str()).collect();
    problems.sort_unstable();
    problems.dedup();
    problems.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let count = ((problems.len() as f64 * share).ceil() as usize).max(1);
    let held: std::collections::HashSet<&str> = problems.into_iter().take(count).collect();
    (0..traces.len()).partition(|&index| !held.contains(traces[index].problem.as_str()))
}

/// One pair per trace: it and another trace with another score, drawn by `seed`.
fn pairs(traces: &[Scored], learnt: &[usize], seed: u64) -> Vec<Item> {
    let mut order = learnt.to_vec();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let mut items = Vec::new();
    for (at, &first) in order.iter().enumerate() {
        let others = order.iter().cycle().skip(at + 1).take(order.len() - 1);
        if let Some(&second) = others.clone().find(|&&other| traces[other].score != traces[first].score) {
            let (high, low) =
                if traces[first].score > traces[second].score { (first, second) } else { (second, first) };
            items.push(Item { high, low: Some(low) });
        }
    }
    items
}

/// How near predictions are to the teacher's scores, on problems that were held out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Traces compared.
    pub traces: usize,
    /// Mean absolute error in points of 0 to 9.
    pub mae: f64,
    /// The same for a model that always says the mean: what the error is worth.
    pub mae_of_mean: f64,
    /// Spearman's rank correlation.
    pub spearman: f64,
    /// Share within one point.
    pub within_one: f64,
    /// Mean prediction, in points, of the traces of each band of two scores.
    pub by_band: std::collections::BTreeMap<String, (usize, f64)>,
}

impl Agreement {
    /// Compares predictions (0 to 1) with scores (0 to 9).
    pub fn of(predicted: &[f32], scores: &[u8]) -> Self {
        let n = scores.len().max(1) as f64;
        let points: Vec<f64> = predicted.iter().map(|value| f64::from(*value) * TOP).collect();
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

/// Spearman's rank correlation with mean ranks for ties; 0 where one side does not vary.
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
    fn ranks_and_agreement() {
        assert!((spearman(&[1.0, 2.0, 3.0], &[10.0, 20.0, 30.0]) - 1.0).abs() < 1e-12);
        assert!((spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        assert_eq!(ranks(&[5.0, 1.0, 5.0]), [1.5, 0.0, 1.5]);
        // scipy.stats.spearmanr([1, 2, 2, 4], [2, 1, 3, 4]).statistic
        assert!((spearman(&[1.0, 2.0, 2.0, 4.0], &[2.0, 1.0, 3.0, 4.0]) - 0.632_455_532).abs() < 1e-8);
        let agreement = Agreement::of(&[0.0, 1.0, 5.0 / 9.0], &[0, 9, 7]);
        assert!((agreement.mae - 2.0 / 3.0).abs() < 1e-6, "{agreement:?}");
        assert!((agreement.within_one - 2.0 / 3.0).abs() < 1e-6);
        assert_eq!(agreement.by_band["8-9"].0, 1);
    }

    #[test]
    fn a_problem_is_learnt_from_or_held_out() {
        let traces: Vec<Scored> = (0..60)
            .map(|i| Scored { tokens: vec![1], score: (i % 10) as u8, problem: format!("p{}", i / 3) })
            .collect();
        let (learnt, held) = split(&traces, 0.2, 3);
        assert_eq!(held.len(), 12, "four of twenty problems");
        for index in &held {
            assert!(learnt.iter().all(|other| traces[*other].problem != traces[*index].problem));
        }
        for item in pairs(&traces, &learnt, 1) {
            assert!(traces[item.high].score > traces[item.low.unwrap()].score);
        }
    }
}
