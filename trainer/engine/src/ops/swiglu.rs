//! SwiGLU (Shazeer 2020): `silu(gate) * up`, element by element.
#![expect(unsafe_code, reason = "results in memory that holds nothing yet")]

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::exp::sigmoid;
use super::{filled, fused, values, with_values};

/// Values per parallel task.
const CHUNK: usize = 1 << 14;

/// Computes `silu(gate) * up`. Inputs and result have the same shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if fused(gate) { gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu) } else { plain(gate, up) }
}

/// Plain form of [`swiglu`].
pub fn plain(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
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
        let (gate, up) = (values(s1, l1)?, values(s2, l2)?);
        if gate.len() != up.len() {
            candle_core::bail!("swiglu: {} values gate {}", gate.len(), up.len());
        }
        let fill = |out: &mut [MaybeUninit<f32>]| {
            let tasks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
            tasks.for_each(|((out, gate), up)| {
                for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                    out.write(g * sigmoid(*g) * u);
                }
            });
        };
        // SAFETY: inputs and output have the same length, so each value is written.
        let out = unsafe { filled(gate.len(), fill) };
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
            dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK)).enumerate().for_each(
                |(chunk, (dgate, dup))| {
                    let start = chunk * CHUNK;
                    let end = start + dgate.len();
                    let (gate, up, grad) = (&gate[start..end], &up[start..end], &grad[start..end]);
                    for i in 0..gate.len() {
                        let s = sigmoid(gate[i]);
                        let silu = gate[i] * s;
                        dup[i] = grad[i] * silu;
                        dgate[i] = grad[i] * up[i] * (s + silu * (1.0 - s));
                    }
                },
            );
            (dgate, dup)
        })?;
        Ok((
            Some(Tensor::from_vec(dgate, gate.shape(), gate.device())?),
            Some(Tensor::from_vec(dup, up.shape(), up.device())?),
        ))
    }
}
