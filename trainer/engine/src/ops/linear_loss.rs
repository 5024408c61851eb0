//! Output layer and loss in one operation; logits exist only in chunks of rows.
//!
//! The forward pass computes the loss and both gradients, so the backward pass only scales them. Memory is
//! one chunk of logits plus one gradient of `W`. Cross entropy is the usual loss; distillation passes other
//! losses.

use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::exp::exp;
use super::log_prob::linear_log_prob;
use super::product::{Matrix, Product};
use super::{Precision, fused, learns, logit_rows, max, sum, with_values};

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
    hidden.apply_op2(&weight, through_logits(&hidden, &weight, precision, row_loss)?)
}

/// Computes the loss and its gradients in chunks of logits. `row_loss` as in [`linear_loss`].
pub(super) fn through_logits(
    hidden: &Tensor,
    weight: &Tensor,
    precision: Precision,
    row_loss: impl Fn(usize, &mut [f32]) -> f64 + Sync,
) -> Result<Gradients> {
    let (rows, d) = hidden.dims2()?;
    let (vocabulary, _) = weight.dims2()?;
    let how = Product::shared(precision);
    let chunk = logit_rows(vocabulary).min(rows);
    let mut logits = vec![0f32; chunk * vocabulary];
    let mut dh = vec![0f32; rows * d];
    let mut dw = if learns(weight) { vec![0f32; vocabulary * d] } else { Vec::new() };
    let loss = with_values([hidden, weight], |[h, w]| {
        let w = Matrix::new(w, vocabulary, d);
        let mut loss = 0f64;
        for (at, (h, dh)) in h.chunks(chunk * d).zip(dh.chunks_mut(chunk * d)).enumerate() {
            let len = h.len() / d;
            let (h, logits) = (Matrix::new(h, len, d), &mut logits[..len * vocabulary]);
            how.run(logits, vocabulary, h, w.t());
            let losses: Vec<f64> = logits
                .par_chunks_mut(vocabulary)
                .enumerate()
                .map(|(row, logits)| row_loss(at * chunk + row, logits))
                .collect();
            loss += losses.iter().sum::<f64>();
            let dlogits = Matrix::new(logits, len, vocabulary);
            how.run(dh, d, dlogits, w);
            if !dw.is_empty() {
                how.adding(at > 0).run(&mut dw, d, dlogits.t(), h);
            }
        }
        loss
    })?;
    let dw = match dw.is_empty() {
        true => None,
        false => Some(Tensor::from_vec(dw, (vocabulary, d), hidden.device())?),
    };
    Ok(Gradients { loss: loss as f32, dh: Tensor::from_vec(dh, (rows, d), hidden.device())?, dw })
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
    if !fused(hidden) {
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
pub fn plain(hidden: &Tensor, weight: &Tensor, targets: &[u32], normaliser: f64) -> Result<Tensor> {
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
    let log_sum = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    let log_probs = log_sum.broadcast_sub(&log_sum.exp()?.sum_keepdim(1)?.log()?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    log_probs.gather(&index, 1)?.sum_all()?.affine(-1.0 / normaliser, 0.0)
}

/// Fails unless there is one target per row, each within the vocabulary.
pub(super) fn check_targets(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<()> {
    let (rows, _) = hidden.dims2()?;
    let (vocabulary, _) = weight.dims2()?;
    if rows != targets.len() || rows == 0 {
        candle_core::bail!("output layer: {rows} rows, {} targets", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocabulary) {
        candle_core::bail!("output layer: target {target} is outside the vocabulary of {vocabulary}");
    }
    Ok(())
}

/// A loss with precomputed gradients.
pub(super) struct Gradients {
    loss: f32,
    pub(super) dh: Tensor,
    pub(super) dw: Option<Tensor>,
}

impl CustomOp2 for Gradients {
    fn name(&self) -> &'static str {
        "linear-loss"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.loss]), Shape::from(())))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let scale = f64::from(grad.to_scalar::<f32>()?);
        #[expect(clippy::float_cmp, reason = "exactly 1 is the usual case, and then nothing is to be scaled")]
        if scale == 1.0 {
            return Ok((Some(self.dh.clone()), self.dw.clone()));
        }
        let scaled = |t: &Tensor| t.affine(scale, 0.0);
        Ok((Some(scaled(&self.dh)?), self.dw.as_ref().map(scaled).transpose()?))
    }
}
