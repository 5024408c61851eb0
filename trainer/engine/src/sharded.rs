//! Tensor parallelism: a model on one device or split over several (Shoeybi et al. 2019, "Megatron-LM",
//! section 3). Each device computes a share of every block's attention heads and MLP columns. The outputs
//! of attention and MLP are summed over the devices; between the sums all devices compute concurrently.
//! Every device holds the embedding and the norms; the first holds the output layer.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::batch::Batch;
use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::kv::{BlockTable, KvCache};
use crate::loader::LoadedModel;
use crate::model::{Attention, CausalLm};
use crate::ops::collective::Collective;
use crate::weights::Weights;

/// A model split over one or more devices.
pub struct TensorParallelLm {
    shares: Vec<CausalLm>,
    collective: Collective,
}

impl TensorParallelLm {
    /// Splits `model` over `devices`. Without devices the model stays where its weights are. Fails if heads
    /// or MLP columns are not divisible by the number of devices.
    pub fn new(model: &LoadedModel, devices: &[Device]) -> Result<Self, EngineError> {
        Self::split(&model.config, &model.weights, model.quantized, devices)
    }

    fn split(
        config: &ModelConfig,
        weights: &Weights,
        quantised: bool,
        devices: &[Device],
    ) -> Result<Self, EngineError> {
        let here = [weights.embedding_device()?];
        let devices = if devices.is_empty() { &here } else { devices };
        let build = |config: &ModelConfig, weights: &Weights| {
            if quantised {
                CausalLm::new(config, &weights.quantized_to_int8()?)
            } else {
                CausalLm::new(config, weights)
            }
        };
        let share = |(rank, device): (usize, &Device)| {
            if devices.len() == 1 && device.same_device(&here[0]) {
                return build(config, weights);
            }
            let mut config = config.shard(devices.len())?;
            // Only the first device computes logits. Marked as tied, the other shards need no output layer.
            config.tied_embeddings |= rank > 0;
            build(&config, &weights.shard(rank, devices.len(), device)?)
        };
        let shares = devices.iter().enumerate().map(share).collect::<Result<_, _>>()?;
        Ok(Self { shares, collective: Collective::new(devices)? })
    }

    /// The first shard. Its configuration is the model's, except for head counts and MLP width.
    fn first_shard(&self) -> &CausalLm {
        &self.shares[0]
    }

    /// Returns the data type for keys and values.
    pub fn kv_dtype(&self) -> DType {
        self.first_shard().kv_dtype()
    }

    /// Returns the configuration of each shard.
    pub fn config(&self) -> &ModelConfig {
        self.first_shard().config()
    }

    /// Creates one KV cache of `blocks` blocks per device.
    pub fn new_kv_caches(&self, blocks: usize) -> Result<Vec<KvCache>, EngineError> {
        let cache = |(share, device): (&CausalLm, &Device)| {
            KvCache::new(share.config(), blocks, device, share.kv_dtype())
        };
        self.shares.iter().zip(self.collective.devices()).map(cache).collect()
    }

    /// Computes hidden states after the final norm, on the first device. Each segment continues the
    /// sequence whose blocks its table lists.
    pub fn hidden_states(
        &self,
        batch: &Batch,
        caches: &mut [KvCache],
        tables: &[BlockTable<'_>],
    ) -> Result<Tensor, EngineError> {
        if let ([only], [cache]) = (self.shares.as_slice(), &mut *caches) {
            return only.hidden_states_cached(batch, cache, tables);
        }
        let rotary = self.first_shard().rotary_tables(batch);
        let embedded = self.shares.par_iter().map(|share| share.embed_tokens(batch));
        let mut rows = embedded.collect::<Result<Vec<_>, EngineError>>()?;
        for layer in 0..self.config().num_layers {
            let attended = self.shares.par_iter().zip(&rows).zip(&mut *caches).map(|((share, x), cache)| {
                let mut attend = Attention::Cached(&batch.segments, cache, tables);
                share.self_attention(layer, x, &rotary, &mut attend)
            });
            rows = self.add_all_reduced(&rows, attended.collect::<Result<_, EngineError>>()?)?;
            let fed = self.shares.par_iter().zip(&rows).map(|(share, x)| share.mlp(layer, x));
            rows = self.add_all_reduced(&rows, fed.collect::<Result<_, EngineError>>()?)?;
        }
        self.first_shard().final_norm(&rows[0])
    }

    /// Adds the sum of the devices' `parts` to `rows`, on each device.
    fn add_all_reduced(&self, rows: &[Tensor], parts: Vec<Tensor>) -> Result<Vec<Tensor>, EngineError> {
        let sums = self.collective.all_reduce_sum(parts.into_iter().map(|part| vec![part]).collect())?;
        Ok(rows.iter().zip(&sums).map(|(x, sum)| x + &sum[0]).collect::<candle_core::Result<_>>()?)
    }

    /// Computes logits, `[rows, vocabulary]`, of hidden states.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        self.first_shard().logits(hidden)
    }
}

impl ModelConfig {
    /// Returns the configuration of one shard out of `devices`.
    fn shard(&self, devices: usize) -> Result<Self, EngineError> {
        let mut share = self.clone();
        for (name, size) in [
            ("num_attention_heads", &mut share.heads.query),
            ("num_key_value_heads", &mut share.heads.kv),
            ("intermediate_size", &mut share.intermediate_size),
        ] {
            if !size.is_multiple_of(devices) {
                return Err(EngineError::InvalidParameter {
                    name: "device",
                    expected: "as many devices as divide the model's heads and inner columns",
                    found: format!("{devices} devices for `{name}` = {size}"),
                });
            }
            *size /= devices;
        }
        Ok(share)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Family;
    use crate::init;

    fn model(family: &str, tied: bool) -> (ModelConfig, Weights) {
        let text = format!(
            r#"{{"model_type": "{family}", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3,
            "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4, "tie_word_embeddings": {tied}}}"#
        );
        let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
        let weights = init::random_weights(&config, 5).unwrap();
        (config, weights)
    }

    /// Two sequences in steps of any length: two and three devices compute the logits of one device.
    #[test]
    fn tensor_parallel_logits_match_one_device() {
        for (family, tied) in [(Family::Qwen2, true), (Family::Qwen3, false), (Family::Llama, true)] {
            let (config, weights) = model(family.name(), tied);
            let outputs = |devices: usize| {
                let lm =
                    TensorParallelLm::split(&config, &weights, false, &vec![Device::Cpu; devices]).unwrap();
                let mut caches = lm.new_kv_caches(6).unwrap();
                let tables: [&[u32]; 2] = [&[4, 0], &[1, 5, 2]];
                let tokens: Vec<u32> = (0..48).map(|at| (at * 17 + 3) % 40).collect();
                let mut all = Vec::new();
                for (a, b) in [(0..7, 0..20), (7..8, 20..21), (8..20, 21..40)] {
                    let batch = Batch::new([(&tokens[a.clone()], a.start), (&tokens[b.clone()], b.start)]);
                    let hidden = lm.hidden_states(&batch, &mut caches, &tables).unwrap();
                    all.extend(lm.logits(&hidden).unwrap().to_vec2::<f32>().unwrap().concat());
                }
                all
            };
            let alone = outputs(1);
            assert!(alone.iter().any(|value| value.abs() > 0.01), "logits that say something");
            for devices in [2, 3] {
                let together = outputs(devices);
                let furthest = alone.iter().zip(&together).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(furthest < 1e-5, "{family:?} on {devices} devices: {furthest}");
            }
        }
    }

    #[test]
    fn rejects_head_counts_not_divisible_by_devices() {
        let (config, weights) = model("llama", true);
        let refused = TensorParallelLm::split(&config, &weights, false, &vec![Device::Cpu; 4])
            .err()
            .unwrap()
            .to_string();
        assert!(refused.contains("num_key_value_heads") && refused.contains("4 devices"), "{refused}");
    }
}
