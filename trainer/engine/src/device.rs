//! Where tensors live: the CPU, or a CUDA device when the program was built with the `cuda` feature.

use candle_core::{DType, Device};

use crate::error::EngineError;

/// Opens `cpu`, `cuda` or `cuda:N`.
pub fn parse(name: &str) -> Result<Device, EngineError> {
    open(name, number(name)?)
}

/// Opens devices that work together, as [`numbers`] reads their names.
pub fn parse_all(names: &str) -> Result<Vec<Device>, EngineError> {
    numbers(names)?
        .into_iter()
        .zip(names.split(','))
        .map(|(number, name)| open(name.trim(), number))
        .collect()
}

/// A GPU gets one stream: what different threads of the host ask of it is done in the order in which they ask.
fn open(name: &str, number: Option<usize>) -> Result<Device, EngineError> {
    let Some(number) = number else { return Ok(Device::Cpu) };
    Device::new_cuda_with_stream(number)
        .map_err(|error| EngineError::Device { name: name.to_owned(), problem: error.to_string() })
}

/// The number of the CUDA device that a name means, none for the CPU. Nothing is opened.
fn number(name: &str) -> Result<Option<usize>, EngineError> {
    let found = match name.split_once(':') {
        None if name == "cpu" => Some(None),
        None if name == "cuda" => Some(Some(0)),
        Some(("cuda", index)) => index.parse().ok().map(Some),
        _ => None,
    };
    found.ok_or_else(|| EngineError::Parameter {
        name: "device",
        expected: "`cpu`, `cuda` or `cuda:N`",
        found: name.to_owned(),
    })
}

/// The numbers of devices whose names stand with commas between them: all of one kind, GPUs once each. Nothing is opened.
pub fn numbers(names: &str) -> Result<Vec<Option<usize>>, EngineError> {
    let numbers = names.split(',').map(|name| number(name.trim())).collect::<Result<Vec<_>, _>>()?;
    let wrong = |(at, device): (usize, &Option<usize>)| {
        device.is_none() != numbers[0].is_none() || device.is_some() && numbers[..at].contains(device)
    };
    if numbers.iter().enumerate().any(wrong) {
        return Err(EngineError::Parameter {
            name: "device",
            expected: "devices of one kind, each once",
            found: names.to_owned(),
        });
    }
    Ok(numbers)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_or_refused_with_a_word() {
        assert_eq!(parse_all("cpu, cpu").unwrap().len(), 2);
        let refused = |names: &str| parse_all(names).unwrap_err().to_string();
        assert!(refused("gpu:0").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("cuda:x").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("cpu,").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("").contains("`cpu`, `cuda` or `cuda:N`"));
        assert!(refused("cpu,cuda").contains("one kind"));
        assert!(refused("cuda, cuda:1, cuda:0").contains("each once"));
        assert_eq!(numbers("cuda:3,cuda").unwrap(), [Some(3), Some(0)]);
        if !cfg!(feature = "cuda") {
            assert!(refused("cuda:0").contains("--features cuda"));
        }
    }
}
