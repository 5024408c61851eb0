//! The decoder, one definition for training and serving: embedding, transformer blocks, a final norm and
//! the output layer. Each block has attention and SwiGLU, both with RMSNorm before. Tensor names are
//! Hugging Face's, so this file can be read next to `modeling_qwen2.py`.
//!
//! Without a KV cache, each segment is a whole sequence (training with packing). With a cache, each segment
//! continues one sequence (serving). A trainable model runs its backward pass block by block (see
//! [`crate::training`]). Candle families are not defined here (see [`crate::foreign`]).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::quantized::QTensor;
use candle_core::{DType, Tensor, Var};

use crate::batch::Batch;
use crate::config::{Family, ModelConfig};
use crate::error::EngineError;
use crate::kv::{KvCache, Table};
use crate::ops::Precision;
use crate::ops::attention::{Segment, attention};
use crate::ops::linear::{Frozen, linear, linear_adapted};
use crate::ops::packed::Packed;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::Rotary;
use crate::ops::swiglu::swiglu;
use crate::training::Training;
use crate::weights::{Adapter, Weights};

/// Rows per pass through the MLP when serving quantized matrices. Intermediate values of this size stay in
/// the CPU cache.
const FEED_ROWS: usize = 256;

/// A causal language model of a native family.
pub struct CausalLm {
    config: ModelConfig,
    embedding: Matrix,
    blocks: Vec<Arc<Block>>,
    norm: Tensor,
    head: Matrix,
    inverse_frequencies: Vec<f32>,
    rotary_magnitude: f32,
    training: Option<Training>,
    precision: Precision,
}

struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
    /// Activation statistics; present only during calibration.
    probe: Option<Probe>,
    precision: Precision,
}

/// Sums of squared inputs per input channel, and the number of rows.
type Probe = Arc<Mutex<(Vec<f64>, usize)>>;

#[derive(Clone)]
enum Matrix {
    Dense(Tensor),
    /// 8- or 4-bit matrix for serving, without gradients.
    Packed(Arc<Packed>),
    /// Frozen quantized matrix below a trainable adapter (QLoRA).
    Quantised(Arc<QTensor>),
}

impl Matrix {
    /// Returns the weight of `module` in its stored form.
    fn of(weights: &Weights, module: &str) -> Result<Self, EngineError> {
        Ok(match (weights.quantised(module), weights.packed(module)) {
            (Some(quantised), _) => Self::Quantised(quantised),
            (None, Some(packed)) => Self::Packed(packed),
            (None, None) => Self::Dense(weights.get(&format!("{module}.weight"))?),
        })
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        if let Some(probe) = &self.probe {
            let squares = x.sqr()?.sum(0)?.to_vec1::<f32>()?;
            let mut held = probe.lock().unwrap_or_else(PoisonError::into_inner);
            held.0.resize(squares.len(), 0.0);
            held.0.iter_mut().zip(squares).for_each(|(sum, square)| *sum += f64::from(square));
            held.1 += x.dim(0)?;
        }
        let y = match (&self.weight, &self.adapter) {
            (Matrix::Dense(weight), None) => linear(x, weight, self.precision)?,
            (Matrix::Quantised(weight), None) => linear(x, &weight.dequantize(x.device())?, self.precision)?,
            (Matrix::Packed(packed), _) => packed.forward(x)?,
            (Matrix::Dense(weight), Some(over)) => linear_adapted(
                x,
                &Frozen::Dense(weight.clone()),
                &over.a,
                &over.b,
                over.scale,
                self.precision,
            )?,
            (Matrix::Quantised(weight), Some(over)) => linear_adapted(
                x,
                &Frozen::Quantised(Arc::clone(weight)),
                &over.a,
                &over.b,
                over.scale,
                self.precision,
            )?,
        };
        self.with_bias(y)
    }

    /// Returns the quantized matrix, unless activation statistics are collected.
    fn packed(&self) -> Option<&Packed> {
        match (&self.weight, &self.probe) {
            (Matrix::Packed(packed), None) => Some(packed),
            _ => None,
        }
    }

    fn with_bias(&self, y: Tensor) -> Result<Tensor, EngineError> {
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// Applies several layers to the same input. Quantized matrices share one rounding of the input and one
    /// parallel loop.
    fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N], EngineError> {
        let matrices: Vec<&Packed> = layers.iter().filter_map(|layer| layer.packed()).collect();
        let outputs = if matrices.len() == N {
            let products = Packed::forward_all(&matrices, x)?;
            layers.iter().zip(products).map(|(layer, y)| layer.with_bias(y)).collect::<Result<Vec<_>, _>>()?
        } else {
            layers.iter().map(|layer| layer.forward(x)).collect::<Result<Vec<_>, _>>()?
        };
        outputs.try_into().map_err(|_| EngineError::Stopped("a layer without a result".to_owned()))
    }
}

pub(crate) struct Block {
    input_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    /// RMSNorm weights of the query and key heads (Qwen3), `[head_dim]` each.
    qk_norm: Option<(Tensor, Tensor)>,
    o: Linear,
    post_attention_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    precision: Precision,
}

/// Keys and values that the rows of a forward pass attend to.
pub(crate) enum Attend<'a> {
    /// The rows of the same segment (training).
    OwnRows(&'a Arc<Vec<Segment>>),
    /// The KV cache of each segment's sequence (serving).
    Cached(&'a [Segment], &'a mut KvCache, &'a [Table<'a>]),
}

impl CausalLm {
    /// Builds a model that shares the storage of `weights`. Products are computed in f32. Fails for candle
    /// families.
    pub fn new(config: &ModelConfig, weights: &Weights) -> Result<Self, EngineError> {
        Self::build(config, weights, Precision::F32)
    }

    /// Builds a model with products in `precision`. A reference model should round like the model under
    /// comparison.
    pub fn rounded(
        config: &ModelConfig,
        weights: &Weights,
        precision: Precision,
    ) -> Result<Self, EngineError> {
        Self::build(config, weights, precision)
    }

    /// Builds a model with a backward pass that runs block by block.
    pub fn trainable(
        config: &ModelConfig,
        weights: &Weights,
        training: Training,
    ) -> Result<Self, EngineError> {
        let precision = training.precision();
        Ok(Self { training: Some(training), ..Self::build(config, weights, precision)? })
    }

    fn build(config: &ModelConfig, weights: &Weights, precision: Precision) -> Result<Self, EngineError> {
        if let Family::Foreign(family) = config.family {
            let problem = "it can be served, and nothing else: its decoder is not defined here".to_owned();
            return Err(EngineError::Foreign { family: family.name(), problem });
        }
        let embedding = Matrix::of(weights, "model.embed_tokens")?;
        let head = if config.tied || config.classes > 0 {
            embedding.clone()
        } else {
            Matrix::of(weights, "lm_head")?
        };
        let blocks = (0..config.layers)
            .map(|layer| Block::new(config, weights, layer, precision).map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            config: config.clone(),
            embedding,
            blocks,
            norm: weights.get("model.norm.weight")?,
            head,
            inverse_frequencies: config.inverse_frequencies(),
            rotary_magnitude: config.rotary_magnitude(),
            training: None,
            precision,
        })
    }

    /// Returns the configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the data type for keys and values: f16 with quantized matrices, whose rounding is coarser,
    /// otherwise the type of the output layer.
    pub fn kv_dtype(&self) -> DType {
        match &self.head {
            Matrix::Dense(head) => head.dtype(),
            Matrix::Packed(_) => DType::F16,
            Matrix::Quantised(_) => DType::F32,
        }
    }

    /// Returns the weight of the output layer, `[vocabulary, hidden]`, for a loss. Fails for quantized
    /// weights.
    pub fn head(&self) -> Result<&Tensor, EngineError> {
        match &self.head {
            Matrix::Dense(head) => Ok(head),
            Matrix::Packed(_) | Matrix::Quantised(_) => {
                let expected = "one whose output layer has a gradient";
                Err(EngineError::Parameter { name: "model", expected, found: "one of fewer bits".to_owned() })
            }
        }
    }

    /// Returns the precision of matrix products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns the mean square of every input channel of the blocks' matrices over `batches`, by name of
    /// the weight. These importance weights guide quantization, like llama.cpp's importance matrix.
    pub fn input_squares(
        config: &ModelConfig,
        weights: &Weights,
        batches: &[Batch],
    ) -> Result<HashMap<String, Vec<f32>>, EngineError> {
        let mut model = Self::new(config, weights)?;
        let mut probes = Vec::new();
        for (layer, block) in model.blocks.iter_mut().enumerate() {
            let Some(block) = Arc::get_mut(block) else { continue };
            for (name, linear) in block.linears() {
                let probe = Probe::default();
                linear.probe = Some(Arc::clone(&probe));
                probes.push((format!("model.layers.{layer}.{name}.weight"), probe));
            }
        }
        batches.iter().try_for_each(|batch| model.hidden(batch).map(drop))?;
        let mean = |probe: Probe| {
            let held = probe.lock().unwrap_or_else(PoisonError::into_inner);
            held.0.iter().map(|sum| (sum / held.1.max(1) as f64) as f32).collect()
        };
        Ok(probes.into_iter().map(|(name, probe)| (name, mean(probe))).collect())
    }

    /// Runs the backward pass of `loss` and adds the gradients to [`CausalLm::take_gradients`]. Fails
    /// unless the model is trainable.
    pub fn backward(&self, loss: &Tensor) -> Result<(), EngineError> {
        let training = self.training.as_ref().ok_or_else(|| {
            EngineError::Stopped("this model was built for serving and has no backward pass".to_owned())
        })?;
        Ok(training.collect(&loss.backward()?)?)
    }

    /// Returns the gradients accumulated since the last call, by name of the variable.
    pub fn take_gradients(&self) -> BTreeMap<String, Tensor> {
        self.training.as_ref().map(Training::take).unwrap_or_default()
    }

    /// Computes hidden states after the final norm, `[rows, hidden]`. Every segment starts a sequence.
    pub fn hidden(&self, batch: &Batch) -> Result<Tensor, EngineError> {
        self.run(batch, Attend::OwnRows(&batch.segments))
    }

    /// Computes hidden states like [`CausalLm::hidden`]. Each segment continues the sequence whose KV cache
    /// blocks its table lists.
    pub fn hidden_cached(
        &self,
        batch: &Batch,
        cache: &mut KvCache,
        tables: &[Table<'_>],
    ) -> Result<Tensor, EngineError> {
        self.run(batch, Attend::Cached(&batch.segments, cache, tables))
    }

    /// Computes logits, `[rows, vocabulary]`, of hidden states.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        Ok(match &self.head {
            Matrix::Dense(head) => linear(hidden, head, self.precision)?,
            Matrix::Packed(head) => head.forward(hidden)?,
            Matrix::Quantised(head) => linear(hidden, &head.dequantize(hidden.device())?, self.precision)?,
        })
    }

    fn run(&self, batch: &Batch, mut attend: Attend<'_>) -> Result<Tensor, EngineError> {
        let rotary = self.rotary(batch);
        let mut x = self.embed(batch)?;
        if self.training.is_some() && !x.track_op() {
            // A frozen embedding records no graph, but the backward pass of the blocks needs a tracked
            // input.
            x = Var::from_tensor(&x)?.as_tensor().clone();
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            x = match (&self.training, &mut attend) {
                (Some(training), Attend::OwnRows(segments)) => {
                    training.step(block, &x, &self.config, &rotary, segments)?
                }
                (_, attend) => block.forward(&x, layer, &self.config, &rotary, attend)?,
            };
        }
        self.last_norm(&x)
    }

    pub(crate) fn rotary(&self, batch: &Batch) -> Rotary {
        Rotary::new(&batch.positions, &self.inverse_frequencies, self.rotary_magnitude)
    }

    pub(crate) fn embed(&self, batch: &Batch) -> Result<Tensor, EngineError> {
        let look_up = |embedding: &Tensor| {
            let tokens = Tensor::from_slice(&batch.tokens, batch.tokens.len(), embedding.device())?;
            embedding.index_select(&tokens, 0)
        };
        Ok(match &self.embedding {
            Matrix::Dense(embedding) => look_up(embedding)?,
            Matrix::Packed(embedding) => embedding.select(&batch.tokens)?,
            Matrix::Quantised(embedding) => look_up(&embedding.dequantize(&embedding.device())?)?,
        })
    }

    /// Computes the attention output of a layer, before the residual addition.
    pub(crate) fn attended(
        &self,
        layer: usize,
        x: &Tensor,
        rotary: &Rotary,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor, EngineError> {
        self.blocks[layer].attended(x, layer, &self.config, rotary, attend)
    }

    /// Computes the MLP output of a layer, before the residual addition.
    pub(crate) fn fed(&self, layer: usize, x: &Tensor) -> Result<Tensor, EngineError> {
        self.blocks[layer].fed(x, self.config.rms_norm_eps)
    }

    pub(crate) fn last_norm(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        Ok(rms_norm(x, &self.norm, self.config.rms_norm_eps)?)
    }
}

impl Block {
    fn new(
        config: &ModelConfig,
        weights: &Weights,
        layer: usize,
        precision: Precision,
    ) -> Result<Self, EngineError> {
        let get = |name: &str| weights.get(&format!("model.layers.{layer}.{name}"));
        let projection = |name: &str, bias: bool| -> Result<Linear, EngineError> {
            let full = format!("model.layers.{layer}.{name}");
            Ok(Linear {
                weight: Matrix::of(weights, &full)?,
                bias: if bias { Some(get(&format!("{name}.bias"))?) } else { None },
                adapter: weights.adapter(&full),
                probe: None,
                precision,
            })
        };
        Ok(Self {
            input_norm: get("input_layernorm.weight")?,
            q: projection("self_attn.q_proj", config.qkv_bias)?,
            k: projection("self_attn.k_proj", config.qkv_bias)?,
            v: projection("self_attn.v_proj", config.qkv_bias)?,
            qk_norm: match config.family {
                Family::Qwen3 => Some((get("self_attn.q_norm.weight")?, get("self_attn.k_norm.weight")?)),
                Family::Qwen2 | Family::Llama | Family::Foreign(_) => None,
            },
            o: projection("self_attn.o_proj", false)?,
            post_attention_norm: get("post_attention_layernorm.weight")?,
            gate: projection("mlp.gate_proj", false)?,
            up: projection("mlp.up_proj", false)?,
            down: projection("mlp.down_proj", false)?,
            precision,
        })
    }

    /// All matrices of the block with their Hugging Face names.
    fn linears(&mut self) -> [(&'static str, &mut Linear); 7] {
        [
            ("self_attn.q_proj", &mut self.q),
            ("self_attn.k_proj", &mut self.k),
            ("self_attn.v_proj", &mut self.v),
            ("self_attn.o_proj", &mut self.o),
            ("mlp.gate_proj", &mut self.gate),
            ("mlp.up_proj", &mut self.up),
            ("mlp.down_proj", &mut self.down),
        ]
    }

    /// Computes the block with its residual connections: `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        layer: usize,
        config: &ModelConfig,
        rotary: &Rotary,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor, EngineError> {
        let x = (x + self.attended(x, layer, config, rotary, attend)?)?;
        let fed = self.fed(&x, config.rms_norm_eps)?;
        Ok((x + fed)?)
    }

    /// Self-attention with its norm, without the residual addition.
    fn attended(
        &self,
        x: &Tensor,
        layer: usize,
        config: &ModelConfig,
        rotary: &Rotary,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor, EngineError> {
        let eps = config.rms_norm_eps;
        let normed = rms_norm(x, &self.input_norm, eps)?;
        let [mut q, mut k, v] = Linear::forward_all([&self.q, &self.k, &self.v], &normed)?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = norm_heads(&q, q_norm, eps)?;
            k = norm_heads(&k, k_norm, eps)?;
        }
        let (q, k) = (rotary.apply(&q)?, rotary.apply(&k)?);
        let attended = match attend {
            Attend::OwnRows(segments) => attention(&q, &k, &v, config.heads, segments, self.precision)?,
            Attend::Cached(segments, cache, tables) => {
                cache.attend(layer, [&q, &k, &v], config.heads, segments, tables)?
            }
        };
        self.o.forward(&attended)
    }

    /// SwiGLU MLP with its norm, without the residual addition. Quantized matrices process [`FEED_ROWS`]
    /// rows at a time.
    fn fed(&self, x: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
        let rows = x.dim(0)?;
        if self.gate.packed().is_none() || rows <= FEED_ROWS {
            return self.fed_at_once(x, eps);
        }
        let parts = (0..rows).step_by(FEED_ROWS).map(|first| {
            let part = x.narrow(0, first, FEED_ROWS.min(rows - first))?;
            self.fed_at_once(&part, eps)
        });
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>, EngineError>>()?, 0)?)
    }

    /// The MLP for all rows of `x` in one pass.
    fn fed_at_once(&self, x: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
        let normed = rms_norm(x, &self.post_attention_norm, eps)?;
        let [gate, up] = Linear::forward_all([&self.gate, &self.up], &normed)?;
        self.down.forward(&swiglu(&gate, &up)?)
    }
}

/// Applies RMSNorm to each head of `x`, `[rows, heads * dim]`.
fn norm_heads(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
    let (rows, width) = x.dims2()?;
    let dim = weight.dim(0)?;
    let heads = x.reshape((rows * (width / dim), dim))?;
    Ok(rms_norm(&heads, weight, eps)?.reshape((rows, width))?)
}
