//! Named tensors, checked against the configuration before a model is built from them. Over frozen ones may lie adapters of
//! low rank that learn in their place.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};

use crate::config::ModelConfig;
use crate::error::EngineError;
use crate::ops::packed::{Packed, is_fast};

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
    /// Under adapters that learn. By module: the name without `.weight`.
    quantised: BTreeMap<String, Arc<QTensor>>,
    /// For serving only: there is no gradient. By module.
    packed: BTreeMap<String, Arc<Packed>>,
    adapters: BTreeMap<String, Adapter>,
}

/// How tensors are kept.
#[derive(Debug, Clone)]
pub(crate) struct Keep {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    /// Matrices are packed to eight bits, or to four if they have no more, as far as their shapes allow.
    pub(crate) eight_bits: bool,
}

/// Tensors of a model as they are read: each is checked against the configuration and brought to where it is kept before the next one.
pub struct Gathered {
    /// What is still to come, in the order of the configuration; nothing is known of a foreign family's before its decoder is built.
    missing: Option<Vec<(String, Vec<usize>)>>,
    left_out: Vec<String>,
    weights: Weights,
    keep: Option<Keep>,
}

impl Gathered {
    /// Nothing yet.
    pub(crate) fn new(config: &ModelConfig, keep: Keep) -> Self {
        Self { keep: Some(keep), ..Self::as_they_are(config) }
    }

    /// Nothing yet; tensors stay where they are.
    pub fn as_they_are(config: &ModelConfig) -> Self {
        let missing = config.foreign.is_none().then(|| config.tensors());
        Self { missing, left_out: Vec::new(), weights: Weights::default(), keep: None }
    }

    /// Whether the model has use for a tensor of that name. One that it has none for is remembered.
    pub fn wants(&mut self, name: &str) -> bool {
        let wanted =
            self.missing.as_ref().is_none_or(|missing| missing.iter().any(|(known, _)| known == name));
        if !wanted {
            self.left_out.push(name.to_owned());
        }
        wanted
    }

    /// Whether matrices are packed, as far as their shapes allow.
    pub(crate) fn packs(&self) -> bool {
        self.keep.as_ref().is_some_and(|keep| keep.eight_bits)
    }

    /// Takes a tensor that is wanted.
    pub fn add(&mut self, name: String, tensor: Tensor) -> Result<(), EngineError> {
        self.check(&name, tensor.dims())?;
        let Some(keep) = &self.keep else {
            self.weights.tensors.insert(name, tensor);
            return Ok(());
        };
        if keep.eight_bits
            && let Some(packed) = packed(&name, &tensor)?
        {
            self.weights.put_packed(&name, packed);
        } else {
            let tensor = tensor.to_device(&keep.device)?.to_dtype(keep.dtype)?;
            self.weights.tensors.insert(name, tensor);
        }
        Ok(())
    }

    /// Takes the weight of a module that is wanted and was packed while it was read.
    pub(crate) fn add_packed(&mut self, name: &str, packed: Packed) -> Result<(), EngineError> {
        self.check(name, &packed.dims())?;
        self.weights.put_packed(name, packed);
        Ok(())
    }

    /// Refuses a tensor that is wanted in another shape.
    pub(crate) fn fits(&self, name: &str, found: &[usize]) -> Result<(), EngineError> {
        let mut missing = self.missing.iter().flatten();
        match missing.find(|(known, expected)| known == name && expected != found) {
            None => Ok(()),
            Some((_, expected)) => Err(EngineError::WrongShape {
                name: name.to_owned(),
                expected: expected.clone(),
                found: found.to_vec(),
            }),
        }
    }

    /// Strikes a tensor off, if it fits.
    fn check(&mut self, name: &str, found: &[usize]) -> Result<(), EngineError> {
        self.fits(name, found)?;
        if let Some(missing) = &mut self.missing {
            missing.retain(|(known, _)| known != name);
        }
        Ok(())
    }

    /// All of them. Tensors that the model does not use were left out and are named in the log; a tied model may carry an output
    /// layer, which it does not use either.
    pub fn finish(self) -> Result<Weights, EngineError> {
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

/// The module whose weight has that name.
fn module(name: &str) -> Option<&str> {
    name.strip_suffix(".weight")
}

/// A matrix of a language model in eight bits, if it is one and can be.
fn packed(name: &str, tensor: &Tensor) -> Result<Option<Packed>, EngineError> {
    if tensor.rank() != 2 || !tensor.device().is_cpu() || module(name).is_none_or(|module| module == "score")
    {
        return Ok(None);
    }
    Ok(Packed::new(tensor)?)
}

impl Weights {
    /// Checks that every tensor of `config` is there with its shape.
    pub fn new(found: BTreeMap<String, Tensor>, config: &ModelConfig) -> Result<Self, EngineError> {
        let mut gathered = Gathered::as_they_are(config);
        for (name, tensor) in found {
            if gathered.wants(&name) {
                gathered.add(name, tensor)?;
            }
        }
        gathered.finish()
    }

    fn put_packed(&mut self, name: &str, packed: Packed) {
        self.packed.insert(module(name).unwrap_or(name).to_owned(), Arc::new(packed));
    }

    /// The same with matrices of eight bits, for serving models that were quantised already: where the fast kernels are; elsewhere
    /// and where a shape does not fit, matrices stay as they are.
    pub fn in_eight_bits(&self) -> Result<Self, EngineError> {
        if !is_fast() {
            return Ok(self.clone());
        }
        let mut all = Self { tensors: BTreeMap::new(), ..self.clone() };
        for (name, tensor) in &self.tensors {
            let adapted = module(name).is_some_and(|module| self.adapters.contains_key(module));
            if !adapted && let Some(packed) = packed(name, tensor)? {
                all.put_packed(name, packed);
            } else {
                all.tensors.insert(name.clone(), tensor.clone());
            }
        }
        Ok(all)
    }

    /// Where the embedding is.
    pub(crate) fn device(&self) -> Result<Device, EngineError> {
        const EMBEDDING: &str = "model.embed_tokens";
        if self.packed.contains_key(EMBEDDING) {
            return Ok(Device::Cpu);
        }
        Ok(self.get(&format!("{EMBEDDING}.weight"))?.device().clone())
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

    /// Copies the tensors to a device and type.
    pub fn to(&self, device: &Device, dtype: DType) -> Result<Self, EngineError> {
        self.refuse_packed("taken elsewhere")?;
        let moved = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.to_device(device)?.to_dtype(dtype)?)))
            .collect::<Result<_, EngineError>>()?;
        Ok(Self { tensors: moved, ..Self::default() })
    }

    /// What device `rank` of `devices` holds: its share of every block's heads and inner columns, and all of the rest.
    pub(crate) fn share(&self, rank: usize, devices: usize, device: &Device) -> Result<Self, EngineError> {
        if !self.adapters.is_empty() || !self.quantised.is_empty() || !self.packed.is_empty() {
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

    fn refuse_packed(&self, what: &str) -> Result<(), EngineError> {
        if self.packed.is_empty() {
            return Ok(());
        }
        let found = format!("matrices that were packed to be served, which cannot be {what}");
        Err(EngineError::Parameter { name: "model", expected: "one that was not loaded to be served", found })
    }

    /// Trainable copies in f32, and weights that share their storage: an optimiser step on the variables changes what a
    /// model built from the weights computes.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), EngineError> {
        self.refuse_packed("trained")?;
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
            packed: self.packed.clone(),
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

    /// Bytes of the packed matrices.
    pub fn packed_bytes(&self) -> usize {
        self.packed.values().map(|packed| packed.bytes()).sum()
    }

    pub(crate) fn adapter(&self, module: &str) -> Option<Adapter> {
        self.adapters.get(module).cloned()
    }

    pub(crate) fn packed(&self, module: &str) -> Option<Arc<Packed>> {
        self.packed.get(module).cloned()
    }

    pub(crate) fn quantised(&self, module: &str) -> Option<Arc<QTensor>> {
        self.quantised.get(module).cloned()
    }
}
