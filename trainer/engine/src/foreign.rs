//! Candle families: models whose decoder comes from candle-transformers, for serving only. Each sequence
//! has a copy of the decoder, with shared weights and a cache of its own, and is computed alone. There is
//! no prefix cache, embedding, prompt logprob or training.
//!
//! candle-transformers ignores a sliding window while decoding, so the context ends at the window. Scaled
//! rotary frequencies are rejected. Within these limits the logits match transformers
//! (`tests/against_transformers.rs`).

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    gemma, gemma2, glm4_new, mistral, mixtral, olmo2, phi3, qwen2_moe, qwen3_moe, starcoder2,
};

use serde_json::json;

use crate::candle_config::{CandleConfig, CandleFamily};
use crate::error::EngineError;
use crate::weights::Weights;

/// A decoder of candle-transformers with the KV cache of one sequence.
trait CandleDecoder: Send {
    /// Returns the logits after the last of `tokens`, `[1, tokens]`, which follow `past` earlier tokens.
    fn forward(&mut self, tokens: &Tensor, past: usize) -> candle_core::Result<Tensor>;

    /// Returns a copy with shared weights and a cache of its own.
    fn copy(&self) -> Box<dyn CandleDecoder>;
}

macro_rules! decoders {
    ($($decoder:ty),* $(,)?) => {$(
        impl CandleDecoder for $decoder {
            fn forward(&mut self, tokens: &Tensor, past: usize) -> candle_core::Result<Tensor> {
                self.forward(tokens, past)
            }

            fn copy(&self) -> Box<dyn CandleDecoder> {
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
fn build_decoder(
    config: &CandleConfig,
    weights: VarBuilder<'_>,
) -> candle_core::Result<Box<dyn CandleDecoder>> {
    Ok(match config.family {
        CandleFamily::Gemma => Box::new(gemma::Model::new(false, &config.deserialize()?, weights)?),
        CandleFamily::Gemma2 => Box::new(gemma2::Model::new(false, &config.deserialize()?, weights)?),
        CandleFamily::Glm4 => Box::new(glm4_new::ModelForCausalLM::new(&config.deserialize()?, weights)?),
        CandleFamily::Mistral => Box::new(mistral::Model::new(&config.deserialize()?, weights)?),
        CandleFamily::Mixtral => Box::new(mixtral::Model::new(&config.deserialize()?, weights)?),
        CandleFamily::Olmo2 => Box::new(olmo2::Model::new(&config.deserialize()?, weights)?),
        CandleFamily::Phi3 => Box::new(phi3::Model::new(&config.deserialize()?, weights)?),
        CandleFamily::Qwen2Moe => Box::new(qwen2_moe::Model::new(&config.deserialize()?, weights)?),
        CandleFamily::Qwen3Moe => {
            Box::new(qwen3_moe::ModelForCausalLM::new(&config.deserialize()?, weights)?)
        }
        CandleFamily::Starcoder2 => Box::new(starcoder2::Model::new(&config.deserialize()?, weights)?),
    })
}

/// A model of a candle family; computes one sequence at a time.
pub struct CandleLm {
    /// Decoder with an empty cache, copied for each sequence.
    fresh: Box<dyn CandleDecoder>,
    device: Device,
}

/// Decoder state of one sequence.
pub struct DecoderState {
    decoder: Box<dyn CandleDecoder>,
    device: Device,
}

impl CandleLm {
    /// Builds a decoder that shares the storage of `weights`. Fails if the family or this build cannot run
    /// the configuration.
    pub fn new(config: &CandleConfig, weights: &Weights) -> Result<Self, EngineError> {
        let mut tensors: HashMap<String, Tensor> =
            weights.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        let embedding = weights.get("model.embed_tokens.weight")?;
        if cfg!(feature = "cuda") && config.family == CandleFamily::Qwen3Moe && embedding.device().is_cpu() {
            return Err(config.unsupported("a program built with `cuda` computes its experts on a GPU only"));
        }
        let head = "lm_head.weight";
        let tied = config.value.get("tie_word_embeddings") == Some(&json!(true));
        let always_tied =
            matches!(config.family, CandleFamily::Gemma | CandleFamily::Gemma2 | CandleFamily::Starcoder2);
        if always_tied && !tied && tensors.contains_key(head) {
            return Err(config.unsupported("an output layer other than the embedding is not supported"));
        }
        if tied && !tensors.contains_key(head) {
            tensors.insert(head.to_owned(), embedding.clone());
        }
        // candle-transformers divides scores by the root of the head size and ignores
        // `query_pre_attn_scalar`. Scaled query weights compensate.
        if let (CandleFamily::Gemma2, Some(dim), Some(scalar)) =
            (config.family, config.number_field("head_dim"), config.number_field("query_pre_attn_scalar"))
        {
            for (_, query) in tensors.iter_mut().filter(|(name, _)| name.contains("self_attn.q_proj.")) {
                *query = query.affine((dim / scalar).sqrt(), 0.0)?;
            }
        }
        let weights = VarBuilder::from_tensors(tensors, embedding.dtype(), embedding.device());
        let fresh = build_decoder(config, weights).map_err(|error| EngineError::CandleFamily {
            family: config.family.name(),
            problem: error.to_string(),
        })?;
        Ok(Self { fresh, device: embedding.device().clone() })
    }

    /// Returns the state of an empty sequence.
    pub fn new_state(&self) -> DecoderState {
        DecoderState { decoder: self.fresh.copy(), device: self.device.clone() }
    }
}

impl DecoderState {
    /// Computes the logits after the last of `tokens`, `[vocabulary]` in f32. `past` is the number of
    /// tokens before.
    pub fn forward(&mut self, tokens: &[u32], past: usize) -> Result<Tensor, EngineError> {
        let tokens = Tensor::from_slice(tokens, (1, tokens.len()), &self.device)?;
        Ok(self.decoder.forward(&tokens, past)?.flatten_all()?.to_dtype(DType::F32)?)
    }
}
