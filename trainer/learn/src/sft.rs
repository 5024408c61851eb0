//! Supervised fine-tuning (TRL: `SFTTrainer`): `L = -1/N Σ log p(token | prefix)` over the `N` assistant tokens of a
//! step.
//!
//! Per step: examples are packed up to the token budget. Micro batches accumulate the gradient of the mean over the
//! whole step. Then follow clipping and AdamW.
//!
//! The order of phases comes from [`crate::curriculum`].

use std::path::Path;

use candle_core::Tensor;
use potstill_engine::batch::Batch;
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::linear_loss::linear_cross_entropy;

use crate::curriculum::Phase;
use crate::error::LearnError;
use crate::examples::Example;
use crate::learner::Learner;
use crate::run::{
    RunConfig, RunReport, StepObserver, StepOutcome, plan_steps, run_hash, run_plan, tokens_hash,
};

/// Fine-tunes a copy of `model` on `examples`, phase after phase. Writes checkpoints, `trainer_state.json` and
/// TensorBoard events to `folder`.
///
/// Examples longer than `max_length` or the model's context are dropped. Fails if none remains.
pub fn sft(
    model: &LoadedModel,
    examples: &[Example],
    phases: &[Phase],
    config: &RunConfig,
    folder: &Path,
    observe: StepObserver<'_>,
) -> Result<(Learner, RunReport), LearnError> {
    let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
    let max_length = config.max_length.min(model.config.max_positions);
    let too_long = lengths.iter().filter(|&&length| length > max_length).count();
    let plan = plan_steps(phases, &lengths, max_length, config);
    if plan.iter().all(|phase| phase.steps.is_empty()) {
        return Err(LearnError::Data(format!(
            "no example to train on: {} given, {too_long} longer than {max_length} tokens",
            examples.len()
        )));
    }
    let mut parts = vec![format!("sft {:?}", config.without_devices()), format!("{phases:?}")];
    for example in examples {
        parts.push(tokens_hash(&example.tokens));
        parts.push(example.num_targets().to_string());
    }
    let mut learner = Learner::new(model, config, &[])?;
    let mut gradients = |learner: &Learner, _: usize, step: &[usize]| {
        let targets: usize = step.iter().map(|&index| examples[index].num_targets()).sum();
        let losses =
            learner.map_micro_batches(step, &lengths, config.micro_batch_tokens, |replica, micro| {
                let rows = micro.iter().map(|&index| &examples[index]);
                let part = sft_loss(&replica.lm, rows, targets as f64)?;
                replica.lm.backward(&part)?;
                Ok(f64::from(part.to_scalar::<f32>()?))
            })?;
        let tokens = step.iter().map(|&index| lengths[index]).sum();
        Ok(StepOutcome { loss: losses.iter().sum(), tokens, ..StepOutcome::default() })
    };
    let hash = run_hash(model, parts)?;
    let report = run_plan(&mut learner, &plan, config, hash, folder, &mut gradients, observe)?;
    Ok((learner, RunReport { examples: examples.len() - too_long, too_long, ..report }))
}

/// Returns the sum of cross-entropies over all tokens in the loss mask, divided by `normaliser`. A scalar tensor with
/// gradient. The hidden state of row `i` predicts token `i + 1`.
pub fn sft_loss<'a>(
    lm: &CausalLm,
    examples: impl IntoIterator<Item = &'a Example>,
    normaliser: f64,
) -> Result<Tensor, LearnError> {
    let learnt = LossRows::new(examples);
    let hidden = learnt.hidden_states(lm)?;
    Ok(linear_cross_entropy(&hidden, lm.lm_head()?, &learnt.targets, normaliser, lm.precision())?)
}

/// A packed batch with the rows whose next token counts in the loss, and these tokens.
pub(crate) struct LossRows {
    batch: Batch,
    rows: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    /// Number of such rows per example.
    pub(crate) counts: Vec<usize>,
}

impl LossRows {
    /// Packs `examples` into one batch and collects the rows before each token in the loss mask.
    pub(crate) fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let examples: Vec<&Example> = examples.into_iter().collect();
        let batch = Batch::new(examples.iter().map(|example| (example.tokens.as_slice(), 0)));
        let (mut rows, mut targets, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        for (example, segment) in examples.iter().zip(batch.segments.iter()) {
            let before = rows.len();
            for at in 1..example.tokens.len() {
                if example.loss_mask[at] {
                    rows.push((segment.start + at - 1) as u32);
                    targets.push(example.tokens[at]);
                }
            }
            counts.push(rows.len() - before);
        }
        Self { batch, rows, targets, counts }
    }

    /// Returns the hidden states of the selected rows, `[rows, hidden]`.
    pub(crate) fn hidden_states(&self, lm: &CausalLm) -> Result<Tensor, LearnError> {
        let hidden = lm.hidden_states(&self.batch)?;
        let rows = Tensor::from_slice(&self.rows, self.rows.len(), hidden.device())?;
        Ok(hidden.index_select(&rows, 0)?)
    }
}
