//! Base model, training sets and supervised fine-tuning of the students. The order of variants is in
//! [`crate::pipeline`]; other algorithms are in [`crate::alignment`] and [`crate::distributions`].

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Device};
use potstill_data::records::{Difficulty, Trace};
use potstill_engine::config::ModelConfig;
use potstill_engine::init;
use potstill_engine::loader::{LoadedModel, load};
use potstill_engine::ops::attention::AttentionHeads;
use potstill_learn::LearnError;
use potstill_learn::curriculum::{ExampleMeta, Phase, phases};
use potstill_learn::examples::{Example, tokenize_conversation};
use potstill_learn::learner::Learner;
use potstill_learn::run::{Progress as Step, RunConfig, RunReport, StepObserver};
use potstill_learn::sft::sft;
use potstill_shared::durable::{publish_folder, remove_folder};
use serde_json::{Value, json};

use crate::demo::{roles, tokenizer};
use crate::progress::Progress;
use crate::recipe::{Conversations, Recipe};
use crate::training_view::TrainingDashboard;

/// Returns the student before training: the model at `student.base`, or a randomly initialized one from `student.init`.
pub fn load_base(recipe: &Recipe) -> anyhow::Result<LoadedModel> {
    if let Some(path) = &recipe.student.base {
        return load(path, &Device::Cpu, DType::F32)
            .with_context(|| format!("cannot load the student's base `{}`", path.display()));
    }
    let init = recipe.student.init.as_ref().context("the recipe's student has neither `base` nor `init`")?;
    let tokenizer = tokenizer::tokenizer()?;
    let end = tokenizer.token_id(tokenizer::END).context("the tokenizer has no end token")?;
    let config = ModelConfig {
        family: init.family,
        vocab_size: tokenizer.len(),
        hidden_size: init.hidden_size,
        intermediate_size: init.intermediate_size,
        num_layers: init.layers,
        heads: AttentionHeads {
            query: init.heads,
            kv: init.kv_heads.unwrap_or(init.heads),
            dim: init.hidden_size / init.heads.max(1),
        },
        max_positions: init.max_positions,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tied_embeddings: true,
        qkv_bias: init.family == potstill_engine::config::Family::Qwen2,
        eos_token_ids: vec![end],
        bos_token_id: None,
        num_labels: 0,
        candle: None,
    };
    config.validate(Path::new("student.init"))?;
    let weights = init::random_weights(&config, recipe.seed)?;
    Ok(LoadedModel {
        config,
        weights,
        tokenizer,
        chat_template: Arc::new(tokenizer::template()?),
        quantized: false,
    })
}

/// Training set: conversations with the difficulty of each.
pub struct TrainingSet {
    /// Conversations as chat messages.
    pub messages: Vec<Vec<Value>>,
    /// Difficulty of each conversation.
    pub known: Vec<ExampleMeta>,
}

impl TrainingSet {
    /// Returns the training set of chains of thought with their answers.
    pub fn chains_of_thought(recipe: &Recipe, traces: &[Trace]) -> Self {
        Self::from_traces(recipe, traces.iter(), Trace::completion)
    }

    /// Returns the training set of final answers only, with each problem once.
    pub fn answers_only(recipe: &Recipe, traces: &[Trace]) -> Self {
        let mut seen = std::collections::HashSet::new();
        let once = traces.iter().filter(|trace| seen.insert(trace.problem.id.clone()));
        Self::from_traces(recipe, once, |trace| trace.answer.clone())
    }

    /// Returns a training set with one conversation per trace.
    fn from_traces<'a>(
        recipe: &Recipe,
        traces: impl Iterator<Item = &'a Trace>,
        completion: impl Fn(&Trace) -> String,
    ) -> Self {
        let (mut messages, mut known) = (Vec::new(), Vec::new());
        for trace in traces {
            let prompt = student_prompt(recipe, &trace.problem.problem);
            messages.push(vec![
                json!({"role": "user", "content": prompt}),
                json!({"role": "assistant", "content": completion(trace)}),
            ]);
            known.push(ExampleMeta {
                difficulty: trace.difficulty.unwrap_or(Difficulty::Unscored),
                cd: trace.scores.and_then(|scores| scores.cd),
            });
        }
        Self { messages, known }
    }

    /// Returns a training set of conversations from other sources. All count as medium. Generated ones exclude the
    /// problems in `held_out`.
    pub fn conversations(section: &Conversations, held_out: &[String]) -> anyhow::Result<Self> {
        let mut messages: Vec<Vec<Value>> = Vec::new();
        if let Some(builtin) = &section.builtin {
            let held_out = held_out.iter().cloned().collect();
            messages.extend(roles::conversations(builtin.problems, builtin.seed, &held_out));
        }
        if let Some(path) = &section.path {
            let rows: Vec<Value> = potstill_data::jsonl::read_records(path)?;
            for (line, row) in rows.into_iter().enumerate() {
                let list = row.get("messages").and_then(Value::as_array).cloned();
                messages.push(list.with_context(|| {
                    format!("`{}` line {}: `messages` is missing or no list", path.display(), line + 1)
                })?);
            }
        }
        let known = vec![ExampleMeta { difficulty: Difficulty::Medium, cd: None }; messages.len()];
        Ok(Self { messages, known })
    }
}

/// Returns the student's prompt for a problem.
pub fn student_prompt(recipe: &Recipe, problem: &str) -> String {
    recipe.student.prompt.replace("{{ problem }}", problem)
}

/// Tokenized training set with its phases.
pub struct SftDataset {
    examples: Vec<Example>,
    phases: Vec<Phase>,
}

impl SftDataset {
    /// Tokenizes the training set and divides it into the phases of the curriculum.
    pub fn new(recipe: &Recipe, model: &LoadedModel, lessons: &TrainingSet) -> anyhow::Result<Self> {
        let examples = lessons
            .messages
            .iter()
            .map(|messages| tokenize_conversation(model, messages))
            .collect::<Result<Vec<_>, _>>()?;
        let sft = recipe.sft.as_ref().context("the recipe has no `sft`")?;
        let phases = phases(&lessons.known, sft.curriculum, sft.learning_rate, recipe.seed);
        Ok(Self { examples, phases })
    }

    /// Returns the number of tokens over all epochs.
    pub fn total_tokens(&self) -> f64 {
        self.phases
            .iter()
            .map(|phase| {
                let once: usize = phase.examples.iter().map(|&index| self.examples[index].tokens.len()).sum();
                phase.epochs * once as f64
            })
            .sum()
    }

    /// Scales the epochs so that training processes `tokens` tokens. Variants are compared at equal cost.
    pub fn with_token_budget(mut self, tokens: f64) -> Self {
        let factor = tokens / self.total_tokens().max(1.0);
        self.phases.iter_mut().for_each(|phase| phase.epochs *= factor);
        self
    }

    /// Returns the tokenized examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Fine-tunes `model` and returns the result. Checkpoints and logs go to `folder`; a restarted training resumes
    /// from there.
    pub fn train(
        &self,
        recipe: &Recipe,
        model: &LoadedModel,
        folder: &Path,
        name: &str,
        progress: &Progress,
    ) -> anyhow::Result<LoadedModel> {
        let section = recipe.sft.as_ref().context("the recipe has no `sft`")?;
        let config = RunConfig { seed: recipe.seed, ..section.run.clone() };
        let (learner, report) = run_with_progress(folder, name, progress, |observe| {
            sft(model, &self.examples, &self.phases, &config, folder, observe)
        })?;
        report_result(name, &report, progress);
        finalize_model(&learner, folder, recipe)
    }
}

/// Returns the trained model with merged adapters. LoRA adapters are also written to `folder/adapter` in PEFT's format.
pub fn finalize_model(learner: &Learner, folder: &Path, recipe: &Recipe) -> anyhow::Result<LoadedModel> {
    if let Some(lora) = learner.lora() {
        let base = recipe
            .student
            .base
            .as_ref()
            .map_or_else(|| recipe.student.name.clone(), |p| p.display().to_string());
        publish_folder::<anyhow::Error>(&folder.join("adapter"), |adapter| {
            Ok(lora.write_adapter(adapter, learner.variables(), &base)?)
        })?;
    }
    Ok(learner.trained_model()?)
}

/// Runs a training and shows its progress. If the checkpoints belong to other data, removes `folder` and starts again.
///
/// The data differ if requests that failed before succeeded this time, or if the starting model changed.
pub fn run_with_progress<T>(
    folder: &Path,
    name: &str,
    progress: &Progress,
    mut train: impl FnMut(StepObserver<'_>) -> Result<T, LearnError>,
) -> anyhow::Result<T> {
    let mut trained = train(&mut progress_observer(name, folder, progress));
    if let Err(LearnError::RunMismatch { path }) = &trained {
        progress.message(format!("`{}` belongs to other data; training begins afresh", path.display()));
        remove_folder(folder)?;
        trained = train(&mut progress_observer(name, folder, progress));
    }
    Ok(trained?)
}

/// Returns a callback that shows every step.
fn progress_observer(name: &str, folder: &Path, progress: &Progress) -> impl FnMut(&Step<'_>) -> bool {
    let mut view = TrainingDashboard::new(name, folder);
    let (name, progress, started) = (name.to_owned(), progress.clone(), std::time::Instant::now());
    let mut tokens = 0;
    let mut line = None;
    let mut phase = String::new();
    move |now| {
        view.record_step(now);
        tokens += now.tokens;
        if phase != now.phase {
            phase = now.phase.to_owned();
            let title = if phase == name { phase.clone() } else { format!("{name}/{phase}") };
            line = Some(progress.add_line(&title, now.steps as u64));
        }
        if let Some(line) = &line {
            let speed = tokens as f64 / started.elapsed().as_secs_f64();
            let entry = now.entry;
            let mut text = format!(
                "step {}/{}, loss {:.4}, norm {:.2}, rate {:.1e}, {speed:.0} tokens/s",
                now.step, now.steps, entry.loss, entry.grad_norm, entry.learning_rate
            );
            for (name, value) in
                entry.metrics.iter().filter(|(name, _)| PROGRESS_METRICS.contains(&name.as_str()))
            {
                text.push_str(&format!(", {} {value:.3}", name.rsplit('/').next().unwrap_or(name)));
            }
            line.update(now.step as u64, &text);
            if now.step == now.steps {
                line.clear();
            }
        }
        true
    }
}

/// Metrics that are short and important enough for the progress line.
const PROGRESS_METRICS: [&str; 5] =
    ["reward", "reward/accuracy", "completions/tokens", "completions/truncated", "rewards/accuracy"];

/// Prints a summary of a finished training.
pub fn report_result(name: &str, report: &RunReport, progress: &Progress) {
    let mut text = format!(
        "trained `{name}`: {} steps over {} examples ({} too long), last loss {:.4}",
        report.steps, report.examples, report.too_long, report.final_loss
    );
    for (name, value) in
        report.final_metrics.iter().filter(|(name, _)| PROGRESS_METRICS.contains(&name.as_str()))
    {
        text.push_str(&format!(", {name} {value:.3}"));
    }
    if report.resumed_from > 0 {
        text.push_str(&format!(", resumed at step {}", report.resumed_from));
    }
    progress.message(text);
}
