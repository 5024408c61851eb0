//! `potstill import easydistill`: converts a configuration of EasyDistill (1.x JSON, 2.0 YAML) to a recipe. The report
//! lists what became of every key. Plain-text API keys are rejected. Data and models are not converted.

mod first;
mod second;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use potstill_shared::durable::{create_folder, write_file};
use serde_json::Value;

/// Arguments of `potstill import`.
#[derive(clap::Args)]
pub struct ImportArguments {
    /// Toolkit that the configuration belongs to.
    #[arg(value_parser = ["easydistill"])]
    pub from: String,
    /// Configuration file: JSON of version 1 or YAML of version 2.
    pub config: PathBuf,
    /// Output folder for the recipe and its prompts.
    #[arg(long, default_value = "imported")]
    pub out: PathBuf,
    /// URL of the endpoint, if the configuration has none.
    #[arg(long, default_value = "http://127.0.0.1:8080/v1")]
    pub gateway: String,
}

/// Result of a conversion.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversion {
    /// Recipe as a TOML table.
    pub recipe: toml::Table,
    /// Prompt templates by file name.
    pub prompts: BTreeMap<&'static str, String>,
    /// Converted keys, each with its counterpart in the recipe.
    pub mapped: Vec<(String, String)>,
    /// Keys without a counterpart in a recipe.
    pub ignored: Vec<String>,
    /// Notes about differences, and decisions that the user has to make.
    pub notes: Vec<String>,
}

/// Reads and converts the configuration, writes the recipe and prompts, and returns a report.
pub fn import_config(arguments: &ImportArguments) -> anyhow::Result<String> {
    let path = &arguments.config;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let config = parse_config(&text).with_context(|| format!("`{}`", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let imported =
        convert(&config, &arguments.gateway, folder).with_context(|| format!("`{}`", path.display()))?;
    create_folder(&arguments.out)?;
    let recipe = arguments.out.join("recipe.toml");
    let mut head =
        format!("# From EasyDistill's `{}`.\n", path.file_name().unwrap_or_default().to_string_lossy());
    for note in &imported.notes {
        head.push_str(&format!("# {note}\n"));
    }
    write_file(&recipe, format!("{head}\n{}", toml::to_string_pretty(&imported.recipe)?).as_bytes())?;
    for (name, text) in &imported.prompts {
        create_folder(&arguments.out.join("prompts"))?;
        write_file(&arguments.out.join("prompts").join(name), text.as_bytes())?;
    }
    let mut report = format!("`{}`\n", recipe.display());
    for (from, to) in &imported.mapped {
        report.push_str(&format!("  {from:<38} -> {to}\n"));
    }
    for key in &imported.ignored {
        report.push_str(&format!("  {key:<38} ignored\n"));
    }
    for note in &imported.notes {
        report.push_str(&format!("note: {note}\n"));
    }
    match crate::recipe::Recipe::load(&recipe) {
        Ok(_) => report.push_str("the recipe is fine; run it with `potstill run`\n"),
        Err(error) => report.push_str(&format!("before it runs: {error}\n")),
    }
    Ok(report)
}

/// Parses a configuration. JSON is also valid YAML, but the JSON parser has better error messages.
fn parse_config(text: &str) -> anyhow::Result<Value> {
    if text.trim_start().starts_with('{') {
        return Ok(serde_json::from_str(text)?);
    }
    Ok(serde_saphyr::from_str(text)?)
}

/// Converts a configuration. `folder` contains it; relative paths start there.
pub fn convert(config: &Value, gateway: &str, folder: &Path) -> anyhow::Result<Conversion> {
    anyhow::ensure!(config.is_object(), "is no table of settings");
    let mut keys = ConfigKeys::new(config);
    let mut target = RecipeBuilder::default();
    let job = keys.take_string("job_type").context("has no `job_type`")?;
    // Only version 2 has a `backend`.
    if config.get("backend").is_some() {
        second::convert(&job, &mut keys, &mut target, gateway, folder)?;
    } else {
        first::convert(&job, &mut keys, &mut target, gateway)?;
    }
    keys.mapped.insert(0, ("job_type".to_owned(), format!("`{job}`: the sections of the recipe")));
    let name: String = job.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    target.set("name", name);
    Ok(Conversion {
        ignored: keys.unread_keys(),
        recipe: target.recipe,
        prompts: target.prompts,
        mapped: keys.mapped,
        notes: target.notes,
    })
}

/// Flattened keys of a configuration. Each is removed when read, so unsupported keys remain.
struct ConfigKeys {
    left: BTreeMap<String, Value>,
    mapped: Vec<(String, String)>,
}

impl ConfigKeys {
    /// Flattens a configuration.
    fn new(config: &Value) -> Self {
        let mut left = BTreeMap::new();
        flatten("", config, &mut left);
        Self { left, mapped: Vec::new() }
    }

    /// Removes a key and returns its value. A null counts as absent.
    fn remove(&mut self, key: &str) -> Option<Value> {
        self.left.remove(key).filter(|value| !value.is_null())
    }

    /// Removes a key, records its counterpart `to` in the recipe, and returns its value.
    fn take_as(&mut self, key: &str, to: &str) -> Option<Value> {
        let value = self.remove(key)?;
        self.mapped.push((key.to_owned(), to.to_owned()));
        Some(value)
    }

    /// Removes a key and returns its value, if it is a string.
    fn take_string(&mut self, key: &str) -> Option<String> {
        self.remove(key)?.as_str().map(str::to_owned)
    }

    /// Returns the keys that have not been read.
    fn unread_keys(&self) -> Vec<String> {
        self.left.keys().cloned().collect()
    }

    /// Removes an API key and returns the environment variable that holds it. A plain-text key is an error, because it
    /// would become readable in the recipe.
    fn take_api_key_env(&mut self, key: &str) -> anyhow::Result<Option<String>> {
        let Some(value) = self.take_string(key).filter(|value| !value.trim().is_empty()) else {
            return Ok(None);
        };
        let variable = value.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'));
        // Common placeholders for "no key needed".
        if variable.is_none() && matches!(value.to_lowercase().as_str(), "empty" | "none" | "null" | "-") {
            return Ok(None);
        }
        let variable = variable.with_context(|| {
            format!("`{key}` holds a key in the clear; write `${{NAME}}` there and put the key into the environment variable")
        })?;
        self.mapped.push((key.to_owned(), "gateway.api_key_env".to_owned()));
        Ok(Some(variable.to_owned()))
    }
}

/// Inserts all leaves of `value` into `into`, with keys such as `a.b` and `a[0].b`.
fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(&key, value, into);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (at, item) in items.iter().enumerate() {
                flatten(&format!("{prefix}[{at}]"), item, into);
            }
        }
        other => drop(into.insert(prefix.to_owned(), other.clone())),
    }
}

/// The recipe under construction.
#[derive(Default)]
struct RecipeBuilder {
    recipe: toml::Table,
    prompts: BTreeMap<&'static str, String>,
    notes: Vec<String>,
}

impl RecipeBuilder {
    /// Sets a key such as `sft.run.weight_decay`, and creates the tables above it.
    fn set(&mut self, key: &str, value: impl Into<toml::Value>) {
        let (path, last) = key.rsplit_once('.').unwrap_or(("", key));
        let mut table = &mut self.recipe;
        for part in path.split('.').filter(|part| !part.is_empty()) {
            let entry = table.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            match entry {
                toml::Value::Table(inner) => table = inner,
                _ => return,
            }
        }
        table.insert(last.to_owned(), value.into());
    }

    /// Sets a key to a JSON value, if TOML can represent it.
    fn set_json(&mut self, key: &str, value: &Value) {
        if let Ok(value) = toml::Value::try_from(value) {
            self.set(key, value);
        }
    }

    /// Adds a note to the report.
    fn add_note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Sets the source of problems. EasyDistill resolves relative paths from its working directory, which is unknown
    /// here, so a note is added.
    fn set_source(&mut self, path: &str, fields: &[(&str, toml::Value)]) {
        let mut source = toml::Table::new();
        source.insert("path".to_owned(), path.into());
        source.extend(fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        self.set("collect.sources", vec![toml::Value::Table(source)]);
        if !Path::new(path).is_absolute() {
            self.add_note(format!(
                "`collect.sources[0].path` is relative to the recipe's folder now: `{path}`"
            ));
        }
    }

    /// Sets the teachers of `generate`.
    fn set_teachers(&mut self, teachers: Vec<toml::Table>) {
        self.set("generate.teachers", teachers.into_iter().map(toml::Value::Table).collect::<Vec<_>>());
    }

    /// Adds a prompt template built from `parts` (such as system prompt and template) and the problem. Template markers
    /// in the parts are neutralized.
    fn add_prompt(&mut self, file: &'static str, parts: &[Option<String>]) {
        let mut text: String = parts
            .iter()
            .flatten()
            .filter(|part| !part.trim().is_empty())
            .map(|part| part.replace("{{", "{ {").replace("{%", "{ %").trim().to_owned())
            .collect::<Vec<_>>()
            .join("\n\n");
        if text.is_empty() {
            return;
        }
        let places = ["{problem}", "{instruction}", "{question}"];
        match places.iter().find(|place| text.contains(**place)) {
            Some(place) => text = text.replace(place, "{{ problem }}"),
            None => text.push_str("\n\n{{ problem }}"),
        }
        self.prompts.insert(file, format!("{text}\n"));
        self.set("prompts", "prompts");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn imported(config: &Value) -> anyhow::Result<Conversion> {
        convert(config, "http://127.0.0.1:8080/v1", Path::new("."))
    }

    #[test]
    fn converts_a_version_1_configuration() {
        let found = imported(&json!({
            "job_type": "cot_generation_api",
            "dataset": { "input_path": "/data/cot_question.json", "output_path": "cot.json" },
            "inference": {
                "base_url": "http://10.0.0.1:8000/v1", "api_key": "${TEACHER_KEY}", "stream": true, "prompt": "Think in steps.",
                "max_new_tokens": 1024, "temperature": 0.8, "enable_chunked_prefill": true,
            },
            "models": { "teacher": "deepseek-r1" },
        }))
        .unwrap();
        let recipe = &found.recipe;
        assert_eq!(recipe["gateway"]["url"].as_str(), Some("http://10.0.0.1:8000/v1"));
        assert_eq!(recipe["gateway"]["api_key_env"].as_str(), Some("TEACHER_KEY"));
        let teacher = &recipe["generate"]["teachers"][0];
        assert_eq!(teacher["model"].as_str(), Some("deepseek-r1"));
        assert_eq!(teacher["max_tokens"].as_integer(), Some(1024));
        assert_eq!(teacher["temperatures"][0].as_float(), Some(0.8));
        assert_eq!(found.prompts["generate.jinja"], "Think in steps.\n\n{{ problem }}\n");
        assert_eq!(found.ignored, ["inference.enable_chunked_prefill", "inference.stream"]);
        assert!(found.mapped.iter().any(|(from, _)| from == "dataset.output_path"));
    }

    #[test]
    fn white_box_distillation_keeps_its_hyperparameters() {
        let found = imported(&json!({
            "job_type": "kd_white_box",
            "dataset": { "instruction_path": "train.json", "labeled_path": "l.json", "logits_path": "g.json", "seed": 42 },
            "inference": { "temperature": 0.8, "max_new_tokens": 512, "top_logits_num": 10, "gpu_memory_utilization": 0.9 },
            "distillation": { "kd_ratio": 0.5, "max_seq_length": 512, "distillation_type": "reverse_kld" },
            "models": { "teacher": "teacher/Qwen2.5-7B-Instruct/", "student": "student/Qwen2.5-0.5B-Instruct/" },
            "training": {
                "output_dir": "./result/", "num_train_epochs": 3, "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 8, "save_steps": 1000, "logging_steps": 1, "learning_rate": 2e-5,
                "weight_decay": 0.05, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine",
            },
        }))
        .unwrap();
        let recipe = &found.recipe;
        assert_eq!(recipe["kd"]["train"]["divergence"].as_str(), Some("reverse_kl"));
        assert_eq!(recipe["kd"]["train"]["top_k"].as_integer(), Some(10));
        assert_eq!(recipe["kd"]["train"]["run"]["batch_tokens"].as_integer(), Some(2 * 8 * 512));
        assert_eq!(recipe["kd"]["teacher"].as_str(), Some("teacher/Qwen2.5-7B-Instruct/"));
        assert_eq!(recipe["student"]["base"].as_str(), Some("student/Qwen2.5-0.5B-Instruct/"));
        assert_eq!(recipe["seed"].as_integer(), Some(42));
        assert_eq!(
            found.ignored,
            [
                "dataset.labeled_path",
                "dataset.logits_path",
                "inference.gpu_memory_utilization",
                "training.logging_steps"
            ]
        );
    }

    #[test]
    fn converts_a_version_2_pipeline() {
        let text = "
job_type: advanced_cot_distill
backend:
  type: pai_token
  api_key: ${PAI_TOKEN_API_KEY}
  base_url: ${PAI_TOKEN_BASE_URL}
  model_id: kimi-k2.6
generation: { system_prompt: 'Think step by step.', temperature: 0.7, max_tokens: 2048 }
sft: { skip_empty: true, min_length: 10, max_length: 8192 }
eval: { metrics: [reasoning_verbosity, cognitive_difficulty], temperature: 0.0, max_tokens: 512, max_workers: 4 }
pipeline:
  - stage: cot_distill
    config: { temperature: 0.6, max_tokens: 4096, max_workers: 3 }
    output_path: outputs/1.jsonl
  - stage: cot_rvcd_score
    config: { max_workers: 4 }
  - stage: cot_mix_by_rv_cd
    config: { mode: sft, cd_bins: [0, 3, 6, 10], rv_target: matched, samples_per_bin: 100, min_correctness: 1 }
  - stage: build_sft
    config: {}
dataset: { input_path: examples/seed.jsonl, problem_key: problem, output_path: outputs/sft.jsonl }
";
        let found = imported(&parse_config(text).unwrap()).unwrap();
        let recipe = &found.recipe;
        assert_eq!(
            recipe["generate"]["teachers"][0]["temperatures"][0].as_float(),
            Some(0.6),
            "the stage wins"
        );
        assert_eq!(recipe["generate"]["teachers"][0]["max_tokens"].as_integer(), Some(4096));
        assert_eq!(recipe["score"]["model"].as_str(), Some("kimi-k2.6"));
        assert_eq!(recipe["sample"]["selection"].as_str(), Some("bins"));
        let bins: Vec<_> =
            recipe["sample"]["bins"].as_array().unwrap().iter().filter_map(|e| e.as_integer()).collect();
        assert_eq!(bins, [3, 6]);
        assert_eq!(recipe["sample"]["per_bin"].as_integer(), Some(100));
        assert_eq!(recipe["concurrency"].as_integer(), Some(4));
        assert!(found.notes.iter().any(|note| note.contains("PAI_TOKEN_BASE_URL")), "{:?}", found.notes);
        assert!(!recipe.contains_key("student"));
    }

    #[test]
    fn rejects_plain_text_keys_and_unsupported_jobs() {
        let clear = json!({ "job_type": "cot_generation_api", "inference": { "api_key": "sk-123" }, "models": {}, "dataset": {} });
        let said = format!("{:#}", imported(&clear).unwrap_err());
        assert!(
            said.contains("`inference.api_key`") && said.contains("in the clear") && !said.contains("sk-123"),
            "{said}"
        );
        for (job, word) in [("rl_reward_api", "score"), ("t2v_distill", "text"), ("something", "not known")] {
            let backend = if job.starts_with("t2v") { json!({}) } else { Value::Null };
            let mut config = json!({ "job_type": job, "backend": backend, "models": {}, "dataset": {} });
            config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
            let said = format!("{:#}", imported(&config).unwrap_err());
            assert!(said.contains(job) && said.contains(word), "{said}");
        }
        assert!(parse_config("{ \"job_type\": ").is_err() && parse_config("a: [1").is_err());
    }
}
