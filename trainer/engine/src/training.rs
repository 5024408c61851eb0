//! Gradient checkpointing: the backward pass runs block by block, with one graph node per transformer block
//! (Chen et al. 2016).
//!
//! The node keeps either the block's inner graph until its backward pass, or with `recompute` only the
//! block's input. Recomputation reduces the activation memory to one block for about a third more work.
//! Gradients of weights are added to the step's sums at once, so a micro batch never holds all of them
//! twice. Frozen weights need no gradient memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, InplaceOp2, Layout, Result, Shape, Tensor, TensorId, Var};
use rayon::prelude::*;

use crate::ops::{Precision, has_fused_kernel, known};

/// Trainable variables of a model and the sums of their gradients.
#[derive(Clone)]
pub struct GradientCheckpoint {
    recompute: bool,
    precision: Precision,
    sums: Arc<GradientSums>,
}

/// Gradient sums of one optimizer step, by name of the variable.
struct GradientSums {
    names: HashMap<TensorId, String>,
    sums: Mutex<BTreeMap<String, Tensor>>,
}

impl GradientCheckpoint {
    /// Creates empty gradient sums for `variables`. Other tensors get no gradient.
    pub fn new(variables: &BTreeMap<String, Var>, recompute: bool, precision: Precision) -> Self {
        let names = variables.iter().map(|(name, variable)| (variable.as_tensor().id(), name.clone()));
        Self {
            recompute,
            precision,
            sums: Arc::new(GradientSums { names: names.collect(), sums: Mutex::default() }),
        }
    }

    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Adds the gradients in `store` to the sums.
    pub(crate) fn accumulate(&self, store: &GradStore) -> Result<()> {
        self.sums.accumulate(store)
    }

    /// Returns the gradient sums and resets them.
    pub(crate) fn take_gradients(&self) -> BTreeMap<String, Tensor> {
        std::mem::take(&mut *self.sums.lock())
    }

    /// Computes `forward(x)` as a single node of candle's graph. With recomputation, `forward` runs again in the backward
    /// pass, so it must return the same values for the same input.
    pub(crate) fn run(
        &self,
        x: &Tensor,
        forward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let input = Var::from_tensor(&x.detach())?;
        let output = forward(input.as_tensor())?;
        let value = output.detach();
        let kept = Mutex::new(if self.recompute { None } else { Some((input, output)) });
        let sums = Arc::clone(&self.sums);
        let node = known::unary("block", value, move |x, grad| {
            let (input, output) = match kept.lock().unwrap_or_else(PoisonError::into_inner).take() {
                Some(kept) => kept,
                None => {
                    let input = Var::from_tensor(&x.detach())?;
                    let output = forward(input.as_tensor())?;
                    (input, output)
                }
            };
            let store = output.apply_op1(GradSeed { grad: grad.detach() })?.backward()?;
            sums.accumulate(&store)?;
            Ok(store.get(&input).cloned())
        });
        x.apply_op1(node)
    }
}

impl GradientSums {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Tensor>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accumulate(&self, store: &GradStore) -> Result<()> {
        let mut sums = self.lock();
        for id in store.get_ids() {
            let (Some(name), Some(gradient)) = (self.names.get(id), store.get_id(*id)) else { continue };
            match sums.get_mut(name) {
                None => {
                    sums.insert(name.clone(), gradient.detach());
                }
                Some(sum) if has_fused_kernel(sum) && sum.is_contiguous() => {
                    sum.inplace_op2(&gradient.contiguous()?, &AddGradient)?
                }
                Some(sum) => *sum = (&*sum + gradient)?.detach(),
            }
        }
        Ok(())
    }
}

/// A scalar with a given gradient: starts the backward pass inside a block.
struct GradSeed {
    grad: Tensor,
}

impl CustomOp1 for GradSeed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let zero = storage.device().zeros_impl(&Shape::from(()), candle_core::DType::F32)?;
        Ok((zero, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _res: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.grad.clone()))
    }
}

/// In-place addition of an f32 gradient on the CPU.
struct AddGradient;

impl InplaceOp2 for AddGradient {
    fn name(&self) -> &'static str {
        "add-gradient"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, _: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (CpuStorage::F32(sum), CpuStorage::F32(more)) = (s1, s2) else {
            candle_core::bail!("gradients must be f32")
        };
        let (start, end) = l2.contiguous_offsets().unwrap_or((0, 0));
        if end - start != sum.len() {
            candle_core::bail!("gradients of different sizes");
        }
        sum.par_chunks_mut(1 << 14).zip(more[start..end].par_chunks(1 << 14)).for_each(|(sum, more)| {
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        });
        Ok(())
    }
}
