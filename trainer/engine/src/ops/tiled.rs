//! Attention of one sequence by candle operations, where no fused form exists. Both directions process
//! tiles of query rows. The backward pass recomputes the probabilities, so memory is one tile, never
//! `O(rows²)`.

use candle_core::{D, DType, Device, Result, Tensor};

use super::attention_shape::AttentionHeads;
use super::{known, requires_grad};

/// Maximum number of scores per tile: 256 MiB of f32.
const MAX_TILE_SCORES: usize = 64 << 20;

/// Causal attention; the rows of `q` follow the first `past` keys. Shapes as in
/// [`super::attention::plain`].
pub(super) fn tiled_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: AttentionHeads,
    past: usize,
) -> Result<Tensor> {
    let rows = (MAX_TILE_SCORES / (heads.query * k.dim(0)?)).clamp(16, 1024);
    attention_in_tiles(q, k, v, (heads, past), rows)
}

/// Attention in tiles of `at_once` rows.
fn attention_in_tiles(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (heads, past): (AttentionHeads, usize),
    at_once: usize,
) -> Result<Tensor> {
    let all = TiledAttention { heads, past, at_once };
    let value = all.forward(&q.detach(), &k.detach(), &v.detach())?;
    if [q, k, v].into_iter().any(requires_grad) {
        let op = known::ternary("attention-tiled", value, move |inputs, grad| all.backward(inputs, grad));
        q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
    } else {
        Ok(value)
    }
}

#[derive(Clone, Copy)]
struct TiledAttention {
    heads: AttentionHeads,
    past: usize,
    at_once: usize,
}

impl TiledAttention {
    /// Returns first row and number of rows of each tile.
    fn tile_ranges(self, rows: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..rows).step_by(self.at_once).map(move |first| (first, self.at_once.min(rows - first)))
    }

    fn forward(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (k, v) = (split_heads(k, self.heads)?, split_heads(v, self.heads)?);
        let parts = self.tile_ranges(q.dim(0)?).map(|(first, rows)| {
            let keys = self.past + first + rows;
            let q = group_queries(&q.narrow(0, first, rows)?, self.heads)?;
            let (k, v) = (k.narrow(1, 0, keys)?.contiguous()?, v.narrow(1, 0, keys)?.contiguous()?);
            let probs = causal_softmax(&q, &k, self.heads, self.past + first)?;
            ungroup_queries(&probs.to_dtype(v.dtype())?.matmul(&v)?, self.heads)
        });
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    }

    /// Backward pass. With `P` the probabilities and `D = dO Vᵀ`: `dV = Pᵀ dO`, `dS = P (D - Σ P D)`, `dQ =
    /// scale dS K`, `dK = scale dSᵀ Q`.
    fn backward(
        self,
        [q, k, v]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (heads, scale) = (self.heads, f64::from(self.heads.score_scale()));
        let (q, grad) = (q.detach(), grad.detach());
        let (k, v) = (split_heads(&k.detach(), heads)?, split_heads(&v.detach(), heads)?);
        let all_keys = k.dim(1)?;
        let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
        for (first, rows) in self.tile_ranges(q.dim(0)?) {
            let keys = self.past + first + rows;
            let (q, grad) = (q.narrow(0, first, rows)?, grad.narrow(0, first, rows)?);
            let (q, grad) = (group_queries(&q, heads)?, group_queries(&grad, heads)?);
            let (k, v) = (k.narrow(1, 0, keys)?.contiguous()?, v.narrow(1, 0, keys)?.contiguous()?);
            let probs = causal_softmax(&q, &k, heads, self.past + first)?.to_dtype(v.dtype())?;
            let behind = |part: Tensor| part.pad_with_zeros(1, 0, all_keys - keys);
            dv = (dv + behind(transposed(&probs)?.matmul(&grad)?)?)?;
            let d = grad.matmul(&transposed(&v)?)?;
            let mean = (&d * &probs)?.sum_keepdim(D::Minus1)?;
            let ds = (probs * d.broadcast_sub(&mean)?)?;
            dq.push(ungroup_queries(&(ds.matmul(&k)? * scale)?, heads)?);
            dk = (dk + behind((transposed(&ds)?.matmul(&q)? * scale)?)?)?;
        }
        let rows = |x: Tensor| x.transpose(0, 1)?.contiguous()?.reshape((all_keys, heads.kv * heads.dim));
        Ok((Some(Tensor::cat(&dq, 0)?), Some(rows(dk)?), Some(rows(dv)?)))
    }
}

fn transposed(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()
}

/// Reshapes `[rows, query * dim]` to `[kv, group * rows, dim]`, so that grouped queries need no repeated
/// keys.
pub(super) fn group_queries(q: &Tensor, heads: AttentionHeads) -> Result<Tensor> {
    let (rows, group) = (q.dim(0)?, heads.query / heads.kv);
    let q = q.reshape((rows, heads.kv, group, heads.dim))?.permute((1, 2, 0, 3))?.contiguous()?;
    q.reshape((heads.kv, group * rows, heads.dim))
}

/// Reshapes `[kv, group * rows, dim]` to `[rows, query * dim]`.
pub(super) fn ungroup_queries(x: &Tensor, heads: AttentionHeads) -> Result<Tensor> {
    let group = heads.query / heads.kv;
    let rows = x.dim(1)? / group;
    let x = x.reshape((heads.kv, group, rows, heads.dim))?.permute((2, 0, 1, 3))?.contiguous()?;
    x.reshape((rows, heads.query * heads.dim))
}

/// Reshapes `[keys, kv * dim]` to `[kv, keys, dim]`.
pub(super) fn split_heads(x: &Tensor, heads: AttentionHeads) -> Result<Tensor> {
    x.reshape((x.dim(0)?, heads.kv, heads.dim))?.transpose(0, 1)?.contiguous()
}

/// Softmax of the scores, `[kv, group * rows, keys]`, in f32 or f64. Row `i` sees the first `past + i + 1`
/// keys.
pub(super) fn causal_softmax(q: &Tensor, k: &Tensor, heads: AttentionHeads, past: usize) -> Result<Tensor> {
    let (all_rows, keys) = (q.dim(1)?, k.dim(1)?);
    let group = heads.query / heads.kv;
    let rows = all_rows / group;
    let scores = (q.matmul(&transposed(k)?)? * f64::from(heads.score_scale()))?;
    let wide = if scores.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let scores = scores.to_dtype(wide)?.reshape((heads.kv, group, rows, keys))?;
    let scores = scores.broadcast_add(&causal_mask(rows, keys, past, q.device())?.to_dtype(wide)?)?;
    let exps = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exps.broadcast_div(&exps.sum_keepdim(D::Minus1)?)?.reshape((heads.kv, all_rows, keys))
}

/// Causal mask, `[1, 1, rows, keys]`: 0 for visible keys, negative infinity for others.
fn causal_mask(rows: usize, keys: usize, past: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..rows)
        .flat_map(|row| (0..keys).map(move |key| if key <= past + row { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(mask, (1, 1, rows, keys), device)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops::attention::reference_attention;

    /// Values and gradients for several tile sizes against plain attention with candle's backward pass.
    #[test]
    fn tiled_attention_matches_plain_attention() {
        let heads = AttentionHeads { query: 6, kv: 2, dim: 4 };
        let random = |rows: usize, width: usize| {
            Var::from_tensor(&Tensor::randn(0f64, 1.0, (rows, width), &Device::Cpu).unwrap()).unwrap()
        };
        for (rows, past) in [(1, 0), (23, 0), (23, 9)] {
            let (q, k, v) = (random(rows, 24), random(past + rows, 8), random(past + rows, 8));
            let weighting = random(rows, 24);
            let of = |out: Tensor| {
                let store = (&out * weighting.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
                let gradient = |x: &Var| store.get(x).unwrap().clone();
                [out, gradient(&q), gradient(&k), gradient(&v)]
            };
            let expected = of(reference_attention(&q, &k, &v, heads, past).unwrap());
            for at_once in [1, 7, 16, 64] {
                let ours = of(attention_in_tiles(&q, &k, &v, (heads, past), at_once).unwrap());
                for (ours, expected) in ours.iter().zip(&expected) {
                    let gap = (ours - expected).unwrap().abs().unwrap().max_all().unwrap();
                    assert!(gap.to_scalar::<f64>().unwrap() < 1e-9, "{rows} rows, {at_once} at once");
                }
            }
        }
    }
}
