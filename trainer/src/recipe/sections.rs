//! The sections of a recipe, each with its defaults. A new option touches one struct here.

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
use crate::compress::Bits;

/// An endpoint that serves the teachers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewaySection {
    /// Base URL that ends in `/v1`.
    pub url: String,
    /// Environment variable that holds the key. Keys themselves never stand in a recipe.
    pub api_key_env: Option<String>,
    /// Base URL of its admin API, which ends in `/admin`: the run announces its stages there.
    pub admin_url: Option<String>,
    /// Environment variable that holds the admin key.
    pub admin_key_env: Option<String>,
}

/// A model that the local gateway serves with node processes of its own.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalModel {
    /// Name behind the gateway.
    pub model: String,
    /// Model folder or `.gguf` file.
    pub path: PathBuf,
    /// Fewest nodes.
    #[serde(default)]
    pub min: usize,
    /// Most nodes.
    #[serde(default = "one")]
    pub max: usize,
    /// Requests that a node decodes together.
    #[serde(default = "default_slots")]
    pub slots: usize,
    /// Threads per node.
    #[serde(default = "one")]
    pub threads: usize,
    /// Where a node computes, as `potstill serve --device` has it.
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
    /// Devices that cannot be, and where they stand.
    pub(super) fn problems_of_devices(&self) -> Vec<(String, EngineError)> {
        let runs = self.runs().map(|(key, run)| (format!("{key}.devices"), run.devices.join(",")));
        let local = self.local.iter().enumerate();
        let nodes = local.map(|(i, model)| (format!("local[{i}].device"), model.device.clone()));
        let student = ("student.device".to_owned(), self.student.device.clone());
        let all = runs.chain(nodes).chain([student]);
        all.filter_map(|(key, names)| Some((key, device::numbers(&names).err()?))).collect()
    }
}

/// Problems that this program makes itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Builtin {
    /// Only `arithmetic` so far.
    pub task: BuiltinTask,
    /// How many.
    pub problems: usize,
    /// Seed of the generator.
    pub seed: u64,
    /// Share of the problems whose answer is withheld, so that only the judge can decide; 0 to 1.
    #[serde(default)]
    pub without_answer: f64,
}

/// Tasks with a generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BuiltinTask {
    /// Multi-step arithmetic word problems.
    Arithmetic,
}

/// Where problems come from.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectSection {
    /// Files.
    #[serde(default)]
    pub sources: Vec<Source>,
    /// Generated problems.
    pub builtin: Option<Builtin>,
    /// Problems of the sources that share so much of their five-word runs, and all numbers, are one; 0 to 1, nothing is compared
    /// if left out.
    pub near: Option<f64>,
    /// Problems that must not be in it, besides those of `evaluate`: benchmarks that the student will meet.
    #[serde(default)]
    pub against: Vec<Source>,
}

/// How many problems of each task are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResampleSection {
    /// Problems in all; as many as there are if left out.
    pub total: Option<usize>,
    /// How often one problem is drawn at most.
    #[serde(default = "default_cap")]
    pub cap: u32,
    /// Shares by task, of any sum; DistilQwen2's if left out.
    pub shares: Option<BTreeMap<String, f64>>,
}

fn default_cap() -> u32 {
    4
}

/// Who writes chains of thought.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateSection {
    /// The teachers.
    pub teachers: Vec<TeacherConfig>,
}

/// A model that answers short questions.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeSection {
    /// The model.
    pub model: String,
    /// Limit on new tokens; a reasoning judge thinks first.
    #[serde(default = "default_judge_tokens")]
    pub max_tokens: u32,
    /// How often an unreadable answer is asked again.
    #[serde(default = "default_reasks")]
    pub reasks: u32,
}

fn default_judge_tokens() -> u32 {
    8192
}

fn default_reasks() -> u32 {
    2
}

/// Who rewrites.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewriteSection {
    /// The model.
    pub model: String,
    /// Sampling temperature.
    #[serde(default = "default_rewrite_temperature")]
    pub temperature: f64,
    /// Limit on new tokens.
    #[serde(default = "default_rewrite_tokens")]
    pub max_tokens: u32,
}

fn default_rewrite_temperature() -> f64 {
    0.6
}

fn default_rewrite_tokens() -> u32 {
    32_768
}

/// The student: an existing model, or a fresh one of a given shape.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentSection {
    /// Name behind the gateway.
    pub name: String,
    /// Model folder or `.gguf` file to start from.
    pub base: Option<PathBuf>,
    /// Shape of a fresh student.
    pub init: Option<InitSection>,
    /// What the student is asked; `{{ problem }}` stands for the problem.
    #[serde(default = "default_prompt")]
    pub prompt: String,
    /// Number format of the exported weights.
    #[serde(default)]
    pub export: ExportType,
    /// Threads of the node that serves it.
    #[serde(default = "one")]
    pub threads: usize,
    /// Where that node computes, as `potstill serve --device` has it.
    #[serde(default = "cpu")]
    pub device: String,
}

impl StudentSection {
    /// For a recipe without a student.
    pub(super) fn nobody(name: &str) -> Self {
        Self {
            name: format!("{name}-student").chars().take(96).collect(),
            base: None,
            init: None,
            prompt: default_prompt(),
            export: ExportType::default(),
            threads: 1,
            device: cpu(),
        }
    }
}

fn default_prompt() -> String {
    "{{ problem }}".to_owned()
}

/// Number formats of exported weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportType {
    /// 32 bits.
    F32,
    /// 16 bits, bfloat.
    #[default]
    Bf16,
    /// 16 bits, IEEE.
    F16,
}

/// Shape of a fresh student.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitSection {
    /// Decoder family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Blocks.
    pub layers: usize,
    /// Attention heads; the head size is `hidden_size / heads`.
    pub heads: usize,
    /// Key and value heads; as many as `heads` if left out.
    pub kv_heads: Option<usize>,
    /// Longest context.
    pub max_positions: usize,
    /// `arithmetic`: the demonstration's own tokenizer.
    pub tokenizer: BuiltinTask,
}

/// How the student is trained.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftSection {
    /// Peak learning rate of the first phase.
    pub learning_rate: f64,
    /// Conversations to train on instead of the sampled traces.
    pub conversations: Option<Conversations>,
    /// In which order: medium first, then hard.
    #[serde(default)]
    pub curriculum: Curriculum,
    /// Steps, optimiser, checkpoints.
    #[serde(default)]
    pub run: RunConfig,
}

/// Conversations that do not come from this run's teachers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversations {
    /// JSONL with `messages` in each row.
    pub path: Option<PathBuf>,
    /// Rows that teach all teacher roles of a task.
    pub builtin: Option<Builtin>,
}

/// Reward models for RV and CD, learnt from the teachers' scores of this run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardSection {
    /// Model folder or `.gguf` file to start from; the student's own start if left out.
    pub base: Option<PathBuf>,
    /// How they are trained.
    #[serde(default)]
    pub train: RewardConfig,
}

/// Distillation of a teacher's distributions, behind the fine-tuning.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KdSection {
    /// Model folder or `.gguf` file of a teacher with the student's vocabulary.
    pub teacher: Option<PathBuf>,
    /// Or a model behind the gateway, with the student's vocabulary, that says its likeliest tokens (vLLM, `potstill serve`).
    pub model: Option<String>,
    /// The student writes, the teacher says what it would have written.
    #[serde(default)]
    pub on_policy: bool,
    /// How the student is trained.
    #[serde(default)]
    pub train: KdConfig,
}

/// Preferences.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DpoSection {
    /// JSONL with `prompt`, `chosen`, `rejected` and, for CogPO, `beta`. Without it the teachers' right traces are chosen over
    /// the student's own wrong answers to the same problems.
    pub pairs: Option<PathBuf>,
    /// Answers that the student writes per problem.
    #[serde(default = "default_samples")]
    pub samples: u32,
    /// Limit on their new tokens.
    #[serde(default = "default_eval_tokens")]
    pub max_tokens: u32,
    /// How the student is trained.
    #[serde(default)]
    pub train: DpoConfig,
}

/// Practice on problems with known answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpoSection {
    /// Folder of a reward model for RV; that of this run's `[reward]` if left out, none without one.
    pub rv: Option<PathBuf>,
    /// The same for CD.
    pub cd: Option<PathBuf>,
    /// How the student is trained.
    #[serde(default)]
    pub train: GrpoConfig,
}

/// How students are tested.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateSection {
    /// Held-out files.
    #[serde(default)]
    pub sources: Vec<Source>,
    /// Held-out generated problems.
    pub builtin: Option<Builtin>,
    /// Completions per problem.
    #[serde(default = "default_samples")]
    pub samples: u32,
    /// Sampling temperature.
    #[serde(default = "default_temperature")]
    pub temperature: f64,
    /// Nucleus sampling.
    #[serde(default = "default_top_p")]
    pub top_p: f64,
    /// Limit on new tokens.
    #[serde(default = "default_eval_tokens")]
    pub max_tokens: u32,
    /// Students to train and test besides the distilled one.
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

/// Smaller forms of the last student, as GGUF.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressSection {
    /// Formats.
    pub to: Vec<Bits>,
    /// Most that the accuracy on the problems of `evaluate` may fall, in points; a form that loses more is not published.
    #[serde(default = "default_lost")]
    pub limit: f64,
    /// Round by what the student's lessons say is important, where the format can.
    #[serde(default = "yes")]
    pub calibrate: bool,
}

fn default_lost() -> f64 {
    2.0
}

fn yes() -> bool {
    true
}

/// What the distilled student is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The student before training.
    Raw,
    /// The same student trained on final answers only, for as many tokens.
    AnswersOnly,
}
