//! The model card: what the student is, what it learnt from, how it was trained, how good it is, bad figures included.

use std::fmt::Write;
use std::path::Path;

use potstill_engine::loader::LoadedModel;
use serde_json::Value;

use crate::pipeline::Variant;
use crate::recipe::Recipe;
use crate::report::StudentFigures;

/// What a card says of a training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Training {
    /// Steps in all.
    pub steps: u64,
    /// Mean loss of the last tenth of the steps.
    pub final_loss: f64,
    /// From the first step to the last; pauses of a run that was stopped count too.
    pub seconds: f64,
}

/// What `trainer_state.json` tells of a training that has ended.
pub fn training_of(log: &Path) -> Option<Training> {
    let state: Value = serde_json::from_str(&std::fs::read_to_string(log).ok()?).ok()?;
    let history = state.get("log_history")?.as_array()?;
    let number = |entry: &Value, key: &str| entry.get(key)?.as_f64();
    let tail = &history[history.len() - history.len().div_ceil(10)..];
    let losses: Vec<f64> = tail.iter().filter_map(|entry| number(entry, "loss")).collect();
    Some(Training {
        steps: state.get("global_step")?.as_u64()?,
        final_loss: losses.iter().sum::<f64>() / losses.len().max(1) as f64,
        seconds: number(history.last()?, "wall_time")? - number(history.first()?, "wall_time")?,
    })
}

/// The card as Markdown with Hugging Face front matter.
pub fn text(
    recipe: &Recipe,
    name: &str,
    variant: Variant,
    model: &LoadedModel,
    training: Option<Training>,
    figures: Option<&StudentFigures>,
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
        config.parameters(),
        config.layers,
        config.hidden_size,
        config.heads.query,
        config.heads.kv,
        config.vocab_size,
        config.max_positions
    ));
    line(match variant {
        Variant::Raw => "It was not trained: it is what the other students started from.".to_owned(),
        Variant::AnswersOnly => "It was trained on final answers only, without chains of thought.".to_owned(),
        Variant::Distilled if recipe.sft.conversations.is_some() => {
            "It was trained on the conversations that the recipe names.".to_owned()
        }
        Variant::Distilled => "It was trained on verified chains of thought of its teachers.".to_owned(),
    });
    if let Some(generate) = &recipe.generate {
        let teachers: Vec<String> = generate.teachers.iter().map(|t| format!("`{}`", t.model)).collect();
        line(format!("\nTeachers: {}.", teachers.join(", ")));
    }
    if let Some(training) = training {
        line("\n## Training\n".to_owned());
        line(format!(
            "Recipe `{}`, seed {}: {} steps in {:.0} s, peak learning rate {}, last loss {:.4}.",
            recipe.name,
            recipe.seed,
            training.steps,
            training.seconds,
            recipe.sft.learning_rate,
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
