//! Rounding of the factors of matrix products.

use super::cpu_features;

/// Rounding of the two factors of a matrix product. Sums are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// No rounding.
    #[default]
    F32,
    /// Rounding to bf16 (8 significant bits) on CPUs with AMX-BF16 or AVX512-BF16; no rounding on other
    /// CPUs.
    Bf16,
}

impl Precision {
    /// Returns the precision that this CPU computes with: `Bf16` only where the instructions exist.
    pub fn supported(self) -> Self {
        if cpu_features::has_bf16() { self } else { Self::F32 }
    }

    /// Returns the name used in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}
