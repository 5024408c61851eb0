//! LoRA (Hu et al. 2021): `W x + (alpha / rank) B A x` with frozen `W`. `A` starts uniform by Kaiming's rule, `B` at
//! zero.
//!
//! With `quantise`, `W` is stored in 4 or 8 bits during training (QLoRA, Dettmers et al. 2023). Rounding is to nearest
//! in GGUF's formats, not NF4. Deliberately absent: dropout and rank-stabilized scales.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{Tensor, Var};
use potstill_engine::checkpoint_files::write_tensors;
use potstill_engine::config::ModelConfig;
use potstill_engine::weights::{Adapter, Weights};
use potstill_shared::durable::write_file;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::LearnError;

/// LoRA settings: modules that get adapters, and their rank (PEFT: `LoraConfig`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank of the adapters, at least 1.
    pub rank: usize,
    /// Numerator of the adapters' scale `alpha / rank`.
    pub alpha: f64,
    /// Names of the modules that get adapters, such as `q_proj`.
    pub targets: Vec<String>,
    /// Format in which the frozen matrices are stored; `None` keeps them in f32.
    pub quantise: Option<FrozenFormat>,
}

/// Quantization formats of frozen matrices, named as in GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrozenFormat {
    /// 8 bits per weight and one scale per 32 weights.
    Q8_0,
    /// 4 bits per weight and one scale per 32 weights.
    Q4_0,
    /// 4 bits per weight in blocks of 256 weights, with 6-bit scales.
    Q4K,
}

impl FrozenFormat {
    fn ggml_type(self) -> GgmlDType {
        match self {
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4K => GgmlDType::Q4K,
        }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        Self { rank: 16, alpha: 32.0, targets: targets.map(str::to_owned).to_vec(), quantise: None }
    }
}

/// The LoRA adapters of one model.
pub struct Lora {
    config: LoraConfig,
    /// Module name, input size and output size.
    modules: Vec<(String, usize, usize)>,
    seed: u64,
}

/// Returns the tensor names of matrices A and B of a module, without PEFT's prefix.
fn tensor_names(module: &str) -> (String, String) {
    (format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight"))
}

impl Lora {
    /// Finds the target modules in a model of this configuration. Fails if the rank is 0, or if the model has no module
    /// of a target's name.
    pub fn new(model: &ModelConfig, config: &LoraConfig, seed: u64) -> Result<Self, LearnError> {
        if config.rank == 0 || config.targets.is_empty() {
            return Err(LearnError::Data("`lora` needs a rank of at least 1 and some targets".to_owned()));
        }
        let matrices: Vec<(String, Vec<usize>)> = model
            .tensor_shapes()
            .into_iter()
            .filter(|(name, shape)| shape.len() == 2 && name.contains("_proj."))
            .map(|(name, shape)| (name.trim_end_matches(".weight").to_owned(), shape))
            .collect();
        let of = |module: &str| module.rsplit('.').next().unwrap_or_default().to_owned();
        let mut known: Vec<String> = matrices.iter().map(|(name, _)| of(name)).collect();
        known.sort();
        known.dedup();
        if let Some(unknown) = config.targets.iter().find(|target| !known.contains(target)) {
            let known = known.join(", ");
            return Err(LearnError::Data(format!(
                "`lora.targets`: the model has no module `{unknown}`; it has {known}"
            )));
        }
        let modules = matrices
            .into_iter()
            .filter(|(name, _)| config.targets.contains(&of(name)))
            .map(|(name, shape)| (name, shape[1], shape[0]))
            .collect();
        Ok(Self { config: config.clone(), modules, seed })
    }

    /// Returns the adapters' scale, `alpha / rank`.
    fn scale(&self) -> f64 {
        self.config.alpha / self.config.rank as f64
    }

    /// Returns the frozen base weights with new adapters, and the trainable variables: matrices A and B of every
    /// adapter, and the tensors named in `extra`.
    pub fn apply(
        &self,
        base: &Weights,
        extra: &[&str],
    ) -> Result<(Weights, BTreeMap<String, Var>), LearnError> {
        let embedding = base.get("model.embed_tokens.weight")?;
        let device = embedding.device();
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let (mut variables, mut adapters) = (BTreeMap::new(), BTreeMap::new());
        for (module, inputs, outputs) in &self.modules {
            // Same bound as PyTorch's `kaiming_uniform_(a = sqrt(5))`: sqrt(3 / inputs) / sqrt(3).
            let bound = 1.0 / (*inputs as f32).sqrt();
            let values: Vec<f32> =
                (0..self.config.rank * inputs).map(|_| rng.random_range(-bound..bound)).collect();
            let a = Var::from_tensor(&Tensor::from_vec(values, (self.config.rank, *inputs), device)?)?;
            let zero = Tensor::zeros((*outputs, self.config.rank), candle_core::DType::F32, device)?;
            let b = Var::from_tensor(&zero)?;
            let adapter = Adapter { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: self.scale() };
            adapters.insert(module.clone(), adapter);
            let (name_a, name_b) = tensor_names(module);
            variables.insert(name_a, a);
            variables.insert(name_b, b);
        }
        let mut frozen = base.detached();
        if let Some(bits) = self.config.quantise {
            let modules: Vec<String> = self.modules.iter().map(|(module, ..)| module.clone()).collect();
            frozen = frozen.with_frozen_quantized(&modules, bits.ggml_type())?;
        }
        for name in extra {
            let variable = Var::from_tensor(&base.get(name)?.copy()?)?;
            frozen.insert(name, variable.as_tensor().clone());
            variables.insert((*name).to_owned(), variable);
        }
        Ok((frozen.with_adapters(adapters), variables))
    }

    /// Returns the base weights with `W + scale B A` for every module and the trained `extra` tensors. Other tensors
    /// are unchanged.
    pub fn merge(&self, base: &Weights, variables: &BTreeMap<String, Var>) -> Result<Weights, LearnError> {
        let mut merged = base.detached();
        let find = |name: &str| {
            variables.get(name).ok_or_else(|| LearnError::Data(format!("adapter `{name}` is missing")))
        };
        let mut left: BTreeMap<&String, &Var> = variables.iter().collect();
        for (module, ..) in &self.modules {
            let (name_a, name_b) = tensor_names(module);
            let product = find(&name_b)?.as_detached_tensor().matmul(&find(&name_a)?.as_detached_tensor())?;
            let name = format!("{module}.weight");
            let weight = base.get(&name)?;
            let added = (product * self.scale())?.to_device(weight.device())?;
            merged.insert(&name, (weight + added)?);
            left.remove(&name_a);
            left.remove(&name_b);
        }
        for (name, variable) in left {
            let here = base.get(name)?.device().clone();
            merged.insert(name, variable.as_detached_tensor().copy()?.to_device(&here)?);
        }
        Ok(merged)
    }

    /// Writes the adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
    pub fn write_adapter(
        &self,
        folder: &Path,
        variables: &BTreeMap<String, Var>,
        base_model: &str,
    ) -> Result<(), LearnError> {
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "target_modules": self.config.targets,
        });
        write_file(&folder.join("adapter_config.json"), format!("{config:#}\n").as_bytes())?;
        let tensors: HashMap<String, Tensor> = variables
            .iter()
            .filter(|(name, _)| name.contains(".lora_"))
            .map(|(name, variable)| (format!("base_model.model.{name}"), variable.as_detached_tensor()))
            .collect();
        Ok(write_tensors(&folder.join("adapter_model.safetensors"), &tensors)?)
    }
}
