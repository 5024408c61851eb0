//! Stretching of the rotary frequencies for contexts that are longer than those of pretraining.

use std::f32::consts::TAU;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::EngineError;

/// How the frequencies are stretched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f32,
        /// Context length before stretching.
        original_max_position_embeddings: f32,
    },
    /// YaRN (Peng et al. 2023, section 3): the same with a ramp over the pairs of a head, and queries and keys made longer.
    Yarn {
        /// The divisor of low frequencies.
        factor: f32,
        /// Context length before stretching.
        original_max_position_embeddings: f32,
        /// What queries and keys are multiplied by.
        attention_factor: f32,
        /// Frequencies that turn more often than this in the original context are kept.
        beta_fast: f32,
        /// Those that turn less often are divided by the whole factor.
        beta_slow: f32,
    },
}

impl RopeScaling {
    /// What all models of Llama 3.1 to 3.3 have but for the factor.
    pub(crate) fn llama3(factor: f32, original_max_position_embeddings: f32) -> Self {
        let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
        Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }
    }

    /// YaRN with the numbers of the paper.
    pub(crate) fn yarn(factor: f32, original_max_position_embeddings: f32) -> Self {
        let attention_factor = yarn_attention(factor, 1.0);
        let (beta_fast, beta_slow) = (32.0, 1.0);
        Self::Yarn { factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow }
    }

    /// Reads `rope_parameters` or `rope_scaling` of a `config.json` whose model has seen so many positions; `path` only names it in
    /// errors.
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
            fill_in_yarn(&mut tagged, positions as f64).map_err(refused)?;
        }
        let scaling: Self = serde_json::from_value(tagged).map_err(|error| refused(error.to_string()))?;
        scaling.checked().map(Some).map_err(refused)
    }

    /// Refuses numbers that stretch nothing.
    pub(crate) fn checked(self) -> Result<Self, String> {
        match self.numbers().into_iter().find(|(_, number)| !(number.is_finite() && *number > 0.0)) {
            Some((name, number)) => Err(format!("`{name}` is {number}, which has to be above 0")),
            None => Ok(self),
        }
    }

    /// Whether it is YaRN with the numbers of the paper, but for their last digits.
    pub(crate) fn is_plain_yarn(&self) -> bool {
        let Self::Yarn { factor, original_max_position_embeddings: original, .. } = self else {
            return false;
        };
        let (own, plain) = (self.numbers(), Self::yarn(*factor, *original).numbers());
        own.iter().zip(plain).all(|((_, own), (_, plain))| (own - plain).abs() <= 1e-4 * plain)
    }

    fn numbers(&self) -> Vec<(&'static str, f32)> {
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

    /// Longest context of a model that has room for `positions` by its own word: what YaRN stretches to is often not said there.
    pub(crate) fn context(&self, positions: usize) -> usize {
        match self {
            Self::Yarn { factor, original_max_position_embeddings: original, .. } => {
                positions.max((factor * original).round() as usize)
            }
            Self::Linear { .. } | Self::Llama3 { .. } => positions,
        }
    }

    /// What queries and keys are multiplied by.
    pub(crate) fn magnitude(&self) -> f32 {
        match self {
            Self::Yarn { attention_factor, .. } => *attention_factor,
            Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
        }
    }

    /// The frequency of a pair of elements of a head of `dim`, in place of `frequency`; `theta` is the base.
    pub(crate) fn stretched(&self, frequency: f32, pair: usize, dim: usize, theta: f32) -> f32 {
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
                between(kept, frequency, *factor)
            }
            Self::Yarn {
                factor, original_max_position_embeddings: original, beta_fast, beta_slow, ..
            } => {
                // The pair that turns so often in the original context.
                let pair_of = |turns: f32| dim as f32 * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
                let fast = pair_of(*beta_fast).floor().max(0.0);
                let slow = pair_of(*beta_slow).ceil().min(dim as f32 - 1.0);
                let divided = (pair as f32 - fast) / (slow - fast).max(0.001);
                between(1.0 - divided.clamp(0.0, 1.0), frequency, *factor)
            }
        }
    }
}

/// So much of the frequency itself, the rest of it divided.
fn between(kept: f32, frequency: f32, factor: f32) -> f32 {
    let kept = kept.clamp(0.0, 1.0);
    frequency * (kept + (1.0 - kept) / factor)
}

/// Equation 22 of the paper, as the root of what scores are multiplied by; `weight` is 1 there.
fn yarn_attention(factor: f32, weight: f32) -> f32 {
    if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 }
}

/// What a configuration may leave out, as transformers has it.
fn fill_in_yarn(tagged: &mut Value, positions: f64) -> Result<(), String> {
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
            yarn_attention(factor as f32, one as f32) / yarn_attention(factor as f32, all as f32)
        }
        _ => yarn_attention(factor as f32, 1.0),
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
    fn what_a_configuration_leaves_out_of_yarn_is_filled_in() {
        // As Qwen2.5's model card has it.
        let given = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768});
        let scaling = read(given).unwrap().unwrap();
        assert_eq!(scaling, RopeScaling::yarn(4.0, 32_768.0));
        assert_eq!(scaling.context(32_768), 131_072);
        assert!((scaling.magnitude() - 1.138_629_4).abs() < 1e-6);
        let by_context = read(json!({"rope_type": "yarn", "original_max_position_embeddings": 8192}));
        assert_eq!(by_context.unwrap(), Some(RopeScaling::yarn(4.0, 8192.0)));
        let weighed = json!({"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0});
        assert_eq!(read(weighed).unwrap().unwrap().magnitude(), 1.0);
        // What was written is read again.
        let written = serde_json::to_value(&scaling).unwrap();
        assert_eq!(read(written).unwrap(), Some(scaling));
    }

    #[test]
    fn what_stretches_nothing_is_refused() {
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
