//! Results of quantization.

use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use potstill_engine::gguf_files::GgufFormat;
use serde::{Deserialize, Serialize};

/// Weight formats, named as in llama.cpp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum QuantizedFormat {
    /// 16 bits.
    #[serde(rename = "f16")]
    F16,
    /// 8 bits.
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8,
    /// About 4.8 bits.
    #[value(name = "q4_k_m")]
    #[serde(rename = "q4_k_m")]
    Q4,
}

impl QuantizedFormat {
    /// Returns the engine's name of the format.
    pub(crate) fn gguf_format(self) -> GgufFormat {
        match self {
            Self::F16 => GgufFormat::F16,
            Self::Q8 => GgufFormat::Q8_0,
            Self::Q4 => GgufFormat::Q4KM,
        }
    }

    /// Returns the name used in recipes and folder names.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8 => "q8_0",
            Self::Q4 => "q4_k_m",
        }
    }
}

/// Similarity of a model to its f32 original, measured on a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QualityLoss {
    /// Number of next-token predictions compared.
    pub tokens: usize,
    /// Fraction of predictions with the same most likely token, 0 to 1.
    pub same_top: f64,
    /// Mean Kullback-Leibler divergence of the other model from f32, in nats.
    pub divergence: f64,
    /// Perplexity of the f32 model.
    pub perplexity_f32: f64,
    /// Perplexity of the other model.
    pub perplexity: f64,
}

impl fmt::Display for QualityLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "on {} tokens the same next token {:.1} %, divergence {:.4} nats, perplexity {:.3} (f32 {:.3})",
            self.tokens,
            100.0 * self.same_top,
            self.divergence,
            self.perplexity,
            self.perplexity_f32
        )
    }
}

/// A quantized file with its measurements.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizedFile {
    /// Path of the file.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Whether rounding used importances from a calibration text.
    pub calibrated: bool,
    /// Similarity to the f32 model.
    pub quality: QualityLoss,
}

impl fmt::Display for QuantizedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:.1} MB, {}", self.path.display(), self.bytes as f64 / 1e6, self.quality)
    }
}
