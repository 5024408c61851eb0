//! Output layer and loss in one operation; logits exist only in chunks of rows.
//!
//! The forward pass computes the loss and both gradients, so the backward pass only scales them. Memory is
//! one chunk of logits plus one gradient of `W`. Cross entropy is the usual loss; distillation passes other
//! losses.

use candle_core::{DType, Device, Result, Tensor};

use super::chunked_logits::{check_targets, chunked_loss};
use super::exp::exp;
use super::log_prob::linear_log_prob;
use super::{Precision, has_fused_kernel, max, sum};

/// Computes the sum of a loss over all rows, a scalar on the CPU. `hidden`: `[rows, d]`; `weight`:
/// `[vocabulary, d]`. `row_loss` receives a row's index and logits, replaces the logits by the gradient and
/// returns the loss. Inputs on other devices or of other types are copied to the CPU as f32.
pub fn linear_loss(
    hidden: &Tensor,
    weight: &Tensor,
    precision: Precision,
    row_loss: &(dyn Fn(usize, &mut [f32]) -> f64 + Sync),
) -> Result<Tensor> {
    if hidden.dim(0)? == 0 {
        candle_core::bail!("a loss over no rows");
    }
    let here = |x: &Tensor| x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous();
    let (hidden, weight) = (here(hidden)?, here(weight)?);
    hidden.apply_op2(&weight, chunked_loss(&hidden, &weight, precision, row_loss)?)
}

/// Computes `Σ -log softmax(hidden Wᵀ)[target] / normaliser` with one target per row. `normaliser` covers
/// the whole batch, so the losses of its micro batches add up to the mean.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    normaliser: f64,
    precision: Precision,
) -> Result<Tensor> {
    check_targets(hidden, weight, targets)?;
    if !has_fused_kernel(hidden) {
        let log_probs = linear_log_prob(hidden, weight, targets, precision)?;
        return log_probs.sum_all()?.affine(-1.0 / normaliser, 0.0);
    }
    let scale = (1.0 / normaliser) as f32;
    linear_loss(hidden, weight, precision, &|row, logits| {
        let target = targets[row] as usize;
        let max = max(logits);
        let at_target = logits[target];
        logits.iter_mut().for_each(|value| *value = exp(*value - max));
        let sum = sum(logits);
        let factor = scale / sum;
        logits.iter_mut().for_each(|value| *value *= factor);
        logits[target] -= scale;
        (f64::from(max - at_target) + f64::from(sum).ln()) / normaliser
    })
}

/// Plain form: all logits at once, by candle operations.
pub fn reference_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    normaliser: f64,
) -> Result<Tensor> {
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
    let log_sum = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    let log_probs = log_sum.broadcast_sub(&log_sum.exp()?.sum_keepdim(1)?.log()?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    log_probs.gather(&index, 1)?.sum_all()?.affine(-1.0 / normaliser, 0.0)
}
