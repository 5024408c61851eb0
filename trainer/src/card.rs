//! Model cards of students and reward models: architecture, training data, training settings and evaluation. All
//! results are listed, also bad ones.

use std::fmt::Write;
use std::path::Path;

use potstill_engine::loader::LoadedModel;
use potstill_learn::reward_model::Agreement;
use serde_json::Value;

use crate::alignment::ScoreKind;
use crate::recipe::Recipe;
use crate::report::StudentResult;
use crate::variant::Variant;

/// Training facts on a model card.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingFacts {
    /// Number of optimizer steps.
    pub steps: u64,
    /// Mean loss of the last tenth of the steps.
    pub final_loss: f64,
    /// Highest learning rate of any step.
    pub peak_rate: f64,
    /// Seconds from the first to the last step, including pauses of a stopped run.
    pub seconds: f64,
}

/// Reads the facts from the log `trainer_state.json`. Returns `None` if the file is missing, damaged or empty.
pub fn read_training(log: &Path) -> Option<TrainingFacts> {
    let state: Value = serde_json::from_str(&std::fs::read_to_string(log).ok()?).ok()?;
    let history = state.get("log_history")?.as_array()?;
    let number = |entry: &Value, key: &str| entry.get(key)?.as_f64();
    let tail = &history[history.len() - history.len().div_ceil(10)..];
    let losses: Vec<f64> = tail.iter().filter_map(|entry| number(entry, "loss")).collect();
    Some(TrainingFacts {
        steps: state.get("global_step")?.as_u64()?,
        final_loss: losses.iter().sum::<f64>() / losses.len().max(1) as f64,
        peak_rate: history.iter().filter_map(|entry| number(entry, "learning_rate")).fold(0.0, f64::max),
        seconds: number(history.last()?, "wall_time")? - number(history.first()?, "wall_time")?,
    })
}

/// Returns the card as Markdown with Hugging Face's front matter.
pub fn student_card(
    recipe: &Recipe,
    name: &str,
    variant: Variant,
    model: &LoadedModel,
    training: Option<TrainingFacts>,
    figures: Option<&StudentResult>,
) -> String {
    let mut card = String::new();
    let mut line = |text: String| {
        let _infallible = writeln!(card, "{text}");
    };
    line("---".to_owned());
    line("library_name: transformers".to_owned());
    line("pipeline_tag: text-generation".to_owned());
    if let Some(base) = recipe.student.base.as_ref().and_then(|path| path.file_name()) {
        line(format!("base_model: {}", base.to_string_lossy()));
    }
    line("tags: [distillation, chain-of-thought, potstill]".to_owned());
    line("---".to_owned());
    line(format!("\n# {name}\n"));
    let config = &model.config;
    line(format!(
        "A {} decoder with {} weights: {} layers of width {}, {} heads ({} for keys), vocabulary {}, context {}.",
        config.family.name(),
        config.parameter_count(),
        config.num_layers,
        config.hidden_size,
        config.heads.query,
        config.heads.kv,
        config.vocab_size,
        config.max_positions
    ));
    line(match variant {
        Variant::Raw => "It was not trained: it is what the other students started from.".to_owned(),
        Variant::AnswersOnly => "It was trained on final answers only, without chains of thought.".to_owned(),
        Variant::Distilled if recipe.sft.as_ref().is_some_and(|sft| sft.conversations.is_some()) => {
            "It was trained on the conversations that the recipe names.".to_owned()
        }
        Variant::Distilled => "It was trained on verified chains of thought of its teachers.".to_owned(),
        Variant::Kd => {
            "After the step before it learnt its teacher's next-token distributions (white-box distillation)."
                .to_owned()
        }
        Variant::Dpo => "After the step before it learnt preferences (DPO).".to_owned(),
        Variant::Grpo => format!(
            "After the step before it practised with rewards (GRPO) for format and accuracy{}.",
            if recipe.reward.is_some() { ", verbosity (RV) and difficulty (CD)" } else { "" }
        ),
    });
    if let Some(generate) = &recipe.generate {
        let teachers: Vec<String> = generate.teachers.iter().map(|t| format!("`{}`", t.model)).collect();
        line(format!("\nTeachers: {}.", teachers.join(", ")));
    }
    if let Some(training) = training {
        line("\n## Training\n".to_owned());
        line(format!(
            "Recipe `{}`, seed {}: {} steps in {:.0} s, peak learning rate {:.2e}, last loss {:.4}.",
            recipe.name,
            recipe.seed,
            training.steps,
            training.seconds,
            training.peak_rate,
            training.final_loss
        ));
    }
    if let Some(figures) = figures {
        let f = &figures.details;
        line("\n## Evaluation\n".to_owned());
        line(format!(
            "{} held-out problems, {} samples each; 95 % interval by bootstrap over problems.\n",
            f.problems, f.samples
        ));
        line("| accuracy | interval | pass@k | mean tokens | cut off |".to_owned());
        line("|---|---|---|---|---|".to_owned());
        let pass: Vec<String> = f.pass_at_k.iter().map(|(k, value)| format!("{k}: {value:.1}")).collect();
        line(format!(
            "| {:.1} % | {:.1} to {:.1} | {} | {:.0} | {:.1} % |",
            f.accuracy,
            f.ci_low,
            f.ci_high,
            pass.join(", "),
            f.mean_tokens,
            f.truncated
        ));
    }
    card
}

/// Returns the card of a reward model, with its agreement on held-out problems.
pub fn reward_model_card(
    recipe: &Recipe,
    metric: ScoreKind,
    model: &LoadedModel,
    agreement: &Agreement,
) -> String {
    let (name, what) = match metric {
        ScoreKind::Rv => ("rv", "Reasoning Verbosity"),
        ScoreKind::Cd => ("cd", "Cognitive Difficulty"),
    };
    let mut card = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\ntags: [reward-model, potstill]\n---\n\n\
         # {}-{name}\n\nPredicts the {what} of a chain of thought, 0 to 1 for a teacher's 0 to 9, from the chat-rendered \
         problem and completion: {}. {} weights.\n\n## Agreement with the teacher on held-out problems\n\n\
         | traces | mean error, points | the same for the mean alone | Spearman | within one point |\n|---|---|---|---|---|\n\
         | {} | {:.2} | {:.2} | {:.2} | {:.0} % |\n\n| scores | traces | mean prediction, points |\n|---|---|---|\n",
        recipe.student.name,
        if model.config.num_labels == 1 {
            "the sigmoid of its one output"
        } else {
            "the expectation of its ten classes over 9"
        },
        model.config.parameter_count(),
        agreement.traces,
        agreement.mae,
        agreement.mae_of_mean,
        agreement.spearman,
        100.0 * agreement.within_one
    );
    for (band, (count, mean)) in &agreement.by_band {
        let _infallible = writeln!(card, "| {band} | {count} | {mean:.1} |");
    }
    card
}
