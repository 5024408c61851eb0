//! Rotary position embedding (Su et al. 2021) in Hugging Face's half-split layout: element `i` of a head
//! pairs with element `i + dim/2`.
#![expect(unsafe_code, reason = "results in memory that holds nothing yet")]

use std::mem::MaybeUninit;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::uninit::fill_uninit;
use super::{ROWS_PER_TASK, contiguous_values, has_fused_kernel, with_values};

/// Cosines and sines for the rows of one batch, `[rows, dim / 2]` each.
#[derive(Clone)]
pub struct RotaryTables {
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
}

impl RotaryTables {
    /// Computes the tables for rows at `positions`, with one inverse frequency per pair. `magnitude` scales
    /// the rotated vectors (YaRN).
    pub fn new(positions: &[u32], inverse_frequencies: &[f32], magnitude: f32) -> Self {
        let half = inverse_frequencies.len();
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions.len() * half), Vec::with_capacity(positions.len() * half));
        for &position in positions {
            for &frequency in inverse_frequencies {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c * magnitude);
                sin.push(s * magnitude);
            }
        }
        Self { cos: Arc::new(cos), sin: Arc::new(sin), half }
    }

    /// Rotates every head of `x`: `[rows, heads * dim]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if has_fused_kernel(x) {
            x.contiguous()?.apply_op1(RotateOp { rotary: self.clone(), sign: 1.0 })
        } else {
            self.apply_reference(x)
        }
    }

    /// Plain form of [`Rotary::apply`].
    pub fn apply_reference(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let heads = width / (2 * self.half);
        let table = |values: &Vec<f32>| {
            Tensor::from_slice(values, (rows, 1, self.half), x.device())?.to_dtype(x.dtype())
        };
        let (cos, sin) = (table(&self.cos)?, table(&self.sin)?);
        let x = x.reshape((rows, heads, 2 * self.half))?;
        let (a, b) = (x.narrow(D::Minus1, 0, self.half)?, x.narrow(D::Minus1, self.half, self.half)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], D::Minus1)?.reshape((rows, width))
    }
}

struct RotateOp {
    rotary: RotaryTables,
    /// 1 rotates forward; -1 rotates back, which is the gradient.
    sign: f32,
}

impl RotateOp {
    fn rotate(&self, x: &[f32], width: usize) -> Vec<f32> {
        let half = self.rotary.half;
        assert!(
            x.len().is_multiple_of(width) && width.is_multiple_of(2 * half),
            "rope: heads of another size"
        );
        let rotate = |at: usize, out: &mut [MaybeUninit<f32>], x: &[f32]| {
            let (cos, sin) = (&self.rotary.cos[at..at + half], &self.rotary.sin[at..at + half]);
            for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                let ((oa, ob), (a, b)) = (out.split_at_mut(half), x.split_at(half));
                for i in 0..half {
                    let s = sin[i] * self.sign;
                    oa[i].write(a[i] * cos[i] - b[i] * s);
                    ob[i].write(b[i] * cos[i] + a[i] * s);
                }
            }
        };
        let fill = |out: &mut [MaybeUninit<f32>]| {
            let tasks = out.par_chunks_mut(width * ROWS_PER_TASK).zip(x.par_chunks(width * ROWS_PER_TASK));
            tasks.enumerate().for_each(|(task, (out, x))| {
                for (row, (out, x)) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
                    rotate((task * ROWS_PER_TASK + row) * half, out, x);
                }
            });
        };
        // SAFETY: rows consist of whole heads, and both halves of each head are written.
        unsafe { fill_uninit(x.len(), fill) }
    }
}

impl CustomOp1 for RotateOp {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        if rows * self.rotary.half != self.rotary.cos.len() {
            candle_core::bail!(
                "rope: {rows} rows, but tables for {}",
                self.rotary.cos.len() / self.rotary.half
            );
        }
        Ok((CpuStorage::F32(self.rotate(contiguous_values(storage, layout)?, width)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let width = x.dim(1)?;
        let back = RotateOp { rotary: self.rotary.clone(), sign: -self.sign };
        let dx = with_values([grad], |[grad]| back.rotate(grad, width))?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
