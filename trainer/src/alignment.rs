//! Trains reward models, and aligns the student with DPO and GRPO. Reward models learn the teachers' scores; DPO and
//! GRPO return the trained student. The algorithms themselves are in `potstill-learn`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context;
use candle_core::{DType, Device};
use potstill_data::jsonl::{read_records, write_records};
use potstill_data::records::{Problem, Trace};
use potstill_engine::loader::{LoadedModel, load};
use potstill_learn::dpo::{DpoConfig, PreferencePair, dpo};
use potstill_learn::examples::{Example, tokenize_conversation};
use potstill_learn::grpo::{GrpoConfig, Prompt, RewardFunction, grpo};
use potstill_learn::reward_model::{self, Agreement, RewardConfig, RewardModel, ScoredTrace};
use potstill_learn::rollouts::{RolloutEngines, RolloutParams};
use potstill_learn::run::RunConfig;
use potstill_shared::durable::create_folder;
use potstill_shared::id::ContentId;
use potstill_verify::verifier::{Reference, Verifier};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::progress::Progress;
use crate::recipe::{DpoSection, GrpoSection, Recipe};
use crate::students::{
    TrainingSet, finalize_model, load_base, report_result, run_with_progress, student_prompt,
};

/// The two scores of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreKind {
    /// Reasoning verbosity.
    Rv,
    /// Cognitive difficulty.
    Cd,
}

impl ScoreKind {
    /// Returns the name used in file names: `rv` or `cd`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rv => "rv",
            Self::Cd => "cd",
        }
    }

    /// Returns the score of `trace`, 0 to 9, or `None` if it has none.
    fn score(self, trace: &Trace) -> Option<u8> {
        let scores = trace.scores?;
        match self {
            Self::Rv => scores.rv,
            Self::Cd => scores.cd,
        }
    }
}

/// Trains a reward model on the scores that judges gave to `traces`. Returns the model and its agreement with held-out
/// scores.
///
/// Starts from `reward.base`, or else from the student's base model. Traces without a score are skipped.
pub fn train_reward_model(
    recipe: &Recipe,
    metric: ScoreKind,
    traces: &[Trace],
    folder: &Path,
    progress: &Progress,
) -> anyhow::Result<(RewardModel, Agreement)> {
    let section = recipe.reward.as_ref().context("the recipe has no `reward`")?;
    let start = match &section.base {
        Some(path) => load(path, &Device::Cpu, DType::F32)
            .with_context(|| format!("cannot load `reward.base` `{}`", path.display()))?,
        None => load_base(recipe)?,
    };
    let mut scored = Vec::new();
    for trace in traces {
        if let Some(score) = metric.score(trace) {
            scored.push(ScoredTrace {
                tokens: RewardModel::encode(&start, &trace.problem.problem, &trace.completion())?,
                score,
                problem: trace.problem.id.to_string(),
            });
        }
    }
    let config = RewardConfig { run: with_recipe_seed(recipe, &section.train.run), ..section.train.clone() };
    let name = format!("reward-{}", metric.name());
    let (model, report, agreement) = run_with_progress(folder, &name, progress, |observe| {
        reward_model::train_reward_model(&start, &scored, &config, folder, observe)
    })?;
    report_result(&name, &report, progress);
    progress.message(format!(
        "`{name}` on {} held-out traces: mean error {:.2} points (the mean alone {:.2}), Spearman {:.2}, within one {:.0} %",
        agreement.traces,
        agreement.mae,
        agreement.mae_of_mean,
        agreement.spearman,
        100.0 * agreement.within_one
    ));
    Ok((model, agreement))
}

/// Returns `run` with the recipe's seed.
pub(crate) fn with_recipe_seed(recipe: &Recipe, run: &RunConfig) -> RunConfig {
    RunConfig { seed: recipe.seed, ..run.clone() }
}

/// Tokenizes the conversations of a training set with the student's template.
pub(crate) fn tokenize_training_set(
    student: &LoadedModel,
    lessons: &TrainingSet,
) -> anyhow::Result<Vec<Example>> {
    Ok(lessons
        .messages
        .iter()
        .map(|messages| tokenize_conversation(student, messages))
        .collect::<Result<_, _>>()?)
}

/// One row of a preference file, with the columns of TRL and EasyDistill.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct PairRow {
    prompt: Value,
    chosen: Value,
    rejected: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    beta: Option<f64>,
}

impl PairRow {
    /// Tokenizes both completions with the prompt.
    fn tokenize(&self, student: &LoadedModel) -> anyhow::Result<PreferencePair> {
        let side = |answer: &Value| -> anyhow::Result<Example> {
            let mut turns = messages(&self.prompt, "user")?;
            turns.extend(messages(answer, "assistant")?);
            Ok(tokenize_conversation(student, &turns)?)
        };
        Ok(PreferencePair { chosen: side(&self.chosen)?, rejected: side(&self.rejected)?, beta: self.beta })
    }
}

/// Returns `value` as messages: a string becomes one message of `role`, a list of messages is returned unchanged.
fn messages(value: &Value, role: &str) -> anyhow::Result<Vec<Value>> {
    match value {
        Value::String(text) => Ok(vec![json!({"role": role, "content": text})]),
        Value::Array(messages) => Ok(messages.clone()),
        other => anyhow::bail!("expected a text or a list of messages, found `{other}`"),
    }
}

/// Trains the student with DPO and returns the result.
///
/// Pairs come from the file `dpo.pairs`. Without one, they are made of teacher traces and the student's own incorrect
/// completions, and stored in `folder`.
pub fn train_dpo(
    recipe: &Recipe,
    section: &DpoSection,
    student: &LoadedModel,
    traces: &[Trace],
    folder: &Path,
    progress: &Progress,
) -> anyhow::Result<LoadedModel> {
    let (path, rows) = match &section.pairs {
        Some(path) => (path.clone(), read_records(path)?),
        None => {
            create_folder(folder)?;
            let path = folder.join(format!("pairs-{}.jsonl", fingerprint(student)?));
            if !path.exists() {
                let rows = pairs_from_incorrect_completions(recipe, section, student, traces, progress)?;
                write_records(&path, &rows)?;
            }
            (path.clone(), read_records(&path)?)
        }
    };
    let pairs = rows
        .iter()
        .enumerate()
        .map(|(row, pair): (usize, &PairRow)| {
            pair.tokenize(student).with_context(|| format!("`{}` row {}", path.display(), row + 1))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let config = DpoConfig { run: with_recipe_seed(recipe, &section.train.run), ..section.train.clone() };
    let trained =
        run_with_progress(folder, "dpo", progress, |observe| dpo(student, &pairs, &config, folder, observe))?;
    report_result("dpo", &trained.1, progress);
    finalize_model(&trained.0, folder, recipe)
}

/// Returns 16 hex digits that distinguish models of one shape. Hashes only the norm weights, which keeps the
/// calculation fast.
fn fingerprint(model: &LoadedModel) -> anyhow::Result<String> {
    let mut hashes = Vec::new();
    for (name, tensor) in model.weights.iter().filter(|(name, _)| name.contains("norm")) {
        let values = tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        hashes.push(format!("{name}{}", ContentId::from_bytes(&bytes)));
    }
    let id = ContentId::from_parts(&hashes.iter().map(String::as_str).collect::<Vec<_>>()).to_string();
    Ok(id.chars().take(16).collect())
}

/// Returns one pair for each problem with an incorrect completion of the student: a teacher's trace as chosen, the
/// first incorrect completion as rejected.
///
/// Samples `section.samples` completions per problem at temperature 1. Problems without a reference answer and
/// truncated completions are skipped.
fn pairs_from_incorrect_completions(
    recipe: &Recipe,
    section: &DpoSection,
    student: &LoadedModel,
    traces: &[Trace],
    progress: &Progress,
) -> anyhow::Result<Vec<PairRow>> {
    let mut once: Vec<&Trace> = traces.iter().filter(|trace| trace.problem.answer.is_some()).collect();
    let mut seen = std::collections::HashSet::new();
    once.retain(|trace| seen.insert(trace.problem.id.clone()));
    let draw = RolloutParams {
        group: section.samples as usize,
        temperature: 1.0,
        top_p: 1.0,
        max_tokens: section.max_tokens as usize,
    };
    let devices = section.train.run.parse_devices()?;
    let copies =
        devices.iter().map(|device| student.to_device(device, DType::F32)).collect::<Result<Vec<_>, _>>()?;
    let rollouts = RolloutEngines::start(&copies, once.len() * draw.group)?;
    let asked = once
        .iter()
        .map(|trace| tokenize_prompt(recipe, student, &trace.problem))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let tokens: Vec<&[u32]> = asked.iter().map(|(tokens, _)| tokens.as_slice()).collect();
    let verifier = Verifier::default();
    let mut rows = Vec::new();
    for (trace, group) in once.iter().zip(rollouts.sample(&tokens, draw, &format!("dpo/{}", recipe.seed))?) {
        let gold = Reference::Answer(trace.problem.answer.clone().unwrap_or_default());
        for completion in group.iter().filter(|completion| !completion.is_truncated) {
            if verifier.verify(&gold, &completion.text)?.correct == Some(false) {
                rows.push(PairRow {
                    prompt: json!(student_prompt(recipe, &trace.problem.problem)),
                    chosen: json!(trace.completion()),
                    rejected: json!(completion.text),
                    beta: None,
                });
                break;
            }
        }
    }
    progress.message(format!("dpo: {} problems, the student was wrong on {}", once.len(), rows.len()));
    Ok(rows)
}

/// Returns the student's prompt for `problem` as token ids, and whether it ends inside an open `<think>` block.
pub(crate) fn tokenize_prompt(
    recipe: &Recipe,
    student: &LoadedModel,
    problem: &Problem,
) -> anyhow::Result<(Vec<u32>, bool)> {
    let messages = json!([{"role": "user", "content": student_prompt(recipe, &problem.problem)}]);
    let text = student.chat_template.render(&messages, true, &json!({}))?;
    Ok((student.tokenizer.encode(&text)?, text.trim_end().ends_with("<think>")))
}

/// Trains the student with GRPO on the problems that have a reference answer, and returns the result.
///
/// Reward models come from `grpo.rv` and `grpo.cd`, or else from `own`, the folders of this run's reward models by
/// metric name.
pub fn train_grpo(
    recipe: &Recipe,
    section: &GrpoSection,
    student: &LoadedModel,
    problems: &[Problem],
    own: &HashMap<&'static str, std::path::PathBuf>,
    folder: &Path,
    progress: &Progress,
) -> anyhow::Result<LoadedModel> {
    let device = section.train.run.parse_devices()?.swap_remove(0);
    let reward =
        |given: &Option<std::path::PathBuf>, metric: ScoreKind| -> anyhow::Result<Option<RewardModel>> {
            let Some(path) = given.as_ref().or_else(|| own.get(metric.name())) else { return Ok(None) };
            let model = load(path, &device, DType::F32)
                .with_context(|| format!("cannot load the reward model `{}`", path.display()))?;
            Ok(Some(RewardModel::new(model).with_context(|| path.display().to_string())?))
        };
    let rewards = RewardFunction {
        verifier: Verifier::default(),
        rv: reward(&section.rv, ScoreKind::Rv)?,
        cd: reward(&section.cd, ScoreKind::Cd)?,
    };
    let mut prompts = Vec::new();
    for problem in problems {
        if let Some(answer) = &problem.answer {
            let (tokens, opened) = tokenize_prompt(recipe, student, problem)?;
            prompts.push(Prompt {
                problem: problem.problem.clone(),
                tokens,
                starts_in_think: opened,
                reference: Reference::Answer(answer.clone()),
            });
        }
    }
    let config = GrpoConfig { run: with_recipe_seed(recipe, &section.train.run), ..section.train.clone() };
    let trained = run_with_progress(folder, "grpo", progress, |observe| {
        grpo(student, &prompts, &rewards, &config, folder, observe)
    })?;
    report_result("grpo", &trained.1, progress);
    finalize_model(&trained.0, folder, recipe)
}
