//! Model configurations, read from `config.json` (Hugging Face) or GGUF metadata, and the shapes of all
//! tensors.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::candle_config::{self, CandleConfig, CandleFamily};
use crate::error::EngineError;
use crate::ops::attention::AttentionHeads;
use crate::rope_scaling::RopeScaling;

/// Model families. The native ones share one decoder; methods of [`ModelConfig`] give the differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Qwen2, Qwen2.5 and models distilled into these: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMSNorm on the query and key heads, no biases.
    Qwen3,
    /// Llama 2, Llama 3, SmolLM2 and other models of the same architecture.
    Llama,
    /// Candle families: decoders of candle-transformers, for serving only.
    #[serde(skip)]
    Candle(CandleFamily),
}

impl Family {
    /// The native families.
    pub const ALL: [Self; 3] = [Self::Qwen2, Self::Qwen3, Self::Llama];

    /// Returns `model_type` in `config.json`, which equals `general.architecture` in GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Llama => "llama",
            Self::Candle(family) => family.name(),
        }
    }

    /// Returns the class name in `architectures`.
    fn architecture_class(self) -> &'static str {
        match self {
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
            Self::Candle(_) => "AutoModelForCausalLM",
        }
    }

    /// Returns the family with `model_type` `name`. Fails with [`EngineError::UnknownArchitecture`]; `path`
    /// appears in the error only.
    pub fn parse(name: &str, path: &Path) -> Result<Self, EngineError> {
        let foreign = CandleFamily::ALL.map(Self::Candle);
        Self::find_by_name(name, path, &[Self::ALL.as_slice(), &foreign].concat())
    }

    /// Returns the native family of that name; rejects candle families.
    pub fn parse_native(name: &str, path: &Path) -> Result<Self, EngineError> {
        Self::find_by_name(name, path, &Self::ALL)
    }

    fn find_by_name(name: &str, path: &Path, known: &[Self]) -> Result<Self, EngineError> {
        let found = known.iter().find(|family| family.name() == name).copied();
        found.ok_or_else(|| EngineError::UnsupportedArchitecture {
            path: path.to_owned(),
            found: name.to_owned(),
            supported: known
                .iter()
                .map(|family| format!("`{}`", family.name()))
                .collect::<Vec<_>>()
                .join(", "),
        })
    }
}

/// Configuration of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Model family.
    pub family: Family,
    /// Number of tokens in the vocabulary: rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_layers: usize,
    /// Numbers and size of attention heads.
    pub heads: AttentionHeads,
    /// Maximum context length in tokens.
    pub max_positions: usize,
    /// Epsilon of RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Scaling of the rotary frequencies for long contexts.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the output layer shares the weights of the embedding.
    pub tied_embeddings: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Token ids that end a turn.
    pub eos_token_ids: Vec<u32>,
    /// Token id that begins a text.
    pub bos_token_id: Option<u32>,
    /// Number of outputs of the classifier or reward head; 0 for a language model.
    pub num_labels: usize,
    /// Configuration of a candle family; `None` for native families.
    pub candle: Option<CandleConfig>,
}

#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_max_position_embeddings")]
    max_position_embeddings: usize,
    #[serde(default = "default_rms_norm_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f32>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    #[serde(default)]
    eos_token_id: Option<OneOrMany>,
    #[serde(default)]
    bos_token_id: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    num_labels: Option<usize>,
    id2label: Option<serde_json::Map<String, Value>>,
}

impl HfConfig {
    fn heads(&self) -> AttentionHeads {
        AttentionHeads {
            query: self.num_attention_heads,
            kv: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1)),
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

fn default_max_position_embeddings() -> usize {
    2048
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

impl ModelConfig {
    /// Parses the text of a `config.json`. `path` appears in errors only.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, EngineError> {
        let malformed = |problem: String| EngineError::malformed(path, problem);
        let value: Value = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        let model_type = value.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let family = Family::parse(model_type, path)?;
        if value.get("quantization_config").is_some_and(|config| !config.is_null()) {
            return Err(malformed(
                "`quantization_config`: safetensors in fewer bits are not read; take the full weights or a GGUF file".to_owned(),
            ));
        }
        if let Family::Candle(family) = family {
            return Self::from_candle_json(family, value, path);
        }
        let hf: HfConfig = serde_json::from_value(value).map_err(|error| malformed(error.to_string()))?;
        debug_assert_eq!(hf.model_type, family.name());
        if hf.use_sliding_window == Some(true) {
            return Err(malformed(
                "`use_sliding_window` is true; only full attention is supported".to_owned(),
            ));
        }
        if hf.mlp_bias == Some(true) || (family == Family::Llama && hf.attention_bias == Some(true)) {
            return Err(malformed("`mlp_bias` and Llama's `attention_bias` are not supported".to_owned()));
        }
        let parameters = hf.rope_parameters.as_ref();
        let theta = parameters
            .and_then(|rope| rope.get("rope_theta")?.as_f64())
            .map(|theta| theta as f32)
            .or(hf.rope_theta)
            .unwrap_or(10_000.0);
        let scaling = hf.rope_scaling.as_ref().filter(|scaling| !scaling.is_null()).or(parameters);
        let positions = hf.max_position_embeddings;
        let rope_scaling =
            scaling.map(|scaling| RopeScaling::parse(scaling, positions, path)).transpose()?.flatten();
        let config = Self {
            family,
            vocab_size: hf.vocab_size,
            hidden_size: hf.hidden_size,
            intermediate_size: hf.intermediate_size,
            num_layers: hf.num_hidden_layers,
            heads: hf.heads(),
            max_positions: rope_scaling
                .as_ref()
                .map_or(positions, |scaling| scaling.max_context_tokens(positions)),
            rms_norm_eps: hf.rms_norm_eps,
            rope_theta: theta,
            rope_scaling,
            tied_embeddings: hf.tie_word_embeddings.unwrap_or(false),
            qkv_bias: family == Family::Qwen2,
            eos_token_ids: hf.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default(),
            bos_token_id: hf.bos_token_id,
            num_labels: if hf.architectures.iter().any(|name| name.ends_with("ForSequenceClassification")) {
                // The default of transformers is two labels.
                hf.num_labels.or(hf.id2label.map(|labels| labels.len())).unwrap_or(2)
            } else {
                0
            },
            candle: None,
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Parses the fields of a candle family's configuration that serving needs.
    fn from_candle_json(family: CandleFamily, value: Value, path: &Path) -> Result<Self, EngineError> {
        let hf: HfConfig = serde_json::from_value(value.clone())
            .map_err(|error| EngineError::malformed(path, error.to_string()))?;
        let heads = hf.heads();
        let config = Self {
            family: Family::Candle(family),
            vocab_size: hf.vocab_size,
            hidden_size: hf.hidden_size,
            intermediate_size: hf.intermediate_size,
            num_layers: hf.num_hidden_layers,
            heads,
            max_positions: hf
                .max_position_embeddings
                .min(candle_config::MAX_CONTEXT_TOKENS)
                .min(candle_config::sliding_window(&value).unwrap_or(usize::MAX)),
            rms_norm_eps: hf.rms_norm_eps,
            rope_theta: hf.rope_theta.unwrap_or(10_000.0),
            rope_scaling: None,
            tied_embeddings: hf.tie_word_embeddings.unwrap_or(false),
            qkv_bias: false,
            eos_token_ids: hf.eos_token_id.map(OneOrMany::into_vec).unwrap_or_default(),
            bos_token_id: hf.bos_token_id,
            num_labels: 0,
            candle: Some(CandleConfig::new(family, value, heads.dim, path)?),
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Fails with [`EngineError::Malformed`] if sizes are zero, implausibly large or inconsistent.
    pub fn validate(&self, path: &Path) -> Result<(), EngineError> {
        let heads = self.heads;
        const MAX_SIZE: usize = 1 << 24;
        let sizes = [
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_layers,
            heads.query,
            heads.dim,
            self.max_positions,
        ];
        let problem =
            if sizes.iter().any(|size| *size > MAX_SIZE) || self.num_layers > 4096 || heads.query > 4096 {
                "a size is beyond anything that exists".to_owned()
            } else if heads.query == 0 || heads.kv == 0 || !heads.query.is_multiple_of(heads.kv) {
                format!("{} query heads are not a multiple of {} key heads", heads.query, heads.kv)
            } else if heads.dim == 0 || !heads.dim.is_multiple_of(2) {
                format!("head size {} is not even", heads.dim)
            } else if [
                self.vocab_size,
                self.hidden_size,
                self.intermediate_size,
                self.num_layers,
                self.max_positions,
            ]
            .contains(&0)
            {
                "a size is zero".to_owned()
            } else {
                return Ok(());
            };
        Err(EngineError::malformed(path, problem))
    }

    /// Returns a `config.json` that Hugging Face transformers can read.
    pub fn to_json(&self) -> Value {
        let mut value = json!({
            "architectures": [self.family.architecture_class()],
            "model_type": self.family.name(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.heads.query,
            "num_key_value_heads": self.heads.kv,
            "head_dim": self.heads.dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tied_embeddings,
            "use_sliding_window": false,
            "torch_dtype": "float32",
            "eos_token_id": self.eos_token_ids,
        });
        if let Some(bos) = self.bos_token_id {
            value["bos_token_id"] = json!(bos);
        }
        if self.num_labels > 0 {
            let class = self.family.architecture_class().replace("ForCausalLM", "ForSequenceClassification");
            value["architectures"] = json!([class]);
            value["num_labels"] = json!(self.num_labels);
            let labels = (0..self.num_labels).map(|label| (label.to_string(), json!(label.to_string())));
            value["id2label"] = Value::Object(labels.collect());
        }
        value
    }

    /// Returns the inverse rotary frequencies in radians per position, one per pair of a head's elements.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let dim = self.heads.dim;
        (0..dim / 2)
            .map(|pair| {
                let frequency = 1.0 / self.rope_theta.powf(2.0 * pair as f32 / dim as f32);
                self.rope_scaling
                    .as_ref()
                    .map_or(frequency, |scaling| scaling.scaled(frequency, pair, dim, self.rope_theta))
            })
            .collect()
    }

    /// Returns the factor on rotated queries and keys: YaRN's attention factor, else 1.
    pub fn rotary_attention_factor(&self) -> f32 {
        self.rope_scaling.as_ref().map_or(1.0, RopeScaling::attention_factor)
    }

    /// Returns the divisor that the scaling applies to each frequency.
    pub(crate) fn frequency_divisors(&self) -> Vec<f32> {
        let unstretched = Self { rope_scaling: None, ..self.clone() }.inverse_frequencies();
        unstretched.iter().zip(self.inverse_frequencies()).map(|(from, to)| from / to).collect()
    }

    /// Returns all tensors of the model by Hugging Face name, with shapes, in file order.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        // The head of a classifier replaces the output layer.
        let (d, ff) = (self.hidden_size, self.intermediate_size);
        let (qw, kw, dim) =
            (self.heads.query * self.heads.dim, self.heads.kv * self.heads.dim, self.heads.dim);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, d])];
        for layer in 0..self.num_layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            add("input_layernorm.weight", &[d]);
            for (name, width) in [("q", qw), ("k", kw), ("v", kw)] {
                add(&format!("self_attn.{name}_proj.weight"), &[width, d]);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}_proj.bias"), &[width]);
                }
            }
            if self.family == Family::Qwen3 {
                add("self_attn.q_norm.weight", &[dim]);
                add("self_attn.k_norm.weight", &[dim]);
            }
            add("self_attn.o_proj.weight", &[d, qw]);
            add("post_attention_layernorm.weight", &[d]);
            add("mlp.gate_proj.weight", &[ff, d]);
            add("mlp.up_proj.weight", &[ff, d]);
            add("mlp.down_proj.weight", &[d, ff]);
        }
        tensors.push(("model.norm.weight".to_owned(), vec![d]));
        if self.num_labels > 0 {
            tensors.push(("score.weight".to_owned(), vec![self.num_labels, d]));
        } else if !self.tied_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, d]));
        }
        tensors
    }

    /// Returns the number of parameters.
    pub fn parameter_count(&self) -> usize {
        self.tensor_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}
