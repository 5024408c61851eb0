//! A model under training: variables (all weights, or LoRA matrices), backward pass and optimizer.
//!
//! With several devices each holds a replica. The micro batches of a step are distributed, gradients are summed, and
//! every replica applies the same update. This is data parallelism (Li et al. 2020, "PyTorch Distributed"). Weights are
//! not sharded.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor, Var};
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::Precision;
use potstill_engine::ops::collective::Collective;
use potstill_engine::training::GradientCheckpoint;
use potstill_engine::weights::Weights;
use rayon::prelude::*;

use crate::adamw::{AdamW, AdamWConfig};
use crate::error::LearnError;
use crate::lora::Lora;
use crate::packing;
use crate::run_config::RunConfig;

/// A model with its variables and optimizer, replicated on every device of the run.
pub struct Learner {
    replicas: Vec<Replica>,
    collective: Collective,
    base: LoadedModel,
    lora: Option<Lora>,
}

/// Replica of the model on one device.
pub struct Replica {
    /// Index of the device, from 0.
    pub rank: usize,
    /// Model for the forward and backward pass of a loss.
    pub lm: CausalLm,
    pub(crate) variables: BTreeMap<String, Var>,
    pub(crate) optimizer: AdamW,
    weights: Weights,
}

impl Replica {
    fn new(
        rank: usize,
        model: &LoadedModel,
        (config, device): (&RunConfig, &Device),
        lora: Option<&Lora>,
        extra: &[&str],
    ) -> Result<Self, LearnError> {
        let base = model.weights.to_device(device, DType::F32)?;
        let (weights, variables) = match lora {
            None => base.trainable()?,
            Some(lora) => lora.apply(&base, extra)?,
        };
        let training = GradientCheckpoint::new(&variables, config.recompute, config.dtype);
        let lm = CausalLm::trainable(&model.config, &weights, training)?;
        let optimiser = AdamW::new(
            variables.clone(),
            AdamWConfig {
                beta1: config.beta1,
                beta2: config.beta2,
                eps: 1e-8,
                weight_decay: config.weight_decay,
                max_grad_norm: config.max_grad_norm,
                quantize_moments: config.eight_bit_moments,
            },
        )?;
        Ok(Self { rank, lm, variables, optimizer: optimiser, weights })
    }

    /// Returns the current value of a tensor of the model by name. Losses that use further tensors, such as a reward
    /// head, need this.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LearnError> {
        Ok(self.weights.get(name)?)
    }
}

impl Learner {
    /// Creates trainable copies of `model`'s tensors on every device, or LoRA adapters if `config.lora` is set.
    ///
    /// With LoRA, the tensors named in `extra` are trained in full, for example the head of a reward model.
    pub fn new(model: &LoadedModel, config: &RunConfig, extra: &[&str]) -> Result<Self, LearnError> {
        let devices = config.parse_devices()?;
        let on_cpu = devices.iter().any(Device::is_cpu);
        if on_cpu && config.dtype.supported() != config.dtype {
            tracing::warn!(
                "`dtype` is bf16, but this processor has no instructions for such products; computing in f32"
            );
        }
        let lora =
            config.lora.as_ref().map(|lora| Lora::new(&model.config, lora, config.seed)).transpose()?;
        let replica = |(rank, device)| Replica::new(rank, model, (config, device), lora.as_ref(), extra);
        let replicas = devices.iter().enumerate().map(replica).collect::<Result<_, _>>()?;
        // Keep the base weights only for LoRA, which merges its adapters into them at the end.
        let base_weights = if lora.is_some() { model.weights.detached() } else { Weights::default() };
        let base = LoadedModel { weights: base_weights, ..model.clone() };
        Ok(Self { replicas, collective: Collective::new(&devices)?, base, lora })
    }

    /// Splits `order` (indices into `lengths`) into micro batches and runs `work` on each. Returns the results in the
    /// order of the micro batches.
    ///
    /// A micro batch holds at most `budget` tokens and at most an equal share of all tokens per replica. Micro batch
    /// `i` runs on replica `i` modulo the number of replicas.
    pub fn map_micro_batches<T: Send>(
        &self,
        order: &[usize],
        lengths: &[usize],
        budget: usize,
        work: impl Fn(&Replica, &[usize]) -> Result<T, LearnError> + Sync,
    ) -> Result<Vec<T>, LearnError> {
        let count = self.replicas.len();
        let tokens: usize = order.iter().map(|&index| lengths[index]).sum();
        let micros = packing::pack_chunks(order, lengths, budget.min(tokens.div_ceil(count)));
        let own = |replica: &Replica| {
            let mine = micros.iter().skip(replica.rank).step_by(count);
            mine.map(|micro| work(replica, micro)).collect::<Result<Vec<T>, LearnError>>()
        };
        if let [only] = self.replicas.as_slice() {
            return own(only);
        }
        let all = self.replicas.par_iter().map(own).collect::<Result<Vec<Vec<T>>, LearnError>>()?;
        let mut all: Vec<_> = all.into_iter().map(Vec::into_iter).collect();
        Ok((0..micros.len()).filter_map(|micro| all[micro % count].next()).collect())
    }

    /// Applies one AdamW step at learning rate `rate` to the accumulated gradients, and returns their norm before
    /// clipping. If the norm is not finite, no weight changes.
    pub fn optimizer_step(&mut self, rate: f64) -> Result<f64, LearnError> {
        let gradients = self.summed_gradients()?;
        let norm = self.rank0().optimizer.gradient_norm(&gradients[0])?;
        if norm.is_finite() {
            self.replicas
                .par_iter_mut()
                .zip(&gradients)
                .try_for_each(|(replica, gradients)| replica.optimizer.step(gradients, norm, rate))?;
        }
        Ok(norm)
    }

    /// Takes the accumulated gradients of every replica and returns, per device, their sum over all devices.
    fn summed_gradients(&self) -> Result<Vec<BTreeMap<String, Tensor>>, LearnError> {
        let mut taken: Vec<_> = self.replicas.iter().map(|replica| replica.lm.take_gradients()).collect();
        if taken.len() == 1 {
            return Ok(taken);
        }
        let names: BTreeSet<String> = taken.iter().flat_map(|own| own.keys().cloned()).collect();
        for (replica, own) in self.replicas.iter().zip(&mut taken) {
            // A replica without a micro batch in this step contributes zeros.
            for (name, variable) in replica.variables.iter().filter(|(name, _)| names.contains(*name)) {
                if !own.contains_key(name) {
                    own.insert(name.clone(), variable.zeros_like()?);
                }
            }
        }
        let sums = self
            .collective
            .all_reduce_sum(taken.into_iter().map(|own| own.into_values().collect()).collect())?;
        Ok(sums.into_iter().map(|sum| names.iter().cloned().zip(sum).collect()).collect())
    }

    /// Returns the replica on the first device.
    pub(crate) fn rank0(&self) -> &Replica {
        &self.replicas[0]
    }

    /// Returns the replicas on all devices.
    pub(crate) fn replicas_mut(&mut self) -> &mut [Replica] {
        &mut self.replicas
    }

    /// Returns the trainable variables of the first device by name.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.rank0().variables
    }

    /// Builds a frozen copy of `model` on each device, for example as the reference model. `precision` should be the
    /// learner's, so that both round alike.
    pub(crate) fn reference_models(
        &self,
        model: &LoadedModel,
        precision: Precision,
    ) -> Result<Vec<CausalLm>, LearnError> {
        let beside = |device: &Device| {
            let weights = model.weights.detached().to_device(device, DType::F32)?;
            Ok(CausalLm::with_precision(&model.config, &weights, precision)?)
        };
        self.collective.devices().iter().map(beside).collect()
    }

    /// Returns one model per device that shares memory with the trained weights. Generation with it uses the newest
    /// weights.
    pub fn inference_models(&self) -> Vec<LoadedModel> {
        let decoder = |replica: &Replica| LoadedModel {
            weights: replica.weights.detached(),
            quantized: false,
            ..self.base.clone()
        };
        self.replicas.iter().map(decoder).collect()
    }

    /// Returns the trained model on the CPU. LoRA adapters are merged into the base weights.
    pub fn trained_model(&self) -> Result<LoadedModel, LearnError> {
        let weights = match &self.lora {
            None => self.rank0().weights.detached().to_device(&Device::Cpu, DType::F32)?,
            Some(lora) => lora.merge(&self.base.weights, self.variables())?,
        };
        Ok(LoadedModel { weights, quantized: false, ..self.base.clone() })
    }

    /// Returns the LoRA adapters, or `None` if all weights are trained.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }
}
