//! `potstill bench train`: training steps (forward, backward, clipping, AdamW) of a randomly initialized model on
//! synthetic tokens. `load-tests/peers/train.py` measures the same shapes with PyTorch.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use potstill_engine::config::{Family, ModelConfig};
use potstill_engine::loader::LoadedModel;
use potstill_engine::ops::Precision;
use potstill_engine::ops::attention::AttentionHeads;
use potstill_engine::template::ChatTemplate;
use potstill_engine::{device, init};
use potstill_learn::examples::Example;
use potstill_learn::learner::Learner;
use potstill_learn::lora::LoraConfig;
use potstill_learn::run::RunConfig;
use potstill_learn::sft::sft_loss;
use serde::Serialize;

use super::{cpu_seconds, peak_memory};
use crate::demo::tokenizer;

/// Arguments of `potstill bench train`.
#[derive(Debug, clap::Args)]
pub struct TrainArguments {
    /// Model shape: `10m` (6 layers of width 256, vocabulary 16,384) or `135m` (30 layers of width 576, vocabulary
    /// 49,152, as SmolLM2).
    #[arg(long, value_enum, default_value_t = ModelShape::M10)]
    pub shape: ModelShape,
    /// Sequences per step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Tokens per sequence.
    #[arg(long, default_value_t = 512)]
    pub seq: usize,
    /// Precision of matrix products; weights and moments stay f32. Falls back to f32 where the processor lacks bf16.
    #[arg(long, value_enum, default_value_t = ProductType::F32)]
    pub dtype: ProductType,
    /// Train LoRA adapters of rank 16 on all linear layers instead of all weights.
    #[arg(long)]
    pub lora: bool,
    /// Recompute activations in the backward pass (gradient checkpointing).
    #[arg(long)]
    pub recompute: bool,
    /// Store the optimizer's moments in 8 bits.
    #[arg(long)]
    pub eight_bit_moments: bool,
    /// Number of threads.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// `cpu`, `cuda` or `cuda:N`; several separated by commas divide the sequences.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Measured steps after one warm-up step; the fastest counts.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Model shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ModelShape {
    /// 10.5 million weights.
    #[value(name = "10m")]
    M10,
    /// 134.5 million weights.
    #[value(name = "135m")]
    M135,
}

/// Precisions of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ProductType {
    /// 32 bits.
    F32,
    /// 16 bits (bfloat16), on processors with AMX-BF16 or AVX512-BF16.
    Bf16,
}

impl From<ProductType> for Precision {
    fn from(asked: ProductType) -> Self {
        match asked {
            ProductType::F32 => Self::F32,
            ProductType::Bf16 => Self::Bf16,
        }
    }
}

/// Measurements of training steps.
#[derive(Debug, Clone, Serialize)]
pub struct TrainReport {
    /// Precision in which products were computed.
    pub dtype: &'static str,
    /// Number of weights of the model.
    pub parameters: u64,
    /// Number of trainable weights.
    pub trainable: u64,
    /// Tokens per step.
    pub tokens: usize,
    /// Number of threads.
    pub threads: usize,
    /// Tokens per second of wall time.
    pub tokens_per_s: f64,
    /// Tokens per second of processor time.
    pub tokens_per_cpu_s: f64,
    /// Peak memory of the process in bytes.
    pub peak_memory: u64,
    /// Loss of every step. All steps use the same tokens, so the loss falls.
    pub losses: Vec<f32>,
}

impl ModelShape {
    /// Returns the configuration of a Qwen2 model with this shape.
    fn model_config(self) -> ModelConfig {
        let (vocab_size, hidden_size, intermediate_size, layers, query, kv) = match self {
            Self::M10 => (16_384, 256, 1024, 6, 4, 2),
            Self::M135 => (49_152, 576, 1536, 30, 9, 3),
        };
        ModelConfig {
            family: Family::Qwen2,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_layers: layers,
            heads: AttentionHeads { query, kv, dim: 64 },
            max_positions: 1 << 14,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: None,
            tied_embeddings: true,
            qkv_bias: true,
            eos_token_ids: vec![0],
            bos_token_id: None,
            num_labels: 0,
            candle: None,
        }
    }
}

/// Runs one warm-up step and the measured steps.
pub fn run(arguments: &TrainArguments) -> anyhow::Result<TrainReport> {
    anyhow::ensure!(
        arguments.batch > 0 && arguments.seq > 1 && arguments.threads > 0 && arguments.rounds > 0,
        "--batch, --threads and --rounds must be at least 1, --seq at least 2"
    );
    let asked = Precision::from(arguments.dtype);
    let on_cpu = arguments.device.contains("cpu");
    let dtype = if on_cpu { asked.supported() } else { asked };
    if asked != dtype {
        tracing::warn!("this processor has no instructions for products of bf16; measuring f32");
    }
    device::set_threads(arguments.threads);
    let config = arguments.shape.model_config();
    config.validate(Path::new("--shape"))?;
    let model = LoadedModel {
        weights: init::random_weights(&config, 1)?,
        tokenizer: tokenizer::tokenizer()?,
        chat_template: Arc::new(ChatTemplate::chatml()?),
        quantized: false,
        config,
    };
    let vocabulary = model.config.vocab_size;
    let examples: Vec<Example> = (0..arguments.batch)
        .map(|row| {
            let token = |at: usize| ((at * 7919 + row * 104_729 + at * at * 31) % vocabulary) as u32;
            Example {
                tokens: (0..arguments.seq).map(token).collect(),
                loss_mask: (0..arguments.seq).map(|at| at > 0).collect(),
            }
        })
        .collect();
    let settings = RunConfig {
        recompute: arguments.recompute,
        dtype,
        lora: arguments.lora.then(LoraConfig::default),
        eight_bit_moments: arguments.eight_bit_moments,
        devices: arguments.device.split(',').map(str::to_owned).collect(),
        ..RunConfig::default()
    };
    let parameters = model.config.parameter_count() as u64;
    let mut learner = Learner::new(&model, &settings, &[])?;
    if !arguments.lora {
        drop(model);
    }
    let trainable = learner.variables().values().map(|variable| variable.elem_count() as u64).sum();
    let tokens = arguments.batch * arguments.seq;
    let targets = (arguments.batch * (arguments.seq - 1)) as f64;
    let (order, lengths) = ((0..arguments.batch).collect::<Vec<_>>(), vec![arguments.seq; arguments.batch]);
    let mut losses = Vec::new();
    let mut best = (f64::INFINITY, f64::INFINITY);
    for round in 0..=arguments.rounds {
        let (begin, cpu) = (Instant::now(), cpu_seconds());
        let loss = device::run_in_pool(|| -> anyhow::Result<f32> {
            let losses = learner.map_micro_batches(&order, &lengths, tokens, |replica, micro| {
                let loss = sft_loss(&replica.lm, micro.iter().map(|&row| &examples[row]), targets)?;
                replica.lm.backward(&loss)?;
                Ok(loss.to_scalar::<f32>()?)
            })?;
            learner.optimizer_step(1e-4)?;
            Ok(losses.iter().sum())
        })?;
        losses.push(loss);
        if round > 0 {
            best = (best.0.min(begin.elapsed().as_secs_f64()), best.1.min(cpu_seconds() - cpu));
        }
    }
    Ok(TrainReport {
        dtype: dtype.name(),
        parameters,
        trainable,
        tokens,
        threads: arguments.threads,
        tokens_per_s: tokens as f64 / best.0,
        tokens_per_cpu_s: tokens as f64 / best.1.max(0.01),
        peak_memory: peak_memory(),
        losses,
    })
}

impl fmt::Display for TrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {:.1} M weights, {:.1} M learn, {} tokens a step, {} threads: {:.0} tokens/s, {:.0} tokens/CPU s, {:.0} MB at most",
            self.dtype,
            self.parameters as f64 / 1e6,
            self.trainable as f64 / 1e6,
            self.tokens,
            self.threads,
            self.tokens_per_s,
            self.tokens_per_cpu_s,
            self.peak_memory as f64 / 1e6
        )
    }
}
