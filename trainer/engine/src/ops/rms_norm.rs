//! RMSNorm (Zhang and Sennrich 2019) over the last dimension: `y = x / sqrt(mean(x²) + eps) * weight`.
#![expect(unsafe_code, reason = "results in memory that holds nothing yet")]

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::uninit::fill_uninit;
use super::{ROWS_PER_TASK, contiguous_values, dot, has_fused_kernel, with_values};

/// Computes RMSNorm of `x`: `[.., d]` with `weight`: `[d]`. The result has the shape of `x`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if has_fused_kernel(x) {
        x.contiguous()?.apply_op2(weight, RmsNormOp { eps: eps as f32 })
    } else {
        reference_rms_norm(x, weight, eps)
    }
}

/// Plain form of [`rms_norm`].
pub fn reference_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + eps)?.sqrt()?)?.broadcast_mul(weight)
}

struct RmsNormOp {
    eps: f32,
}

impl RmsNormOp {
    fn inverse_rms(&self, row: &[f32]) -> f32 {
        1.0 / (dot(row, row) / row.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNormOp {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (contiguous_values(s1, l1)?, contiguous_values(s2, l2)?);
        let d = weight.len();
        let fill = |out: &mut [MaybeUninit<f32>]| {
            let tasks = out.par_chunks_mut(d * ROWS_PER_TASK).zip(x.par_chunks(d * ROWS_PER_TASK));
            tasks.for_each(|(out, x)| {
                for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    let r = self.inverse_rms(x);
                    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                        out.write(x * r * w);
                    }
                }
            });
        };
        // SAFETY: input and output consist of the same number of whole rows of `d` values, so each value is
        // written.
        let out = unsafe { fill_uninit(x.len() / d * d, fill) };
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = with_values([x, weight, grad], |[x, weight, grad]| {
            let d = weight.len();
            let mut dx = vec![0f32; x.len()];
            let parts: Vec<Vec<f32>> = dx
                .par_chunks_mut(d * ROWS_PER_TASK)
                .zip(x.par_chunks(d * ROWS_PER_TASK))
                .zip(grad.par_chunks(d * ROWS_PER_TASK))
                .map(|((dx, x), g)| {
                    let mut dw = vec![0f32; d];
                    for ((dx, x), g) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(g.chunks_exact(d)) {
                        let r = self.inverse_rms(x);
                        let dot: f32 = g.iter().zip(weight).zip(x).map(|((g, w), x)| g * w * x).sum();
                        let back = dot * r * r * r / d as f32;
                        for i in 0..d {
                            dx[i] = r * g[i] * weight[i] - x[i] * back;
                            dw[i] += g[i] * x[i] * r;
                        }
                    }
                    dw
                })
                .collect();
            let mut dw = vec![0f32; d];
            for part in parts {
                dw.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
            (dx, dw)
        })?;
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dw, weight.shape(), x.device())?),
        ))
    }
}
