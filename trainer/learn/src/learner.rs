//! A model that learns: which of its tensors do (all, or adapters of low rank), its backward pass and its optimiser. On several
//! devices each has a copy: the micro-batches of a step are shared out, their gradients summed over the devices, and every copy
//! takes the same step (data parallelism; Li et al. 2020, "PyTorch Distributed").

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor, Var};
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::ops::Precision;
use potstill_engine::ops::collective::Collective;
use potstill_engine::training::Training;
use potstill_engine::weights::Weights;
use rayon::prelude::*;

use crate::adamw::{AdamW, AdamWConfig};
use crate::error::LearnError;
use crate::lora::Lora;
use crate::packing;
use crate::run::RunConfig;

/// A model, its variables and its optimiser, on as many devices as the run has.
pub struct Learner {
    replicas: Vec<Replica>,
    collective: Collective,
    base: LoadedModel,
    lora: Option<Lora>,
}

/// The model on one device.
pub struct Replica {
    /// Its number.
    pub rank: usize,
    /// For the forward and backward pass of a loss.
    pub lm: CausalLm,
    pub(crate) variables: BTreeMap<String, Var>,
    pub(crate) optimiser: AdamW,
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
        let base = model.weights.to(device, DType::F32)?;
        let (weights, variables) = match lora {
            None => base.trainable()?,
            Some(lora) => lora.over(&base, extra)?,
        };
        let training = Training::new(&variables, config.recompute, config.dtype);
        let lm = CausalLm::trainable(&model.config, &weights, training)?;
        let optimiser = AdamW::new(
            variables.clone(),
            AdamWConfig {
                beta1: config.beta1,
                beta2: config.beta2,
                eps: 1e-8,
                weight_decay: config.weight_decay,
                max_grad_norm: config.max_grad_norm,
                eight_bits: config.eight_bit_moments,
            },
        )?;
        Ok(Self { rank, lm, variables, optimiser, weights })
    }

    /// One tensor of the model as it stands, for losses over more than the logits.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LearnError> {
        Ok(self.weights.get(name)?)
    }
}

impl Learner {
    /// Trainable copies of `model`'s tensors, or adapters over them where `config.lora` says so. `extra` are further
    /// tensors that learn from `model`'s hidden states, such as the head of a reward model.
    pub fn new(model: &LoadedModel, config: &RunConfig, extra: &[&str]) -> Result<Self, LearnError> {
        let devices = config.devices()?;
        let on_cpu = devices.iter().any(Device::is_cpu);
        if on_cpu && config.dtype.here() != config.dtype {
            tracing::warn!(
                "`dtype` is bf16, but this processor has no instructions for such products; computing in f32"
            );
        }
        let lora =
            config.lora.as_ref().map(|lora| Lora::new(&model.config, lora, config.seed)).transpose()?;
        let replica = |(rank, device)| Replica::new(rank, model, (config, device), lora.as_ref(), extra);
        let replicas = devices.iter().enumerate().map(replica).collect::<Result<_, _>>()?;
        // Only what adapters are merged into is needed again.
        let base_weights = if lora.is_some() { model.weights.detached() } else { Weights::default() };
        let base = LoadedModel { weights: base_weights, ..model.clone() };
        Ok(Self { replicas, collective: Collective::new(&devices)?, base, lora })
    }

    /// Cuts `order` into micro-batches of at most `budget` tokens, and of no more than each replica's share of all, and has the
    /// replicas share them out: micro-batch `i` goes to replica `i` modulo their number. Results in the order of the
    /// micro-batches.
    pub fn share<T: Send>(
        &self,
        order: &[usize],
        lengths: &[usize],
        budget: usize,
        work: impl Fn(&Replica, &[usize]) -> Result<T, LearnError> + Sync,
    ) -> Result<Vec<T>, LearnError> {
        let count = self.replicas.len();
        let tokens: usize = order.iter().map(|&index| lengths[index]).sum();
        let micros = packing::chunks(order, lengths, budget.min(tokens.div_ceil(count)));
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

    /// One optimiser step at `rate` with the gradients that were added up; returns their norm. Nothing moves when it is no number.
    pub fn update(&mut self, rate: f64) -> Result<f64, LearnError> {
        let gradients = self.gradients()?;
        let norm = self.first().optimiser.gradient_norm(&gradients[0])?;
        if norm.is_finite() {
            self.replicas
                .par_iter_mut()
                .zip(&gradients)
                .try_for_each(|(replica, gradients)| replica.optimiser.step(gradients, norm, rate))?;
        }
        Ok(norm)
    }

    /// The gradients of a step, on each device those of all.
    fn gradients(&self) -> Result<Vec<BTreeMap<String, Tensor>>, LearnError> {
        let mut taken: Vec<_> = self.replicas.iter().map(|replica| replica.lm.take_gradients()).collect();
        if taken.len() == 1 {
            return Ok(taken);
        }
        let names: BTreeSet<String> = taken.iter().flat_map(|own| own.keys().cloned()).collect();
        for (replica, own) in self.replicas.iter().zip(&mut taken) {
            // Who had no micro-batch of this step adds nothing.
            for (name, variable) in replica.variables.iter().filter(|(name, _)| names.contains(*name)) {
                if !own.contains_key(name) {
                    own.insert(name.clone(), variable.zeros_like()?);
                }
            }
        }
        let sums = self.collective.sum(taken.into_iter().map(|own| own.into_values().collect()).collect())?;
        Ok(sums.into_iter().map(|sum| names.iter().cloned().zip(sum).collect()).collect())
    }

    pub(crate) fn first(&self) -> &Replica {
        &self.replicas[0]
    }

    pub(crate) fn replicas_mut(&mut self) -> &mut [Replica] {
        &mut self.replicas
    }

    /// Variables by name; those of the first device where there are several.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.first().variables
    }

    /// `model`, frozen, on each of the devices: what the learner is held against. Products round as the learner's do.
    pub(crate) fn beside(
        &self,
        model: &LoadedModel,
        precision: Precision,
    ) -> Result<Vec<CausalLm>, LearnError> {
        let beside = |device: &Device| {
            let weights = model.weights.detached().to(device, DType::F32)?;
            Ok(CausalLm::rounded(&model.config, &weights, precision)?)
        };
        self.collective.devices().iter().map(beside).collect()
    }

    /// The model for decoding on each device, over the very same memory: what the optimiser changes is what it decodes with.
    pub fn decoders(&self) -> Vec<LoadedModel> {
        let decoder = |replica: &Replica| LoadedModel {
            weights: replica.weights.detached(),
            quantised: false,
            ..self.base.clone()
        };
        self.replicas.iter().map(decoder).collect()
    }

    /// The trained model in the memory of the CPU, adapters merged into what they lie over.
    pub fn finish(&self) -> Result<LoadedModel, LearnError> {
        let weights = match &self.lora {
            None => self.first().weights.detached().to(&Device::Cpu, DType::F32)?,
            Some(lora) => lora.merged(&self.base.weights, self.variables())?,
        };
        Ok(LoadedModel { weights, quantised: false, ..self.base.clone() })
    }

    /// The adapters, where it has some.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }
}
