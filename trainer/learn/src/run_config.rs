//! Settings of a training run, shared by all algorithms.

use candle_core::Device;
use potstill_engine::device;
use potstill_engine::ops::Precision;
use serde::{Deserialize, Serialize};

use crate::error::LearnError;
use crate::lora::LoraConfig;

/// Training settings common to all algorithms (TRL and transformers: `TrainingArguments`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Tokens per optimizer step.
    pub batch_tokens: usize,
    /// Tokens per micro batch (one forward and backward pass). Bounds the memory for activations.
    pub micro_batch_tokens: usize,
    /// Maximum length of an example in tokens. Longer examples are dropped and counted.
    pub max_length: usize,
    /// Fraction of a phase's steps used for the learning rate warm-up, 0 to 1.
    pub warmup_ratio: f64,
    /// Learning rate at the end of a phase as a fraction of the peak, 0 to 1.
    pub floor_ratio: f64,
    /// Decoupled weight decay; applies to matrices, not to norms and biases.
    pub weight_decay: f64,
    /// AdamW's decay rate of the first moment.
    pub beta1: f64,
    /// AdamW's decay rate of the second moment.
    pub beta2: f64,
    /// Maximum global norm of the gradients; larger gradients are scaled down to it.
    pub max_grad_norm: f64,
    /// Stores AdamW's moments in 8 instead of 32 bits. CPU only.
    pub eight_bit_moments: bool,
    /// Seed of the data order.
    pub seed: u64,
    /// Steps between two checkpoints.
    pub checkpoint_every: usize,
    /// Number of checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Maximum number of steps per phase; 0 means no limit.
    pub max_steps: usize,
    /// Gradient checkpointing: recomputes each block's activations in the backward pass. Stores the activations of one
    /// block instead of all, for about a third more computation.
    pub recompute: bool,
    /// Precision to which inputs of matrix products are rounded, on processors that support it. Weights, moments and
    /// sums are always f32. On a GPU, the products' results in the blocks are rounded too.
    pub dtype: Precision,
    /// LoRA settings; without them all weights are trained.
    pub lora: Option<LoraConfig>,
    /// Devices: `cpu`, `cuda` or `cuda:N`. With several, each holds a replica and computes some of the micro batches of
    /// a step.
    pub devices: Vec<String>,
}

impl RunConfig {
    /// Returns the settings without the devices. Used for the run's hash, so that a run resumes on other hardware.
    pub(crate) fn without_devices(&self) -> Self {
        Self { devices: Vec::new(), ..self.clone() }
    }

    /// Returns the devices, or an error if a name is unknown or the device is unavailable.
    pub fn parse_devices(&self) -> Result<Vec<Device>, LearnError> {
        Ok(device::open_devices(&self.devices.join(","))?)
    }
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            batch_tokens: 1 << 16,
            micro_batch_tokens: 1 << 13,
            max_length: 1 << 14,
            warmup_ratio: 0.1,
            floor_ratio: 0.1,
            weight_decay: 0.05,
            beta1: 0.9,
            beta2: 0.999,
            max_grad_norm: 1.0,
            eight_bit_moments: false,
            seed: 0,
            checkpoint_every: 200,
            keep_checkpoints: 2,
            max_steps: 0,
            recompute: false,
            dtype: Precision::F32,
            lora: None,
            devices: vec!["cpu".to_owned()],
        }
    }
}
