//! Converts EasyDistill 1.x configurations: one JSON table per job. Common parts of both versions are in [`super`].

use anyhow::Context;
use serde_json::Value;

use super::{ConfigKeys, RecipeBuilder};

/// Arguments of transformers' trainer with an equivalent in our training settings.
const TRAINING_KEYS: [(&str, &str); 3] = [
    ("training.weight_decay", "run.weight_decay"),
    ("training.warmup_ratio", "run.warmup_ratio"),
    ("training.save_steps", "run.checkpoint_every"),
];

/// Converts a configuration by its job type. Fails for job types without an equivalent.
pub(super) fn convert(
    job: &str,
    keys: &mut ConfigKeys,
    target: &mut RecipeBuilder,
    gateway: &str,
) -> anyhow::Result<()> {
    match job {
        "cot_generation_api" | "cot_generation_batch" => {
            convert_generation(keys, target, gateway)?;
            set_problem_source(keys, target, "dataset.input_path")?;
        }
        "kd_black_box_api" | "kd_black_box_local" => {
            convert_generation(keys, target, gateway)?;
            set_problem_source(keys, target, "dataset.instruction_path")?;
            set_student(keys, target)?;
            convert_training(keys, target, "sft");
        }
        "kd_black_box_train_only" => {
            set_labeled_source(keys, target)?;
            set_student(keys, target)?;
            convert_training(keys, target, "sft");
        }
        "kd_white_box" | "kd_white_box_train_only" => {
            let teacher = keys.take_as("models.teacher", "kd.teacher").context("has no `models.teacher`")?;
            match &teacher {
                Value::String(path) => target.set("kd.teacher", path.as_str()),
                _ => anyhow::bail!(
                    "`models.teacher`: distillation of distributions takes one teacher, not a list"
                ),
            }
            set_trace_source(job, keys, target)?;
            set_student(keys, target)?;
            convert_distillation(keys, target)?;
            convert_training(keys, target, "kd.train");
        }
        "rank_dpo_api" | "rank_dpo_local" => {
            convert_generation(keys, target, gateway)?;
            set_problem_source(keys, target, "dataset.instruction_path")?;
            set_student(keys, target)?;
            target.add_note("the student's own wrong answers are rejected, the teacher's right ones chosen");
            target.set("dpo.samples", 4);
            convert_training(keys, target, "dpo.train");
        }
        "rl_grpo" => {
            set_problem_source(keys, target, "dataset.instruction_path")?;
            set_student(keys, target)?;
            target.add_note("answers are checked by rules: the rows need the field `answer`; RV and CD reward models may be named in `grpo`");
            convert_training(keys, target, "grpo.train");
        }
        "rl_reward_api" | "rl_reward_local" => anyhow::bail!(
            "`{job}` trains on answers that were asked to be good and bad; here reward models learn RV and CD from the scores of a \
             teacher: write a recipe with `score` and `reward`"
        ),
        "cot_long2short_api" | "cot_long2short_batch" | "cot_short2long_api" | "cot_short2long_batch" => {
            let teacher = take_teacher(keys)?;
            set_endpoint(keys, target, gateway)?;
            set_problem_source(keys, target, "dataset.input_path")?;
            set_in_source(target, "traces", true.into());
            target.set("difficulty.model", teacher.as_str());
            target.set("rewrite.model", teacher.as_str());
            target.set_teachers(vec![model_table(&teacher)]);
            let file = if job.contains("long2short") { "simplify.jinja" } else { "extend.jinja" };
            if keys.left.contains_key("inference.prompt") {
                target.add_note(format!("`inference.prompt` was written for every trace; ours are `{file}`, for those that a grader calls so"));
            }
            copy_sampling(keys, target, "rewrite.temperature", "rewrite.max_tokens");
        }
        other => anyhow::bail!(
            "`{other}` is not known here; cot_generation, cot_long2short, cot_short2long, kd_black_box, kd_white_box, rank_dpo and \
             rl_grpo jobs of version 1 are, and jobs of version 2 (with a `backend`)"
        ),
    }
    if let Some(seed) = keys.take_as("dataset.seed", "seed") {
        target.set_json("seed", &seed);
    }
    keys.take_as("dataset.output_path", "the run folder (`potstill run --out`), then `potstill dataset`");
    keys.take_as("training.output_dir", "the run folder (`potstill run --out`)");
    Ok(())
}

/// Returns a table with the field `model`.
fn model_table(name: &str) -> toml::Table {
    toml::Table::from_iter([("model".to_owned(), name.into())])
}

/// Returns the name of the teacher.
fn take_teacher(keys: &mut ConfigKeys) -> anyhow::Result<String> {
    match keys.take_as("models.teacher", "generate.teachers, or the models of the stages") {
        Some(Value::String(name)) => Ok(name),
        _ => keys
            .take_as("inference.model", "generate.teachers, or the models of the stages")
            .and_then(|name| name.as_str().map(str::to_owned))
            .context("names no teacher: `models.teacher` is missing"),
    }
}

/// Sets URL and API key of the gateway.
fn set_endpoint(keys: &mut ConfigKeys, target: &mut RecipeBuilder, gateway: &str) -> anyhow::Result<()> {
    let url = keys.take_as("inference.base_url", "gateway.url");
    let url = url.as_ref().and_then(Value::as_str).filter(|url| !url.is_empty());
    target.set("gateway.url", url.unwrap_or(gateway).trim_end_matches('/'));
    if let Some(variable) = keys.take_api_key_env("inference.api_key")? {
        target.set("gateway.api_key_env", variable);
    }
    Ok(())
}

/// Copies temperature and token limit to the given keys.
fn copy_sampling(keys: &mut ConfigKeys, target: &mut RecipeBuilder, temperature: &str, max_tokens: &str) {
    for (from, to) in [("inference.temperature", temperature), ("inference.max_new_tokens", max_tokens)] {
        if let Some(value) = keys.take_as(from, to) {
            target.set_json(to, &value);
        }
    }
}

/// Sets gateway, teachers and the prompt template for `generate`.
fn convert_generation(
    keys: &mut ConfigKeys,
    target: &mut RecipeBuilder,
    gateway: &str,
) -> anyhow::Result<()> {
    set_endpoint(keys, target, gateway)?;
    let names = match keys.take_as("models.teacher", "generate.teachers") {
        Some(Value::Array(names)) => {
            names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
        }
        Some(Value::String(name)) if !name.is_empty() => vec![name],
        _ => {
            target.add_note("`generate.teachers[0].model` is not named in the configuration: set it");
            vec!["TEACHER".to_owned()]
        }
    };
    let temperature = keys.take_as("inference.temperature", "generate.teachers.temperatures");
    let max_tokens = keys.take_as("inference.max_new_tokens", "generate.teachers.max_tokens");
    let teachers = names.iter().map(|name| {
        let mut table = model_table(name);
        if let Some(temperature) = temperature.as_ref().and_then(Value::as_f64) {
            table.insert("temperatures".to_owned(), vec![temperature].into());
        }
        if let Some(tokens) = max_tokens.as_ref().and_then(Value::as_i64) {
            table.insert("max_tokens".to_owned(), tokens.into());
        }
        table
    });
    target.set_teachers(teachers.collect());
    let mut part = |key: &str| {
        keys.take_as(key, "prompts/generate.jinja").and_then(|value| value.as_str().map(str::to_owned))
    };
    let parts = [part("inference.system_prompt"), part("inference.prompt")];
    target.add_prompt("generate.jinja", &parts);
    Ok(())
}

/// Sets the file under `key` as the source of problems.
fn set_problem_source(keys: &mut ConfigKeys, target: &mut RecipeBuilder, key: &str) -> anyhow::Result<()> {
    let path = keys.take_as(key, "collect.sources").and_then(|path| path.as_str().map(str::to_owned));
    target.set_source(&path.with_context(|| format!("has no `{key}`"))?, &[("format", "easydistill".into())]);
    Ok(())
}

/// Sets a field of the first source.
fn set_in_source(target: &mut RecipeBuilder, name: &str, value: toml::Value) {
    let source = target.recipe.get_mut("collect").and_then(|collect| collect.get_mut("sources")?.get_mut(0));
    if let Some(toml::Value::Table(source)) = source {
        source.insert(name.to_owned(), value);
    }
}

/// Sets a source whose rows already contain a teacher's completions.
fn set_labeled_source(keys: &mut ConfigKeys, target: &mut RecipeBuilder) -> anyhow::Result<()> {
    set_problem_source(keys, target, "dataset.labeled_path")?;
    set_in_source(target, "traces", true.into());
    target.add_note(
        "rows with thinking apart from the answer (think tags) are learnt from; others are put aside",
    );
    Ok(())
}

/// Sets a labeled source, or has the local teacher generate the traces.
fn set_trace_source(job: &str, keys: &mut ConfigKeys, target: &mut RecipeBuilder) -> anyhow::Result<()> {
    if job.ends_with("train_only") {
        return set_labeled_source(keys, target);
    }
    set_problem_source(keys, target, "dataset.instruction_path")?;
    // The teacher is a model folder, so a local node of this program generates the traces.
    let path = target.recipe["kd"]["teacher"].as_str().unwrap_or_default().to_owned();
    let mut node = model_table("teacher");
    node.insert("path".to_owned(), path.into());
    target.set("local", vec![toml::Value::Table(node)]);
    let mut teacher = model_table("teacher");
    if let Some(temperature) = keys.take_as("inference.temperature", "generate.teachers.temperatures") {
        teacher.insert("temperatures".to_owned(), vec![temperature.as_f64().unwrap_or(0.7)].into());
    }
    if let Some(tokens) = keys.take_as("inference.max_new_tokens", "generate.teachers.max_tokens") {
        teacher.insert("max_tokens".to_owned(), tokens.as_i64().unwrap_or(512).into());
    }
    teacher.insert("thinking".to_owned(), "whole".into());
    target.set_teachers(vec![teacher]);
    Ok(())
}

/// Sets the student's base model.
fn set_student(keys: &mut ConfigKeys, target: &mut RecipeBuilder) -> anyhow::Result<()> {
    let path =
        keys.take_as("models.student", "student.base").and_then(|path| path.as_str().map(str::to_owned));
    let path = path.context("has no `models.student`")?;
    target.set("student.name", "student");
    target.set("student.base", path);
    Ok(())
}

/// Copies the settings of logit distillation.
fn convert_distillation(keys: &mut ConfigKeys, target: &mut RecipeBuilder) -> anyhow::Result<()> {
    for (from, to) in
        [("distillation.kd_ratio", "kd.train.ratio"), ("inference.top_logits_num", "kd.train.top_k")]
    {
        if let Some(value) = keys.take_as(from, to) {
            target.set_json(to, &value);
        }
    }
    let divergence = match keys.take_as("distillation.distillation_type", "kd.train.divergence") {
        None => return Ok(()),
        Some(kind) if kind == "forward_kld" => "forward_kl",
        Some(kind) if kind == "reverse_kld" => "reverse_kl",
        Some(other) => anyhow::bail!(
            "`distillation.distillation_type`: `{other}` is neither forward_kld nor reverse_kld"
        ),
    };
    target.set("kd.train.divergence", divergence);
    Ok(())
}

/// Copies the training settings to a section of the recipe. Rows per step become tokens per step.
fn convert_training(keys: &mut ConfigKeys, target: &mut RecipeBuilder, section: &str) {
    let rate = format!("{section}.learning_rate");
    match keys.take_as("training.learning_rate", &rate) {
        Some(value) => target.set_json(&rate, &value),
        None => target.set(&rate, 1e-5),
    }
    let epochs = match section {
        "sft" => "sft.curriculum.medium_epochs".to_owned(),
        "grpo.train" => String::new(),
        other => format!("{other}.epochs"),
    };
    if !epochs.is_empty()
        && let Some(value) =
            keys.take_as("training.num_train_epochs", &epochs).and_then(|value| value.as_f64())
    {
        target.set(&epochs, value);
    }
    for (from, to) in TRAINING_KEYS {
        let to = format!("{section}.{to}");
        if let Some(value) = keys.take_as(from, &to) {
            target.set_json(&to, &value);
        }
    }
    let mut number = |key: &str, to: &str| keys.take_as(key, to).and_then(|value| value.as_i64());
    let length = number("distillation.max_seq_length", &format!("{section}.run.max_length"))
        .or_else(|| number("training.max_length", &format!("{section}.run.max_length")));
    let (batch, tokens) = ("training.per_device_train_batch_size", format!("{section}.run.batch_tokens"));
    let rows = number(batch, &tokens)
        .map(|rows| rows * number("training.gradient_accumulation_steps", &tokens).unwrap_or(1));
    if let Some(length) = length {
        target.set(&format!("{section}.run.max_length"), length);
    }
    if let Some(rows) = rows {
        let length = length.unwrap_or(1024);
        target.set(&tokens, rows * length);
        target.add_note(format!(
            "{rows} rows a step became {} tokens a step, at {length} tokens a row at most",
            rows * length
        ));
    }
    match keys.take_as("training.lr_scheduler_type", "the schedule, which is cosine with warm-up") {
        Some(kind) if kind != "cosine" => target.add_note(format!("the schedule is cosine here, not {kind}")),
        _ => {}
    }
}
