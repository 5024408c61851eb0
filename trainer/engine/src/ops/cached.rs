//! Decode attention: a few query rows over keys and values in KV cache blocks, without gathering.
//!
//! The layout suits 16 SIMD lanes: keys by dimension, with 16 tokens side by side; values by token. Each
//! key and value is read once for all query heads that share a key head, as f32 or f16. With a long context
//! this read dominates the time of a step.
//!
//! ```text
//! scores[n][16 tokens] = Σ_d q[n][d] * keys[d][16 tokens]        out[n][..] = Σ_t p[n][t] * values[t][..]
//! ```

#![expect(unsafe_code, reason = "an instruction that asks for memory ahead of its use")]

use half::f16;

use super::softmax;

/// Tokens per block.
pub(crate) const BLOCK_TOKENS: usize = 16;
/// Maximum number of query heads per pass over the keys.
const MAX_HEADS_PER_PASS: usize = 4;

/// Prefetch distance in blocks. Blocks are scattered in memory, so the hardware prefetcher cannot predict
/// the next one.
const PREFETCH_BLOCKS: usize = 2;

/// Storage type of a cached value.
pub(crate) trait KvElement: Copy + Send + Sync + 'static {
    /// The value zero.
    const ZERO: Self;
    /// Rounds to the nearest value of this type.
    fn from_f32(value: f32) -> Self;
    /// Returns the value as f32.
    fn to_f32(self) -> f32;
}

impl KvElement for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

/// The bits of a finite IEEE 754 half. Larger values, including infinities, saturate at ±65504.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FiniteF16(i16);

impl KvElement for FiniteF16 {
    const ZERO: Self = Self(0);

    fn from_f32(value: f32) -> Self {
        let most = f16::MAX.to_f32();
        Self(f16::from_f32(value.clamp(-most, most)).to_bits() as i16)
    }

    /// Moves sign, exponent and fraction to their places in f32, then corrects the exponent bias (127 - 15
    /// = 112). Exact for subnormal values too, and the same few instructions for all lanes.
    #[inline(always)]
    fn to_f32(self) -> f32 {
        const EXPONENT_SHIFT: f32 = f32::from_bits((127 + 112) << 23);
        f32::from_bits((i32::from(self.0) << 13) as u32 & 0x8fff_e000) * EXPONENT_SHIFT
    }
}

/// Keys, then values of one key head in a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadBlock<'a, E>(pub(crate) &'a [E]);

impl<'a, E: KvElement> HeadBlock<'a, E> {
    /// Number of elements for a head of `dim` elements.
    pub(crate) const fn len(dim: usize) -> usize {
        2 * BLOCK_TOKENS * dim
    }

    /// Writes key and value of the block's token number `token`.
    pub(crate) fn write_token(part: &mut [E], token: usize, key: &[f32], value: &[f32]) {
        let (keys, values) = part.split_at_mut(BLOCK_TOKENS * key.len());
        for (lanes, key) in keys.chunks_exact_mut(BLOCK_TOKENS).zip(key) {
            lanes[token] = E::from_f32(*key);
        }
        for (to, value) in values[token * value.len()..].iter_mut().zip(value) {
            *to = E::from_f32(*value);
        }
    }

    /// Appends the keys and values of the first `tokens` tokens, token by token.
    pub(crate) fn gather(self, tokens: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let (by_lane, by_token) = self.0.split_at(self.0.len() / 2);
        let dim = by_lane.len() / BLOCK_TOKENS;
        for token in 0..tokens {
            keys.extend(by_lane.chunks_exact(BLOCK_TOKENS).map(|lanes| lanes[token].to_f32()));
        }
        values.extend(by_token[..tokens * dim].iter().map(|value| value.to_f32()));
    }

    /// Returns keys and values.
    fn keys_and_values(self) -> (&'a [E], &'a [E]) {
        self.0.split_at(self.0.len() / 2)
    }
}

/// Attention of the query heads in `q` over the first `seen` tokens of `parts`. `q` and `out` hold heads of
/// `dim` elements, which share one key head. `scores` is scratch memory.
pub(crate) fn attend_blocks<E: KvElement>(
    parts: &[HeadBlock<'_, E>],
    seen: usize,
    (q, dim): (&[f32], usize),
    scale: f32,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    for (q, out) in q.chunks(MAX_HEADS_PER_PASS * dim).zip(out.chunks_mut(MAX_HEADS_PER_PASS * dim)) {
        match q.len() / dim {
            1 => attend_heads::<E, 1>(parts, seen, q, scale, scores, out),
            2 => attend_heads::<E, 2>(parts, seen, q, scale, scores, out),
            3 => attend_heads::<E, 3>(parts, seen, q, scale, scores, out),
            _ => attend_heads::<E, MAX_HEADS_PER_PASS>(parts, seen, q, scale, scores, out),
        }
    }
}

/// Attention of `N` query heads, like [`attend`].
fn attend_heads<E: KvElement, const N: usize>(
    parts: &[HeadBlock<'_, E>],
    seen: usize,
    q: &[f32],
    scale: f32,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let dim = q.len() / N;
    let parts = &parts[..seen.div_ceil(BLOCK_TOKENS)];
    let padded = parts.len() * BLOCK_TOKENS;
    scores.clear();
    scores.resize(N * padded, 0.0);
    for (at, part) in parts.iter().enumerate() {
        prefetch(parts.get(at + PREFETCH_BLOCKS).map(|part| part.keys_and_values().0));
        for (n, sums) in key_products::<E, N>(part.keys_and_values().0, q, dim).into_iter().enumerate() {
            let scores = &mut scores[n * padded + at * BLOCK_TOKENS..][..BLOCK_TOKENS];
            scores.iter_mut().zip(sums).for_each(|(score, sum)| *score = scale * sum);
        }
    }
    parts.iter().take(PREFETCH_BLOCKS).for_each(|part| prefetch(Some(part.keys_and_values().1)));
    scores.chunks_exact_mut(padded).for_each(|scores| softmax(&mut scores[..seen]));
    out.fill(0.0);
    for (at, part) in parts.iter().enumerate() {
        prefetch(parts.get(at + PREFETCH_BLOCKS).map(|part| part.keys_and_values().1));
        let tokens = BLOCK_TOKENS.min(seen - at * BLOCK_TOKENS);
        let p: [&[f32]; N] = std::array::from_fn(|n| &scores[n * padded + at * BLOCK_TOKENS..][..tokens]);
        add_weighted_values::<E, N>(&part.keys_and_values().1[..tokens * dim], p, dim, out);
    }
}

/// Prefetches memory into the CPU cache.
#[inline(always)]
fn prefetch<E>(ahead: Option<&[E]>) {
    #[cfg(target_arch = "x86_64")]
    for line in ahead.into_iter().flat_map(|ahead| ahead.chunks(64 / size_of::<E>())) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, and the address lies within a slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ahead;
}

/// Returns 16 values as f32.
#[inline(always)]
fn load_lanes<E: KvElement>(from: &[E]) -> [f32; BLOCK_TOKENS] {
    std::array::from_fn(|lane| from[lane].to_f32())
}

/// Dot products of `N` queries with 16 keys.
#[inline(always)]
fn key_products<E: KvElement, const N: usize>(keys: &[E], q: &[f32], dim: usize) -> [[f32; BLOCK_TOKENS]; N] {
    let mut sums = [[0f32; BLOCK_TOKENS]; N];
    for (d, keys) in keys.chunks_exact(BLOCK_TOKENS).enumerate() {
        let keys = load_lanes(keys);
        for (n, sums) in sums.iter_mut().enumerate() {
            let q = q[n * dim + d];
            sums.iter_mut().zip(keys).for_each(|(sum, key)| *sum = q.mul_add(key, *sum));
        }
    }
    sums
}

/// Adds the values, weighted by `p`, to `out`.
#[inline(always)]
fn add_weighted_values<E: KvElement, const N: usize>(
    values: &[E],
    p: [&[f32]; N],
    dim: usize,
    out: &mut [f32],
) {
    let whole = dim - dim % BLOCK_TOKENS;
    for column in (0..whole).step_by(BLOCK_TOKENS) {
        let mut sums: [[f32; BLOCK_TOKENS]; N] =
            std::array::from_fn(|n| load_lanes(&out[n * dim + column..][..BLOCK_TOKENS]));
        for (token, values) in values.chunks_exact(dim).enumerate() {
            let values = load_lanes(&values[column..][..BLOCK_TOKENS]);
            for (sums, p) in sums.iter_mut().zip(p) {
                let p = p[token];
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = p.mul_add(value, *sum));
            }
        }
        for (n, sums) in sums.iter().enumerate() {
            out[n * dim + column..][..BLOCK_TOKENS].copy_from_slice(sums);
        }
    }
    for column in whole..dim {
        for (token, values) in values.chunks_exact(dim).enumerate() {
            for (n, p) in p.iter().enumerate() {
                let out = &mut out[n * dim + column];
                *out = p[token].mul_add(values[column].to_f32(), *out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::test_noise;
    use super::*;

    #[test]
    fn decodes_every_finite_f16_exactly() {
        for bits in 0..=u16::MAX {
            let exact = f16::from_bits(bits);
            if exact.is_finite() {
                assert_eq!(FiniteF16(bits as i16).to_f32().to_bits(), exact.to_f32().to_bits(), "{bits:#x}");
            }
        }
        assert_eq!(
            (FiniteF16::from_f32(1e9).to_f32(), FiniteF16::from_f32(f32::NEG_INFINITY).to_f32()),
            (65_504.0, -65_504.0)
        );
    }

    /// Reference implementation over unblocked keys and values, in f64.
    fn slow(q: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], scale: f64) -> Vec<f64> {
        let dot = |key: &Vec<f64>| scale * q.iter().zip(key).map(|(q, key)| q * key).sum::<f64>();
        let scores: Vec<f64> = keys.iter().map(dot).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exps: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let value = |d: usize| exps.iter().zip(values).map(|(p, value)| p / sum * value[d]).sum();
        (0..q.len()).map(value).collect()
    }

    fn check<E: KvElement>(
        heads: usize,
        dim: usize,
        seen: usize,
        stale: usize,
        seed: u64,
    ) -> Result<(), TestCaseError> {
        let mut next = test_noise(seed);
        let mut row = |width: usize| -> Vec<f32> { (0..width).map(|_| 3.0 * next()).collect() };
        let q = row(heads * dim);
        let mut blocks = vec![vec![E::ZERO; HeadBlock::<E>::len(dim)]; seen.div_ceil(BLOCK_TOKENS)];
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let kept =
            |row: &[f32]| -> Vec<f64> { row.iter().map(|v| f64::from(E::from_f32(*v).to_f32())).collect() };
        for token in 0..(seen + stale).min(blocks.len() * BLOCK_TOKENS) {
            let (key, value) = (row(dim), row(dim));
            HeadBlock::write_token(&mut blocks[token / BLOCK_TOKENS], token % BLOCK_TOKENS, &key, &value);
            if token < seen {
                keys.push(kept(&key));
                values.push(kept(&value));
            }
        }
        let parts: Vec<HeadBlock<'_, E>> = blocks.iter().map(|block| HeadBlock(block.as_slice())).collect();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for (at, part) in parts.iter().enumerate() {
            part.gather(BLOCK_TOKENS.min(seen - at * BLOCK_TOKENS), &mut k, &mut v);
        }
        let flat = |rows: &[Vec<f64>]| -> Vec<f32> { rows.iter().flatten().map(|v| *v as f32).collect() };
        prop_assert_eq!((k, v), (flat(&keys), flat(&values)));
        let mut out = vec![f32::NAN; heads * dim];
        attend_blocks(&parts, seen, (&q, dim), 0.25, &mut Vec::new(), &mut out);
        for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact(dim)) {
            let q: Vec<f64> = q.iter().map(|q| f64::from(*q)).collect();
            for (found, exact) in out.iter().zip(slow(&q, &keys, &values, 0.25)) {
                prop_assert!((f64::from(*found) - exact).abs() < 1e-4, "{} {}", found, exact);
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Attention equals the reference for both storage types and ignores stale tokens beyond the last
        /// one.
        #[test]
        fn block_attention_matches_f64_attention(heads in 1usize..8, dim in 1usize..40, seen in 1usize..70, stale in 0usize..9, seed: u64) {
            check::<f32>(heads, dim, seen, stale, seed)?;
            check::<FiniteF16>(heads, dim, seen, stale, seed)?;
        }
    }
}
