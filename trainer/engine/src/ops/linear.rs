//! A linear layer, `y = x Wᵀ`, whose backward pass computes only the gradients that are needed. A frozen
//! `W` costs no gradient. A frozen quantized `W` is dequantized only while in use (QLoRA, Dettmers et al.
//! 2023). With an adapter the layer stays one operation, so no second tensor as wide as the output exists.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor};

use super::product::{Matrix, Product};
use super::{Precision, fused, known, learns, values, with_values};

/// Computes `x Wᵀ`, `[rows, out]`, for `x`: `[rows, in]` and `weight`: `[out, in]`.
pub fn linear(x: &Tensor, weight: &Tensor, precision: Precision) -> Result<Tensor> {
    if fused(x) {
        x.contiguous()?.apply_op2(weight, Linear { precision })
    } else {
        of_stock(x, weight, &Frozen::Dense(weight.detach()), precision)
    }
}

/// Linear layer of candle operations. `frozen` holds the values of the weight; `weight` is the tensor that
/// may need a gradient.
fn of_stock(x: &Tensor, weight: &Tensor, frozen: &Frozen, precision: Precision) -> Result<Tensor> {
    let value = stock(&x.detach(), &frozen.dense(x.device())?.t()?, precision)?;
    if !learns(x) && !learns(weight) {
        return Ok(value);
    }
    let frozen = frozen.clone();
    // Gradients as in [`Linear`].
    let op = known::of_two("linear-stock", value, move |[x, weight], grad| {
        let grad = grad.detach().contiguous()?;
        let dx = learns(x).then(|| stock(&grad, &frozen.dense(x.device())?, precision));
        let dw = learns(weight).then(|| stock(&grad.t()?.contiguous()?, &x.detach(), precision));
        Ok((dx.transpose()?, dw.transpose()?))
    });
    x.apply_op2(weight, op)
}

/// Matrix product by candle. With `Bf16`, f32 products on a GPU run in bf16, including the result, as in
/// PyTorch's autocast.
pub(super) fn stock(x: &Tensor, y: &Tensor, precision: Precision) -> Result<Tensor> {
    if precision == Precision::Bf16 && x.dtype() == DType::F32 && !x.device().is_cpu() {
        return x.to_dtype(DType::BF16)?.matmul(&y.to_dtype(DType::BF16)?)?.to_dtype(DType::F32);
    }
    x.matmul(y)
}

/// A weight without gradients.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// An unquantized matrix.
    Dense(Tensor),
    /// A quantized matrix.
    Quantised(Arc<QTensor>),
}

impl Frozen {
    /// Returns the dequantized matrix.
    fn dense(&self, device: &Device) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.detach()),
            Self::Quantised(weight) => weight.dequantize(device),
        }
    }
}

/// Computes `x Wᵀ + scale (x Aᵀ) Bᵀ`, `[rows, out]`, with a frozen `W`: `[out, in]`, `a`: `[rank, in]` and
/// `b`: `[out, rank]` (LoRA).
pub fn linear_adapted(
    x: &Tensor,
    weight: &Frozen,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    precision: Precision,
) -> Result<Tensor> {
    if fused(x) {
        x.contiguous()?.apply_op3(a, b, Adapted { weight: weight.clone(), scale: scale as f32, precision })
    } else {
        // The operation needs a second graph input; a detached tensor takes the place of the frozen weight.
        let own = of_stock(x, &a.detach(), weight, precision)?;
        own + (linear(&linear(x, a, precision)?, b, precision)? * scale)?
    }
}

/// Plain form of [`linear_adapted`].
pub fn plain_adapted(x: &Tensor, weight: &Frozen, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let own = x.matmul(&weight.dense(x.device())?.t()?)?;
    own + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?
}

/// Returns `lhs * rhs` as a new tensor.
fn multiplied(lhs: Matrix<'_>, rhs: Matrix<'_>, how: Product) -> Result<Tensor> {
    Tensor::from_vec(how.of(lhs, rhs), (lhs.rows, rhs.columns), &Device::Cpu)
}

struct Linear {
    precision: Precision,
}

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
        let (x, weight) =
            (Matrix::new(values(s1, l1)?, rows, inner), Matrix::new(values(s2, l2)?, out, inner));
        let y = Product::shared(self.precision).of(x, weight.t());
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    /// With `g` the gradient of `y`: `dx = g W` and `dW = gᵀ x`.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, inner) = x.dims2()?;
        let out = weight.dim(0)?;
        let how = Product::shared(self.precision);
        let (dx, dw) = with_values([x, weight, grad], |[xs, ws, gs]| {
            let g = Matrix::new(gs, rows, out);
            let dx = learns(x).then(|| multiplied(g, Matrix::new(ws, out, inner), how));
            let dw = learns(weight).then(|| multiplied(g.t(), Matrix::new(xs, rows, inner), how));
            (dx, dw)
        })?;
        Ok((dx.transpose()?, dw.transpose()?))
    }
}

struct Adapted {
    weight: Frozen,
    scale: f32,
    precision: Precision,
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
        let x = Matrix::new(values(s1, l1)?, rows, inner);
        let (a, b) = (Matrix::new(values(s2, l2)?, rank, inner), Matrix::new(values(s3, l3)?, out, rank));
        let how = Product::shared(self.precision);
        let mut y = with_values([&self.weight.dense(&Device::Cpu)?], |[weight]| {
            how.of(x, Matrix::new(weight, out, inner).t())
        })?;
        let low = how.of(x, a.t());
        how.scaled(self.scale).adding(true).run(&mut y, out, Matrix::new(&low, rows, rank), b.t());
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    /// With `g` the gradient of `y`, `u = x Aᵀ` and `h = scale g B`: `dx = g W + h A`, `dA = hᵀ x`, `dB =
    /// scale gᵀ u`.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rows, inner) = x.dims2()?;
        let (rank, out) = (a.dim(0)?, b.dim(0)?);
        let how = Product::shared(self.precision);
        let weight = if learns(x) { Some(self.weight.dense(&Device::Cpu)?) } else { None };
        let (da, db, h) = with_values([x, a, b, grad], |[xs, aa, bs, gs]| {
            let (g, x) = (Matrix::new(gs, rows, out), Matrix::new(xs, rows, inner));
            let u = how.of(x, Matrix::new(aa, rank, inner).t());
            let h = how.scaled(self.scale).of(g, Matrix::new(bs, out, rank));
            let da = multiplied(Matrix::new(&h, rows, rank).t(), x, how);
            let db = multiplied(g.t(), Matrix::new(&u, rows, rank), how.scaled(self.scale));
            (da, db, h)
        })?;
        let dx = match weight {
            None => None,
            Some(weight) => Some(with_values([&weight, a, grad], |[ws, aa, gs]| {
                let mut dx = how.of(Matrix::new(gs, rows, out), Matrix::new(ws, out, inner));
                let (h, a) = (Matrix::new(&h, rows, rank), Matrix::new(aa, rank, inner));
                how.adding(true).run(&mut dx, inner, h, a);
                Tensor::from_vec(dx, (rows, inner), &Device::Cpu)
            })??),
        };
        Ok((dx, Some(da?), Some(db?)))
    }
}
