//! Scaling of the rotary frequencies for contexts longer than those of pretraining.

use std::f32::consts::TAU;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::EngineError;

/// Scaling method with its parameters, as in Hugging Face's `rope_scaling`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Divides all frequencies by `factor`.
    Linear {
        /// Divisor of all frequencies.
        factor: f32,
    },
    /// Llama 3: divides low frequencies by `factor`, keeps high ones, with a linear ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` count as low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` count as high frequencies.
        high_freq_factor: f32,
        /// Context length of pretraining in tokens.
        original_max_position_embeddings: f32,
    },
    /// YaRN (Peng et al. 2023, section 3): a ramp over the pairs of a head, and a factor on queries and
    /// keys.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Context length of pretraining in tokens.
        original_max_position_embeddings: f32,
        /// Factor on queries and keys.
        attention_factor: f32,
        /// Frequencies with more rotations than this in the original context are kept.
        beta_fast: f32,
        /// Frequencies with fewer rotations than this are divided by the whole factor.
        beta_slow: f32,
    },
}

impl RopeScaling {
    /// Returns the parameters shared by all Llama 3.1 to 3.3 models, with the given factor and context
    /// length.
    pub(crate) fn llama3_defaults(factor: f32, original_max_position_embeddings: f32) -> Self {
        let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
        Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }
    }

    /// Returns YaRN with the parameters of the paper.
    pub(crate) fn yarn_defaults(factor: f32, original_max_position_embeddings: f32) -> Self {
        let attention_factor = yarn_attention_factor(factor, 1.0);
        let (beta_fast, beta_slow) = (32.0, 1.0);
        Self::Yarn { factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow }
    }

    /// Parses `rope_parameters` or `rope_scaling` of a `config.json`. `positions` is
    /// `max_position_embeddings`, the default for missing fields. Returns `None` without scaling. `path`
    /// appears in errors only.
    pub(crate) fn parse(value: &Value, positions: usize, path: &Path) -> Result<Option<Self>, EngineError> {
        let kind = value.get("rope_type").or_else(|| value.get("type"));
        let kind = kind.and_then(Value::as_str).unwrap_or("default");
        if kind == "default" {
            return Ok(None);
        }
        let refused =
            |problem: String| EngineError::malformed(path, format!("rope scaling `{kind}`: {problem}"));
        if !["linear", "llama3", "yarn"].contains(&kind) {
            return Err(refused("not supported; `linear`, `llama3` and `yarn` are".to_owned()));
        }
        let mut tagged = value.clone();
        tagged["rope_type"] = json!(kind);
        if kind == "yarn" {
            fill_yarn_defaults(&mut tagged, positions as f64).map_err(refused)?;
        }
        let scaling: Self = serde_json::from_value(tagged).map_err(|error| refused(error.to_string()))?;
        scaling.validated().map(Some).map_err(refused)
    }

    /// Fails unless all parameters are finite and above 0.
    pub(crate) fn validated(self) -> Result<Self, String> {
        match self.named_parameters().into_iter().find(|(_, number)| !(number.is_finite() && *number > 0.0)) {
            Some((name, number)) => Err(format!("`{name}` is {number}, which has to be above 0")),
            None => Ok(self),
        }
    }

    /// Returns whether the parameters are those of the YaRN paper, within rounding.
    pub(crate) fn has_yarn_defaults(&self) -> bool {
        let Self::Yarn { factor, original_max_position_embeddings: original, .. } = self else {
            return false;
        };
        let (own, plain) =
            (self.named_parameters(), Self::yarn_defaults(*factor, *original).named_parameters());
        own.iter().zip(plain).all(|((_, own), (_, plain))| (own - plain).abs() <= 1e-4 * plain)
    }

    /// All parameters with their names.
    fn named_parameters(&self) -> Vec<(&'static str, f32)> {
        match self {
            Self::Linear { factor } => vec![("factor", *factor)],
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => vec![
                ("factor", *factor),
                ("low_freq_factor", *low_freq_factor),
                ("high_freq_factor", *high_freq_factor),
                ("original_max_position_embeddings", *original),
            ],
            Self::Yarn {
                factor,
                original_max_position_embeddings: original,
                attention_factor,
                beta_fast,
                beta_slow,
            } => vec![
                ("factor", *factor),
                ("original_max_position_embeddings", *original),
                ("attention_factor", *attention_factor),
                ("beta_fast", *beta_fast),
                ("beta_slow", *beta_slow),
            ],
        }
    }

    /// Returns the maximum context length in tokens. `positions` is the length in the configuration, which
    /// often omits YaRN's extension.
    pub(crate) fn max_context_tokens(&self, positions: usize) -> usize {
        match self {
            Self::Yarn { factor, original_max_position_embeddings: original, .. } => {
                positions.max((factor * original).round() as usize)
            }
            Self::Linear { .. } | Self::Llama3 { .. } => positions,
        }
    }

    /// Returns the factor on rotated queries and keys.
    pub(crate) fn attention_factor(&self) -> f32 {
        match self {
            Self::Yarn { attention_factor, .. } => *attention_factor,
            Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
        }
    }

    /// Returns the scaled frequency of pair `pair` in a head of `dim` elements. `frequency` is the unscaled
    /// one, `theta` the base.
    pub(crate) fn scaled(&self, frequency: f32, pair: usize, dim: usize, theta: f32) -> f32 {
        match self {
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let turns = original * frequency / TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                interpolate(kept, frequency, *factor)
            }
            Self::Yarn {
                factor, original_max_position_embeddings: original, beta_fast, beta_slow, ..
            } => {
                // The pair that makes `turns` rotations in the original context.
                let pair_of = |turns: f32| dim as f32 * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
                let fast = pair_of(*beta_fast).floor().max(0.0);
                let slow = pair_of(*beta_slow).ceil().min(dim as f32 - 1.0);
                let divided = (pair as f32 - fast) / (slow - fast).max(0.001);
                interpolate(1.0 - divided.clamp(0.0, 1.0), frequency, *factor)
            }
        }
    }
}

/// Interpolates between the frequency (`kept` = 1) and the frequency divided by `factor` (`kept` = 0).
fn interpolate(kept: f32, frequency: f32, factor: f32) -> f32 {
    let kept = kept.clamp(0.0, 1.0);
    frequency * (kept + (1.0 - kept) / factor)
}

/// Returns the factor of queries and keys: the square root of `1 / t` in equation 22 of the YaRN paper,
/// where `weight` is 1.
fn yarn_attention_factor(factor: f32, weight: f32) -> f32 {
    if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 }
}

/// Fills in fields that the configuration omits, with the defaults of transformers.
fn fill_yarn_defaults(tagged: &mut Value, positions: f64) -> Result<(), String> {
    if tagged.get("truncate") == Some(&json!(false)) {
        return Err("`truncate` is false, which is not supported".to_owned());
    }
    let number = |tagged: &Value, name: &str| tagged.get(name).and_then(Value::as_f64);
    let (original, factor) = (number(tagged, "original_max_position_embeddings"), number(tagged, "factor"));
    if original.or(factor).is_none() {
        return Err("neither `factor` nor `original_max_position_embeddings` is a number".to_owned());
    }
    let original = original.unwrap_or(positions);
    if original <= 0.0 {
        return Err(format!("`original_max_position_embeddings` is {original}, which has to be above 0"));
    }
    let factor = factor.unwrap_or(positions / original);
    let weight = |name: &str| number(tagged, name).filter(|weight| *weight != 0.0);
    let attention = match (weight("mscale"), weight("mscale_all_dim")) {
        (Some(one), Some(all)) => {
            yarn_attention_factor(factor as f32, one as f32)
                / yarn_attention_factor(factor as f32, all as f32)
        }
        _ => yarn_attention_factor(factor as f32, 1.0),
    };
    for (name, value) in [
        ("original_max_position_embeddings", original),
        ("factor", factor),
        ("attention_factor", f64::from(attention)),
        ("beta_fast", 32.0),
        ("beta_slow", 1.0),
    ] {
        if tagged.get(name).is_none_or(Value::is_null) {
            tagged[name] = json!(value);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<Option<RopeScaling>, EngineError> {
        RopeScaling::parse(&value, 32_768, Path::new("config.json"))
    }

    #[test]
    fn fills_in_missing_yarn_fields() {
        // The configuration of Qwen2.5's model card.
        let given = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768});
        let scaling = read(given).unwrap().unwrap();
        assert_eq!(scaling, RopeScaling::yarn_defaults(4.0, 32_768.0));
        assert_eq!(scaling.max_context_tokens(32_768), 131_072);
        assert!((scaling.attention_factor() - 1.138_629_4).abs() < 1e-6);
        let by_context = read(json!({"rope_type": "yarn", "original_max_position_embeddings": 8192}));
        assert_eq!(by_context.unwrap(), Some(RopeScaling::yarn_defaults(4.0, 8192.0)));
        let weighed = json!({"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0});
        assert_eq!(read(weighed).unwrap().unwrap().attention_factor(), 1.0);
        // Serialized scaling is parsed to the same value.
        let written = serde_json::to_value(&scaling).unwrap();
        assert_eq!(read(written).unwrap(), Some(scaling));
    }

    #[test]
    fn rejects_invalid_scaling_parameters() {
        for (value, word) in [
            (json!({"rope_type": "yarn"}), "neither `factor`"),
            (json!({"rope_type": "yarn", "factor": 0.0}), "`factor` is 0"),
            (json!({"rope_type": "yarn", "original_max_position_embeddings": 0}), "embeddings` is 0"),
            (json!({"rope_type": "yarn", "factor": 4.0, "truncate": false}), "`truncate`"),
            (json!({"rope_type": "yarn", "factor": 4.0, "beta_slow": -1.0}), "`beta_slow` is -1"),
            (json!({"rope_type": "linear", "factor": -2.0}), "`factor` is -2"),
            (json!({"rope_type": "longrope"}), "`linear`, `llama3` and `yarn` are"),
        ] {
            let error = read(value).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
