//! Named tensors, checked against the configuration before a model is built from them.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

use crate::config::ModelConfig;
use crate::error::EngineError;

/// A model's tensors by Hugging Face name.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Checks that every tensor of `config` is there with its shape. Tensors that the model does not use are dropped
    /// and named in the log. A tied model may carry an output layer; it is dropped too.
    pub fn new(mut found: BTreeMap<String, Tensor>, config: &ModelConfig) -> Result<Self, EngineError> {
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
        Ok(Self { tensors })
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
        Ok(Self { tensors: moved })
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
        Ok((Self { tensors }, variables))
    }
}
