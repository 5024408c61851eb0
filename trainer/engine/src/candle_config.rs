//! Configurations of candle families, checked for values that candle-transformers would ignore or panic on.

use std::path::Path;

use candle_core::DType;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::EngineError;

/// A candle family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CandleFamily {
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

impl CandleFamily {
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
pub(crate) const MAX_CONTEXT_TOKENS: usize = 1 << 18;

/// The `config.json` of a candle family, in the form that candle-transformers reads.
#[derive(Debug, Clone, PartialEq)]
pub struct CandleConfig {
    pub(crate) family: CandleFamily,
    /// The JSON object for candle-transformers.
    pub(crate) value: Value,
}

/// Returns the sliding window in tokens, or `None` with full attention.
pub(crate) fn sliding_window(config: &Value) -> Option<usize> {
    let off = config.get("use_sliding_window") == Some(&json!(false));
    let window = config.get("sliding_window").and_then(Value::as_u64).filter(|_| !off)?;
    usize::try_from(window).ok()
}

impl CandleConfig {
    /// Converts the output of newer versions of transformers to the fields that candle-transformers reads.
    /// `dim` is the head size. Rejects values that candle-transformers would ignore or panic on.
    pub(crate) fn new(
        family: CandleFamily,
        mut value: Value,
        dim: usize,
        path: &Path,
    ) -> Result<Self, EngineError> {
        let refused = |problem: &str| Err(EngineError::malformed(path, problem));
        let rope = value.get("rope_parameters").cloned().unwrap_or_default();
        let theta = rope.get("rope_theta").cloned();
        let partial = rope.get("partial_rotary_factor").cloned();
        let no_window = sliding_window(&value).is_none();
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
        let positions =
            number("max_position_embeddings").map(|most| json!(most.min(MAX_CONTEXT_TOKENS as u64)));
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
        if matches!(family, CandleFamily::Gemma | CandleFamily::Gemma2) {
            // Older files also carry `hidden_act`, which no implementation uses.
            fields.remove("hidden_act");
        }
        // The loader reads the token ids; `rope_scaling` was checked above.
        for name in ["eos_token_id", "bos_token_id", "rope_scaling"] {
            fields.remove(name);
        }
        if no_window && matches!(family, CandleFamily::Mixtral | CandleFamily::Qwen2Moe) {
            // These two decoders require a number; the whole context stands for full attention.
            let all = fields.get("max_position_embeddings").cloned().unwrap_or_default();
            fields.insert("sliding_window".to_owned(), all);
        }
        Ok(Self { family, value })
    }

    /// Returns the computation type for a model that would otherwise use `dtype`. Most of these decoders
    /// compute positions in the weights' type, and bf16 cannot represent all integers above 256.
    pub(crate) fn compute_dtype(&self, dtype: DType) -> DType {
        match self.family {
            CandleFamily::Mistral | CandleFamily::Qwen3Moe => dtype,
            _ => DType::F32,
        }
    }

    pub(crate) fn unsupported(&self, problem: &str) -> EngineError {
        EngineError::CandleFamily { family: self.family.name(), problem: problem.to_owned() }
    }

    pub(crate) fn number_field(&self, name: &str) -> Option<f64> {
        self.value.get(name)?.as_f64()
    }

    pub(crate) fn deserialize<T: DeserializeOwned>(&self) -> candle_core::Result<T> {
        serde_json::from_value(self.value.clone()).map_err(candle_core::Error::wrap)
    }
}
