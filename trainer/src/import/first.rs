//! Converts EasyDistill 1.x configurations: one JSON table per job. Common parts of both versions are in [`super`].

use anyhow::Context;
use serde_json::Value;

use super::{Keys, Target};

/// Arguments of transformers' trainer with an equivalent in our training settings.
const TRAINING: [(&str, &str); 3] = [
    ("training.weight_decay", "run.weight_decay"),
    ("training.warmup_ratio", "run.warmup_ratio"),
    ("training.save_steps", "run.checkpoint_every"),
];

/// Converts a configuration by its job type. Fails for job types without an equivalent.
pub(super) fn map(job: &str, keys: &mut Keys, target: &mut Target, gateway: &str) -> anyhow::Result<()> {
    match job {
        "cot_generation_api" | "cot_generation_batch" => {
            generation(keys, target, gateway)?;
            problems(keys, target, "dataset.input_path")?;
        }
        "kd_black_box_api" | "kd_black_box_local" => {
            generation(keys, target, gateway)?;
            problems(keys, target, "dataset.instruction_path")?;
            student(keys, target)?;
            training(keys, target, "sft");
        }
        "kd_black_box_train_only" => {
            labelled(keys, target)?;
            student(keys, target)?;
            training(keys, target, "sft");
        }
        "kd_white_box" | "kd_white_box_train_only" => {
            let teacher = keys.map("models.teacher", "kd.teacher").context("has no `models.teacher`")?;
            match &teacher {
                Value::String(path) => target.set("kd.teacher", path.as_str()),
                _ => anyhow::bail!(
                    "`models.teacher`: distillation of distributions takes one teacher, not a list"
                ),
            }
            labelled_or_generated(job, keys, target)?;
            student(keys, target)?;
            distribution(keys, target)?;
            training(keys, target, "kd.train");
        }
        "rank_dpo_api" | "rank_dpo_local" => {
            generation(keys, target, gateway)?;
            problems(keys, target, "dataset.instruction_path")?;
            student(keys, target)?;
            target.note("the student's own wrong answers are rejected, the teacher's right ones chosen");
            target.set("dpo.samples", 4);
            training(keys, target, "dpo.train");
        }
        "rl_grpo" => {
            problems(keys, target, "dataset.instruction_path")?;
            student(keys, target)?;
            target.note("answers are checked by rules: the rows need the field `answer`; RV and CD reward models may be named in `grpo`");
            training(keys, target, "grpo.train");
        }
        "rl_reward_api" | "rl_reward_local" => anyhow::bail!(
            "`{job}` trains on answers that were asked to be good and bad; here reward models learn RV and CD from the scores of a \
             teacher: write a recipe with `score` and `reward`"
        ),
        "cot_long2short_api" | "cot_long2short_batch" | "cot_short2long_api" | "cot_short2long_batch" => {
            let teacher = teacher(keys)?;
            endpoint(keys, target, gateway)?;
            problems(keys, target, "dataset.input_path")?;
            set_in_source(target, "traces", true.into());
            target.set("difficulty.model", teacher.as_str());
            target.set("rewrite.model", teacher.as_str());
            target.teachers(vec![model(&teacher)]);
            let file = if job.contains("long2short") { "simplify.jinja" } else { "extend.jinja" };
            if keys.left.contains_key("inference.prompt") {
                target.note(format!("`inference.prompt` was written for every trace; ours are `{file}`, for those that a grader calls so"));
            }
            sampling(keys, target, "rewrite.temperature", "rewrite.max_tokens");
        }
        other => anyhow::bail!(
            "`{other}` is not known here; cot_generation, cot_long2short, cot_short2long, kd_black_box, kd_white_box, rank_dpo and \
             rl_grpo jobs of version 1 are, and jobs of version 2 (with a `backend`)"
        ),
    }
    if let Some(seed) = keys.map("dataset.seed", "seed") {
        target.set_json("seed", &seed);
    }
    keys.map("dataset.output_path", "the run folder (`potstill run --out`), then `potstill dataset`");
    keys.map("training.output_dir", "the run folder (`potstill run --out`)");
    Ok(())
}

/// Returns a table with the field `model`.
fn model(name: &str) -> toml::Table {
    toml::Table::from_iter([("model".to_owned(), name.into())])
}

/// Returns the name of the teacher.
fn teacher(keys: &mut Keys) -> anyhow::Result<String> {
    match keys.map("models.teacher", "generate.teachers, or the models of the stages") {
        Some(Value::String(name)) => Ok(name),
        _ => keys
            .map("inference.model", "generate.teachers, or the models of the stages")
            .and_then(|name| name.as_str().map(str::to_owned))
            .context("names no teacher: `models.teacher` is missing"),
    }
}

/// Sets URL and API key of the gateway.
fn endpoint(keys: &mut Keys, target: &mut Target, gateway: &str) -> anyhow::Result<()> {
    let url = keys.map("inference.base_url", "gateway.url");
    let url = url.as_ref().and_then(Value::as_str).filter(|url| !url.is_empty());
    target.set("gateway.url", url.unwrap_or(gateway).trim_end_matches('/'));
    if let Some(variable) = keys.secret("inference.api_key")? {
        target.set("gateway.api_key_env", variable);
    }
    Ok(())
}

/// Copies temperature and token limit to the given keys.
fn sampling(keys: &mut Keys, target: &mut Target, temperature: &str, max_tokens: &str) {
    for (from, to) in [("inference.temperature", temperature), ("inference.max_new_tokens", max_tokens)] {
        if let Some(value) = keys.map(from, to) {
            target.set_json(to, &value);
        }
    }
}

/// Sets gateway, teachers and the prompt template for `generate`.
fn generation(keys: &mut Keys, target: &mut Target, gateway: &str) -> anyhow::Result<()> {
    endpoint(keys, target, gateway)?;
    let names = match keys.map("models.teacher", "generate.teachers") {
        Some(Value::Array(names)) => {
            names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
        }
        Some(Value::String(name)) if !name.is_empty() => vec![name],
        _ => {
            target.note("`generate.teachers[0].model` is not named in the configuration: set it");
            vec!["TEACHER".to_owned()]
        }
    };
    let temperature = keys.map("inference.temperature", "generate.teachers.temperatures");
    let max_tokens = keys.map("inference.max_new_tokens", "generate.teachers.max_tokens");
    let teachers = names.iter().map(|name| {
        let mut table = model(name);
        if let Some(temperature) = temperature.as_ref().and_then(Value::as_f64) {
            table.insert("temperatures".to_owned(), vec![temperature].into());
        }
        if let Some(tokens) = max_tokens.as_ref().and_then(Value::as_i64) {
            table.insert("max_tokens".to_owned(), tokens.into());
        }
        table
    });
    target.teachers(teachers.collect());
    let mut part = |key: &str| {
        keys.map(key, "prompts/generate.jinja").and_then(|value| value.as_str().map(str::to_owned))
    };
    let parts = [part("inference.system_prompt"), part("inference.prompt")];
    target.prompt("generate.jinja", &parts);
    Ok(())
}

/// Sets the file under `key` as the source of problems.
fn problems(keys: &mut Keys, target: &mut Target, key: &str) -> anyhow::Result<()> {
    let path = keys.map(key, "collect.sources").and_then(|path| path.as_str().map(str::to_owned));
    target.source(&path.with_context(|| format!("has no `{key}`"))?, &[("format", "easydistill".into())]);
    Ok(())
}

/// Sets a field of the first source.
fn set_in_source(target: &mut Target, name: &str, value: toml::Value) {
    let source = target.recipe.get_mut("collect").and_then(|collect| collect.get_mut("sources")?.get_mut(0));
    if let Some(toml::Value::Table(source)) = source {
        source.insert(name.to_owned(), value);
    }
}

/// Sets a source whose rows already contain a teacher's completions.
fn labelled(keys: &mut Keys, target: &mut Target) -> anyhow::Result<()> {
    problems(keys, target, "dataset.labeled_path")?;
    set_in_source(target, "traces", true.into());
    target
        .note("rows with thinking apart from the answer (think tags) are learnt from; others are put aside");
    Ok(())
}

/// Sets a labeled source, or has the local teacher generate the traces.
fn labelled_or_generated(job: &str, keys: &mut Keys, target: &mut Target) -> anyhow::Result<()> {
    if job.ends_with("train_only") {
        return labelled(keys, target);
    }
    problems(keys, target, "dataset.instruction_path")?;
    // The teacher is a model folder, so a local node of this program generates the traces.
    let path = target.recipe["kd"]["teacher"].as_str().unwrap_or_default().to_owned();
    let mut node = model("teacher");
    node.insert("path".to_owned(), path.into());
    target.set("local", vec![toml::Value::Table(node)]);
    let mut teacher = model("teacher");
    if let Some(temperature) = keys.map("inference.temperature", "generate.teachers.temperatures") {
        teacher.insert("temperatures".to_owned(), vec![temperature.as_f64().unwrap_or(0.7)].into());
    }
    if let Some(tokens) = keys.map("inference.max_new_tokens", "generate.teachers.max_tokens") {
        teacher.insert("max_tokens".to_owned(), tokens.as_i64().unwrap_or(512).into());
    }
    teacher.insert("thinking".to_owned(), "whole".into());
    target.teachers(vec![teacher]);
    Ok(())
}

/// Sets the student's base model.
fn student(keys: &mut Keys, target: &mut Target) -> anyhow::Result<()> {
    let path = keys.map("models.student", "student.base").and_then(|path| path.as_str().map(str::to_owned));
    let path = path.context("has no `models.student`")?;
    target.set("student.name", "student");
    target.set("student.base", path);
    Ok(())
}

/// Copies the settings of logit distillation.
fn distribution(keys: &mut Keys, target: &mut Target) -> anyhow::Result<()> {
    for (from, to) in
        [("distillation.kd_ratio", "kd.train.ratio"), ("inference.top_logits_num", "kd.train.top_k")]
    {
        if let Some(value) = keys.map(from, to) {
            target.set_json(to, &value);
        }
    }
    let divergence = match keys.map("distillation.distillation_type", "kd.train.divergence") {
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
fn training(keys: &mut Keys, target: &mut Target, section: &str) {
    let rate = format!("{section}.learning_rate");
    match keys.map("training.learning_rate", &rate) {
        Some(value) => target.set_json(&rate, &value),
        None => target.set(&rate, 1e-5),
    }
    let epochs = match section {
        "sft" => "sft.curriculum.medium_epochs".to_owned(),
        "grpo.train" => String::new(),
        other => format!("{other}.epochs"),
    };
    if !epochs.is_empty()
        && let Some(value) = keys.map("training.num_train_epochs", &epochs).and_then(|value| value.as_f64())
    {
        target.set(&epochs, value);
    }
    for (from, to) in TRAINING {
        let to = format!("{section}.{to}");
        if let Some(value) = keys.map(from, &to) {
            target.set_json(&to, &value);
        }
    }
    let mut number = |key: &str, to: &str| keys.map(key, to).and_then(|value| value.as_i64());
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
        target.note(format!(
            "{rows} rows a step became {} tokens a step, at {length} tokens a row at most",
            rows * length
        ));
    }
    match keys.map("training.lr_scheduler_type", "the schedule, which is cosine with warm-up") {
        Some(kind) if kind != "cosine" => target.note(format!("the schedule is cosine here, not {kind}")),
        _ => {}
    }
}
