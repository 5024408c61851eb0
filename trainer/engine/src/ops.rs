//! Operations of a decoder with their backward passes.
//!
//! Each operation has a fused CPU form (f32) and a plain form of differentiable candle operations. The
//! plain form is the reference of the tests and often serves other devices and types. candle's own fused
//! norm, rotary embedding and softmax are not used, because they drop gradients silently.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub mod attention;
pub mod attention_shape;
#[cfg(target_arch = "x86_64")]
mod bf16;
pub(crate) mod cached;
mod chunked_logits;
pub mod collective;
mod cpu_features;
pub mod exp;
#[cfg(feature = "flash-attn")]
mod flash;
pub(crate) mod known;
pub mod linear;
pub mod linear_loss;
pub mod log_prob;
mod matrix;
pub mod packed;
mod precision;
mod product;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod tiled;
mod uninit;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};

pub use self::precision::Precision;

/// Rows per parallel task in row-wise kernels.
pub(crate) const ROWS_PER_TASK: usize = 128;

/// Returns whether the fused CPU form applies to `x`: f32 on the CPU.
pub fn has_fused_kernel(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Returns the f32 values of a storage. Fails unless the layout is contiguous.
pub(crate) fn contiguous_values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("a fused operation needs contiguous input"),
    }
}

/// Calls `f` with the f32 values of CPU tensors. Copies only tensors that are not contiguous.
pub fn with_values<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> R) -> Result<R> {
    let contiguous = tensors.map(Tensor::contiguous);
    let mut owned = Vec::with_capacity(N);
    for tensor in contiguous {
        owned.push(tensor?);
    }
    let guards: Vec<_> = owned.iter().map(Tensor::storage_and_layout).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slot, (storage, layout)) in slices.iter_mut().zip(&guards) {
        match &**storage {
            Storage::Cpu(cpu) => *slot = contiguous_values(cpu, layout)?,
            _ => candle_core::bail!("a fused operation needs a CPU tensor"),
        }
    }
    Ok(f(slices))
}

/// Returns the number of rows of logits per chunk: about 32 MiB of f32, from 16 to 4096 rows.
fn logit_chunk_rows(vocabulary: usize) -> usize {
    const CHUNK_LOGITS: usize = 8 << 20;
    (CHUNK_LOGITS / vocabulary).clamp(16, 4096)
}

/// Returns whether `x` needs a gradient: a variable, or computed from one.
fn requires_grad(x: &Tensor) -> bool {
    x.track_op()
}

/// Dot product in 16 lanes, so that the compiler can vectorize. The order of additions is fixed.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..16 {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Sum in 16 lanes, in a fixed order.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = values.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] += chunk[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Computes `Σ exp(value - max)` in 16 lanes.
#[inline(always)]
pub(crate) fn sum_exp(values: &[f32], max: f32) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = values.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().map(|value| exp::exp(value - max)).sum();
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] += exp::exp(chunk[i] - max);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Largest value, in 16 lanes. NaN is ignored.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    // `f32::max` would check both operands for NaN.
    let larger = |most: f32, value: f32| if value > most { value } else { most };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(16);
    let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    lanes.into_iter().fold(tail, larger)
}

/// Computes `out += a * x`.
#[inline(always)]
pub(crate) fn axpy(a: f32, x: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out = a.mul_add(*x, *out));
}

/// Softmax in place.
#[inline(always)]
pub(crate) fn softmax(scores: &mut [f32]) {
    let max = max(scores);
    scores.iter_mut().for_each(|score| *score = exp::exp(*score - max));
    let inverse = 1.0 / sum(scores);
    scores.iter_mut().for_each(|score| *score *= inverse);
}

/// Returns a reproducible generator of values from -1 to 1 for tests (xorshift, Marsaglia 2003).
#[cfg(test)]
fn test_noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
