//! Sections of a recipe with their defaults. A new option changes one struct here; rules across sections are in
//! [`super`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use potstill_cot::generate::TeacherConfig;
use potstill_data::jsonl::Source;
use potstill_engine::config::Family;
use potstill_engine::{EngineError, device};
use potstill_learn::curriculum::Curriculum;
use potstill_learn::dpo::DpoConfig;
use potstill_learn::grpo::GrpoConfig;
use potstill_learn::kd::KdConfig;
use potstill_learn::reward_model::RewardConfig;
use potstill_learn::run::RunConfig;
use serde::{Deserialize, Serialize};

use super::Recipe;
use crate::quantize_report::QuantizedFormat;

/// An endpoint that serves the teachers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewaySection {
    /// Base URL, ending in `/v1`.
    pub url: String,
    /// Environment variable that holds the API key. Recipes never contain keys.
    pub api_key_env: Option<String>,
    /// Base URL of the gateway's admin API, ending in `/admin`. The run announces its plan there.
    pub admin_url: Option<String>,
    /// Environment variable that holds the admin key.
    pub admin_key_env: Option<String>,
}

/// A model that the local gateway serves with its own node processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalModel {
    /// Model name at the gateway.
    pub model: String,
    /// Model folder or `.gguf` file.
    pub path: PathBuf,
    /// Minimum number of nodes.
    #[serde(default)]
    pub min: usize,
    /// Maximum number of nodes.
    #[serde(default = "one")]
    pub max: usize,
    /// Requests that a node decodes at the same time.
    #[serde(default = "default_slots")]
    pub slots: usize,
    /// Threads per node.
    #[serde(default = "one")]
    pub threads: usize,
    /// Device of a node, as for `potstill serve --device`.
    #[serde(default = "cpu")]
    pub device: String,
}

fn one() -> usize {
    1
}

fn cpu() -> String {
    "cpu".to_owned()
}

fn default_slots() -> usize {
    32
}

impl Recipe {
    /// Returns errors in device names, each with its key.
    pub(super) fn device_errors(&self) -> Vec<(String, EngineError)> {
        let runs =
            self.training_settings().map(|(key, run)| (format!("{key}.devices"), run.devices.join(",")));
        let local = self.local.iter().enumerate();
        let nodes = local.map(|(i, model)| (format!("local[{i}].device"), model.device.clone()));
        let student = ("student.device".to_owned(), self.student.device.clone());
        let all = runs.chain(nodes).chain([student]);
        all.filter_map(|(key, names)| Some((key, device::parse_device_indices(&names).err()?))).collect()
    }
}

/// Problems from a built-in generator.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuiltinProblems {
    /// Kind of problems; only `arithmetic`.
    pub task: BuiltinTask,
    /// Number of problems.
    pub problems: usize,
    /// Seed of the generator.
    pub seed: u64,
    /// Fraction of the problems without a reference answer, 0 to 1. Only a judge can grade these.
    #[serde(default)]
    pub without_answer: f64,
}

/// Tasks with a generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BuiltinTask {
    /// Arithmetic word problems with several steps.
    Arithmetic,
}

/// Sources of problems.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectSection {
    /// Files and hub paths.
    #[serde(default)]
    pub sources: Vec<Source>,
    /// Generated problems.
    pub builtin: Option<BuiltinProblems>,
    /// Similarity above which problems are near duplicates, 0 to 1: Jaccard similarity of five-word sequences. All
    /// numbers must be equal too. Left out, near duplicates are not searched.
    pub near: Option<f64>,
    /// Benchmarks whose problems are removed from the sources (decontamination). Problems of `evaluate` are always
    /// removed.
    #[serde(default)]
    pub against: Vec<Source>,
}

/// Resampling by task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResampleSection {
    /// Number of problems to sample; as many as exist if left out.
    pub total: Option<usize>,
    /// Maximum copies of one problem.
    #[serde(default = "default_cap")]
    pub cap: u32,
    /// Share of each task, of any sum; those of DistilQwen2 if left out.
    pub shares: Option<BTreeMap<String, f64>>,
}

fn default_cap() -> u32 {
    4
}

/// Generation of chains of thought.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateSection {
    /// Teacher models with their sampling parameters.
    pub teachers: Vec<TeacherConfig>,
}

/// A model that classifies, grades or judges.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeSection {
    /// Model name at the gateway.
    pub model: String,
    /// Maximum number of new tokens, including the judge's reasoning.
    #[serde(default = "default_judge_tokens")]
    pub max_tokens: u32,
    /// Times that a request is repeated if its completion cannot be parsed.
    #[serde(default = "default_parse_retries")]
    pub reasks: u32,
}

fn default_judge_tokens() -> u32 {
    8192
}

fn default_parse_retries() -> u32 {
    2
}

/// Rewriting of traces.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewriteSection {
    /// Model name at the gateway.
    pub model: String,
    /// Sampling temperature.
    #[serde(default = "default_rewrite_temperature")]
    pub temperature: f64,
    /// Maximum number of new tokens.
    #[serde(default = "default_rewrite_tokens")]
    pub max_tokens: u32,
}

fn default_rewrite_temperature() -> f64 {
    0.6
}

fn default_rewrite_tokens() -> u32 {
    32_768
}

/// The student: an existing base model, or a randomly initialized one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentSection {
    /// Model name at the gateway.
    pub name: String,
    /// Model folder or `.gguf` file to start from.
    pub base: Option<PathBuf>,
    /// Shape of a randomly initialized student.
    pub init: Option<InitSection>,
    /// Prompt of the student; `{{ problem }}` stands for the problem.
    #[serde(default = "default_prompt")]
    pub prompt: String,
    /// Data type of the exported weights.
    #[serde(default)]
    pub export: ExportDtype,
    /// Threads of the node that serves the student.
    #[serde(default = "one")]
    pub threads: usize,
    /// Device of that node, as for `potstill serve --device`.
    #[serde(default = "cpu")]
    pub device: String,
}

impl StudentSection {
    /// Returns a placeholder for a recipe without a student.
    pub(super) fn placeholder(name: &str) -> Self {
        Self {
            name: format!("{name}-student").chars().take(96).collect(),
            base: None,
            init: None,
            prompt: default_prompt(),
            export: ExportDtype::default(),
            threads: 1,
            device: cpu(),
        }
    }
}

fn default_prompt() -> String {
    "{{ problem }}".to_owned()
}

/// Data types of exported weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportDtype {
    /// 32-bit floating point.
    F32,
    /// bfloat16.
    #[default]
    Bf16,
    /// IEEE 16-bit floating point.
    F16,
}

/// Shape of a randomly initialized student.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitSection {
    /// Model family of the decoder.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder blocks.
    pub layers: usize,
    /// Number of attention heads. The head size is `hidden_size / heads`.
    pub heads: usize,
    /// Number of key and value heads; equal to `heads` if left out.
    pub kv_heads: Option<usize>,
    /// Maximum context length in tokens.
    pub max_positions: usize,
    /// Tokenizer; only `arithmetic`, that of the demonstration.
    pub tokenizer: BuiltinTask,
}

/// Supervised fine-tuning.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftSection {
    /// Peak learning rate of the first phase.
    pub learning_rate: f64,
    /// Conversations to train on instead of the selected traces.
    pub conversations: Option<Conversations>,
    /// Curriculum; by default medium, then hard.
    #[serde(default)]
    pub curriculum: Curriculum,
    /// Settings of the training loop.
    #[serde(default)]
    pub run: RunConfig,
}

/// Conversations that do not come from teachers of this run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversations {
    /// JSONL file with `messages` in each row.
    pub path: Option<PathBuf>,
    /// Generated conversations that cover all teacher roles of a task.
    pub builtin: Option<BuiltinProblems>,
}

/// Reward models for RV and CD, trained on the scores of this run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardSection {
    /// Model folder or `.gguf` file to start from; the student's base model if left out.
    pub base: Option<PathBuf>,
    /// Training settings.
    #[serde(default)]
    pub train: RewardConfig,
}

/// Logit distillation after fine-tuning.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KdSection {
    /// Model folder or `.gguf` file of a teacher with the student's vocabulary.
    pub teacher: Option<PathBuf>,
    /// Alternatively, a model at the gateway with the student's vocabulary that returns prompt logprobs (vLLM,
    /// `potstill serve`).
    pub model: Option<String>,
    /// Trains on the student's own completions instead of the traces.
    #[serde(default)]
    pub on_policy: bool,
    /// Training settings.
    #[serde(default)]
    pub train: KdConfig,
}

/// Direct preference optimization.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DpoSection {
    /// JSONL file with `prompt`, `chosen`, `rejected` and, for CogPO, `beta`. Without it, teacher traces are chosen
    /// over the student's own incorrect completions.
    pub pairs: Option<PathBuf>,
    /// Completions that the student samples per problem.
    #[serde(default = "default_samples")]
    pub samples: u32,
    /// Maximum number of new tokens of these completions.
    #[serde(default = "default_eval_tokens")]
    pub max_tokens: u32,
    /// Training settings.
    #[serde(default)]
    pub train: DpoConfig,
}

/// Reinforcement learning with GRPO on problems with reference answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpoSection {
    /// Folder of a reward model for RV; this run's own if left out, none without `[reward]`.
    pub rv: Option<PathBuf>,
    /// Folder of a reward model for CD, with the same default.
    pub cd: Option<PathBuf>,
    /// Training settings.
    #[serde(default)]
    pub train: GrpoConfig,
}

/// Evaluation of the students.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateSection {
    /// Files and hub paths with held-out problems.
    #[serde(default)]
    pub sources: Vec<Source>,
    /// Generated held-out problems.
    pub builtin: Option<BuiltinProblems>,
    /// Completions per problem.
    #[serde(default = "default_samples")]
    pub samples: u32,
    /// Sampling temperature.
    #[serde(default = "default_temperature")]
    pub temperature: f64,
    /// Nucleus sampling: probability mass of the tokens to sample from.
    #[serde(default = "default_top_p")]
    pub top_p: f64,
    /// Maximum number of new tokens.
    #[serde(default = "default_eval_tokens")]
    pub max_tokens: u32,
    /// Baselines to train and evaluate besides the student.
    #[serde(default)]
    pub compare: Vec<Baseline>,
}

fn default_samples() -> u32 {
    4
}

fn default_temperature() -> f64 {
    0.6
}

fn default_top_p() -> f64 {
    0.95
}

fn default_eval_tokens() -> u32 {
    4096
}

/// Quantized versions of the last student, as GGUF files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeSection {
    /// Weight formats.
    pub to: Vec<QuantizedFormat>,
    /// Maximum loss of accuracy on the problems of `evaluate`, in points. A version that loses more is not published.
    #[serde(default = "default_max_accuracy_drop")]
    pub limit: f64,
    /// Whether rounding uses importances computed on training examples, for formats that support it.
    #[serde(default = "default_true")]
    pub calibrate: bool,
}

fn default_max_accuracy_drop() -> f64 {
    2.0
}

fn default_true() -> bool {
    true
}

/// Baselines for the distilled student.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The student before training.
    Raw,
    /// The same student, fine-tuned on final answers only, for as many tokens.
    AnswersOnly,
}
