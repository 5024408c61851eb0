//! Output layer and cross-entropy in one: `mean(-log softmax(hidden Wᵀ)[target])` without ever holding all logits.
//!
//! Works through the rows in chunks; loss and both gradients are ready after the forward pass, so backward only scales
//! them. Memory is one chunk of logits plus one gradient of `W`.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, DType, InplaceOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::exp::exp;
use super::{fused, max, sum};

/// Logits of one chunk stay near this many values (32 MiB of f32).
const CHUNK_VALUES: usize = 8 << 20;

/// `hidden`: `[rows, d]`, `weight`: `[vocabulary, d]`, one target per row. The sum of the losses is divided by
/// `normaliser`, so that micro-batches add up to the mean over the whole batch. Returns a scalar.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    normaliser: f64,
) -> Result<Tensor> {
    let (rows, _) = hidden.dims2()?;
    let (vocabulary, _) = weight.dims2()?;
    if rows != targets.len() || rows == 0 {
        candle_core::bail!("cross-entropy: {rows} rows, {} targets", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocabulary) {
        candle_core::bail!("cross-entropy: target {target} is outside the vocabulary of {vocabulary}");
    }
    if !fused(hidden) {
        return plain(hidden, weight, targets, normaliser);
    }
    let (h, w) = (hidden.detach(), weight.detach());
    let chunk = (CHUNK_VALUES / vocabulary).clamp(16, 4096);
    let mut loss = 0f64;
    let mut dh = Vec::new();
    let mut dw: Option<Tensor> = None;
    for start in (0..rows).step_by(chunk) {
        let len = chunk.min(rows - start);
        let part = h.narrow(0, start, len)?.contiguous()?;
        let logits = part.matmul(&w.t()?)?;
        let softmax = SoftmaxMinusTarget {
            targets: &targets[start..start + len],
            scale: (1.0 / normaliser) as f32,
            loss: Mutex::new(0.0),
        };
        logits.inplace_op1(&softmax)?;
        loss += softmax.loss.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        dh.push(logits.matmul(&w)?);
        let part_dw = logits.t()?.matmul(&part)?;
        dw = Some(match dw {
            Some(sum) => (sum + part_dw)?,
            None => part_dw,
        });
    }
    let dh = if dh.len() == 1 { dh.remove(0) } else { Tensor::cat(&dh, 0)? };
    let Some(dw) = dw else { candle_core::bail!("cross-entropy: no rows") };
    hidden.apply_op2(weight, Precomputed { loss: (loss / normaliser) as f32, dh, dw })
}

/// The plain twin: all logits at once, stock operations.
pub fn plain(hidden: &Tensor, weight: &Tensor, targets: &[u32], normaliser: f64) -> Result<Tensor> {
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
    let log_sum = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    let log_probs = log_sum.broadcast_sub(&log_sum.exp()?.sum_keepdim(1)?.log()?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    log_probs.gather(&index, 1)?.sum_all()?.affine(-1.0 / normaliser, 0.0)
}

/// Turns a row of logits into `(softmax - one-hot(target)) * scale` and adds up the losses.
struct SoftmaxMinusTarget<'a> {
    targets: &'a [u32],
    scale: f32,
    loss: Mutex<f64>,
}

impl InplaceOp1 for SoftmaxMinusTarget<'_> {
    fn name(&self) -> &'static str {
        "softmax-minus-target"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (_, vocabulary) = layout.shape().dims2()?;
        let CpuStorage::F32(logits) = storage else { candle_core::bail!("cross-entropy needs f32 logits") };
        let losses: Vec<f64> = logits
            .par_chunks_mut(vocabulary)
            .zip(self.targets)
            .map(|(row, &target)| {
                let max = max(row);
                let at_target = row[target as usize];
                row.iter_mut().for_each(|value| *value = exp(*value - max));
                let sum = sum(row);
                let scale = self.scale / sum;
                row.iter_mut().for_each(|value| *value *= scale);
                row[target as usize] -= self.scale;
                f64::from(max - at_target) + f64::from(sum).ln()
            })
            .collect();
        *self.loss.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = losses.iter().sum();
        Ok(())
    }
}

/// A scalar whose gradients are known already.
struct Precomputed {
    loss: f32,
    dh: Tensor,
    dw: Tensor,
}

impl CustomOp2 for Precomputed {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
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
            return Ok((Some(self.dh.clone()), Some(self.dw.clone())));
        }
        Ok((Some(self.dh.affine(scale, 0.0)?), Some(self.dw.affine(scale, 0.0)?)))
    }
}
