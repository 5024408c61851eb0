//! Sums over several devices, which each of them gets (all-reduce): what training on shares of the data and models in pieces are
//! made of. Between CUDA devices by NCCL, where the program was built with `nccl`; else through the first device.
#![cfg_attr(feature = "nccl", expect(unsafe_code, reason = "communicators move between threads"))]

use candle_core::{Device, Result, Tensor};

/// The devices that take part, in order. One may stand there more than once, except with NCCL.
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

    /// Devices that take part.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// `ranks` holds the tensors of each device, the same shapes in the same order on all. Each gets the sums back in their place.
    /// They are added in the order of the devices.
    pub fn sum(&self, mut ranks: Vec<Vec<Tensor>>) -> Result<Vec<Vec<Tensor>>> {
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
                // A sum of its own for each: what is done to one in place must not reach the others.
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

    /// One for each device.
    pub(super) struct Communicators(Mutex<Vec<Comm>>);

    // SAFETY: NCCL's communicators belong to no thread; they may only not be used by several at once, which the lock sees to.
    unsafe impl Send for Communicators {}
    // SAFETY: as above.
    unsafe impl Sync for Communicators {}

    fn told(error: NcclError) -> candle_core::Error {
        candle_core::Error::Msg(format!("NCCL: {error:?}"))
    }

    impl Communicators {
        /// None where a device is not CUDA's.
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
            // All in one group: nothing waits for another device's call.
            group_start().map_err(told)?;
            let queued = ranks.iter().zip(comms.iter()).try_for_each(|(rank, comm)| {
                rank.iter().try_for_each(|tensor| tensor.inplace_op1(&AllReduce(comm)))
            });
            group_end().map_err(told)?;
            queued?;
            Ok(ranks)
        }
    }

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
                    self.0.all_reduce_in_place(&mut values, &ReduceOp::Sum).map(drop).map_err(told)
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
    fn every_device_gets_the_sum_and_its_own_memory() {
        let devices = vec![Device::Cpu; 3];
        let collective = Collective::new(&devices).unwrap();
        let rank = |by: f32| {
            let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
            vec![tensor(&[by, 2.0 * by]), tensor(&[-by])]
        };
        let sums = collective.sum(vec![rank(1.0), rank(10.0), rank(100.0)]).unwrap();
        for sum in &sums {
            assert_eq!(sum[0].to_vec1::<f32>().unwrap(), [111.0, 222.0]);
            assert_eq!(sum[1].to_vec1::<f32>().unwrap(), [-111.0]);
        }
        sums[0][0].slice_set(&Tensor::new(&[0f32], &Device::Cpu).unwrap(), 0, 0).unwrap();
        assert_eq!(sums[1][0].to_vec1::<f32>().unwrap(), [111.0, 222.0], "memory of its own");
        assert!(collective.sum(vec![rank(1.0)]).is_err(), "a device is missing");
    }
}
