//! The KV cache: keys and values of all sequences in blocks (PagedAttention, arXiv:2309.06180). On the CPU
//! each block is one allocation, made on first use. On other devices each layer has one tensor, and a block
//! is a range of its rows. `kv::blocks` assigns blocks to sequences.

pub(crate) mod blocks;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::ops::attention::{self, AttentionHeads, MAX_DOT_ROWS, Segment, attend_head, unfused_attention};
use crate::ops::cached::{self, FiniteF16, HeadBlock, KvElement, attend_blocks};
use crate::ops::{Precision, has_fused_kernel, with_values};

/// Tokens per block.
pub const BLOCK_TOKENS: usize = cached::BLOCK_TOKENS;

/// Minimum number of blocks that one task writes.
const MIN_BLOCKS_PER_TASK: usize = 4;
/// Minimum number of rows per attention task of a long prompt, because each task gathers the keys and
/// values first. A multiple of the tile, so the sums of a row do not depend on the number of threads.
const MIN_TASK_ROWS: usize = 2 * attention::TILE_ROWS;

/// Storage of the KV cache of one model or of one device's shard.
#[derive(Debug)]
pub struct KvCache {
    layers: usize,
    store: BlockStore,
}

#[derive(Debug)]
enum BlockStore {
    /// CPU, f32.
    F32(HostBlocks<f32>),
    /// CPU, f16: half the memory.
    F16(HostBlocks<FiniteF16>),
    /// Other devices and types: keys and values per layer, `[blocks * BLOCK, kv_heads * head_dim]` each.
    Device(Vec<(Tensor, Tensor)>),
}

/// Blocks on the CPU. Each block holds one [`Part`] per layer and key head; an unused block is empty.
#[derive(Debug)]
struct HostBlocks<E>(Vec<Box<[E]>>);

/// Block numbers of one sequence in token order.
pub type BlockTable<'a> = &'a [u32];

impl KvCache {
    /// Creates a cache of `count` blocks of [`BLOCK`] tokens. The CPU stores f32 or f16 in its own layout;
    /// other types and devices use one tensor per layer.
    pub fn new(
        config: &ModelConfig,
        count: usize,
        device: &Device,
        dtype: DType,
    ) -> Result<Self, EngineError> {
        let width = config.heads.kv * config.heads.dim;
        let store = match (device.is_cpu(), dtype) {
            (true, DType::F32) => BlockStore::F32(HostBlocks(vec![Box::default(); count])),
            (true, DType::F16) => BlockStore::F16(HostBlocks(vec![Box::default(); count])),
            _ => {
                let rows = || Tensor::zeros((count * BLOCK_TOKENS, width), dtype, device);
                let layers = (0..config.num_layers).map(|_| Ok((rows()?, rows()?)));
                BlockStore::Device(layers.collect::<Result<_, EngineError>>()?)
            }
        };
        Ok(Self { layers: config.num_layers, store })
    }

    /// Returns the bytes per token over all layers.
    pub fn bytes_per_token(config: &ModelConfig, dtype: DType) -> usize {
        2 * config.num_layers * config.heads.kv * config.heads.dim * dtype.size_in_bytes()
    }

    /// Writes keys and values of the rows of `layer` into their blocks. Returns the attention output,
    /// shaped like `q`: `[rows, heads * dim]`. Fails if a sequence exceeds its table.
    pub(crate) fn write_and_attend(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        heads: AttentionHeads,
        segments: &[Segment],
        tables: &[BlockTable<'_>],
    ) -> Result<Tensor, EngineError> {
        for (segment, table) in segments.iter().zip(tables) {
            if segment.past + segment.len > table.len() * BLOCK_TOKENS {
                return Err(EngineError::Stopped("a sequence is longer than its blocks".to_owned()));
            }
        }
        let layers = (layer, self.layers);
        match &mut self.store {
            BlockStore::F32(host) if has_fused_kernel(q) => {
                host.write_and_attend(layers, [q, k, v], heads, segments, tables)
            }
            BlockStore::F16(host) if has_fused_kernel(q) => {
                host.write_and_attend(layers, [q, k, v], heads, segments, tables)
            }
            BlockStore::Device(layers) => {
                let (keys, values) = &layers[layer];
                attend_tensors([keys, values], [q, k, v], heads, segments, tables)
            }
            _ => Err(EngineError::Stopped("a cache moved between devices".to_owned())),
        }
    }
}

impl<E: KvElement> HostBlocks<E> {
    /// Writes the rows of layer `layer` of `layers` and returns their attention.
    fn write_and_attend(
        &mut self,
        (layer, layers): (usize, usize),
        [q, k, v]: [&Tensor; 3],
        heads: AttentionHeads,
        segments: &[Segment],
        tables: &[BlockTable<'_>],
    ) -> Result<Tensor, EngineError> {
        let part = HeadBlock::<E>::len(heads.dim);
        let first = layer * heads.kv * part;
        Ok(with_values([q, k, v], |[qd, kd, vd]| {
            let mut writes = Vec::new();
            for (segment, table) in segments.iter().zip(tables) {
                for rows in segment.split(BLOCK_TOKENS, BLOCK_TOKENS - segment.past % BLOCK_TOKENS) {
                    let at = table[rows.past / BLOCK_TOKENS] as usize;
                    writes.push((rows, at, std::mem::take(&mut self.0[at])));
                }
            }
            writes.par_iter_mut().with_min_len(MIN_BLOCKS_PER_TASK).for_each(|(rows, _, block)| {
                if block.is_empty() {
                    *block = vec![E::ZERO; layers * heads.kv * part].into_boxed_slice();
                }
                for (head, part) in block[first..][..heads.kv * part].chunks_exact_mut(part).enumerate() {
                    for row in 0..rows.len {
                        let from = ((rows.start + row) * heads.kv + head) * heads.dim;
                        let values = from..from + heads.dim;
                        HeadBlock::write_token(
                            part,
                            rows.past % BLOCK_TOKENS + row,
                            &kd[values.clone()],
                            &vd[values],
                        );
                    }
                }
            });
            for (_, at, block) in writes {
                self.0[at] = block;
            }
            let out = self.attend(first, qd, heads, segments, tables);
            Tensor::from_vec(out, q.shape(), q.device())
        })??)
    }

    /// Computes the attention of all rows in the layer whose parts begin at `first`. One task handles some
    /// rows of one sequence and one key head. The results are stored by key head first and reordered to
    /// rows at the end.
    fn attend(
        &self,
        first: usize,
        q: &[f32],
        heads: AttentionHeads,
        segments: &[Segment],
        tables: &[BlockTable<'_>],
    ) -> Vec<f32> {
        let (query_width, group_width) = (heads.query_width(), heads.query_width() / heads.kv);
        let rows = q.len() / query_width;
        let task_rows = (rows * heads.kv / (4 * rayon::current_num_threads())).max(MIN_TASK_ROWS);
        let task_rows = task_rows.next_multiple_of(MIN_TASK_ROWS);
        let mut by_head = vec![0f32; q.len()];
        let mut tasks = Vec::with_capacity(segments.len() * heads.kv);
        for (head, mut rest) in by_head.chunks_exact_mut((rows * group_width).max(1)).enumerate() {
            for (segment, table) in segments.iter().zip(tables) {
                for part in segment.split(task_rows, task_rows) {
                    let (out, tail) = rest.split_at_mut(part.len * group_width);
                    tasks.push((part, segment.len > MAX_DOT_ROWS, *table, head, out));
                    rest = tail;
                }
            }
        }
        tasks.into_par_iter().for_each(|(segment, of_many, table, head, out)| {
            let part = HeadBlock::<E>::len(heads.dim);
            let at = first + head * part;
            let blocks = &table[..(segment.past + segment.len).div_ceil(BLOCK_TOKENS)];
            let parts: Vec<HeadBlock<'_, E>> =
                blocks.iter().map(|block| HeadBlock(&self.0[*block as usize][at..at + part])).collect();
            let rows = &q[segment.start * query_width..(segment.start + segment.len) * query_width];
            if of_many {
                return attend_many_rows(&parts, rows, heads, head, segment, out);
            }
            let mut scores = Vec::new();
            for (row, out) in out.chunks_exact_mut(group_width).enumerate() {
                let q = &rows[row * query_width + head * group_width..][..group_width];
                let seen = segment.past + row + 1;
                attend_blocks(&parts, seen, (q, heads.dim), heads.score_scale(), &mut scores, out);
            }
        });
        let mut out = vec![0f32; q.len()];
        out.par_chunks_mut(query_width * MIN_TASK_ROWS).enumerate().for_each(|(task, out)| {
            for (row, out) in out.chunks_exact_mut(query_width).enumerate() {
                for (head, out) in out.chunks_exact_mut(group_width).enumerate() {
                    let from = (head * rows + task * MIN_TASK_ROWS + row) * group_width;
                    out.copy_from_slice(&by_head[from..from + group_width]);
                }
            }
        });
        out
    }
}

/// Attention of many query rows: gathers the head's keys and values into matrices for matrix products.
fn attend_many_rows<E: KvElement>(
    parts: &[HeadBlock<'_, E>],
    q: &[f32],
    heads: AttentionHeads,
    head: usize,
    segment: Segment,
    out: &mut [f32],
) {
    let (dim, length) = (heads.dim, segment.past + segment.len);
    let (mut k, mut v) = (Vec::with_capacity(length * dim), Vec::with_capacity(length * dim));
    for (at, part) in parts.iter().enumerate() {
        part.gather(BLOCK_TOKENS.min(length - at * BLOCK_TOKENS), &mut k, &mut v);
    }
    let width = heads.query_width() / heads.kv;
    for (at, head) in heads.query_group(head).enumerate() {
        let (q, out) = ((&q[head * dim..], heads.query_width()), (&mut out[at * dim..], width));
        attend_head(q, (&k, &v, dim), heads, segment.past, segment.len, Precision::F32, out);
    }
}

/// Row indices of a sequence's tokens in the tensors of a layer.
fn slot_indices(table: BlockTable<'_>, tokens: usize) -> impl Iterator<Item = u32> {
    (0..tokens).map(|at| table[at / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (at % BLOCK_TOKENS) as u32)
}

/// Writes the rows into the tensors of one layer, gathers all keys and values of each sequence and computes
/// the attention.
fn attend_tensors(
    [keys, values]: [&Tensor; 2],
    [q, k, v]: [&Tensor; 3],
    heads: AttentionHeads,
    segments: &[Segment],
    tables: &[BlockTable<'_>],
) -> Result<Tensor, EngineError> {
    let (k, v) = (k.contiguous()?, v.contiguous()?);
    let mut all = Vec::new();
    for (s, table) in segments.iter().zip(tables) {
        // Consecutive rows of one block are copied together.
        let mut row = 0;
        while row < s.len {
            let place = s.past + row;
            let run = (BLOCK_TOKENS - place % BLOCK_TOKENS).min(s.len - row);
            let at = table[place / BLOCK_TOKENS] as usize * BLOCK_TOKENS + place % BLOCK_TOKENS;
            keys.slice_set(&k.narrow(0, s.start + row, run)?, 0, at)?;
            values.slice_set(&v.narrow(0, s.start + row, run)?, 0, at)?;
            row += run;
        }
        all.extend(slot_indices(table, s.past + s.len));
    }
    let places = Tensor::new(all, q.device())?;
    let (k, v) = (keys.index_select(&places, 0)?, values.index_select(&places, 0)?);
    Ok(unfused_attention([q, &k, &v], heads, segments)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::reference_attention;

    fn config() -> ModelConfig {
        let text = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4}"#;
        ModelConfig::from_json(text, std::path::Path::new("config.json")).unwrap()
    }

    /// All stores against plain attention over whole sequences, with blocks in any order and steps of any
    /// length.
    #[test]
    fn paged_attention_matches_plain_attention() {
        let config = config();
        let heads = AttentionHeads { query: 6, kv: 2, dim: 4 };
        let make = |rows: usize, width: usize, salt: usize| {
            let value = |i: usize| ((i * 7919 + salt * 31) % 997) as f32 / 498.0 - 1.0;
            Tensor::from_vec((0..rows * width).map(value).collect::<Vec<_>>(), (rows, width), &Device::Cpu)
                .unwrap()
        };
        let lengths = [52usize, 160];
        let whole: Vec<[Tensor; 3]> =
            lengths.iter().map(|&n| [make(n, 24, n), make(n, 8, n + 1), make(n, 8, n + 2)]).collect();
        let tables: [Vec<u32>; 2] = [vec![9, 2, 5, 0], vec![1, 3, 4, 6, 7, 8, 11, 10, 13, 12]];
        for (kept, dtype, bound) in
            [(DType::F32, DType::F32, 1e-5), (DType::F64, DType::F64, 1e-5), (DType::F16, DType::F32, 1e-3)]
        {
            let mut cache = KvCache::new(&config, 14, &Device::Cpu, kept).unwrap();
            let mut past = [0usize; 2];
            for steps in [[1usize, 83], [29, 1], [1, 20], [18, 3], [3, 53]] {
                let rows = |which: usize| {
                    let parts: Vec<Tensor> = (0..2)
                        .map(|s| {
                            whole[s][which].narrow(0, past[s], steps[s]).unwrap().to_dtype(dtype).unwrap()
                        })
                        .collect();
                    Tensor::cat(&parts, 0).unwrap()
                };
                let (q, k, v) = (rows(0), rows(1), rows(2));
                let segments = [
                    Segment { start: 0, len: steps[0], past: past[0] },
                    Segment { start: steps[0], len: steps[1], past: past[1] },
                ];
                let borrowed: Vec<BlockTable<'_>> = tables.iter().map(Vec::as_slice).collect();
                let ours = cache.write_and_attend(1, [&q, &k, &v], heads, &segments, &borrowed).unwrap();
                for s in 0..2 {
                    let until = |which: usize| whole[s][which].narrow(0, 0, past[s] + steps[s]).unwrap();
                    let q = whole[s][0].narrow(0, past[s], steps[s]).unwrap();
                    let expected = reference_attention(&q, &until(1), &until(2), heads, past[s]).unwrap();
                    let ours =
                        ours.narrow(0, segments[s].start, steps[s]).unwrap().to_dtype(DType::F32).unwrap();
                    let difference = (ours - expected).unwrap().abs().unwrap().flatten_all().unwrap();
                    assert!(difference.max(0).unwrap().to_scalar::<f32>().unwrap() < bound);
                }
                (0..2).for_each(|s| past[s] += steps[s]);
            }
            let all = Segment { start: 0, len: 1, past: 64 };
            let row = make(1, 24, 0).to_dtype(dtype).unwrap();
            let kv = make(1, 8, 0).to_dtype(dtype).unwrap();
            assert!(cache.write_and_attend(0, [&row, &kv, &kv], heads, &[all], &[&tables[0]]).is_err());
        }
    }

    /// A prompt that several tasks share, next to short sequences: equal to plain attention, and the same
    /// bits on any number of threads.
    #[test]
    fn attention_of_long_prompts_is_independent_of_the_thread_count() {
        let (config, heads) = (config(), AttentionHeads { query: 6, kv: 2, dim: 4 });
        let value = |i: usize| ((i * 7919 + 13) % 997) as f32 / 498.0 - 1.0;
        let lengths = [3, 5 * MIN_TASK_ROWS + 7, 2, 40];
        let rows = lengths.iter().sum::<usize>();
        let make = |width: usize| {
            let values: Vec<f32> = (0..rows * width).map(|i| value(i + width)).collect();
            Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (make(24), make(8), make(8));
        let (mut start, mut block, mut segments, mut tables) = (0, 0, Vec::new(), Vec::new());
        for len in lengths {
            segments.push(Segment { start, len, past: 0 });
            let next = block + len.div_ceil(BLOCK_TOKENS) as u32;
            tables.push((block..next).collect::<Vec<u32>>());
            (start, block) = (start + len, next);
        }
        let borrowed: Vec<BlockTable<'_>> = tables.iter().map(Vec::as_slice).collect();
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut cache = KvCache::new(&config, block as usize, &Device::Cpu, DType::F32).unwrap();
            let out = pool
                .install(|| cache.write_and_attend(1, [&q, &k, &v], heads, &segments, &borrowed).unwrap());
            out.to_vec2::<f32>().unwrap()
        };
        let ours = on(1);
        assert_eq!(ours, on(3));
        for segment in segments {
            let part = |x: &Tensor| x.narrow(0, segment.start, segment.len).unwrap();
            let expected = reference_attention(&part(&q), &part(&k), &part(&v), heads, 0)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap();
            for (ours, expected) in ours[segment.start..].iter().flatten().zip(expected.iter().flatten()) {
                assert!((ours - expected).abs() < 1e-5, "{ours} {expected}");
            }
        }
    }
}
