//! Log-probabilities of given tokens, `log softmax(hidden Wᵀ)[target]`, with backward and without ever holding all
//! logits: the backward pass computes each chunk of logits again. Preference and policy losses are built on it.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::exp::exp;
use super::linear_loss::check_targets;
use super::{fused, learns, logit_rows, max, sum_exp, with_values};

/// `hidden`: `[rows, d]`, `weight`: `[vocabulary, d]`, one target per row; returns `[rows]`.
pub fn linear_log_prob(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Tensor> {
    check_targets(hidden, weight, targets)?;
    if !fused(hidden) {
        return plain(hidden, weight, targets);
    }
    let (h, w) = (hidden.detach(), weight.detach());
    let mut rows: Vec<(f32, f32)> = Vec::with_capacity(targets.len());
    for (start, logits) in chunks(&h, &w) {
        let (logits, _) = logits?;
        let vocabulary = logits.dim(1)?;
        rows.extend(with_values([&logits], |[values]| {
            let each = values.par_chunks(vocabulary).zip(&targets[start..]).map(|(row, &target)| {
                let max = max(row);
                let normaliser = max + sum_exp(row, max).ln();
                (row[target as usize] - normaliser, normaliser)
            });
            each.collect::<Vec<_>>()
        })?);
    }
    let (log_probs, normalisers) = rows.into_iter().unzip();
    hidden.apply_op2(weight, LogProb { log_probs, normalisers, targets: targets.to_vec() })
}

/// The plain twin: all logits at once, stock operations.
pub fn plain(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
    let log_probs = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    log_probs.gather(&index, 1)?.squeeze(1)
}

/// Mean entropy of the next-token distributions of `hidden`, in nats; no gradient.
pub fn mean_entropy(hidden: &Tensor, weight: &Tensor) -> Result<f64> {
    let (h, w) = (hidden.detach().to_dtype(DType::F32)?, weight.detach().to_dtype(DType::F32)?);
    let mut total = 0f64;
    for (_, logits) in chunks(&h, &w) {
        let (logits, _) = logits?;
        let vocabulary = logits.dim(1)?;
        let logits = logits.to_device(&candle_core::Device::Cpu)?;
        total += with_values([&logits], |[values]| {
            let each = values.par_chunks(vocabulary).map(|row| {
                let max = max(row);
                let (mut mass, mut weighted) = (0f32, 0f32);
                for value in row {
                    let p = exp(value - max);
                    mass += p;
                    weighted += p * (value - max);
                }
                f64::from(mass.ln() - weighted / mass)
            });
            each.collect::<Vec<_>>().iter().sum::<f64>()
        })?;
    }
    Ok(total / h.dim(0)?.max(1) as f64)
}

/// Logits chunk by chunk: the first row, and logits with the hidden rows that they belong to.
fn chunks<'a>(h: &'a Tensor, w: &'a Tensor) -> impl Iterator<Item = (usize, Result<(Tensor, Tensor)>)> + 'a {
    let rows = h.dim(0).unwrap_or(0);
    let chunk = logit_rows(w.dim(0).unwrap_or(1));
    (0..rows).step_by(chunk).map(move |start| {
        let logits = || {
            let part = h.narrow(0, start, chunk.min(rows - start))?.contiguous()?;
            Ok((part.matmul(&w.t()?)?, part))
        };
        (start, logits())
    })
}

struct LogProb {
    log_probs: Vec<f32>,
    /// Logarithm of the sum of exponentials of each row.
    normalisers: Vec<f32>,
    targets: Vec<u32>,
}

impl CustomOp2 for LogProb {
    fn name(&self) -> &'static str {
        "linear-log-prob"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.log_probs.clone()), Shape::from(self.log_probs.len())))
    }

    /// With `g` the gradient of a row's result: `dlogits = g (one-hot(target) - softmax)`.
    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (h, w) = (hidden.detach(), weight.detach());
        let grad = grad.to_vec1::<f32>()?;
        let (mut dh, mut dw) = (Vec::new(), None::<Tensor>);
        for (start, logits) in chunks(&h, &w) {
            let (logits, part) = logits?;
            let (rows, vocabulary) = logits.dims2()?;
            let mut values = with_values([&logits], |[values]| values.to_vec())?;
            values.par_chunks_mut(vocabulary).enumerate().for_each(|(row, values)| {
                let (g, normaliser) = (grad[start + row], self.normalisers[start + row]);
                values.iter_mut().for_each(|value| *value = -g * exp(*value - normaliser));
                values[self.targets[start + row] as usize] += g;
            });
            let dlogits = Tensor::from_vec(values, (rows, vocabulary), h.device())?;
            dh.push(dlogits.matmul(&w)?);
            if learns(weight) {
                let part_dw = dlogits.t()?.matmul(&part)?;
                dw = Some(match dw {
                    Some(sum) => (sum + part_dw)?,
                    None => part_dw,
                });
            }
        }
        Ok((Some(Tensor::cat(&dh, 0)?), dw))
    }
}
