//! A linear layer, `y = x Wᵀ`, whose backward pass computes only the gradients that are needed. A frozen
//! `W` costs no gradient. A frozen quantized `W` is dequantized only while in use (QLoRA, Dettmers et al.
//! 2023). With an adapter the layer stays one operation, so no second tensor as wide as the output exists.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor};

use super::product::{Matmul, MatrixView};
use super::{Precision, contiguous_values, has_fused_kernel, known, requires_grad, with_values};

/// Computes `x Wᵀ`, `[rows, out]`, for `x`: `[rows, in]` and `weight`: `[out, in]`.
pub fn linear(x: &Tensor, weight: &Tensor, precision: Precision) -> Result<Tensor> {
    if has_fused_kernel(x) {
        x.contiguous()?.apply_op2(weight, LinearOp { precision })
    } else {
        unfused_linear(x, weight, &FrozenWeight::Dense(weight.detach()), precision)
    }
}

/// Linear layer of candle operations. `frozen` holds the values of the weight; `weight` is the tensor that
/// may need a gradient.
fn unfused_linear(
    x: &Tensor,
    weight: &Tensor,
    frozen: &FrozenWeight,
    precision: Precision,
) -> Result<Tensor> {
    let value = unfused_matmul(&x.detach(), &frozen.dequantized(x.device())?.t()?, precision)?;
    if !requires_grad(x) && !requires_grad(weight) {
        return Ok(value);
    }
    let frozen = frozen.clone();
    // Gradients as in [`Linear`].
    let op = known::binary("linear-stock", value, move |[x, weight], grad| {
        let grad = grad.detach().contiguous()?;
        let dx = requires_grad(x).then(|| unfused_matmul(&grad, &frozen.dequantized(x.device())?, precision));
        let dw =
            requires_grad(weight).then(|| unfused_matmul(&grad.t()?.contiguous()?, &x.detach(), precision));
        Ok((dx.transpose()?, dw.transpose()?))
    });
    x.apply_op2(weight, op)
}

/// Matrix product by candle. With `Bf16`, f32 products on a GPU run in bf16, including the result, as in
/// PyTorch's autocast.
pub(super) fn unfused_matmul(x: &Tensor, y: &Tensor, precision: Precision) -> Result<Tensor> {
    if precision == Precision::Bf16 && x.dtype() == DType::F32 && !x.device().is_cpu() {
        return x.to_dtype(DType::BF16)?.matmul(&y.to_dtype(DType::BF16)?)?.to_dtype(DType::F32);
    }
    x.matmul(y)
}

/// A weight without gradients.
#[derive(Debug, Clone)]
pub enum FrozenWeight {
    /// An unquantized matrix.
    Dense(Tensor),
    /// A quantized matrix.
    Quantised(Arc<QTensor>),
}

impl FrozenWeight {
    /// Returns the dequantized matrix.
    fn dequantized(&self, device: &Device) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.detach()),
            Self::Quantised(weight) => weight.dequantize(device),
        }
    }
}

/// Computes `x Wᵀ + scale (x Aᵀ) Bᵀ`, `[rows, out]`, with a frozen `W`: `[out, in]`, `a`: `[rank, in]` and
/// `b`: `[out, rank]` (LoRA).
pub fn lora_linear(
    x: &Tensor,
    weight: &FrozenWeight,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    precision: Precision,
) -> Result<Tensor> {
    if has_fused_kernel(x) {
        x.contiguous()?.apply_op3(
            a,
            b,
            LoraLinearOp { weight: weight.clone(), scale: scale as f32, precision },
        )
    } else {
        // The operation needs a second graph input; a detached tensor takes the place of the frozen weight.
        let own = unfused_linear(x, &a.detach(), weight, precision)?;
        own + (linear(&linear(x, a, precision)?, b, precision)? * scale)?
    }
}

/// Plain form of [`linear_adapted`].
pub fn reference_lora_linear(
    x: &Tensor,
    weight: &FrozenWeight,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let own = x.matmul(&weight.dequantized(x.device())?.t()?)?;
    own + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?
}

/// Returns `lhs * rhs` as a new tensor.
fn matmul_tensor(lhs: MatrixView<'_>, rhs: MatrixView<'_>, how: Matmul) -> Result<Tensor> {
    Tensor::from_vec(how.multiply(lhs, rhs), (lhs.rows, rhs.columns), &Device::Cpu)
}

struct LinearOp {
    precision: Precision,
}

impl CustomOp2 for LinearOp {
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
        let (x, weight) = (
            MatrixView::new(contiguous_values(s1, l1)?, rows, inner),
            MatrixView::new(contiguous_values(s2, l2)?, out, inner),
        );
        let y = Matmul::multi_threaded(self.precision).multiply(x, weight.transposed());
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
        let how = Matmul::multi_threaded(self.precision);
        let (dx, dw) = with_values([x, weight, grad], |[xs, ws, gs]| {
            let g = MatrixView::new(gs, rows, out);
            let dx = requires_grad(x).then(|| matmul_tensor(g, MatrixView::new(ws, out, inner), how));
            let dw = requires_grad(weight)
                .then(|| matmul_tensor(g.transposed(), MatrixView::new(xs, rows, inner), how));
            (dx, dw)
        })?;
        Ok((dx.transpose()?, dw.transpose()?))
    }
}

struct LoraLinearOp {
    weight: FrozenWeight,
    scale: f32,
    precision: Precision,
}

impl CustomOp3 for LoraLinearOp {
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
        let x = MatrixView::new(contiguous_values(s1, l1)?, rows, inner);
        let (a, b) = (
            MatrixView::new(contiguous_values(s2, l2)?, rank, inner),
            MatrixView::new(contiguous_values(s3, l3)?, out, rank),
        );
        let how = Matmul::multi_threaded(self.precision);
        let mut y = with_values([&self.weight.dequantized(&Device::Cpu)?], |[weight]| {
            how.multiply(x, MatrixView::new(weight, out, inner).transposed())
        })?;
        let low = how.multiply(x, a.transposed());
        how.with_scale(self.scale).with_accumulate(true).multiply_into(
            &mut y,
            out,
            MatrixView::new(&low, rows, rank),
            b.transposed(),
        );
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
        let how = Matmul::multi_threaded(self.precision);
        let weight = if requires_grad(x) { Some(self.weight.dequantized(&Device::Cpu)?) } else { None };
        let (da, db, h) = with_values([x, a, b, grad], |[xs, aa, bs, gs]| {
            let (g, x) = (MatrixView::new(gs, rows, out), MatrixView::new(xs, rows, inner));
            let u = how.multiply(x, MatrixView::new(aa, rank, inner).transposed());
            let h = how.with_scale(self.scale).multiply(g, MatrixView::new(bs, out, rank));
            let da = matmul_tensor(MatrixView::new(&h, rows, rank).transposed(), x, how);
            let db =
                matmul_tensor(g.transposed(), MatrixView::new(&u, rows, rank), how.with_scale(self.scale));
            (da, db, h)
        })?;
        let dx = match weight {
            None => None,
            Some(weight) => Some(with_values([&weight, a, grad], |[ws, aa, gs]| {
                let mut dx = how.multiply(MatrixView::new(gs, rows, out), MatrixView::new(ws, out, inner));
                let (h, a) = (MatrixView::new(&h, rows, rank), MatrixView::new(aa, rank, inner));
                how.with_accumulate(true).multiply_into(&mut dx, inner, h, a);
                Tensor::from_vec(dx, (rows, inner), &Device::Cpu)
            })??),
        };
        Ok((dx, Some(da?), Some(db?)))
    }
}
