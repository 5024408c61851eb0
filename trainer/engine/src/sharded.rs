//! A model on one device, or on several that share it out: each has some of every block's heads and inner columns, and the two
//! outputs of a block are summed over the devices (tensor parallelism; Shoeybi et al. 2019, "Megatron-LM", section 3). What lies
//! between the sums is computed on all devices at once; embedding and norms are held by each, the output layer by the first.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::batch::Batch;
use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::kv::{KvCache, Table};
use crate::loader::LoadedModel;
use crate::model::{Attend, CausalLm};
use crate::ops::collective::Collective;
use crate::weights::Weights;

/// The shares, one for each device.
pub struct ShardedLm {
    shares: Vec<CausalLm>,
    collective: Collective,
}

impl ShardedLm {
    /// Brings `model` to `devices` in the type that each computes in. Without devices it stays where its weights are.
    pub fn new(model: &LoadedModel, devices: &[Device]) -> Result<Self, EngineError> {
        Self::over(&model.config, &model.weights, model.quantised, devices)
    }

    fn over(
        config: &ModelConfig,
        weights: &Weights,
        quantised: bool,
        devices: &[Device],
    ) -> Result<Self, EngineError> {
        let here = [weights.device()?];
        let devices = if devices.is_empty() { &here } else { devices };
        let build = |config: &ModelConfig, weights: &Weights| {
            if quantised {
                CausalLm::new(config, &weights.in_eight_bits()?)
            } else {
                CausalLm::new(config, weights)
            }
        };
        let share = |(rank, device): (usize, &Device)| {
            if devices.len() == 1 && device.same_device(&here[0]) {
                return build(config, weights);
            }
            let mut config = config.share(devices.len())?;
            // Only the first writes: the others need no output layer beside the embedding.
            config.tied |= rank > 0;
            build(&config, &weights.share(rank, devices.len(), device)?)
        };
        let shares = devices.iter().enumerate().map(share).collect::<Result<_, _>>()?;
        Ok(Self { shares, collective: Collective::new(devices)? })
    }

    /// The first share; its shape is the model's, but for heads and inner columns.
    fn first(&self) -> &CausalLm {
        &self.shares[0]
    }

    /// How keys and values are best kept.
    pub fn kv_dtype(&self) -> DType {
        self.first().kv_dtype()
    }

    /// The shape of each share.
    pub fn config(&self) -> &ModelConfig {
        self.first().config()
    }

    /// A cache of so many blocks for each device.
    pub fn caches(&self, blocks: usize) -> Result<Vec<KvCache>, EngineError> {
        let cache = |(share, device): (&CausalLm, &Device)| {
            KvCache::new(share.config(), blocks, device, share.kv_dtype())
        };
        self.shares.iter().zip(self.collective.devices()).map(cache).collect()
    }

    /// Hidden states after the last norm on the first device, each segment continuing the sequence whose blocks its table names.
    pub fn hidden(
        &self,
        batch: &Batch,
        caches: &mut [KvCache],
        tables: &[Table<'_>],
    ) -> Result<Tensor, EngineError> {
        if let ([only], [cache]) = (self.shares.as_slice(), &mut *caches) {
            return only.hidden_cached(batch, cache, tables);
        }
        let rotary = self.first().rotary(batch);
        let embedded = self.shares.par_iter().map(|share| share.embed(batch));
        let mut rows = embedded.collect::<Result<Vec<_>, EngineError>>()?;
        for layer in 0..self.config().layers {
            let attended = self.shares.par_iter().zip(&rows).zip(&mut *caches).map(|((share, x), cache)| {
                let mut attend = Attend::Cached(&batch.segments, cache, tables);
                share.attended(layer, x, &rotary, &mut attend)
            });
            rows = self.added(&rows, attended.collect::<Result<_, EngineError>>()?)?;
            let fed = self.shares.par_iter().zip(&rows).map(|(share, x)| share.fed(layer, x));
            rows = self.added(&rows, fed.collect::<Result<_, EngineError>>()?)?;
        }
        self.first().last_norm(&rows[0])
    }

    /// `rows` and the sum of what the devices have computed, on each of them.
    fn added(&self, rows: &[Tensor], parts: Vec<Tensor>) -> Result<Vec<Tensor>, EngineError> {
        let sums = self.collective.sum(parts.into_iter().map(|part| vec![part]).collect())?;
        Ok(rows.iter().zip(&sums).map(|(x, sum)| x + &sum[0]).collect::<candle_core::Result<_>>()?)
    }

    /// Logits `[rows, vocabulary]` of hidden states.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        self.first().logits(hidden)
    }
}

impl ModelConfig {
    /// The shape of what each of `devices` holds.
    fn share(&self, devices: usize) -> Result<Self, EngineError> {
        let mut share = self.clone();
        for (name, size) in [
            ("num_attention_heads", &mut share.heads.query),
            ("num_key_value_heads", &mut share.heads.kv),
            ("intermediate_size", &mut share.intermediate_size),
        ] {
            if !size.is_multiple_of(devices) {
                return Err(EngineError::Parameter {
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
        let weights = init::random(&config, 5).unwrap();
        (config, weights)
    }

    /// Two sequences in steps of any length: two and three devices compute what one does.
    #[test]
    fn several_devices_compute_what_one_does() {
        for (family, tied) in [(Family::Qwen2, true), (Family::Qwen3, false), (Family::Llama, true)] {
            let (config, weights) = model(family.name(), tied);
            let outputs = |devices: usize| {
                let lm = ShardedLm::over(&config, &weights, false, &vec![Device::Cpu; devices]).unwrap();
                let mut caches = lm.caches(6).unwrap();
                let tables: [&[u32]; 2] = [&[4, 0], &[1, 5, 2]];
                let tokens: Vec<u32> = (0..48).map(|at| (at * 17 + 3) % 40).collect();
                let mut all = Vec::new();
                for (a, b) in [(0..7, 0..20), (7..8, 20..21), (8..20, 21..40)] {
                    let batch = Batch::new([(&tokens[a.clone()], a.start), (&tokens[b.clone()], b.start)]);
                    let hidden = lm.hidden(&batch, &mut caches, &tables).unwrap();
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
    fn heads_that_do_not_divide_are_refused() {
        let (config, weights) = model("llama", true);
        let refused =
            ShardedLm::over(&config, &weights, false, &vec![Device::Cpu; 4]).err().unwrap().to_string();
        assert!(refused.contains("num_key_value_heads") && refused.contains("4 devices"), "{refused}");
    }
}
