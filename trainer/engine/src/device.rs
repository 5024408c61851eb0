//! Devices for tensors: the CPU, or CUDA devices if the program is built with the `cuda` feature. Also
//! sizes and enters the thread pool of the kernels.

use candle_core::{DType, Device};

use crate::error::EngineError;

/// Opens the device `cpu`, `cuda` (device 0) or `cuda:N`.
pub fn open_device(name: &str) -> Result<Device, EngineError> {
    open_index(name, parse_device_index(name)?)
}

/// Opens a comma-separated list of devices that share one model. [`numbers`] gives the rules.
pub fn open_devices(names: &str) -> Result<Vec<Device>, EngineError> {
    parse_device_indices(names)?
        .into_iter()
        .zip(names.split(','))
        .map(|(number, name)| open_index(name.trim(), number))
        .collect()
}

/// Opens one device. A GPU gets a single CUDA stream, which keeps the operations of all host threads in
/// submission order.
fn open_index(name: &str, number: Option<usize>) -> Result<Device, EngineError> {
    let Some(number) = number else { return Ok(Device::Cpu) };
    Device::new_cuda_with_stream(number)
        .map_err(|error| EngineError::Device { name: name.to_owned(), problem: error.to_string() })
}

/// Parses a device name without opening the device. Returns the CUDA index, or `None` for the CPU.
fn parse_device_index(name: &str) -> Result<Option<usize>, EngineError> {
    let found = match name.split_once(':') {
        None if name == "cpu" => Some(None),
        None if name == "cuda" => Some(Some(0)),
        Some(("cuda", index)) => index.parse().ok().map(Some),
        _ => None,
    };
    found.ok_or_else(|| EngineError::InvalidParameter {
        name: "device",
        expected: "`cpu`, `cuda` or `cuda:N`",
        found: name.to_owned(),
    })
}

/// Parses a comma-separated list of device names without opening the devices. Returns CUDA indices, `None`
/// for the CPU. Fails if the list mixes CPU and GPUs or repeats a GPU.
pub fn parse_device_indices(names: &str) -> Result<Vec<Option<usize>>, EngineError> {
    let numbers =
        names.split(',').map(|name| parse_device_index(name.trim())).collect::<Result<Vec<_>, _>>()?;
    let wrong = |(at, device): (usize, &Option<usize>)| {
        device.is_none() != numbers[0].is_none() || device.is_some() && numbers[..at].contains(device)
    };
    if numbers.iter().enumerate().any(wrong) {
        return Err(EngineError::InvalidParameter {
            name: "device",
            expected: "devices of one kind, each once",
            found: names.to_owned(),
        });
    }
    Ok(numbers)
}

/// Returns the data type of computations: f32 on the CPU, bf16 on CUDA.
pub fn compute_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// Sets the size of the global rayon pool that kernels and matrix products share. Idle threads sleep. Must
/// be called before the first tensor operation. Returns false if the pool already exists; its size then
/// stays unchanged.
pub fn set_threads(threads: usize) -> bool {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("kernel-{i}"))
        .build_global()
        .is_ok()
}

/// Runs `work` on a thread of the rayon pool and returns its result. Parallel loops inside `work` then
/// start without a hand-over from an outside thread. A model step consists of hundreds of small operations;
/// in a pool of one thread none of them wakes another thread.
pub fn run_in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_device_lists_and_rejects_bad_names() {
        assert_eq!(open_devices("cpu, cpu").unwrap().len(), 2);
        let refused = |names: &str| open_devices(names).unwrap_err().to_string();
        assert!(refused("gpu:0").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("cuda:x").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("cpu,").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("cpu,cuda").contains("one kind"));
        assert!(refused("cuda, cuda:1, cuda:0").contains("each once"));
        assert_eq!(parse_device_indices("cuda:3,cuda").unwrap(), [Some(3), Some(0)]);
        if !cfg!(feature = "cuda") {
            assert!(refused("cuda:0").contains("--features cuda"));
        }
    }
}
