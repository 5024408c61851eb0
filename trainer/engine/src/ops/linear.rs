//! A linear layer, `y = x Wᵀ`, whose backward pass computes only what somebody asks for: a frozen `W` costs no gradient,
//! and a frozen quantised `W` is unpacked for the moment of its use (QLoRA, Dettmers et al. 2023).

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::product::Product;
use super::{fused, learns, values};

/// `x`: `[rows, in]`, `weight`: `[out, in]`; the result is `[rows, out]`.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if fused(x) { x.contiguous()?.apply_op2(weight, Linear) } else { x.matmul(&weight.t()?) }
}

/// The same with a weight that is kept in few bits and never learns.
pub fn linear_quantised(x: &Tensor, weight: &Arc<QTensor>) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Quantised { weight: Arc::clone(weight) })
}

fn forward(x: &[f32], weight: &[f32], rows: usize, inner: usize, out: usize) -> Vec<f32> {
    let mut y = vec![0f32; rows * out];
    let threads = rayon::current_num_threads();
    let product = Product { m: rows, n: out, k: inner, scale: 1.0, add: false, threads };
    product.run(&mut y, (out, 1), x, (inner, 1), weight, (1, inner));
    y
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, inner) = l1.shape().dims2()?;
        let (out, width) = l2.shape().dims2()?;
        if inner != width {
            candle_core::bail!("linear: rows of {inner} values, but a weight for {width}");
        }
        let y = forward(values(s1, l1)?, values(s2, l2)?, rows, inner, out);
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    /// `dx = g W`, `dW = gᵀ x`.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = if learns(x) { Some(grad.matmul(&weight.detach())?) } else { None };
        let dw = if learns(weight) { Some(grad.t()?.matmul(&x.detach())?) } else { None };
        Ok((dx, dw))
    }
}

struct Quantised {
    weight: Arc<QTensor>,
}

impl CustomOp1 for Quantised {
    fn name(&self) -> &'static str {
        "linear-quantised"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inner) = layout.shape().dims2()?;
        let (out, _) = self.weight.shape().dims2()?;
        let weight = self.weight.dequantize(&candle_core::Device::Cpu)?;
        let x = values(storage, layout)?;
        let y = super::with_values([&weight], |[weight]| forward(x, weight, rows, inner, out))?;
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    fn bwd(&self, _x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.matmul(&self.weight.dequantize(grad.device())?)?))
    }
}
