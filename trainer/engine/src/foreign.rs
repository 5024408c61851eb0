//! Candle families: models whose decoder comes from candle-transformers, for serving only. Each sequence
//! has a copy of the decoder, with shared weights and a cache of its own, and is computed alone. There is
//! no prefix cache, embedding, prompt logprob or training.
//!
//! candle-transformers ignores a sliding window while decoding, so the context ends at the window. Scaled
//! rotary frequencies are rejected. Within these limits the logits match transformers
//! (`tests/against_transformers.rs`).

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    gemma, gemma2, glm4_new, mistral, mixtral, olmo2, phi3, qwen2_moe, qwen3_moe, starcoder2,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::EngineError;
use crate::weights::Weights;

/// A candle family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// Google's Gemma.
    Gemma,
    /// Google's Gemma 2.
    Gemma2,
    /// GLM-4-0414 (2025).
    Glm4,
    /// Mistral (dense).
    Mistral,
    /// Mixtral: Mistral with mixture of experts.
    Mixtral,
    /// OLMo 2 by Ai2.
    Olmo2,
    /// Phi-3 and Phi-4.
    Phi3,
    /// Qwen2 with mixture of experts.
    Qwen2Moe,
    /// Qwen3 with mixture of experts.
    Qwen3Moe,
    /// StarCoder2 by BigCode.
    Starcoder2,
}

impl Foreign {
    /// All candle families.
    pub const ALL: [Self; 10] = [
        Self::Gemma,
        Self::Gemma2,
        Self::Glm4,
        Self::Mistral,
        Self::Mixtral,
        Self::Olmo2,
        Self::Phi3,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::Starcoder2,
    ];

    /// Returns `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Glm4 => "glm4",
            Self::Mistral => "mistral",
            Self::Mixtral => "mixtral",
            Self::Olmo2 => "olmo2",
            Self::Phi3 => "phi3",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Starcoder2 => "starcoder2",
        }
    }
}

/// Maximum context length in tokens. candle-transformers computes rotary tables for all positions of the
/// configuration when the model is built; this bound limits their size.
pub(crate) const MOST_POSITIONS: usize = 1 << 18;

/// The `config.json` of a candle family, in the form that candle-transformers reads.
#[derive(Debug, Clone, PartialEq)]
pub struct ForeignConfig {
    family: Foreign,
    /// The JSON object for candle-transformers.
    value: Value,
}

/// Returns the sliding window in tokens, or `None` with full attention.
pub(crate) fn window(config: &Value) -> Option<usize> {
    let off = config.get("use_sliding_window") == Some(&json!(false));
    let window = config.get("sliding_window").and_then(Value::as_u64).filter(|_| !off)?;
    usize::try_from(window).ok()
}

impl ForeignConfig {
    /// Converts the output of newer versions of transformers to the fields that candle-transformers reads.
    /// `dim` is the head size. Rejects values that candle-transformers would ignore or panic on.
    pub(crate) fn new(
        family: Foreign,
        mut value: Value,
        dim: usize,
        path: &Path,
    ) -> Result<Self, EngineError> {
        let refused = |problem: &str| Err(EngineError::malformed(path, problem));
        let rope = value.get("rope_parameters").cloned().unwrap_or_default();
        let theta = rope.get("rope_theta").cloned();
        let partial = rope.get("partial_rotary_factor").cloned();
        let no_window = window(&value).is_none();
        let stretched = |rope: &Value| {
            let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str);
            kind.is_some_and(|kind| kind != "default")
        };
        let experts = value.get("num_local_experts").cloned();
        let scaling = value.get("rope_scaling").cloned().unwrap_or_default();
        if stretched(&scaling) || stretched(&rope) {
            return refused("stretched rotary frequencies are not supported for this family");
        }
        let turned = value.get("partial_rotary_factor").or(partial.as_ref()).and_then(Value::as_f64);
        if let Some(part) = turned.filter(|part| !(*part <= 1.0 && *part * dim as f64 >= 2.0)) {
            return refused(&format!("`partial_rotary_factor` is {part}, of heads of {dim}"));
        }
        let number = |name: &str| value.get(name).and_then(Value::as_u64);
        if number("decoder_sparse_step") == Some(0) {
            return refused("`decoder_sparse_step` is 0");
        }
        let all = number("num_experts").or_else(|| number("num_local_experts"));
        if let (Some(chosen), Some(all)) = (number("num_experts_per_tok"), all)
            && !(1..=all).contains(&chosen)
        {
            return refused(&format!("`num_experts_per_tok` is {chosen}, of {all} experts"));
        }
        let positions = number("max_position_embeddings").map(|most| json!(most.min(MOST_POSITIONS as u64)));
        let Some(fields) = value.as_object_mut() else { return refused("it is no object") };
        if let Some(positions) = positions {
            fields.insert("max_position_embeddings".to_owned(), positions);
        }
        // Sets a field that the file leaves out.
        let mut known = |name: &str, given: Option<Value>| {
            if let Some(given) = given
                && fields.get(name).is_none_or(Value::is_null)
            {
                fields.insert(name.to_owned(), given);
            }
        };
        known("rope_theta", theta);
        known("partial_rotary_factor", partial);
        known("num_experts", experts);
        known("tie_word_embeddings", Some(json!(false)));
        known("max_window_layers", Some(json!(0)));
        known("hidden_activation", Some(json!("gelu_pytorch_tanh")));
        fields.insert("use_flash_attn".to_owned(), json!(false));
        if matches!(family, Foreign::Gemma | Foreign::Gemma2) {
            // Older files also carry `hidden_act`, which no implementation uses.
            fields.remove("hidden_act");
        }
        // The loader reads the token ids; `rope_scaling` was checked above.
        for name in ["eos_token_id", "bos_token_id", "rope_scaling"] {
            fields.remove(name);
        }
        if no_window && matches!(family, Foreign::Mixtral | Foreign::Qwen2Moe) {
            // These two decoders require a number; the whole context stands for full attention.
            let all = fields.get("max_position_embeddings").cloned().unwrap_or_default();
            fields.insert("sliding_window".to_owned(), all);
        }
        Ok(Self { family, value })
    }

    /// Returns the computation type for a model that would otherwise use `dtype`. Most of these decoders
    /// compute positions in the weights' type, and bf16 cannot represent all integers above 256.
    pub(crate) fn dtype(&self, dtype: DType) -> DType {
        match self.family {
            Foreign::Mistral | Foreign::Qwen3Moe => dtype,
            _ => DType::F32,
        }
    }

    fn refused(&self, problem: &str) -> EngineError {
        EngineError::Foreign { family: self.family.name(), problem: problem.to_owned() }
    }

    fn number(&self, name: &str) -> Option<f64> {
        self.value.get(name)?.as_f64()
    }

    fn parse<T: DeserializeOwned>(&self) -> candle_core::Result<T> {
        serde_json::from_value(self.value.clone()).map_err(candle_core::Error::wrap)
    }
}

/// A decoder of candle-transformers with the KV cache of one sequence.
trait Decoder: Send {
    /// Returns the logits after the last of `tokens`, `[1, tokens]`, which follow `past` earlier tokens.
    fn forward(&mut self, tokens: &Tensor, past: usize) -> candle_core::Result<Tensor>;

    /// Returns a copy with shared weights and a cache of its own.
    fn copy(&self) -> Box<dyn Decoder>;
}

macro_rules! decoders {
    ($($decoder:ty),* $(,)?) => {$(
        impl Decoder for $decoder {
            fn forward(&mut self, tokens: &Tensor, past: usize) -> candle_core::Result<Tensor> {
                self.forward(tokens, past)
            }

            fn copy(&self) -> Box<dyn Decoder> {
                Box::new(self.clone())
            }
        }
    )*};
}

decoders!(
    gemma::Model,
    gemma2::Model,
    glm4_new::ModelForCausalLM,
    mistral::Model,
    mixtral::Model,
    olmo2::Model,
    phi3::Model,
    qwen2_moe::Model,
    qwen3_moe::ModelForCausalLM,
    starcoder2::Model,
);

/// Builds the decoder of the family.
fn decoder(config: &ForeignConfig, weights: VarBuilder<'_>) -> candle_core::Result<Box<dyn Decoder>> {
    Ok(match config.family {
        Foreign::Gemma => Box::new(gemma::Model::new(false, &config.parse()?, weights)?),
        Foreign::Gemma2 => Box::new(gemma2::Model::new(false, &config.parse()?, weights)?),
        Foreign::Glm4 => Box::new(glm4_new::ModelForCausalLM::new(&config.parse()?, weights)?),
        Foreign::Mistral => Box::new(mistral::Model::new(&config.parse()?, weights)?),
        Foreign::Mixtral => Box::new(mixtral::Model::new(&config.parse()?, weights)?),
        Foreign::Olmo2 => Box::new(olmo2::Model::new(&config.parse()?, weights)?),
        Foreign::Phi3 => Box::new(phi3::Model::new(&config.parse()?, weights)?),
        Foreign::Qwen2Moe => Box::new(qwen2_moe::Model::new(&config.parse()?, weights)?),
        Foreign::Qwen3Moe => Box::new(qwen3_moe::ModelForCausalLM::new(&config.parse()?, weights)?),
        Foreign::Starcoder2 => Box::new(starcoder2::Model::new(&config.parse()?, weights)?),
    })
}

/// A model of a candle family; computes one sequence at a time.
pub struct ForeignLm {
    /// Decoder with an empty cache, copied for each sequence.
    fresh: Box<dyn Decoder>,
    device: Device,
}

/// Decoder state of one sequence.
pub struct State {
    decoder: Box<dyn Decoder>,
    device: Device,
}

impl ForeignLm {
    /// Builds a decoder that shares the storage of `weights`. Fails if the family or this build cannot run
    /// the configuration.
    pub fn new(config: &ForeignConfig, weights: &Weights) -> Result<Self, EngineError> {
        let mut tensors: HashMap<String, Tensor> =
            weights.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        let embedding = weights.get("model.embed_tokens.weight")?;
        if cfg!(feature = "cuda") && config.family == Foreign::Qwen3Moe && embedding.device().is_cpu() {
            return Err(config.refused("a program built with `cuda` computes its experts on a GPU only"));
        }
        let head = "lm_head.weight";
        let tied = config.value.get("tie_word_embeddings") == Some(&json!(true));
        let always_tied = matches!(config.family, Foreign::Gemma | Foreign::Gemma2 | Foreign::Starcoder2);
        if always_tied && !tied && tensors.contains_key(head) {
            return Err(config.refused("an output layer other than the embedding is not supported"));
        }
        if tied && !tensors.contains_key(head) {
            tensors.insert(head.to_owned(), embedding.clone());
        }
        // candle-transformers divides scores by the root of the head size and ignores
        // `query_pre_attn_scalar`. Scaled query weights compensate.
        if let (Foreign::Gemma2, Some(dim), Some(scalar)) =
            (config.family, config.number("head_dim"), config.number("query_pre_attn_scalar"))
        {
            for (_, query) in tensors.iter_mut().filter(|(name, _)| name.contains("self_attn.q_proj.")) {
                *query = query.affine((dim / scalar).sqrt(), 0.0)?;
            }
        }
        let weights = VarBuilder::from_tensors(tensors, embedding.dtype(), embedding.device());
        let fresh = decoder(config, weights).map_err(|error| EngineError::Foreign {
            family: config.family.name(),
            problem: error.to_string(),
        })?;
        Ok(Self { fresh, device: embedding.device().clone() })
    }

    /// Returns the state of an empty sequence.
    pub fn state(&self) -> State {
        State { decoder: self.fresh.copy(), device: self.device.clone() }
    }
}

impl State {
    /// Computes the logits after the last of `tokens`, `[vocabulary]` in f32. `past` is the number of
    /// tokens before.
    pub fn forward(&mut self, tokens: &[u32], past: usize) -> Result<Tensor, EngineError> {
        let tokens = Tensor::from_slice(tokens, (1, tokens.len()), &self.device)?;
        Ok(self.decoder.forward(&tokens, past)?.flatten_all()?.to_dtype(DType::F32)?)
    }
}
