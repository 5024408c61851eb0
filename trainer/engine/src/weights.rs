//! Named tensors of a model, checked against the configuration before a model is built. Also holds
//! quantized matrices for serving, frozen quantized matrices for training, and LoRA adapters.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};

use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::ops::packed::{QuantizedMatrix, has_fast_kernel};

/// A LoRA adapter (Hu et al. 2021): adds `scale B A` to a frozen matrix.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Shape `[rank, in]`.
    pub a: Tensor,
    /// Shape `[out, rank]`.
    pub b: Tensor,
    /// Factor `alpha / rank`.
    pub scale: f64,
}

/// Weights of a model by Hugging Face name.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
    /// Frozen quantized matrices below trainable adapters (QLoRA), by module: the tensor name without
    /// `.weight`.
    frozen_quantized: BTreeMap<String, Arc<QTensor>>,
    /// 8- or 4-bit matrices for serving, without gradients, by module.
    quantized: BTreeMap<String, Arc<QuantizedMatrix>>,
    adapters: BTreeMap<String, Adapter>,
}

/// Storage of the tensors of a model while loading.
#[derive(Debug, Clone)]
pub(crate) struct WeightLayout {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    /// Whether matrices are quantized where their shapes permit: 4-bit data stays 4-bit, all else becomes
    /// 8-bit.
    pub(crate) eight_bits: bool,
}

/// Collects the tensors of a model while reading. Checks each tensor against the configuration and converts
/// the tensor to the target storage before the next is read.
pub struct WeightBuilder {
    /// Tensors that have not been added yet, in the order of the configuration. `None` for a candle family,
    /// whose tensor names only its decoder knows.
    missing: Option<Vec<(String, Vec<usize>)>>,
    /// Names of tensors that the model does not use.
    left_out: Vec<String>,
    weights: Weights,
    keep: Option<WeightLayout>,
}

impl WeightBuilder {
    /// Creates an empty collection that converts tensors as `keep` specifies.
    pub(crate) fn new(config: &ModelConfig, keep: WeightLayout) -> Self {
        Self { keep: Some(keep), ..Self::unconverted(config) }
    }

    /// Creates an empty collection that keeps device and data type of the tensors.
    pub fn unconverted(config: &ModelConfig) -> Self {
        let missing = config.candle.is_none().then(|| config.tensor_shapes());
        Self { missing, left_out: Vec::new(), weights: Weights::default(), keep: None }
    }

    /// Returns whether the model uses a tensor of that name. Records the names of unused tensors for the
    /// log.
    pub fn uses(&mut self, name: &str) -> bool {
        let wanted =
            self.missing.as_ref().is_none_or(|missing| missing.iter().any(|(known, _)| known == name));
        if !wanted {
            self.left_out.push(name.to_owned());
        }
        wanted
    }

    /// Returns whether matrices are quantized while reading.
    pub(crate) fn quantizes(&self) -> bool {
        self.keep.as_ref().is_some_and(|keep| keep.eight_bits)
    }

    /// Adds a tensor that [`Gathered::wants`] accepts. Fails if the shape differs from the configuration.
    pub fn add(&mut self, name: String, tensor: Tensor) -> Result<(), EngineError> {
        self.mark_found(&name, tensor.dims())?;
        let Some(keep) = &self.keep else {
            self.weights.tensors.insert(name, tensor);
            return Ok(());
        };
        if keep.eight_bits
            && let Some(packed) = quantize_matrix(&name, &tensor)?
        {
            self.weights.insert_quantized(&name, packed);
        } else {
            let tensor = tensor.to_device(&keep.device)?.to_dtype(keep.dtype)?;
            self.weights.tensors.insert(name, tensor);
        }
        Ok(())
    }

    /// Adds a matrix that was quantized while reading.
    pub(crate) fn add_quantized(&mut self, name: &str, packed: QuantizedMatrix) -> Result<(), EngineError> {
        self.mark_found(name, &packed.dims())?;
        self.weights.insert_quantized(name, packed);
        Ok(())
    }

    /// Fails with [`EngineError::WrongShape`] if the configuration gives another shape.
    pub(crate) fn check_shape(&self, name: &str, found: &[usize]) -> Result<(), EngineError> {
        let mut missing = self.missing.iter().flatten();
        match missing.find(|(known, expected)| known == name && expected != found) {
            None => Ok(()),
            Some((_, expected)) => Err(EngineError::ShapeMismatch {
                name: name.to_owned(),
                expected: expected.clone(),
                found: found.to_vec(),
            }),
        }
    }

    /// Checks the shape and removes the tensor from the missing ones.
    fn mark_found(&mut self, name: &str, found: &[usize]) -> Result<(), EngineError> {
        self.check_shape(name, found)?;
        if let Some(missing) = &mut self.missing {
            missing.retain(|(known, _)| known != name);
        }
        Ok(())
    }

    /// Returns the weights. Fails if a tensor is missing. Logs the names of unused tensors, for example the
    /// output layer of a tied model.
    pub fn build(self) -> Result<Weights, EngineError> {
        if let Some((name, expected)) = self.missing.into_iter().flatten().next() {
            return Err(EngineError::MissingTensor { name, expected });
        }
        if !self.left_out.is_empty() {
            let names: Vec<_> = self.left_out.iter().take(5).collect();
            tracing::warn!(
                count = self.left_out.len(),
                ?names,
                "tensors that the architecture does not use were left out"
            );
        }
        Ok(self.weights)
    }
}

/// Returns the module of a weight's name.
fn module_name(name: &str) -> Option<&str> {
    name.strip_suffix(".weight")
}

/// Converts a matrix on the CPU to 8 bits. Returns `None` for vectors, classifier heads, tensors on other
/// devices and rows that do not divide into blocks.
fn quantize_matrix(name: &str, tensor: &Tensor) -> Result<Option<QuantizedMatrix>, EngineError> {
    if tensor.rank() != 2
        || !tensor.device().is_cpu()
        || module_name(name).is_none_or(|module| module == "score")
    {
        return Ok(None);
    }
    Ok(QuantizedMatrix::quantize_int8(tensor)?)
}

impl Weights {
    /// Checks that every tensor of `config` exists with its shape.
    pub fn new(found: BTreeMap<String, Tensor>, config: &ModelConfig) -> Result<Self, EngineError> {
        let mut gathered = WeightBuilder::unconverted(config);
        for (name, tensor) in found {
            if gathered.uses(&name) {
                gathered.add(name, tensor)?;
            }
        }
        gathered.build()
    }

    fn insert_quantized(&mut self, name: &str, packed: QuantizedMatrix) {
        self.quantized.insert(module_name(name).unwrap_or(name).to_owned(), Arc::new(packed));
    }

    /// Returns the weights with 8-bit matrices, for serving. Without fast kernels all matrices stay
    /// unchanged, as do adapted ones and shapes that do not fit.
    pub fn quantized_to_int8(&self) -> Result<Self, EngineError> {
        if !has_fast_kernel() {
            return Ok(self.clone());
        }
        let mut all = Self { tensors: BTreeMap::new(), ..self.clone() };
        for (name, tensor) in &self.tensors {
            let adapted = module_name(name).is_some_and(|module| self.adapters.contains_key(module));
            if !adapted && let Some(packed) = quantize_matrix(name, tensor)? {
                all.insert_quantized(name, packed);
            } else {
                all.tensors.insert(name.clone(), tensor.clone());
            }
        }
        Ok(all)
    }

    /// Returns the device of the embedding.
    pub(crate) fn embedding_device(&self) -> Result<Device, EngineError> {
        const EMBEDDING: &str = "model.embed_tokens";
        if self.quantized.contains_key(EMBEDDING) {
            return Ok(Device::Cpu);
        }
        Ok(self.get(&format!("{EMBEDDING}.weight"))?.device().clone())
    }

    /// Returns a tensor by name. Fails with [`EngineError::MissingTensor`], also for quantized matrices.
    pub fn get(&self, name: &str) -> Result<Tensor, EngineError> {
        self.tensors
            .get(name)
            .cloned()
            .ok_or_else(|| EngineError::MissingTensor { name: name.to_owned(), expected: Vec::new() })
    }

    /// Iterates over the unquantized tensors in order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter()
    }

    /// Copies the tensors to a device and data type. Adapters and frozen quantized matrices are not copied.
    /// Fails for matrices quantized for serving.
    pub fn to_device(&self, device: &Device, dtype: DType) -> Result<Self, EngineError> {
        self.reject_quantized("taken elsewhere")?;
        let moved = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.to_device(device)?.to_dtype(dtype)?)))
            .collect::<Result<_, EngineError>>()?;
        Ok(Self { tensors: moved, ..Self::default() })
    }

    /// Returns the shard of device `rank` of `devices` for tensor parallelism. Attention heads and MLP
    /// columns are split; all else is copied. Fails for adapters and quantized matrices.
    pub(crate) fn shard(&self, rank: usize, devices: usize, device: &Device) -> Result<Self, EngineError> {
        if !self.adapters.is_empty() || !self.frozen_quantized.is_empty() || !self.quantized.is_empty() {
            let problem = "a model with adapters or packed matrices is not shared out over devices";
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

    /// Fails if the weights hold matrices quantized for serving; `what` names the rejected use.
    fn reject_quantized(&self, what: &str) -> Result<(), EngineError> {
        if self.quantized.is_empty() {
            return Ok(());
        }
        let found = format!("matrices that were packed to be served, which cannot be {what}");
        Err(EngineError::InvalidParameter {
            name: "model",
            expected: "one that was not loaded to be served",
            found,
        })
    }

    /// Returns trainable f32 copies of the tensors, and weights that share the copies' storage. An optimizer step
    /// on the variables updates models built from the weights. Fails for matrices quantized for serving.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), EngineError> {
        self.reject_quantized("trained")?;
        let mut variables = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let variable = Var::from_tensor(&tensor.to_dtype(DType::F32)?.copy()?)?;
            tensors.insert(name.clone(), variable.as_tensor().clone());
            variables.insert(name.clone(), variable);
        }
        Ok((Self { tensors, ..Self::default() }, variables))
    }

    /// Returns weights that share the memory but record no gradients.
    pub fn detached(&self) -> Self {
        let adapters = self.adapters.iter().map(|(module, adapter)| {
            let Adapter { a, b, scale } = adapter;
            (module.clone(), Adapter { a: a.detach(), b: b.detach(), scale: *scale })
        });
        Self {
            tensors: self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect(),
            frozen_quantized: self.frozen_quantized.clone(),
            quantized: self.quantized.clone(),
            adapters: adapters.collect(),
        }
    }

    /// Returns the same weights with adapters on the named modules.
    pub fn with_adapters(&self, adapters: BTreeMap<String, Adapter>) -> Self {
        Self { adapters, ..self.clone() }
    }

    /// Returns the weights with the matrices of `modules` quantized to `kind`. Modules whose row length is
    /// not a multiple of the block size stay unchanged.
    pub fn with_frozen_quantized(&self, modules: &[String], kind: GgmlDType) -> Result<Self, EngineError> {
        let mut all = self.clone();
        for module in modules {
            let name = format!("{module}.weight");
            let weight = self.get(&name)?;
            if weight.dim(1)?.is_multiple_of(kind.block_size()) {
                all.frozen_quantized.insert(module.clone(), Arc::new(QTensor::quantize(&weight, kind)?));
                all.tensors.remove(&name);
            }
        }
        Ok(all)
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// Returns the size of the serving matrices in bytes.
    pub fn quantized_bytes(&self) -> usize {
        self.quantized.values().map(|packed| packed.size_bytes()).sum()
    }

    pub(crate) fn adapter(&self, module: &str) -> Option<Adapter> {
        self.adapters.get(module).cloned()
    }

    pub(crate) fn quantized(&self, module: &str) -> Option<Arc<QuantizedMatrix>> {
        self.quantized.get(module).cloned()
    }

    pub(crate) fn frozen_quantized(&self, module: &str) -> Option<Arc<QTensor>> {
        self.frozen_quantized.get(module).cloned()
    }
}
