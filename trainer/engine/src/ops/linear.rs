//! A linear layer, `y = x Wᵀ`, whose backward pass computes only what somebody asks for: a frozen `W` costs no gradient,
//! and a frozen quantised `W` is unpacked for the moment of its use (QLoRA, Dettmers et al. 2023). With an adapter over it the
//! layer is one operation, so that nothing as wide as its output is held twice.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::product::Product;
use super::{fused, learns, values};

/// `x`: `[rows, in]`, `weight`: `[out, in]`; the result is `[rows, out]`.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if fused(x) { x.contiguous()?.apply_op2(weight, Linear) } else { x.matmul(&weight.t()?) }
}

/// A weight that never learns.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// As it is.
    Dense(Tensor),
    /// In few bits.
    Quantised(Arc<QTensor>),
}

impl Frozen {
    fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.detach()),
            Self::Quantised(weight) => weight.dequantize(&candle_core::Device::Cpu),
        }
    }
}

/// `y = x Wᵀ + scale (x Aᵀ) Bᵀ` with a frozen `W`: `a` is `[rank, in]`, `b` is `[out, rank]`.
pub fn linear_adapted(x: &Tensor, weight: &Frozen, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    if fused(x) {
        x.contiguous()?.apply_op3(a, b, Adapted { weight: weight.clone(), scale: scale as f32 })
    } else {
        plain_adapted(x, weight, a, b, scale)
    }
}

/// The plain twin.
pub fn plain_adapted(x: &Tensor, weight: &Frozen, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let own = x.matmul(&weight.dense()?.to_device(x.device())?.t()?)?;
    own + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?
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

struct Adapted {
    weight: Frozen,
    scale: f32,
}

impl CustomOp3 for Adapted {
    fn name(&self) -> &'static str {
        "linear-adapted"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, inner) = l1.shape().dims2()?;
        let (rank, _) = l2.shape().dims2()?;
        let (out, _) = l3.shape().dims2()?;
        let (x, a, b) = (values(s1, l1)?, values(s2, l2)?, values(s3, l3)?);
        let weight = self.weight.dense()?;
        let mut y = super::with_values([&weight], |[weight]| forward(x, weight, rows, inner, out))?;
        let low = forward(x, a, rows, inner, rank);
        let threads = rayon::current_num_threads();
        let product = Product { m: rows, n: out, k: rank, scale: self.scale, add: true, threads };
        product.run(&mut y, (out, 1), &low, (rank, 1), b, (1, rank));
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    /// With `u = x Aᵀ` and `h = scale g B`: `dx = g W + h A`, `dA = hᵀ x`, `dB = scale gᵀ u`.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wide = learns(x);
        let (x, a, b) = (x.detach(), a.detach(), b.detach());
        let scale = f64::from(self.scale);
        let h = (grad.matmul(&b)? * scale)?;
        let da = h.t()?.matmul(&x)?;
        let db = (grad.t()?.matmul(&x.matmul(&a.t()?)?)? * scale)?;
        let dx = if wide { Some((grad.matmul(&self.weight.dense()?)? + h.matmul(&a)?)?) } else { None };
        Ok((dx, Some(da), Some(db)))
    }
}
