//! Converts EasyDistill 2.0 configurations: a YAML table with a backend and stages. Version 2 produces data and trains
//! no model, so the recipe has no student.

use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use super::{ConfigKeys, RecipeBuilder};

/// A stage: the key prefix of its settings, and its kind.
struct Stage {
    prefix: String,
    kind: String,
}

/// Converts a configuration with all its stages. Fails for jobs that are not about text.
pub(super) fn convert(
    job: &str,
    keys: &mut ConfigKeys,
    target: &mut RecipeBuilder,
    gateway: &str,
    folder: &Path,
) -> anyhow::Result<()> {
    let media = [
        "t2i",
        "ti2i",
        "t2v",
        "mm_",
        "omnithoughtv",
        "pe_rewrite",
        "prompt_optimize",
        "agent",
        "search_agent",
    ];
    anyhow::ensure!(
        !media.iter().any(|name| job.contains(name)),
        "`{job}` is not about chains of thought in text; only those are distilled here"
    );
    let model = convert_backend(keys, target, gateway)?;
    let stages = take_stages(job, keys);
    for stage in &stages {
        convert_stage(job, stage, &model, keys, target, folder)?;
    }
    let key = keys.take_as("dataset.problem_key", "collect.sources.problem");
    let path = ["dataset.input_path", "dataset.instruction_path", "dataset.seed_path"]
        .iter()
        .find_map(|name| keys.take_as(name, "collect.sources"))
        .and_then(|path| path.as_str().map(str::to_owned))
        .context("has no `dataset.input_path`")?;
    let problem = key.as_ref().and_then(Value::as_str);
    let answer = keys.take_as("dataset.answer_key", "collect.sources.answer");
    let mut fields: Vec<(&str, toml::Value)> = vec![("problem", problem.unwrap_or("problem").into())];
    if let Some(answer) = answer.as_ref().and_then(Value::as_str) {
        fields.push(("answer", answer.into()));
    }
    target.set_source(&path, &fields);
    convert_workers(keys, target);
    for (from, to) in [
        ("dataset.output_path", "the run folder (`potstill run --out`), then `potstill dataset`"),
        ("dataset.output_format", "`potstill dataset --format`"),
    ] {
        keys.take_as(from, to);
    }
    if keys
        .take_as("sft.max_length", "nothing: over-long rows are dropped in training, and counted")
        .is_some()
    {
        target.add_note("`sft.max_length` counts letters there; here `sft.run.max_length` of a recipe with a student counts tokens");
    }
    Ok(())
}

/// Sets URL and API key of the gateway and returns the model name.
fn convert_backend(
    keys: &mut ConfigKeys,
    target: &mut RecipeBuilder,
    gateway: &str,
) -> anyhow::Result<String> {
    keys.take_as("backend.type", "the endpoint: any that speaks the OpenAI API");
    let url =
        ["backend.base_url", "backend.endpoint_url"].iter().find_map(|key| keys.take_as(key, "gateway.url"));
    let mut url = url.as_ref().and_then(Value::as_str).unwrap_or(gateway).to_owned();
    if url.contains("${") {
        target.add_note(format!("the address is `{url}` there; `gateway.url` has to name it"));
        url = gateway.to_owned();
    }
    target.set("gateway.url", url.trim_end_matches('/'));
    for key in ["backend.api_key", "backend.token"] {
        if let Some(variable) = keys.take_api_key_env(key)? {
            target.set("gateway.api_key_env", variable);
        }
    }
    let model = keys.take_as("backend.model_id", "the models of all stages");
    Ok(model.and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_else(|| {
        target.add_note("no `backend.model_id`: set the models of the stages");
        "TEACHER".to_owned()
    }))
}

/// Returns the stages of a pipeline. Without a pipeline, the job itself is the only stage.
fn take_stages(job: &str, keys: &mut ConfigKeys) -> Vec<Stage> {
    let mut stages = Vec::new();
    while let Some(kind) = keys.take_string(&format!("pipeline[{}].stage", stages.len())) {
        let at = stages.len();
        keys.mapped.push((format!("pipeline[{at}].stage"), format!("`{kind}`")));
        keys.take_as(&format!("pipeline[{at}].output_path"), "the stage files of the run");
        stages.push(Stage { prefix: format!("pipeline[{at}].config"), kind });
    }
    if stages.is_empty() {
        stages.push(Stage { prefix: "cot".to_owned(), kind: job.to_owned() });
    }
    stages
}

/// Returns a setting of the stage, or else of the general `sections`.
fn take_setting(
    keys: &mut ConfigKeys,
    stage: &Stage,
    sections: &[&str],
    name: &str,
    to: &str,
) -> Option<Value> {
    let own = keys.take_as(&format!("{}.{name}", stage.prefix), to);
    for section in sections {
        let general = keys.take_as(&format!("{section}.{name}"), to);
        if own.is_none() && general.is_some() {
            return general;
        }
    }
    own
}

/// Converts one stage. Fails for kinds without an equivalent.
fn convert_stage(
    job: &str,
    stage: &Stage,
    model: &str,
    keys: &mut ConfigKeys,
    target: &mut RecipeBuilder,
    folder: &Path,
) -> anyhow::Result<()> {
    match stage.kind.as_str() {
        "cot_distill" | "instruct_distill" | "instruction_response" => {
            let sections = ["cot", "generation"];
            let mut teacher = toml::Table::from_iter([("model".to_owned(), model.into())]);
            if let Some(value) =
                take_setting(keys, stage, &sections, "temperature", "generate.teachers.temperatures")
            {
                teacher.insert("temperatures".to_owned(), vec![value.as_f64().unwrap_or(0.7)].into());
            }
            if let Some(value) =
                take_setting(keys, stage, &sections, "max_tokens", "generate.teachers.max_tokens")
            {
                teacher.insert("max_tokens".to_owned(), value.as_i64().unwrap_or(2048).into());
            }
            if stage.kind != "cot_distill" {
                teacher.insert("thinking".to_owned(), "whole".into());
            }
            target.set_teachers(vec![teacher]);
            convert_prompt(stage, keys, target, folder)?;
        }
        "cot_rvcd_score" | "cot_eval" => {
            target.set("score.model", model);
            if let Some(value) = take_setting(keys, stage, &["eval"], "max_tokens", "score.max_tokens") {
                target.set_json("score.max_tokens", &value);
            }
            keys.take_as(
                "eval.metrics",
                "score (RV and CD); right or wrong is decided by `verify`, rules first",
            );
            target.set("verify.model", model);
            take_setting(keys, stage, &["eval"], "temperature", "0, always");
            if keys.take_as("eval.prompts_file", "prompts/rv.jinja and prompts/cd.jinja, built in").is_some()
            {
                target.add_note("the prompts for RV and CD are the built-in ones; put your own into prompts/rv.jinja and prompts/cd.jinja");
            }
        }
        "cot_mix_by_rv_cd" => convert_selection(stage, keys, target),
        "cot_long2short" | "cot_short2long" => {
            target.set("difficulty.model", model);
            target.set("rewrite.model", model);
            target.add_note("a grader decides which traces are rewritten");
            if stage.kind == job {
                target.add_note("the rows need think tags in one field: name it with `trace` and set `traces = true` in `collect.sources`");
            }
        }
        "instruction_balance" => {
            target.set("classify.model", model);
            target.set("resample.cap", 4);
            let shares = format!("{}.target_distribution.", stage.prefix);
            let named: Vec<String> =
                keys.left.keys().filter(|key| key.starts_with(&shares)).cloned().collect();
            for key in named {
                if let Some(share) = keys.take_as(&key, "resample.shares").and_then(|share| share.as_f64()) {
                    let task = toml::Value::from(share);
                    let table = target.recipe["resample"].as_table_mut();
                    let table =
                        table.map(|table| table.entry("shares").or_insert_with(|| toml::Table::new().into()));
                    if let Some(toml::Value::Table(table)) = table {
                        table.insert(key[shares.len()..].to_owned(), task);
                    }
                }
            }
        }
        "build_sft" | "sft" => {}
        "dpo_cot" | "dpo_instruct" | "preference" => {
            target.add_note("pairs come out of the run: `potstill dataset RUN OUT --format dpo`");
        }
        other => anyhow::bail!(
            "stage `{other}` is not known here; cot_distill, instruct_distill, cot_rvcd_score, cot_mix_by_rv_cd, cot_long2short, \
             cot_short2long, instruction_balance, dpo_cot and build_sft are"
        ),
    }
    Ok(())
}

/// Converts the selection of traces by bins of CD.
fn convert_selection(stage: &Stage, keys: &mut ConfigKeys, target: &mut RecipeBuilder) {
    let key = |name: &str| format!("{}.{name}", stage.prefix);
    target.set("sample.selection", "bins");
    if let Some(Value::Array(edges)) = keys.take_as(&key("cd_bins"), "sample.bins") {
        // The outer edges are the ends of the scale.
        let inner: Vec<i64> =
            edges.iter().filter_map(Value::as_i64).filter(|edge| (1..=9).contains(edge)).collect();
        target.set("sample.bins", inner);
    }
    if let Some(value) = keys.take_as(&key("samples_per_bin"), "sample.per_bin") {
        target.set_json("sample.per_bin", &value);
    }
    match keys.take_as(&key("rv_target"), "sample.rv_target").as_ref().and_then(Value::as_str) {
        None => {}
        Some("low") => target.set("sample.rv_target", "low"),
        Some("med" | "medium") => target.set("sample.rv_target", "medium"),
        Some("high") => target.set("sample.rv_target", "high"),
        Some("matched") => {
            target.set("sample.rv_target", "matched");
            target.add_note(
                "matched RV targets go from 2 to 8 here; there the last one is 10, outside the scale",
            );
        }
        Some(other) => target
            .add_note(format!("`rv_target: {other}` is not known; `sample.rv_target` is left at matched")),
    }
    keys.take_as(&key("min_correctness"), "verify: only right traces go on");
    keys.take_as(&key("mode"), "`potstill dataset --format`");
}

/// Adds the prompt template for `generate`.
fn convert_prompt(
    stage: &Stage,
    keys: &mut ConfigKeys,
    target: &mut RecipeBuilder,
    folder: &Path,
) -> anyhow::Result<()> {
    let to = "prompts/generate.jinja";
    let text = |value: Option<Value>| value.and_then(|value| value.as_str().map(str::to_owned));
    let system = text(take_setting(keys, stage, &["cot", "generation"], "system_prompt", to));
    let mut template = text(take_setting(keys, stage, &["cot"], "prompt_template", to));
    if let Some(file) = text(take_setting(keys, stage, &["cot"], "prompt_template_file", to)) {
        // EasyDistill resolves these paths from its working directory, often the folder above `configs`.
        let places = folder.ancestors().map(|above| above.join(&file));
        match places.clone().find(|path| path.exists()) {
            Some(path) => {
                template =
                    Some(std::fs::read_to_string(&path).with_context(|| format!("`{}`", path.display()))?)
            }
            None => target.add_note(format!("`{file}` is not here; the built-in prompt asks instead")),
        }
    }
    if system.is_some() || template.is_some() {
        target.add_prompt("generate.jinja", &[system, template]);
    }
    Ok(())
}

/// Sets `concurrency` to the largest worker count of all stages.
fn convert_workers(keys: &mut ConfigKeys, target: &mut RecipeBuilder) {
    let named: Vec<String> = keys.left.keys().filter(|key| key.ends_with("max_workers")).cloned().collect();
    let most = named.iter().filter_map(|key| keys.take_as(key, "concurrency")?.as_i64()).max();
    if let Some(most) = most {
        target.set("concurrency", most.clamp(1, 4096));
    }
}
