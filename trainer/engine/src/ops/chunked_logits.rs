//! A loss over the rows of an output layer, with both gradients; logits exist only in chunks of rows.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::product::{Matmul, MatrixView};
use super::{Precision, logit_chunk_rows, requires_grad, with_values};

/// Computes the loss and its gradients in chunks of logits. `row_loss` as in [`linear_loss`].
pub(super) fn chunked_loss(
    hidden: &Tensor,
    weight: &Tensor,
    precision: Precision,
    row_loss: impl Fn(usize, &mut [f32]) -> f64 + Sync,
) -> Result<PrecomputedLoss> {
    let (rows, d) = hidden.dims2()?;
    let (vocabulary, _) = weight.dims2()?;
    let how = Matmul::multi_threaded(precision);
    let chunk = logit_chunk_rows(vocabulary).min(rows);
    let mut logits = vec![0f32; chunk * vocabulary];
    let mut dh = vec![0f32; rows * d];
    let mut dw = if requires_grad(weight) { vec![0f32; vocabulary * d] } else { Vec::new() };
    let loss = with_values([hidden, weight], |[h, w]| {
        let w = MatrixView::new(w, vocabulary, d);
        let mut loss = 0f64;
        for (at, (h, dh)) in h.chunks(chunk * d).zip(dh.chunks_mut(chunk * d)).enumerate() {
            let len = h.len() / d;
            let (h, logits) = (MatrixView::new(h, len, d), &mut logits[..len * vocabulary]);
            how.multiply_into(logits, vocabulary, h, w.transposed());
            let losses: Vec<f64> = logits
                .par_chunks_mut(vocabulary)
                .enumerate()
                .map(|(row, logits)| row_loss(at * chunk + row, logits))
                .collect();
            loss += losses.iter().sum::<f64>();
            let dlogits = MatrixView::new(logits, len, vocabulary);
            how.multiply_into(dh, d, dlogits, w);
            if !dw.is_empty() {
                how.with_accumulate(at > 0).multiply_into(&mut dw, d, dlogits.transposed(), h);
            }
        }
        loss
    })?;
    let dw = match dw.is_empty() {
        true => None,
        false => Some(Tensor::from_vec(dw, (vocabulary, d), hidden.device())?),
    };
    Ok(PrecomputedLoss { loss: loss as f32, dh: Tensor::from_vec(dh, (rows, d), hidden.device())?, dw })
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
pub(super) struct PrecomputedLoss {
    loss: f32,
    pub(super) dh: Tensor,
    pub(super) dw: Option<Tensor>,
}

impl CustomOp2 for PrecomputedLoss {
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
