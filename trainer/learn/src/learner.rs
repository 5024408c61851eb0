//! A model that learns: which of its tensors do (all, or adapters of low rank), its backward pass and its optimiser.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use potstill_engine::loader::LoadedModel;
use potstill_engine::model::CausalLm;
use potstill_engine::training::Training;
use potstill_engine::weights::Weights;

use crate::adamw::{AdamW, AdamWConfig};
use crate::error::LearnError;
use crate::lora::Lora;
use crate::run::RunConfig;

/// The model, its variables and its optimiser.
pub struct Learner {
    /// For the forward and backward pass of a loss.
    pub lm: CausalLm,
    pub(crate) variables: BTreeMap<String, Var>,
    pub(crate) optimiser: AdamW,
    weights: Weights,
    base: LoadedModel,
    lora: Option<Lora>,
}

impl Learner {
    /// Trainable copies of `model`'s tensors, or adapters over them where `config.lora` says so. `extra` are further
    /// tensors that learn from `model`'s hidden states, such as the head of a reward model.
    pub fn new(model: &LoadedModel, config: &RunConfig, extra: &[&str]) -> Result<Self, LearnError> {
        let (weights, variables, lora) = match &config.lora {
            None => {
                let (weights, variables) = model.weights.trainable()?;
                (weights, variables, None)
            }
            Some(settings) => {
                let lora = Lora::new(&model.config, settings, config.seed)?;
                let (weights, variables) = lora.over(&model.weights, extra)?;
                (weights, variables, Some(lora))
            }
        };
        if config.dtype.here() != config.dtype {
            tracing::warn!(
                "`dtype` is bf16, but this processor has no instructions for such products; computing in f32"
            );
        }
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
            },
        )?;
        // Only what adapters are merged into is needed again.
        let base_weights = if lora.is_some() { model.weights.detached() } else { Weights::default() };
        let base = LoadedModel { weights: base_weights, ..model.clone() };
        Ok(Self { lm, variables, optimiser, weights, base, lora })
    }

    /// Moves the variables by the gradients that were added up, clipped, at this rate; returns the gradients' norm. Nothing
    /// moves when it is not finite.
    pub fn update(&mut self, rate: f64) -> Result<f64, LearnError> {
        let gradients = self.lm.take_gradients();
        let norm = self.optimiser.gradient_norm(&gradients)?;
        if norm.is_finite() {
            self.optimiser.step(&gradients, norm, rate)?;
        }
        Ok(norm)
    }

    /// One tensor of the model as it stands, for losses over more than the logits.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LearnError> {
        Ok(self.weights.get(name)?)
    }

    /// Variables by name.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// The model for decoding, over the very same memory: what the optimiser changes is what it decodes with.
    pub fn decoder(&self) -> LoadedModel {
        LoadedModel { weights: self.weights.detached(), quantised: false, ..self.base.clone() }
    }

    /// The trained model, adapters merged into what they lie over.
    pub fn finish(&self) -> Result<LoadedModel, LearnError> {
        let weights = match &self.lora {
            None => self.weights.detached().to(self.device(), DType::F32)?,
            Some(lora) => lora.merged(&self.base.weights, &self.variables)?,
        };
        Ok(LoadedModel { weights, quantised: false, ..self.base.clone() })
    }

    /// The adapters, where it has some.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    fn device(&self) -> &Device {
        self.variables.values().next().map_or(&Device::Cpu, |variable| variable.device())
    }
}
