//! Choice of the instruction set.

use std::sync::OnceLock;

use crate::ops::cpu_features;

/// Instruction sets of the kernels, slowest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kernel {
    /// Portable code for any CPU.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX-512 with VNNI, and AMX-INT8 tiles.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
}

impl Kernel {
    /// Returns the fastest kernel for this CPU, within the limit of `POTSTILL_KERNEL`.
    pub(super) fn fastest() -> Self {
        KernelChoice::detect().kernel
    }

    pub(super) fn has_tiles(self) -> bool {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return self == Self::Amx;
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        false
    }

    /// Returns the kernels that this CPU supports.
    pub(super) fn supported() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "only x86 has others"))]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if cpu_features::has_avx2() {
                all.push(Self::Avx2);
            }
            if cpu_features::has_avx512_vnni() {
                all.push(Self::Avx512);
                #[cfg(target_os = "linux")]
                if crate::ops::amx::is_available() {
                    all.push(Self::Amx);
                }
            }
        }
        all
    }
}

/// Kernels in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct KernelChoice {
    pub(super) kernel: Kernel,
    /// Whether prefill converts weights to bf16 tiles.
    pub(super) long: bool,
}

impl KernelChoice {
    /// Returns the best choice for this CPU. The environment variable `POTSTILL_KERNEL` limits the kernel
    /// for comparisons (`plain`, `avx2` or `avx512`). The value `bf16` selects bf16 prefill on CPUs without
    /// AMX too.
    pub(super) fn detect() -> Self {
        static DETECTED: OnceLock<KernelChoice> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let named = std::env::var("POTSTILL_KERNEL").unwrap_or_default();
            let most = match named.as_str() {
                "plain" => Some(Kernel::Portable),
                "avx2" => Some(Kernel::Avx2),
                "avx512" => Some(Kernel::Avx512),
                _ => None,
            };
            let usable = |kernel: &Kernel| most.is_none_or(|most| *kernel <= most);
            let kernel = Kernel::supported().into_iter().filter(usable).max().unwrap_or(Kernel::Portable);
            Self { kernel, long: kernel.has_tiles() || named == "bf16" }
        })
    }
}
