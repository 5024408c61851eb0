//! A graph node with a precomputed value, on any device. The node adds only a backward pass to candle's
//! graph.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor};

/// `backward` receives the inputs and the gradient of the value; returns the gradients of the inputs.
pub(crate) struct PrecomputedOp<B> {
    name: &'static str,
    value: Tensor,
    backward: B,
}

/// Gradient of one input; `None` if no gradient is needed.
type Gradient = Option<Tensor>;

/// Returns a node with one input.
pub(crate) fn unary(
    name: &'static str,
    value: Tensor,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Gradient> + Send + Sync + 'static,
) -> impl CustomOp1 + Send + Sync + 'static {
    PrecomputedOp { name, value, backward }
}

/// Returns a node with two inputs.
pub(crate) fn binary(
    name: &'static str,
    value: Tensor,
    backward: impl Fn([&Tensor; 2], &Tensor) -> Result<(Gradient, Gradient)> + Send + Sync + 'static,
) -> impl CustomOp2 + Send + Sync + 'static {
    PrecomputedOp { name, value, backward }
}

/// Returns a node with three inputs.
pub(crate) fn ternary(
    name: &'static str,
    value: Tensor,
    backward: impl Fn([&Tensor; 3], &Tensor) -> Result<(Gradient, Gradient, Gradient)> + Send + Sync + 'static,
) -> impl CustomOp3 + Send + Sync + 'static {
    PrecomputedOp { name, value, backward }
}

impl<B> PrecomputedOp<B> {
    /// Returns the value as CPU storage.
    fn cpu_value(&self) -> Result<(CpuStorage, Shape)> {
        let value = self.value.contiguous()?;
        let (storage, layout) = value.storage_and_layout();
        match (&*storage, layout.start_offset()) {
            (Storage::Cpu(storage), 0) => Ok((storage.clone(), value.shape().clone())),
            _ => candle_core::bail!("the value of `{}` left the CPU", self.name),
        }
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(&self) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let value = self.value.contiguous()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, value.shape().clone())),
            _ => candle_core::bail!("the value of `{}` left the device", self.name),
        }
    }
}

impl<B: Fn(&Tensor, &Tensor) -> Result<Gradient>> CustomOp1 for PrecomputedOp<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu_value()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, x: &Tensor, _value: &Tensor, grad: &Tensor) -> Result<Gradient> {
        (self.backward)(x, grad)
    }
}

impl<B: Fn([&Tensor; 2], &Tensor) -> Result<(Gradient, Gradient)>> CustomOp2 for PrecomputedOp<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu_value()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _value: &Tensor, grad: &Tensor) -> Result<(Gradient, Gradient)> {
        (self.backward)([a, b], grad)
    }
}

impl<B: Fn([&Tensor; 3], &Tensor) -> Result<(Gradient, Gradient, Gradient)>> CustomOp3 for PrecomputedOp<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu_value()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _value: &Tensor,
        grad: &Tensor,
    ) -> Result<(Gradient, Gradient, Gradient)> {
        (self.backward)([a, b, c], grad)
    }
}
