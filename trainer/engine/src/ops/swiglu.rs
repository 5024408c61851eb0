//! SwiGLU (Shazeer 2020): `silu(gate) * up`, element by element.
#![expect(unsafe_code, reason = "results in memory that holds nothing yet")]

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::exp::sigmoid;
use super::uninit::fill_uninit;
use super::{contiguous_values, has_fused_kernel, with_values};

/// Values per parallel task.
const VALUES_PER_TASK: usize = 1 << 14;

/// Computes `silu(gate) * up`. Inputs and result have the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if has_fused_kernel(gate) {
        gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGluOp)
    } else {
        reference_swiglu(gate, up)
    }
}

/// Plain form of [`swiglu`].
pub fn reference_swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

struct SwiGluOp;

impl CustomOp2 for SwiGluOp {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (contiguous_values(s1, l1)?, contiguous_values(s2, l2)?);
        if gate.len() != up.len() {
            candle_core::bail!("swiglu: {} values gate {}", gate.len(), up.len());
        }
        let fill = |out: &mut [MaybeUninit<f32>]| {
            let tasks = out
                .par_chunks_mut(VALUES_PER_TASK)
                .zip(gate.par_chunks(VALUES_PER_TASK))
                .zip(up.par_chunks(VALUES_PER_TASK));
            tasks.for_each(|((out, gate), up)| {
                for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                    out.write(g * sigmoid(*g) * u);
                }
            });
        };
        // SAFETY: inputs and output have the same length, so each value is written.
        let out = unsafe { fill_uninit(gate.len(), fill) };
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dgate, dup) = with_values([gate, up, grad], |[gate, up, grad]| {
            let (mut dgate, mut dup) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
            dgate
                .par_chunks_mut(VALUES_PER_TASK)
                .zip(dup.par_chunks_mut(VALUES_PER_TASK))
                .enumerate()
                .for_each(|(chunk, (dgate, dup))| {
                    let start = chunk * VALUES_PER_TASK;
                    let end = start + dgate.len();
                    let (gate, up, grad) = (&gate[start..end], &up[start..end], &grad[start..end]);
                    for i in 0..gate.len() {
                        let s = sigmoid(gate[i]);
                        let silu = gate[i] * s;
                        dup[i] = grad[i] * silu;
                        dgate[i] = grad[i] * up[i] * (s + silu * (1.0 - s));
                    }
                });
            (dgate, dup)
        })?;
        Ok((
            Some(Tensor::from_vec(dgate, gate.shape(), gate.device())?),
            Some(Tensor::from_vec(dup, up.shape(), up.device())?),
        ))
    }
}
