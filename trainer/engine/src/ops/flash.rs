//! Attention by FlashAttention-2 (Dao 2023) through candle's kernels: CUDA, 16 bits, forward only. Requires
//! the feature `flash-attn`.

use candle_core::{DType, Result, Tensor};
use candle_flash_attn::flash_attn_varlen;

use super::attention_shape::{AttentionHeads, Segment};
use super::requires_grad;

/// Largest head size that the kernels support.
const LARGEST_HEAD: usize = 512;

/// Computes causal attention of every segment's rows over `past + len` keys each. Keys and values of the
/// segments are concatenated in `k` and `v`. Returns `None` if the kernels do not support device, type,
/// head size or gradients.
pub(super) fn flash(
    [q, k, v]: [&Tensor; 3],
    heads: AttentionHeads,
    segments: &[Segment],
) -> Result<Option<Tensor>> {
    let known = matches!(q.dtype(), DType::BF16 | DType::F16) && heads.dim.is_multiple_of(8);
    if !q.device().is_cuda() || !known || heads.dim > LARGEST_HEAD || requires_grad(q) {
        return Ok(None);
    }
    let split = |x: &Tensor, count: usize| x.contiguous()?.reshape((x.dim(0)?, count, heads.dim));
    let ends = |length: fn(&Segment) -> usize| {
        let mut end = 0;
        let after = segments.iter().map(|segment| {
            end += length(segment) as u32;
            end
        });
        let ends: Vec<u32> = std::iter::once(0).chain(after).collect();
        let longest = segments.iter().map(length).max().unwrap_or(0);
        Tensor::new(ends, q.device()).map(|ends| (ends, longest))
    };
    let (rows, most_rows) = ends(|segment| segment.len)?;
    let (keys, most_keys) = ends(|segment| segment.past + segment.len)?;
    let (q, k, v) = (split(q, heads.query)?, split(k, heads.kv)?, split(v, heads.kv)?);
    let out = flash_attn_varlen(&q, &k, &v, &rows, &keys, most_rows, most_keys, heads.score_scale(), true)?;
    out.reshape((out.dim(0)?, heads.query_width())).map(Some)
}
