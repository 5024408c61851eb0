//! Where tensors live: the CPU, or a CUDA device when the program was built with the `cuda` feature.

use candle_core::{DType, Device};

use crate::error::EngineError;

/// Parses `cpu`, `cuda` or `cuda:N`.
pub fn parse(name: &str) -> Result<Device, EngineError> {
    match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        ("cuda", index) => {
            let index = index.parse().map_err(|_| EngineError::Parameter {
                name: "device",
                expected: "`cpu`, `cuda` or `cuda:N`",
                found: name.to_owned(),
            })?;
            Device::new_cuda(index)
                .map_err(|error| EngineError::Device { name: name.to_owned(), problem: error.to_string() })
        }
        _ => Err(EngineError::Parameter {
            name: "device",
            expected: "`cpu`, `cuda` or `cuda:N`",
            found: name.to_owned(),
        }),
    }
}

/// The type to compute in: f32 on the CPU, bf16 on CUDA.
pub fn compute_type(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// Sizes the pool that kernels and matrix products share. Its waits are passive. Call once, before the first tensor;
/// a later call changes nothing and says so by `false`.
pub fn set_threads(threads: usize) -> bool {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("kernel-{i}"))
        .build_global()
        .is_ok()
}

/// Runs `work` on a thread of the pool, so that what it shares out needs no hand-over between threads: a step of a model
/// has hundreds of small operations, and with one thread none of them wakes anybody.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}
