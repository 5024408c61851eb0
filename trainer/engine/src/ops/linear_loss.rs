//! Output layer and a loss per row in one, without ever holding all logits.
//!
//! Works through the rows in chunks; loss and both gradients are ready after the forward pass, so backward only scales
//! them. Memory is one chunk of logits plus one gradient of `W`. Cross-entropy is the usual loss; distillation brings
//! others.

use candle_core::{CpuStorage, CustomOp2, DType, InplaceOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Mutex;

use super::exp::exp;
use super::{fused, learns, logit_rows, max, sum};

/// `hidden`: `[rows, d]`, `weight`: `[vocabulary, d]`. `row_loss` gets the index of a row and its logits, leaves the
/// gradient of its loss in their place and returns the loss. Returns the scalar sum of the losses. f32 on the CPU only.
pub fn linear_loss(
    hidden: &Tensor,
    weight: &Tensor,
    row_loss: &(dyn Fn(usize, &mut [f32]) -> f64 + Sync),
) -> Result<Tensor> {
    let (rows, _) = hidden.dims2()?;
    let (vocabulary, _) = weight.dims2()?;
    if rows == 0 {
        candle_core::bail!("a loss over no rows");
    }
    let (h, w) = (hidden.detach(), weight.detach());
    let chunk = logit_rows(vocabulary);
    let mut loss = 0f64;
    let mut dh = Vec::new();
    let mut dw: Option<Tensor> = None;
    for start in (0..rows).step_by(chunk) {
        let len = chunk.min(rows - start);
        let part = h.narrow(0, start, len)?.contiguous()?;
        let logits = part.matmul(&w.t()?)?;
        let each = EachRow { start, row_loss, loss: Mutex::new(0.0) };
        logits.inplace_op1(&each)?;
        loss += each.loss.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        dh.push(logits.matmul(&w)?);
        if learns(weight) {
            let part_dw = logits.t()?.matmul(&part)?;
            dw = Some(match dw {
                Some(sum) => (sum + part_dw)?,
                None => part_dw,
            });
        }
    }
    let dh = if dh.len() == 1 { dh.remove(0) } else { Tensor::cat(&dh, 0)? };
    hidden.apply_op2(weight, Precomputed { loss: loss as f32, dh, dw })
}

/// `Σ -log softmax(hidden Wᵀ)[target] / normaliser`, one target per row, so that micro-batches add up to the mean over
/// the whole batch.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    normaliser: f64,
) -> Result<Tensor> {
    check_targets(hidden, weight, targets)?;
    if !fused(hidden) {
        return plain(hidden, weight, targets, normaliser);
    }
    let scale = (1.0 / normaliser) as f32;
    linear_loss(hidden, weight, &|row, logits| {
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

/// The plain twin: all logits at once, stock operations.
pub fn plain(hidden: &Tensor, weight: &Tensor, targets: &[u32], normaliser: f64) -> Result<Tensor> {
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
    let log_sum = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    let log_probs = log_sum.broadcast_sub(&log_sum.exp()?.sum_keepdim(1)?.log()?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    log_probs.gather(&index, 1)?.sum_all()?.affine(-1.0 / normaliser, 0.0)
}

/// Refuses targets that do not fit.
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

/// Turns each row of logits into its gradient and adds up the losses.
struct EachRow<'a> {
    start: usize,
    row_loss: &'a (dyn Fn(usize, &mut [f32]) -> f64 + Sync),
    loss: Mutex<f64>,
}

impl InplaceOp1 for EachRow<'_> {
    fn name(&self) -> &'static str {
        "row-losses"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (_, vocabulary) = layout.shape().dims2()?;
        let CpuStorage::F32(logits) = storage else { candle_core::bail!("row losses need f32 logits") };
        let losses: Vec<f64> = logits
            .par_chunks_mut(vocabulary)
            .enumerate()
            .map(|(row, logits)| (self.row_loss)(self.start + row, logits))
            .collect();
        *self.loss.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = losses.iter().sum();
        Ok(())
    }
}

/// A scalar whose gradients are known already.
struct Precomputed {
    loss: f32,
    dh: Tensor,
    dw: Option<Tensor>,
}

impl CustomOp2 for Precomputed {
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
