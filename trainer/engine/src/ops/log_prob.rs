//! Log probabilities of given tokens, `log softmax(hidden Wᵀ)[target]`, for DPO and policy losses. Logits
//! exist only in chunks of rows; the backward pass recomputes each chunk.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::chunked_logits::{check_targets, chunked_loss};
use super::exp::exp;
use super::linear::unfused_matmul;
use super::product::{Matmul, MatrixView};
use super::{Precision, has_fused_kernel, known, logit_chunk_rows, max, requires_grad, sum_exp, with_values};

/// Computes the log probability of each row's target, `[rows]`. `hidden`: `[rows, d]`; `weight`:
/// `[vocabulary, d]`; one target per row. Fails if a target is outside the vocabulary.
pub fn linear_log_prob(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    precision: Precision,
) -> Result<Tensor> {
    check_targets(hidden, weight, targets)?;
    if !has_fused_kernel(hidden) {
        return unfused_log_prob(hidden, weight, targets, precision);
    }
    let rows: Vec<(f32, f32)> = map_logit_rows(hidden, weight, precision, |row, logits| {
        let max = max(logits);
        let normaliser = max + sum_exp(logits, max).ln();
        (logits[targets[row] as usize] - normaliser, normaliser)
    })?;
    let (log_probs, normalisers) = rows.into_iter().unzip();
    let op = LogProbOp { log_probs, normalisers, targets: targets.to_vec(), precision };
    hidden.apply_op2(weight, op)
}

/// Plain form: all logits at once, by candle operations.
pub fn reference_log_prob(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
    let log_probs = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    log_probs.gather(&index, 1)?.squeeze(1)
}

/// Computes the mean entropy of the next-token distributions of `hidden`, in nats, without gradients.
pub fn mean_entropy(hidden: &Tensor, weight: &Tensor, precision: Precision) -> Result<f64> {
    if !has_fused_kernel(hidden) {
        let mut sum = 0.0;
        for_each_logit_chunk(hidden, weight, |_, logits| {
            let log_probs = logits.broadcast_sub(&log_sum_exp(&logits)?)?;
            let part = (log_probs.exp()? * log_probs)?.sum_all()?.to_dtype(DType::F64)?;
            sum -= part.to_scalar::<f64>()?;
            Ok(())
        })?;
        return Ok(sum / hidden.dim(0)?.max(1) as f64);
    }
    let each = map_logit_rows(hidden, weight, precision, |_, logits| {
        let max = max(logits);
        let (mut mass, mut weighted) = (0f32, 0f32);
        for value in logits {
            let p = exp(*value - max);
            mass += p;
            weighted += p * (*value - max);
        }
        f64::from(mass.ln() - weighted / mass)
    })?;
    Ok(each.iter().sum::<f64>() / each.len().max(1) as f64)
}

/// Calls `f` with index and logits of each row; returns all results in order.
fn map_logit_rows<R: Send>(
    hidden: &Tensor,
    weight: &Tensor,
    precision: Precision,
    f: impl Fn(usize, &[f32]) -> R + Sync,
) -> Result<Vec<R>> {
    let (vocabulary, d) = weight.dims2()?;
    let chunk = logit_chunk_rows(vocabulary);
    with_values([hidden, weight], |[h, w]| {
        let w = MatrixView::new(w, vocabulary, d);
        let mut logits = vec![0f32; chunk.min(h.len() / d) * vocabulary];
        let mut all = Vec::with_capacity(h.len() / d);
        for (at, h) in h.chunks(chunk * d).enumerate() {
            let h = MatrixView::new(h, h.len() / d, d);
            Matmul::multi_threaded(precision).multiply_into(&mut logits, vocabulary, h, w.transposed());
            let rows = logits.par_chunks(vocabulary).take(h.rows).enumerate();
            all.par_extend(rows.map(|(row, logits)| f(at * chunk + row, logits)));
        }
        all
    })
}

struct LogProbOp {
    log_probs: Vec<f32>,
    /// Logarithm of the sum of exponentials of each row.
    normalisers: Vec<f32>,
    targets: Vec<u32>,
    precision: Precision,
}

impl CustomOp2 for LogProbOp {
    fn name(&self) -> &'static str {
        "linear-log-prob"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.log_probs.clone()), Shape::from(self.log_probs.len())))
    }

    /// Backward pass. With `g` the gradient of a row's result: `dlogits = g (one-hot(target) - softmax)`.
    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.to_vec1::<f32>()?;
        let all = chunked_loss(hidden, weight, self.precision, |row, logits| {
            let (g, normaliser) = (grad[row], self.normalisers[row]);
            logits.iter_mut().for_each(|value| *value = -g * exp(*value - normaliser));
            logits[self.targets[row] as usize] += g;
            0.0
        })?;
        Ok((Some(all.dh), all.dw))
    }
}

/// Calls `each` with chunks of logits and their first row. GPUs get larger chunks, because small ones leave
/// them idle.
fn for_each_logit_chunk(
    hidden: &Tensor,
    weight: &Tensor,
    mut each: impl FnMut(usize, Tensor) -> Result<()>,
) -> Result<()> {
    let (hidden, weight) = (hidden.detach(), weight.detach().t()?);
    // Logits are never rounded to bf16, because the rounding would show in every log probability.
    let at_once = if hidden.device().is_cpu() { 1 } else { 8 };
    let (rows, chunk) = (hidden.dim(0)?, at_once * logit_chunk_rows(weight.dim(1)?));
    for first in (0..rows).step_by(chunk) {
        let logits = hidden.narrow(0, first, chunk.min(rows - first))?.matmul(&weight)?;
        let wide = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        each(first, logits.to_dtype(wide)?)?;
    }
    Ok(())
}

/// Reduces `[rows, vocabulary]` to `[rows, 1]`.
fn log_sum_exp(logits: &Tensor) -> Result<Tensor> {
    let max = logits.max_keepdim(1)?;
    logits.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max
}

/// Log probabilities by candle operations in chunks of logits, where no fused form exists.
fn unfused_log_prob(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    precision: Precision,
) -> Result<Tensor> {
    let targets = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    let mut parts = Vec::new();
    for_each_logit_chunk(hidden, weight, |first, logits| {
        let of_targets = logits.gather(&targets.narrow(0, first, logits.dim(0)?)?, 1)?;
        parts.push((of_targets - log_sum_exp(&logits)?)?.squeeze(1)?);
        Ok(())
    })?;
    // Gradients as in [`LogProb`].
    let op =
        known::binary("linear-log-prob-stock", Tensor::cat(&parts, 0)?, move |[hidden, weight], grad| {
            let grad = grad.unsqueeze(1)?;
            let (mut dh, mut dw) = (Vec::new(), None::<Tensor>);
            for_each_logit_chunk(hidden, weight, |first, logits| {
                let rows = logits.dim(0)?;
                let (grad, targets) = (grad.narrow(0, first, rows)?, targets.narrow(0, first, rows)?);
                let probs = logits.broadcast_sub(&log_sum_exp(&logits)?)?.exp()?;
                let dlogits =
                    probs.broadcast_mul(&grad.neg()?)?.scatter_add(&targets, &grad.contiguous()?, 1)?;
                let dlogits = dlogits.to_dtype(hidden.dtype())?;
                dh.push(unfused_matmul(&dlogits, &weight.detach(), precision)?);
                if requires_grad(weight) {
                    let hidden = hidden.detach().narrow(0, first, rows)?;
                    let part = unfused_matmul(&dlogits.t()?.contiguous()?, &hidden, precision)?;
                    dw = Some(match dw.take() {
                        Some(sum) => (sum + part)?,
                        None => part,
                    });
                }
                Ok(())
            })?;
            Ok((Some(Tensor::cat(&dh, 0)?), dw))
        });
    hidden.apply_op2(weight, op)
}
