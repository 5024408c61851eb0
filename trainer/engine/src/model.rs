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
use crate::kv::{BlockTable, KvCache};
use crate::ops::Precision;
use crate::ops::attention::{Segment, attention};
use crate::ops::linear::{FrozenWeight, linear, lora_linear};
use crate::ops::packed::QuantizedMatrix;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::RotaryTables;
use crate::ops::swiglu::swiglu;
use crate::training::GradientCheckpoint;
use crate::weights::{Adapter, Weights};

/// Rows per pass through the MLP when serving quantized matrices. Intermediate values of this size stay in
/// the CPU cache.
const MLP_CHUNK_ROWS: usize = 256;

/// A causal language model of a native family.
pub struct CausalLm {
    config: ModelConfig,
    embedding: LinearWeight,
    blocks: Vec<Arc<TransformerBlock>>,
    final_norm: Tensor,
    lm_head: LinearWeight,
    inverse_frequencies: Vec<f32>,
    rotary_attention_factor: f32,
    gradient_checkpoint: Option<GradientCheckpoint>,
    precision: Precision,
}

struct Linear {
    weight: LinearWeight,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
    /// Activation statistics; present only during calibration.
    activation_stats: Option<ActivationStats>,
    precision: Precision,
}

/// Sums of squared inputs per input channel, and the number of rows.
type ActivationStats = Arc<Mutex<(Vec<f64>, usize)>>;

#[derive(Clone)]
enum LinearWeight {
    Dense(Tensor),
    /// 8- or 4-bit matrix for serving, without gradients.
    Packed(Arc<QuantizedMatrix>),
    /// Frozen quantized matrix below a trainable adapter (QLoRA).
    Quantised(Arc<QTensor>),
}

impl LinearWeight {
    /// Returns the weight of `module` in its stored form.
    fn from_weights(weights: &Weights, module: &str) -> Result<Self, EngineError> {
        Ok(match (weights.frozen_quantized(module), weights.quantized(module)) {
            (Some(quantised), _) => Self::Quantised(quantised),
            (None, Some(packed)) => Self::Packed(packed),
            (None, None) => Self::Dense(weights.get(&format!("{module}.weight"))?),
        })
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        if let Some(probe) = &self.activation_stats {
            let squares = x.sqr()?.sum(0)?.to_vec1::<f32>()?;
            let mut held = probe.lock().unwrap_or_else(PoisonError::into_inner);
            held.0.resize(squares.len(), 0.0);
            held.0.iter_mut().zip(squares).for_each(|(sum, square)| *sum += f64::from(square));
            held.1 += x.dim(0)?;
        }
        let y = match (&self.weight, &self.adapter) {
            (LinearWeight::Dense(weight), None) => linear(x, weight, self.precision)?,
            (LinearWeight::Quantised(weight), None) => {
                linear(x, &weight.dequantize(x.device())?, self.precision)?
            }
            (LinearWeight::Packed(packed), _) => packed.forward(x)?,
            (LinearWeight::Dense(weight), Some(over)) => lora_linear(
                x,
                &FrozenWeight::Dense(weight.clone()),
                &over.a,
                &over.b,
                over.scale,
                self.precision,
            )?,
            (LinearWeight::Quantised(weight), Some(over)) => lora_linear(
                x,
                &FrozenWeight::Quantised(Arc::clone(weight)),
                &over.a,
                &over.b,
                over.scale,
                self.precision,
            )?,
        };
        self.add_bias(y)
    }

    /// Returns the quantized matrix, unless activation statistics are collected.
    fn quantized_matrix(&self) -> Option<&QuantizedMatrix> {
        match (&self.weight, &self.activation_stats) {
            (LinearWeight::Packed(packed), None) => Some(packed),
            _ => None,
        }
    }

    fn add_bias(&self, y: Tensor) -> Result<Tensor, EngineError> {
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// Applies several layers to the same input. Quantized matrices share one rounding of the input and one
    /// parallel loop.
    fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N], EngineError> {
        let matrices: Vec<&QuantizedMatrix> =
            layers.iter().filter_map(|layer| layer.quantized_matrix()).collect();
        let outputs = if matrices.len() == N {
            let products = QuantizedMatrix::forward_all(&matrices, x)?;
            layers.iter().zip(products).map(|(layer, y)| layer.add_bias(y)).collect::<Result<Vec<_>, _>>()?
        } else {
            layers.iter().map(|layer| layer.forward(x)).collect::<Result<Vec<_>, _>>()?
        };
        outputs.try_into().map_err(|_| EngineError::Stopped("a layer without a result".to_owned()))
    }
}

pub(crate) struct TransformerBlock {
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
pub(crate) enum Attention<'a> {
    /// The rows of the same segment (training).
    OwnRows(&'a Arc<Vec<Segment>>),
    /// The KV cache of each segment's sequence (serving).
    Cached(&'a [Segment], &'a mut KvCache, &'a [BlockTable<'a>]),
}

impl CausalLm {
    /// Builds a model that shares the storage of `weights`. Products are computed in f32. Fails for candle
    /// families.
    pub fn new(config: &ModelConfig, weights: &Weights) -> Result<Self, EngineError> {
        Self::build(config, weights, Precision::F32)
    }

    /// Builds a model with products in `precision`. A reference model should round like the model under
    /// comparison.
    pub fn with_precision(
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
        training: GradientCheckpoint,
    ) -> Result<Self, EngineError> {
        let precision = training.precision();
        Ok(Self { gradient_checkpoint: Some(training), ..Self::build(config, weights, precision)? })
    }

    fn build(config: &ModelConfig, weights: &Weights, precision: Precision) -> Result<Self, EngineError> {
        if let Family::Candle(family) = config.family {
            let problem = "it can be served, and nothing else: its decoder is not defined here".to_owned();
            return Err(EngineError::CandleFamily { family: family.name(), problem });
        }
        let embedding = LinearWeight::from_weights(weights, "model.embed_tokens")?;
        let head = if config.tied_embeddings || config.num_labels > 0 {
            embedding.clone()
        } else {
            LinearWeight::from_weights(weights, "lm_head")?
        };
        let blocks = (0..config.num_layers)
            .map(|layer| TransformerBlock::new(config, weights, layer, precision).map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            config: config.clone(),
            embedding,
            blocks,
            final_norm: weights.get("model.norm.weight")?,
            lm_head: head,
            inverse_frequencies: config.inverse_frequencies(),
            rotary_attention_factor: config.rotary_attention_factor(),
            gradient_checkpoint: None,
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
        match &self.lm_head {
            LinearWeight::Dense(head) => head.dtype(),
            LinearWeight::Packed(_) => DType::F16,
            LinearWeight::Quantised(_) => DType::F32,
        }
    }

    /// Returns the weight of the output layer, `[vocabulary, hidden]`, for a loss. Fails for quantized
    /// weights.
    pub fn lm_head(&self) -> Result<&Tensor, EngineError> {
        match &self.lm_head {
            LinearWeight::Dense(head) => Ok(head),
            LinearWeight::Packed(_) | LinearWeight::Quantised(_) => {
                let expected = "one whose output layer has a gradient";
                Err(EngineError::InvalidParameter {
                    name: "model",
                    expected,
                    found: "one of fewer bits".to_owned(),
                })
            }
        }
    }

    /// Returns the precision of matrix products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Returns the mean square of every input channel of the blocks' matrices over `batches`, by name of
    /// the weight. These importance weights guide quantization, like llama.cpp's importance matrix.
    pub fn importance_matrix(
        config: &ModelConfig,
        weights: &Weights,
        batches: &[Batch],
    ) -> Result<HashMap<String, Vec<f32>>, EngineError> {
        let mut model = Self::new(config, weights)?;
        let mut probes = Vec::new();
        for (layer, block) in model.blocks.iter_mut().enumerate() {
            let Some(block) = Arc::get_mut(block) else { continue };
            for (name, linear) in block.linear_layers() {
                let probe = ActivationStats::default();
                linear.activation_stats = Some(Arc::clone(&probe));
                probes.push((format!("model.layers.{layer}.{name}.weight"), probe));
            }
        }
        batches.iter().try_for_each(|batch| model.hidden_states(batch).map(drop))?;
        let mean = |probe: ActivationStats| {
            let held = probe.lock().unwrap_or_else(PoisonError::into_inner);
            held.0.iter().map(|sum| (sum / held.1.max(1) as f64) as f32).collect()
        };
        Ok(probes.into_iter().map(|(name, probe)| (name, mean(probe))).collect())
    }

    /// Runs the backward pass of `loss` and adds the gradients to [`CausalLm::take_gradients`]. Fails
    /// unless the model is trainable.
    pub fn backward(&self, loss: &Tensor) -> Result<(), EngineError> {
        let training = self.gradient_checkpoint.as_ref().ok_or_else(|| {
            EngineError::Stopped("this model was built for serving and has no backward pass".to_owned())
        })?;
        Ok(training.accumulate(&loss.backward()?)?)
    }

    /// Returns the gradients accumulated since the last call, by name of the variable.
    pub fn take_gradients(&self) -> BTreeMap<String, Tensor> {
        self.gradient_checkpoint.as_ref().map(GradientCheckpoint::take_gradients).unwrap_or_default()
    }

    /// Computes hidden states after the final norm, `[rows, hidden]`. Every segment starts a sequence.
    pub fn hidden_states(&self, batch: &Batch) -> Result<Tensor, EngineError> {
        self.forward(batch, Attention::OwnRows(&batch.segments))
    }

    /// Computes hidden states like [`CausalLm::hidden`]. Each segment continues the sequence whose KV cache
    /// blocks its table lists.
    pub fn hidden_states_cached(
        &self,
        batch: &Batch,
        cache: &mut KvCache,
        tables: &[BlockTable<'_>],
    ) -> Result<Tensor, EngineError> {
        self.forward(batch, Attention::Cached(&batch.segments, cache, tables))
    }

    /// Computes logits, `[rows, vocabulary]`, of hidden states.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        Ok(match &self.lm_head {
            LinearWeight::Dense(head) => linear(hidden, head, self.precision)?,
            LinearWeight::Packed(head) => head.forward(hidden)?,
            LinearWeight::Quantised(head) => {
                linear(hidden, &head.dequantize(hidden.device())?, self.precision)?
            }
        })
    }

    fn forward(&self, batch: &Batch, mut attend: Attention<'_>) -> Result<Tensor, EngineError> {
        let rotary = self.rotary_tables(batch);
        let mut x = self.embed_tokens(batch)?;
        if self.gradient_checkpoint.is_some() && !x.track_op() {
            // A frozen embedding records no graph, but the backward pass of the blocks needs a tracked
            // input.
            x = Var::from_tensor(&x)?.as_tensor().clone();
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            x = match (&self.gradient_checkpoint, &mut attend) {
                (Some(training), Attention::OwnRows(segments)) => {
                    let (block, segments) = (Arc::clone(block), Arc::clone(segments));
                    let (config, rotary) = (self.config.clone(), rotary.clone());
                    training.run(&x, move |x| {
                        // The layer index selects a KV cache only, so 0 serves every block.
                        let mut attend = Attention::OwnRows(&segments);
                        block
                            .forward(x, 0, &config, &rotary, &mut attend)
                            .map_err(|error| candle_core::Error::Msg(error.to_string()))
                    })?
                }
                (_, attend) => block.forward(&x, layer, &self.config, &rotary, attend)?,
            };
        }
        self.final_norm(&x)
    }

    pub(crate) fn rotary_tables(&self, batch: &Batch) -> RotaryTables {
        RotaryTables::new(&batch.positions, &self.inverse_frequencies, self.rotary_attention_factor)
    }

    pub(crate) fn embed_tokens(&self, batch: &Batch) -> Result<Tensor, EngineError> {
        let look_up = |embedding: &Tensor| {
            let tokens = Tensor::from_slice(&batch.tokens, batch.tokens.len(), embedding.device())?;
            embedding.index_select(&tokens, 0)
        };
        Ok(match &self.embedding {
            LinearWeight::Dense(embedding) => look_up(embedding)?,
            LinearWeight::Packed(embedding) => embedding.lookup_rows(&batch.tokens)?,
            LinearWeight::Quantised(embedding) => look_up(&embedding.dequantize(&embedding.device())?)?,
        })
    }

    /// Computes the attention output of a layer, before the residual addition.
    pub(crate) fn self_attention(
        &self,
        layer: usize,
        x: &Tensor,
        rotary: &RotaryTables,
        attend: &mut Attention<'_>,
    ) -> Result<Tensor, EngineError> {
        self.blocks[layer].self_attention(x, layer, &self.config, rotary, attend)
    }

    /// Computes the MLP output of a layer, before the residual addition.
    pub(crate) fn mlp(&self, layer: usize, x: &Tensor) -> Result<Tensor, EngineError> {
        self.blocks[layer].mlp(x, self.config.rms_norm_eps)
    }

    pub(crate) fn final_norm(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        Ok(rms_norm(x, &self.final_norm, self.config.rms_norm_eps)?)
    }
}

impl TransformerBlock {
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
                weight: LinearWeight::from_weights(weights, &full)?,
                bias: if bias { Some(get(&format!("{name}.bias"))?) } else { None },
                adapter: weights.adapter(&full),
                activation_stats: None,
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
                Family::Qwen2 | Family::Llama | Family::Candle(_) => None,
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
    fn linear_layers(&mut self) -> [(&'static str, &mut Linear); 7] {
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
        rotary: &RotaryTables,
        attend: &mut Attention<'_>,
    ) -> Result<Tensor, EngineError> {
        let x = (x + self.self_attention(x, layer, config, rotary, attend)?)?;
        let fed = self.mlp(&x, config.rms_norm_eps)?;
        Ok((x + fed)?)
    }

    /// Self-attention with its norm, without the residual addition.
    fn self_attention(
        &self,
        x: &Tensor,
        layer: usize,
        config: &ModelConfig,
        rotary: &RotaryTables,
        attend: &mut Attention<'_>,
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
            Attention::OwnRows(segments) => attention(&q, &k, &v, config.heads, segments, self.precision)?,
            Attention::Cached(segments, cache, tables) => {
                cache.write_and_attend(layer, [&q, &k, &v], config.heads, segments, tables)?
            }
        };
        self.o.forward(&attended)
    }

    /// SwiGLU MLP with its norm, without the residual addition. Quantized matrices process [`FEED_ROWS`]
    /// rows at a time.
    fn mlp(&self, x: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
        let rows = x.dim(0)?;
        if self.gate.quantized_matrix().is_none() || rows <= MLP_CHUNK_ROWS {
            return self.mlp_chunk(x, eps);
        }
        let parts = (0..rows).step_by(MLP_CHUNK_ROWS).map(|first| {
            let part = x.narrow(0, first, MLP_CHUNK_ROWS.min(rows - first))?;
            self.mlp_chunk(&part, eps)
        });
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>, EngineError>>()?, 0)?)
    }

    /// The MLP for all rows of `x` in one pass.
    fn mlp_chunk(&self, x: &Tensor, eps: f64) -> Result<Tensor, EngineError> {
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
