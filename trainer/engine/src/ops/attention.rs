//! Causal grouped-query attention over a ragged batch.
//!
//! Rows of all sequences are concatenated. A [`Segment`] gives the rows of one sequence and the number of
//! its earlier keys. Training and prefill use the same kernel: scores of 64 query rows at a time. The
//! backward pass recomputes the probabilities, so memory is `O(rows)`, never `O(rows²)`.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

pub use super::attention_shape::{AttentionHeads, Segment};
use super::product::{Matmul, MatrixView};
use super::tiled::{self, group_queries, split_heads, tiled_attention, ungroup_queries};
use super::{Precision, axpy, contiguous_values, dot, has_fused_kernel, softmax, with_values};

/// Query rows per tile.
pub(crate) const TILE_ROWS: usize = 64;
/// Largest number of rows for which dot products are faster than a matrix product, which packs its inputs
/// first.
pub(crate) const MAX_DOT_ROWS: usize = 4;

/// Computes attention of every segment over its own rows (`past` = 0), with a backward pass. `q`: `[rows,
/// query * dim]`; `k` and `v`: `[rows, kv * dim]`; the result has the shape of `q`.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: AttentionHeads,
    segments: &Arc<Vec<Segment>>,
    precision: Precision,
) -> Result<Tensor> {
    if has_fused_kernel(q) {
        let op = AttentionOp { heads, segments: Arc::clone(segments), precision };
        q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
    } else {
        unfused_attention([q, k, v], heads, segments)
    }
}

/// Attention on other devices and types, where no fused form exists. Each segment's rows attend to its
/// `past + len` keys, which are concatenated by segment in `k` and `v`.
pub(crate) fn unfused_attention(
    [q, k, v]: [&Tensor; 3],
    heads: AttentionHeads,
    segments: &[Segment],
) -> Result<Tensor> {
    #[cfg(feature = "flash-attn")]
    if let Some(out) = super::flash::flash([q, k, v], heads, segments)? {
        return Ok(out);
    }
    let mut parts = Vec::with_capacity(segments.len());
    let mut first = 0;
    for s in segments {
        let keys = s.past + s.len;
        let (k, v) = (k.narrow(0, first, keys)?, v.narrow(0, first, keys)?);
        parts.push(tiled_attention(&q.narrow(0, s.start, s.len)?, &k, &v, heads, s.past)?);
        first += keys;
    }
    Tensor::cat(&parts, 0)
}

/// Plain form for one sequence; the rows of `q` follow the first `past` keys.
pub fn reference_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: AttentionHeads,
    past: usize,
) -> Result<Tensor> {
    let (q, k, v) = (group_queries(q, heads)?, split_heads(k, heads)?, split_heads(v, heads)?);
    let probs = tiled::causal_softmax(&q, &k, heads, past)?.to_dtype(v.dtype())?;
    ungroup_queries(&probs.matmul(&v)?, heads)
}

/// Attention of one sequence's rows over themselves, on the calling thread.
fn attend_segment(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    heads: AttentionHeads,
    precision: Precision,
    out: &mut [f32],
) {
    let (qw, kw) = (heads.query_width(), heads.kv_width());
    let q_rows = q.len() / qw;
    for kv in 0..heads.kv {
        let k0 = kv * heads.dim;
        for head in heads.query_group(kv) {
            let q0 = head * heads.dim;
            let out = (&mut out[q0..], qw);
            let (q, kv) = ((&q[q0..], qw), (&k[k0..], &v[k0..], kw));
            attend_head(q, kv, heads, 0, q_rows, precision, out);
        }
    }
}

/// Attention of one head: `rows` queries over `past + rows` keys and values. Each slice comes with the
/// distance between its rows; `k` and `v` share theirs.
pub(crate) fn attend_head(
    (q, q_stride): (&[f32], usize),
    (k, v, kv_stride): (&[f32], &[f32], usize),
    heads: AttentionHeads,
    past: usize,
    rows: usize,
    precision: Precision,
    (out, out_stride): (&mut [f32], usize),
) {
    let mut scores = Vec::new();
    for first in (0..rows).step_by(TILE_ROWS) {
        let tile = TILE_ROWS.min(rows - first);
        let keys = past + first + tile;
        let q = MatrixView::strided(&q[first * q_stride..], tile, heads.dim, q_stride);
        causal_softmax(q, MatrixView::strided(k, keys, heads.dim, kv_stride), heads, precision, &mut scores);
        let v = MatrixView::strided(v, keys, heads.dim, kv_stride);
        weighted_sum(
            MatrixView::new(&scores, tile, keys),
            v,
            precision,
            &mut out[first * out_stride..],
            out_stride,
        );
    }
}

/// Causal softmax of `q` over `k`, in which the last query row sees all keys. Fills `scores`, `[rows,
/// keys]`, with zeros above the diagonal.
fn causal_softmax(
    q: MatrixView<'_>,
    k: MatrixView<'_>,
    heads: AttentionHeads,
    precision: Precision,
    scores: &mut Vec<f32>,
) {
    let (rows, keys) = (q.rows, k.rows);
    scores.clear();
    scores.resize(rows * keys, 0.0);
    if rows <= MAX_DOT_ROWS {
        for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
            let q = q.row(row);
            for (key, score) in scores.iter_mut().enumerate() {
                *score = heads.score_scale() * dot(q, k.row(key));
            }
        }
    } else {
        Matmul::single_threaded(precision).with_scale(heads.score_scale()).multiply_into(
            scores,
            keys,
            q,
            k.transposed(),
        );
    }
    for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
        let (seen, unseen) = scores.split_at_mut(keys - rows + row + 1);
        softmax(seen);
        unseen.fill(0.0);
    }
}

/// Computes `out[row] = Σ scores[row][key] * v[key]`.
fn weighted_sum(
    scores: MatrixView<'_>,
    v: MatrixView<'_>,
    precision: Precision,
    out: &mut [f32],
    out_stride: usize,
) {
    if scores.rows <= MAX_DOT_ROWS {
        for row in 0..scores.rows {
            let out = &mut out[row * out_stride..row * out_stride + v.columns];
            out.fill(0.0);
            for (key, &score) in scores.row(row).iter().enumerate() {
                axpy(score, v.row(key), out);
            }
        }
    } else {
        Matmul::single_threaded(precision).multiply_into(out, out_stride, scores, v);
    }
}

struct AttentionOp {
    heads: AttentionHeads,
    segments: Arc<Vec<Segment>>,
    precision: Precision,
}

/// Splits `data` into the rows of each segment. Segments are in order and cover all rows.
fn split_by_segment<'a>(data: &'a mut [f32], segments: &[Segment], width: usize) -> Vec<&'a mut [f32]> {
    let mut rest = data;
    let mut parts = Vec::with_capacity(segments.len());
    for segment in segments {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(segment.len * width);
        parts.push(part);
        rest = tail;
    }
    parts
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        "attention"
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
        let (q, k, v) = (contiguous_values(s1, l1)?, contiguous_values(s2, l2)?, contiguous_values(s3, l3)?);
        let (qw, kw) = (self.heads.query_width(), self.heads.kv_width());
        let mut out = vec![0f32; q.len()];
        split_by_segment(&mut out, &self.segments, qw)
            .into_par_iter()
            .zip(self.segments.par_iter())
            .for_each(|(out, s)| {
                let rows = |data: &'_ [f32], width: usize| -> Range<usize> {
                    debug_assert!((s.start + s.len) * width <= data.len());
                    s.start * width..(s.start + s.len) * width
                };
                let (q, k, v) = (&q[rows(q, qw)], &k[rows(k, kw)], &v[rows(v, kw)]);
                attend_segment(q, k, v, self.heads, self.precision, out);
            });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (qw, kw) = (self.heads.query_width(), self.heads.kv_width());
        let (dq, dk, dv) = with_values([q, k, v, grad], |[qd, kd, vd, gd]| {
            let (mut dq, mut dk, mut dv) = (vec![0f32; qd.len()], vec![0f32; kd.len()], vec![0f32; vd.len()]);
            split_by_segment(&mut dq, &self.segments, qw)
                .into_par_iter()
                .zip(split_by_segment(&mut dk, &self.segments, kw))
                .zip(split_by_segment(&mut dv, &self.segments, kw))
                .zip(self.segments.par_iter())
                .for_each(|(((dq, dk), dv), s)| {
                    let (qr, kr) =
                        (s.start * qw..(s.start + s.len) * qw, s.start * kw..(s.start + s.len) * kw);
                    let inputs = [&qd[qr.clone()], &kd[kr.clone()], &vd[kr], &gd[qr]];
                    self.segment_backward(s.len, inputs, dq, dk, dv);
                });
            (dq, dk, dv)
        })?;
        Ok((
            Some(Tensor::from_vec(dq, q.shape(), q.device())?),
            Some(Tensor::from_vec(dk, k.shape(), q.device())?),
            Some(Tensor::from_vec(dv, v.shape(), q.device())?),
        ))
    }
}

impl AttentionOp {
    /// Backward pass of one segment. With `P` the probabilities and `g` the gradient of the output: `dV =
    /// Pᵀ g`, `dP = g Vᵀ`, `dS = P ∘ (dP - rowsum(P ∘ dP))`, `dQ = scale dS K`, `dK = scale dSᵀ Q`.
    fn segment_backward(
        &self,
        rows: usize,
        [q, k, v, g]: [&[f32]; 4],
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let heads = self.heads;
        let (qw, kw, dim) = (heads.query_width(), heads.kv_width(), heads.dim);
        let (mut probs, mut dprobs) = (Vec::new(), Vec::new());
        let how = Matmul::single_threaded(self.precision);
        for kv in 0..heads.kv {
            let k0 = kv * dim;
            for head in heads.query_group(kv) {
                for first in (0..rows).step_by(TILE_ROWS) {
                    let tile = TILE_ROWS.min(rows - first);
                    let keys = first + tile;
                    let q0 = first * qw + head * dim;
                    let (q, g) = (
                        MatrixView::strided(&q[q0..], tile, dim, qw),
                        MatrixView::strided(&g[q0..], tile, dim, qw),
                    );
                    let (k, v) = (
                        MatrixView::strided(&k[k0..], keys, dim, kw),
                        MatrixView::strided(&v[k0..], keys, dim, kw),
                    );
                    causal_softmax(q, k, heads, self.precision, &mut probs);
                    let p = MatrixView::new(&probs, tile, keys);
                    how.with_accumulate(true).multiply_into(&mut dv[k0..], kw, p.transposed(), g);
                    dprobs.clear();
                    dprobs.resize(tile * keys, 0.0);
                    how.multiply_into(&mut dprobs, keys, g, v.transposed());
                    for (p, dp) in probs.chunks_exact(keys).zip(dprobs.chunks_exact_mut(keys)) {
                        let row_sum = dot(p, dp);
                        dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - row_sum));
                    }
                    let ds = MatrixView::new(&dprobs, tile, keys);
                    let how = how.with_scale(heads.score_scale());
                    how.multiply_into(&mut dq[q0..], qw, ds, k);
                    how.with_accumulate(true).multiply_into(&mut dk[k0..], kw, ds.transposed(), q);
                }
            }
        }
    }
}
