//! Operations of a decoder with their backward pass.
//!
//! Each has a fused CPU form (f32) and a plain twin made of stock differentiable tensor operations. The plain form runs
//! on every other device and type, and is the reference that the tests hold the fused form against. candle's own fused
//! norm, rotary and softmax are not used: they drop gradients without a word.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16;
pub(crate) mod cached;
pub mod collective;
pub mod exp;
mod filled;
#[cfg(feature = "flash-attn")]
mod flash;
pub(crate) mod known;
pub mod linear;
pub mod linear_loss;
pub mod log_prob;
pub mod packed;
mod product;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod tiled;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};

use self::filled::filled;

/// What the two sides of a product are rounded to; sums are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// To eight bits of mantissa, where the processor has instructions for it (AMX-BF16 or AVX512-BF16); elsewhere not at
    /// all.
    Bf16,
}

impl Precision {
    /// What is computed here when this is asked for.
    pub fn here(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        let available = bf16::available();
        #[cfg(not(target_arch = "x86_64"))]
        let available = false;
        if available { self } else { Self::F32 }
    }

    /// As recipes and reports write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Rows that one parallel task takes in row-wise kernels.
pub(crate) const ROWS_PER_TASK: usize = 128;

/// Whether the fused CPU form applies.
pub fn fused(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// The contiguous f32 values behind a storage and its layout.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("a fused operation needs contiguous input"),
    }
}

/// Runs `f` over the values of contiguous CPU tensors without copying them.
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
            Storage::Cpu(cpu) => *slot = values(cpu, layout)?,
            _ => candle_core::bail!("a fused operation needs a CPU tensor"),
        }
    }
    Ok(f(slices))
}

/// Rows of logits that are worked on at once: they stay near 32 MiB of f32.
fn logit_rows(vocabulary: usize) -> usize {
    const VALUES: usize = 8 << 20;
    (VALUES / vocabulary).clamp(16, 4096)
}

/// Whether `x` is worth a gradient: a variable, or computed from one.
fn learns(x: &Tensor) -> bool {
    x.track_op()
}

/// Sum of products in 16 lanes, so that the compiler may vectorise it; the order of additions is fixed.
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

/// Sum in 16 lanes.
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

/// `Σ exp(value - max)` in 16 lanes.
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

/// Largest value, in 16 lanes; what is no number is passed over.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    // `f32::max` would look at both sides.
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

/// `out += a * x`.
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

/// Numbers from -1 to 1 for tests, the same for the same seed (xorshift, Marsaglia 2003).
#[cfg(test)]
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
