//! `potstill demo`: runs the whole pipeline offline on built-in data. The teacher is a small model, trained by this
//! trainer with `trainer/recipes/demo-teacher.toml`. The students learn only from its completions, which pass through
//! the gateway.

pub mod roles;
pub mod tokenizer;

use std::path::{Path, PathBuf};

use potstill_shared::durable::{DurableError, create_folder, write_file};

use crate::recipe::Recipe;
use crate::run_recipe::{AfterRun, run_all_stages};

/// Arguments of `potstill demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArguments {
    /// Run folder. The same command resumes a stopped run.
    #[arg(long, default_value = "demo-run")]
    pub out: PathBuf,
    /// Use fewer problems and steps; takes about a minute.
    #[arg(long)]
    pub quick: bool,
    /// Print the report as JSON on standard output.
    #[arg(long)]
    pub json: bool,
    /// Exit after the report instead of serving the student.
    #[arg(long)]
    pub exit: bool,
    /// Port of the gateway on 127.0.0.1; any free port if it is taken.
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
}

/// Built-in files with their path in the `assets` folder of the run.
const EMBEDDED_FILES: [(&str, &[u8]); 14] = [
    ("demo.toml", include_bytes!("../recipes/demo.toml")),
    ("demo-prompts/generate.jinja", include_bytes!("../recipes/demo-prompts/generate.jinja")),
    ("demo-prompts/difficulty.jinja", include_bytes!("../recipes/demo-prompts/difficulty.jinja")),
    ("demo-prompts/extend.jinja", include_bytes!("../recipes/demo-prompts/extend.jinja")),
    ("demo-prompts/simplify.jinja", include_bytes!("../recipes/demo-prompts/simplify.jinja")),
    ("demo-prompts/process.jinja", include_bytes!("../recipes/demo-prompts/process.jinja")),
    ("demo-prompts/rv.jinja", include_bytes!("../recipes/demo-prompts/rv.jinja")),
    ("demo-prompts/cd.jinja", include_bytes!("../recipes/demo-prompts/cd.jinja")),
    ("demo-teacher/config.json", include_bytes!("../recipes/demo-teacher/config.json")),
    ("demo-teacher/generation_config.json", include_bytes!("../recipes/demo-teacher/generation_config.json")),
    ("demo-teacher/tokenizer.json", include_bytes!("../recipes/demo-teacher/tokenizer.json")),
    ("demo-teacher/tokenizer_config.json", include_bytes!("../recipes/demo-teacher/tokenizer_config.json")),
    ("demo-teacher/chat_template.jinja", include_bytes!("../recipes/demo-teacher/chat_template.jinja")),
    ("demo-teacher/model.safetensors", include_bytes!("../recipes/demo-teacher/model.safetensors")),
];

/// Runs the demonstration.
pub async fn run_demo(arguments: DemoArguments) -> anyhow::Result<()> {
    let assets = arguments.out.join("assets");
    write_assets(&assets)?;
    let path = assets.join("demo.toml");
    let mut recipe = Recipe::load(&path)?;
    if arguments.quick {
        make_quick(&mut recipe);
    }
    let end = AfterRun { serve: !arguments.exit, json: arguments.json };
    run_all_stages(recipe, &path, &arguments.out, arguments.port, None, end).await
}

/// Writes the built-in files that are missing or differ.
fn write_assets(folder: &Path) -> Result<(), DurableError> {
    for (name, bytes) in EMBEDDED_FILES {
        let path = folder.join(name);
        if std::fs::read(&path).is_ok_and(|there| there == bytes) {
            continue;
        }
        create_folder(path.parent().unwrap_or(folder))?;
        write_file(&path, bytes)?;
    }
    Ok(())
}

/// Reduces the recipe to a third of the problems. The run gets another name, so that it never resumes a full one.
fn make_quick(recipe: &mut Recipe) {
    recipe.name.push_str("-quick");
    if let Some(builtin) = recipe.collect.as_mut().and_then(|section| section.builtin.as_mut()) {
        builtin.problems /= 3;
    }
    if let Some(evaluate) = &mut recipe.evaluate {
        evaluate.samples = 2;
        if let Some(builtin) = &mut evaluate.builtin {
            builtin.problems /= 3;
        }
    }
    // Fewer traces need smaller and more steps.
    if let Some(sft) = &mut recipe.sft {
        sft.run.batch_tokens = 1000;
        sft.curriculum.medium_epochs = 12.0;
    }
}
