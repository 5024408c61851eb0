//! Named tensors, checked against the configuration before a model is built from them. Over frozen ones may lie adapters of
//! low rank that learn in their place.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};

use crate::config::ModelConfig;
use crate::error::EngineError;

/// What LoRA (Hu et al. 2021) adds to a frozen matrix: `scale B A`.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// `alpha / rank`.
    pub scale: f64,
}

/// A model's tensors by Hugging Face name.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
    /// By module: the name without `.weight`.
    quantised: BTreeMap<String, Arc<QTensor>>,
    adapters: BTreeMap<String, Adapter>,
}

impl Weights {
    /// Checks that every tensor of `config` is there with its shape. Tensors that the model does not use are dropped
    /// and named in the log. A tied model may carry an output layer; it is dropped too. Those of a foreign family are looked at
    /// when its decoder is built.
    pub fn new(mut found: BTreeMap<String, Tensor>, config: &ModelConfig) -> Result<Self, EngineError> {
        if config.foreign.is_some() {
            return Ok(Self { tensors: found, ..Self::default() });
        }
        let mut tensors = BTreeMap::new();
        for (name, expected) in config.tensors() {
            let Some(tensor) = found.remove(&name) else {
                return Err(EngineError::MissingTensor { name, expected });
            };
            if tensor.dims() != expected {
                return Err(EngineError::WrongShape { name, expected, found: tensor.dims().to_vec() });
            }
            tensors.insert(name, tensor);
        }
        if !found.is_empty() {
            let names: Vec<_> = found.keys().take(5).collect();
            tracing::warn!(
                count = found.len(),
                ?names,
                "tensors that the architecture does not use were left out"
            );
        }
        Ok(Self { tensors, ..Self::default() })
    }

    /// The tensor of that name; `new` has checked that it is there.
    pub fn get(&self, name: &str) -> Result<Tensor, EngineError> {
        self.tensors
            .get(name)
            .cloned()
            .ok_or_else(|| EngineError::MissingTensor { name: name.to_owned(), expected: Vec::new() })
    }

    /// In order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter()
    }

    /// Copies to a device and type.
    pub fn to(&self, device: &Device, dtype: DType) -> Result<Self, EngineError> {
        let moved = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.to_device(device)?.to_dtype(dtype)?)))
            .collect::<Result<_, EngineError>>()?;
        Ok(Self { tensors: moved, ..Self::default() })
    }

    /// What device `rank` of `devices` holds: its share of every block's heads and inner columns, and all of the rest.
    pub(crate) fn share(&self, rank: usize, devices: usize, device: &Device) -> Result<Self, EngineError> {
        if !self.adapters.is_empty() || !self.quantised.is_empty() {
            let problem = "a model with adapters is not shared out over devices: merge them first";
            return Err(EngineError::Stopped(problem.to_owned()));
        }
        let cut = |tensor: &Tensor, dim: usize| {
            let size = tensor.dim(dim)? / devices;
            tensor.narrow(dim, rank * size, size)?.contiguous()
        };
        let mut tensors = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let module = name.rsplit('.').nth(1).unwrap_or_default();
            let share = match module {
                "q_proj" | "k_proj" | "v_proj" | "gate_proj" | "up_proj" => cut(tensor, 0)?,
                "o_proj" | "down_proj" => cut(tensor, 1)?,
                _ => tensor.clone(),
            };
            tensors.insert(name.clone(), share.to_device(device)?);
        }
        Ok(Self { tensors, ..Self::default() })
    }

    /// Trainable copies in f32, and weights that share their storage: an optimiser step on the variables changes what a
    /// model built from the weights computes.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), EngineError> {
        let mut variables = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let variable = Var::from_tensor(&tensor.to_dtype(DType::F32)?.copy()?)?;
            tensors.insert(name.clone(), variable.as_tensor().clone());
            variables.insert(name.clone(), variable);
        }
        Ok((Self { tensors, ..Self::default() }, variables))
    }

    /// The same memory without gradients.
    pub fn detached(&self) -> Self {
        let adapters = self.adapters.iter().map(|(module, adapter)| {
            let Adapter { a, b, scale } = adapter;
            (module.clone(), Adapter { a: a.detach(), b: b.detach(), scale: *scale })
        });
        Self {
            tensors: self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect(),
            quantised: self.quantised.clone(),
            adapters: adapters.collect(),
        }
    }

    /// The same frozen weights with adapters over the named modules.
    pub fn with_adapters(&self, adapters: BTreeMap<String, Adapter>) -> Self {
        Self { adapters, ..self.clone() }
    }

    /// The same with the named modules' weights kept in `kind`, which needs rows that its blocks divide; modules whose rows
    /// do not fit stay as they are.
    pub fn with_quantised(&self, modules: &[String], kind: GgmlDType) -> Result<Self, EngineError> {
        let mut all = self.clone();
        for module in modules {
            let name = format!("{module}.weight");
            let weight = self.get(&name)?;
            if weight.dim(1)?.is_multiple_of(kind.block_size()) {
                all.quantised.insert(module.clone(), Arc::new(QTensor::quantize(&weight, kind)?));
                all.tensors.remove(&name);
            }
        }
        Ok(all)
    }

    /// One more tensor, or another in its place.
    pub fn insert(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    pub(crate) fn adapter(&self, module: &str) -> Option<Adapter> {
        self.adapters.get(module).cloned()
    }

    pub(crate) fn quantised(&self, module: &str) -> Option<Arc<QTensor>> {
        self.quantised.get(module).cloned()
    }
}
