//! All-reduce: sums tensors over several devices, for data-parallel training and tensor parallelism. CUDA
//! devices use NCCL if the feature `nccl` is on; otherwise the first device adds.
#![cfg_attr(feature = "nccl", expect(unsafe_code, reason = "communicators move between threads"))]

use candle_core::{Device, Result, Tensor};

/// The participating devices, in order. Without NCCL a device may appear several times.
pub struct Collective {
    devices: Vec<Device>,
    #[cfg(feature = "nccl")]
    nccl: Option<nccl::Communicators>,
}

impl Collective {
    /// Connects the devices.
    pub fn new(devices: &[Device]) -> Result<Self> {
        Ok(Self {
            devices: devices.to_vec(),
            #[cfg(feature = "nccl")]
            nccl: nccl::Communicators::new(devices)?,
        })
    }

    /// Returns the participating devices.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Sums tensors over the devices. `ranks` holds the tensors of each device, with equal shapes and order
    /// on all. Returns the sums on every device. Without NCCL the order of additions is the order of the
    /// devices.
    pub fn all_reduce_sum(&self, mut ranks: Vec<Vec<Tensor>>) -> Result<Vec<Vec<Tensor>>> {
        if ranks.len() != self.devices.len() || ranks.iter().any(|rank| rank.len() != ranks[0].len()) {
            candle_core::bail!("a sum over {} devices needs as many tensors of each", self.devices.len());
        }
        if ranks.len() == 1 {
            return Ok(ranks);
        }
        #[cfg(feature = "nccl")]
        if let Some(nccl) = &self.nccl {
            return nccl.sum(ranks);
        }
        for at in 0..ranks[0].len() {
            let mut total = ranks[0][at].clone();
            for other in &ranks[1..] {
                total = (total + other[at].to_device(&self.devices[0])?)?;
            }
            for (rank, device) in ranks.iter_mut().zip(&self.devices) {
                // Each device gets a copy, so an in-place change on one does not affect the others.
                rank[at] = if device.is_cpu() { total.copy()? } else { total.to_device(device)? };
            }
        }
        Ok(ranks)
    }
}

#[cfg(feature = "nccl")]
mod nccl {
    use std::sync::{Mutex, PoisonError};

    use candle_core::cuda_backend::cudarc::nccl::{
        Comm, ReduceOp, group_end, group_start, result::NcclError,
    };
    use candle_core::{CpuStorage, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Tensor};
    use half::{bf16, f16};

    /// NCCL communicators, one per device.
    pub(super) struct Communicators(Mutex<Vec<Comm>>);

    // SAFETY: NCCL communicators are not bound to a thread but forbid concurrent use, which the mutex
    // prevents.
    unsafe impl Send for Communicators {}
    // SAFETY: as for `Send`.
    unsafe impl Sync for Communicators {}

    fn told(error: NcclError) -> candle_core::Error {
        candle_core::Error::Msg(format!("NCCL: {error:?}"))
    }

    impl Communicators {
        /// Connects the devices; returns `None` unless all are CUDA devices.
        pub(super) fn new(devices: &[Device]) -> Result<Option<Self>> {
            let mut streams = Vec::with_capacity(devices.len());
            for device in devices {
                match device {
                    Device::Cuda(device) => streams.push(device.cuda_stream()),
                    _ => return Ok(None),
                }
            }
            Ok(Some(Self(Mutex::new(Comm::from_devices(streams).map_err(told)?))))
        }

        pub(super) fn sum(&self, ranks: Vec<Vec<Tensor>>) -> Result<Vec<Vec<Tensor>>> {
            let comms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let ranks = ranks
                .into_iter()
                .map(|rank| rank.iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>())
                .collect::<Result<Vec<_>>>()?;
            // One group for all calls; otherwise the first call would wait for the other devices.
            group_start().map_err(told)?;
            let queued = ranks.iter().zip(comms.iter()).try_for_each(|(rank, comm)| {
                rank.iter().try_for_each(|tensor| tensor.inplace_op1(&AllReduce(comm)))
            });
            group_end().map_err(told)?;
            queued?;
            Ok(ranks)
        }
    }

    /// In-place sum of one tensor.
    struct AllReduce<'a>(&'a Comm);

    impl InplaceOp1 for AllReduce<'_> {
        fn name(&self) -> &'static str {
            "all-reduce"
        }

        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
            candle_core::bail!("NCCL sums on CUDA devices only")
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
            use candle_core::backend::BackendStorage;
            let Some((start, end)) = layout.contiguous_offsets() else {
                candle_core::bail!("NCCL sums contiguous tensors only")
            };
            macro_rules! reduce {
                ($type:ty) => {{
                    let mut values = storage.as_cuda_slice_mut::<$type>()?.slice_mut(start..end);
                    self.0.all_reduce_in_place(&mut values, &ReduceOp::Sum).map(drop).map_err(nccl_error)
                }};
            }
            match storage.dtype() {
                DType::F32 => reduce!(f32),
                DType::BF16 => reduce!(bf16),
                DType::F16 => reduce!(f16),
                other => candle_core::bail!("NCCL sums no tensors of {other:?} here"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_reach_every_device_in_separate_memory() {
        let devices = vec![Device::Cpu; 3];
        let collective = Collective::new(&devices).unwrap();
        let rank = |by: f32| {
            let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
            vec![tensor(&[by, 2.0 * by]), tensor(&[-by])]
        };
        let sums = collective.all_reduce_sum(vec![rank(1.0), rank(10.0), rank(100.0)]).unwrap();
        for sum in &sums {
            assert_eq!(sum[0].to_vec1::<f32>().unwrap(), [111.0, 222.0]);
            assert_eq!(sum[1].to_vec1::<f32>().unwrap(), [-111.0]);
        }
        sums[0][0].slice_set(&Tensor::new(&[0f32], &Device::Cpu).unwrap(), 0, 0).unwrap();
        assert_eq!(sums[1][0].to_vec1::<f32>().unwrap(), [111.0, 222.0], "memory of its own");
        assert!(collective.all_reduce_sum(vec![rank(1.0)]).is_err(), "a device is missing");
    }
}
