//! A recipe: one TOML file that describes a whole run. All checks happen before the first paid request. Errors are
//! reported together, each with file, key and expected value. Paths are relative to the recipe's folder.

use std::path::{Path, PathBuf};

use potstill_cot::ledger::Budget;
use potstill_data::hub;
use potstill_data::sampler::SamplingConfig;
use potstill_data::tasks::TASKS;
use potstill_learn::run::RunConfig;
use serde::Serialize;

mod section_reader;
mod sections;

use self::section_reader::SectionReader;
pub use sections::*;

use crate::stage_id::StageId;

/// A checked recipe.
#[derive(Debug, Clone, Serialize)]
pub struct Recipe {
    /// Name of the run.
    pub name: String,
    /// Seed of all random choices.
    pub seed: u64,
    /// Maximum number of open requests per model, and of records that a stage processes at the same time.
    pub concurrency: usize,
    /// Limits on spending, and prices.
    pub budget: Budget,
    /// Gateway with the teachers; without it a local gateway is started.
    pub gateway: Option<GatewaySection>,
    /// Models that the local gateway serves.
    pub local: Vec<LocalModel>,
    /// Folder with prompt templates that replace the built-in ones.
    pub prompts: Option<PathBuf>,
    /// Sources of problems.
    pub collect: Option<CollectSection>,
    /// Model that classifies problems into tasks.
    pub classify: Option<JudgeSection>,
    /// Shares of the tasks for resampling.
    pub resample: Option<ResampleSection>,
    /// Teachers that generate chains of thought.
    pub generate: Option<GenerateSection>,
    /// Model that grades the difficulty of traces.
    pub difficulty: Option<JudgeSection>,
    /// Model that rewrites traces.
    pub rewrite: Option<RewriteSection>,
    /// Model that judges answers where rules cannot decide.
    pub verify: Option<JudgeSection>,
    /// Model that scores RV and CD.
    pub score: Option<JudgeSection>,
    /// Policy that selects traces for training.
    pub sample: SamplingConfig,
    /// The student: base model, name and prompt.
    pub student: StudentSection,
    /// Supervised fine-tuning; without it, later algorithms start from `student.base`.
    pub sft: Option<SftSection>,
    /// Reward models for RV and CD.
    pub reward: Option<RewardSection>,
    /// Logit distillation.
    pub kd: Option<KdSection>,
    /// Direct preference optimization.
    pub dpo: Option<DpoSection>,
    /// Reinforcement learning with GRPO.
    pub grpo: Option<GrpoSection>,
    /// Evaluation on held-out problems.
    pub evaluate: Option<EvaluateSection>,
    /// Quantized versions of the last student.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<QuantizeSection>,
}

/// Names of the stages whose requests cost money: those that call models, and the teacher calls of logit distillation.
fn paid_stages() -> Vec<&'static str> {
    let stages = StageId::ALL.into_iter().filter(|stage| stage.calls_models());
    stages.map(StageId::name).chain(["kd"]).collect()
}

/// All errors of a recipe.
#[derive(Debug, thiserror::Error)]
#[error("recipe `{path}` has {} problem(s):\n  {}", errors.len(), errors.join("\n  "))]
pub struct RecipeError {
    /// Path of the recipe.
    pub path: PathBuf,
    /// One message per error, with key and expected value.
    pub errors: Vec<String>,
}

impl Recipe {
    /// Reads and checks a recipe. Returns all errors together.
    pub fn load(path: &Path) -> Result<Self, RecipeError> {
        let refused = |problems| RecipeError { path: path.to_owned(), errors: problems };
        let text = std::fs::read_to_string(path).map_err(|error| refused(vec![error.to_string()]))?;
        let table = text.parse::<toml::Table>().map_err(|error| refused(vec![error.to_string()]))?;
        let mut sections = SectionReader { table, problems: Vec::new() };
        let s = &mut sections;
        let (name, student) = (s.required::<String>("name"), s.optional::<StudentSection>("student"));
        let (sft, reward, kd, dpo, grpo) = (
            s.optional("sft"),
            s.optional("reward"),
            s.optional("kd"),
            s.optional("dpo"),
            s.optional("grpo"),
        );
        let optional = (
            s.optional("seed").unwrap_or(0),
            s.optional("concurrency").unwrap_or(64),
            s.optional("budget").unwrap_or_default(),
            s.optional("gateway"),
            s.optional("local").unwrap_or_default(),
            s.optional("prompts"),
            s.optional("collect"),
            s.optional("classify"),
            s.optional("resample"),
            s.optional("generate"),
            s.optional("difficulty"),
            s.optional("rewrite"),
            s.optional("verify"),
            s.optional("score"),
        );
        let (sample, evaluate, compress) =
            (s.optional("sample").unwrap_or_default(), s.optional("evaluate"), s.optional("compress"));
        for key in s.table.keys() {
            s.problems.push(format!(
                "`{key}` is not known; known are name, seed, concurrency, budget, gateway, local, prompts, collect, classify, \
                 resample, generate, difficulty, rewrite, verify, score, sample, student, sft, reward, kd, dpo, grpo, evaluate, compress"
            ));
        }
        let Some(name) = name else { return Err(refused(sections.problems)) };
        // A recipe that only produces data needs no student.
        let student = student.unwrap_or_else(|| StudentSection::placeholder(&name));
        let (
            seed,
            concurrency,
            budget,
            gateway,
            local,
            prompts,
            collect,
            classify,
            resample,
            generate,
            difficulty,
            rewrite,
            verify,
            score,
        ) = optional;
        let mut recipe = Self {
            name,
            seed,
            concurrency,
            budget,
            gateway,
            local,
            prompts,
            collect,
            classify,
            resample,
            generate,
            difficulty,
            rewrite,
            verify,
            score,
            sample,
            student,
            sft,
            reward,
            kd,
            dpo,
            grpo,
            evaluate,
            compress,
        };
        recipe.resolve_paths(path.parent().unwrap_or(Path::new(".")));
        sections.problems.extend(recipe.validation_errors());
        if sections.problems.is_empty() { Ok(recipe) } else { Err(refused(sections.problems)) }
    }

    /// Resolves all local paths relative to the recipe's folder.
    fn resolve_paths(&mut self, folder: &Path) {
        let fix = |path: &mut PathBuf| *path = folder.join(&*path);
        self.prompts.iter_mut().for_each(fix);
        self.local.iter_mut().for_each(|model| fix(&mut model.path));
        self.student.base.iter_mut().for_each(fix);
        if let Some(conversations) = self.sft.iter_mut().find_map(|sft| sft.conversations.as_mut()) {
            conversations.path.iter_mut().for_each(fix);
        }
        self.reward.iter_mut().flat_map(|section| &mut section.base).for_each(fix);
        self.kd.iter_mut().flat_map(|section| &mut section.teacher).for_each(fix);
        self.dpo.iter_mut().flat_map(|section| &mut section.pairs).for_each(fix);
        self.grpo.iter_mut().flat_map(|section| section.rv.iter_mut().chain(&mut section.cd)).for_each(fix);
        let collected = self
            .collect
            .iter_mut()
            .flat_map(|section| section.sources.iter_mut().chain(&mut section.against));
        let tested = self.evaluate.iter_mut().flat_map(|section| &mut section.sources);
        let here = collected.chain(tested).filter(|source| !hub::is_hub_address(&source.path));
        here.for_each(|source| fix(&mut source.path));
    }

    /// Returns all errors that types do not rule out.
    fn validation_errors(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut need = |fine: bool, problem: String| {
            if !fine {
                problems.push(problem);
            }
        };
        let name_fits = |name: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            !name.is_empty() && name.len() <= 96 && name.chars().all(allowed) && !name.starts_with(['.', '-'])
        };
        need(
            name_fits(&self.name),
            format!("`name`: `{}` must be letters, digits, `.`, `_`, `-`, at most 96", self.name),
        );
        need(
            name_fits(&self.student.name),
            format!(
                "`student.name`: `{}` must be letters, digits, `.`, `_`, `-`, at most 96",
                self.student.name
            ),
        );
        need(
            (1..=4096).contains(&self.concurrency),
            format!("`concurrency` must be 1 to 4096, not {}", self.concurrency),
        );
        need(
            !self.trains_student() && self.student.init.is_none()
                || self.student.base.is_some() != self.student.init.is_some(),
            "`student` needs either `base` (a model to start from) or `init` (the shape of a fresh one)"
                .to_owned(),
        );
        need(
            self.student.prompt.contains("{{ problem }}"),
            "`student.prompt` must contain `{{ problem }}`".to_owned(),
        );
        if let Some(init) = &self.student.init {
            need(
                init.heads > 0 && init.hidden_size.is_multiple_of(init.heads.max(1)),
                format!("`student.init`: {} heads must divide hidden_size {}", init.heads, init.hidden_size),
            );
        }
        let rates = [
            ("sft.learning_rate", self.sft.as_ref().map(|section| section.learning_rate)),
            ("reward.train.learning_rate", self.reward.as_ref().map(|section| section.train.learning_rate)),
            ("kd.train.learning_rate", self.kd.as_ref().map(|section| section.train.learning_rate)),
            ("dpo.train.learning_rate", self.dpo.as_ref().map(|section| section.train.learning_rate)),
            ("grpo.train.learning_rate", self.grpo.as_ref().map(|section| section.train.learning_rate)),
        ];
        for (key, rate) in rates.iter().filter_map(|(key, rate)| Some((key, (*rate)?))) {
            need(rate > 0.0 && rate < 1.0, format!("`{key}` must be above 0 and below 1, not {rate}"));
        }
        for (key, run) in self.training_settings() {
            need(
                run.batch_tokens > 0 && run.micro_batch_tokens > 0,
                format!("`{key}.batch_tokens` and `{key}.micro_batch_tokens` must be at least 1"),
            );
        }
        for (key, problem) in self.device_errors() {
            need(false, format!("`{key}`: {problem}"));
        }
        if let Some(section) = &self.compress {
            need(
                self.trains_student() && self.evaluate.is_some(),
                "`compress` makes smaller forms of a student and tests them on the problems of `evaluate`: it needs both"
                    .to_owned(),
            );
            need(!section.to.is_empty(), "`compress.to` is empty; it knows f16, q8_0 and q4_k_m".to_owned());
            need(
                section.limit >= 0.0,
                format!("`compress.limit` must be points of accuracy, 0 or more, not {}", section.limit),
            );
        }
        if let Some(section) = &self.kd {
            need(
                section.teacher.is_some() != section.model.is_some(),
                "`kd` needs either `teacher` (a model folder) or `model` (a name behind the gateway)"
                    .to_owned(),
            );
            need(section.train.top_k > 0, "`kd.train.top_k` must be at least 1".to_owned());
        }
        if let Some(section) = &self.grpo {
            for problem in section.train.validation_errors() {
                need(false, format!("`grpo.train`: {problem}"));
            }
        }
        let own_traces = self.sft.as_ref().is_some_and(|sft| sft.conversations.is_none());
        if self.generate.is_some() || own_traces {
            need(self.collect.is_some(), "`collect` is missing: where do the problems come from?".to_owned());
            need(
                self.makes_traces(),
                "`generate` is missing: who writes the chains of thought? (`sft.conversations` and sources with `traces` need none)"
                    .to_owned(),
            );
        }
        need(
            self.trains_student() || self.collect.is_some(),
            "nothing to do: give `generate` to make data, or `sft`, `kd`, `dpo` or `grpo` to train"
                .to_owned(),
        );
        need(
            self.trains_student() || self.evaluate.as_ref().is_none_or(|section| section.compare.is_empty()),
            "`evaluate.compare` compares students, and the recipe trains none".to_owned(),
        );
        need(
            self.grpo.is_none() || self.collect.is_some(),
            "`grpo` practises on the problems of `collect`, which is missing".to_owned(),
        );
        need(
            self.resample.is_none() || self.classify.is_some(),
            "`resample` needs to know the tasks of the problems: `classify` is missing".to_owned(),
        );
        if let Some(section) = &self.resample {
            need(section.cap > 0, "`resample.cap` must be at least 1".to_owned());
            for (task, share) in section.shares.iter().flatten() {
                need(
                    TASKS.iter().any(|(name, _)| name == task) && *share >= 0.0,
                    format!(
                        "`resample.shares.{task}`: expected one of the 32 tasks, with a share of at least 0"
                    ),
                );
            }
        }
        for stage in self.budget.stages.keys() {
            need(
                paid_stages().contains(&stage.as_str()),
                format!("`budget.stages.{stage}`: stages that ask are {}", paid_stages().join(", ")),
            );
        }
        for (model, price) in &self.budget.prices {
            need(
                price.prompt >= 0.0 && price.completion >= 0.0,
                format!("`budget.prices.{model}`: prices are per million tokens and not below 0"),
            );
        }
        let (least, most) = self.sample.cd_window();
        need(
            least <= most && most <= 9 && self.sample.rv_min <= self.sample.rv_max && self.sample.rv_max <= 9,
            "`sample`: RV and CD go from 0 to 9, the lower limit first".to_owned(),
        );
        need(
            self.sample.bins.is_sorted() && self.sample.bins.iter().all(|edge| (1..=9).contains(edge)),
            "`sample.bins` are rising values of CD from 1 to 9".to_owned(),
        );
        need(self.sample.per_problem > 0, "`sample.per_problem` must be at least 1".to_owned());
        need(
            self.reward.is_none() || self.score.is_some(),
            "`reward` learns from the scores of `score`, which is missing".to_owned(),
        );
        for (key, missing) in [
            ("kd", self.kd.is_some()),
            ("dpo", self.dpo.as_ref().is_some_and(|section| section.pairs.is_none())),
        ] {
            need(
                !missing || self.makes_traces(),
                format!("`{key}` works on the traces of `generate`, which is missing"),
            );
        }
        if let Some(collect) = &self.collect {
            need(
                !collect.sources.is_empty() || collect.builtin.is_some(),
                "`collect` needs `sources` or `builtin`".to_owned(),
            );
            need(
                collect.near.is_none_or(|near| near > 0.0 && near <= 1.0),
                "`collect.near`: expected a share above 0 and at most 1".to_owned(),
            );
        }
        for (i, model) in self.local.iter().enumerate() {
            need(
                model.min <= model.max && model.max > 0 && model.slots > 0 && model.threads > 0,
                format!("`local[{i}]` needs min <= max, and max, slots and threads of at least 1"),
            );
        }
        let known: Vec<&str> = self.local.iter().map(|model| model.model.as_str()).collect();
        for (key, model) in self.models() {
            // The models of a remote gateway are checked at the start of a run, before the first request.
            need(
                self.gateway.is_some() || known.contains(&model),
                format!("`{key}`: no `local` model is called `{model}`, and no `gateway.url` is given"),
            );
        }
        if let Some(generate) = &self.generate {
            need(!generate.teachers.is_empty(), "`generate.teachers` is empty".to_owned());
            for (i, teacher) in generate.teachers.iter().enumerate() {
                let key = format!("generate.teachers[{i}]");
                need(
                    !teacher.temperatures.is_empty()
                        && teacher.temperatures.iter().all(|t| (0.0..=2.0).contains(t)),
                    format!("`{key}.temperatures` must hold values from 0 to 2"),
                );
                need(teacher.samples > 0, format!("`{key}.samples` must be at least 1"));
                need(
                    teacher.top_p > 0.0 && teacher.top_p <= 1.0,
                    format!("`{key}.top_p` must be above 0 and at most 1, not {}", teacher.top_p),
                );
            }
        }
        if let Some(gateway) = &self.gateway {
            need(
                gateway.url.starts_with("http://") && gateway.url.trim_end_matches('/').ends_with("/v1"),
                format!("`gateway.url` must look like `http://host:port/v1`, not `{}`", gateway.url),
            );
            if let Some(url) = &gateway.admin_url {
                need(
                    url.starts_with("http://") && url.trim_end_matches('/').ends_with("/admin"),
                    format!("`gateway.admin_url` must look like `http://host:port/admin`, not `{url}`"),
                );
            }
            if let Some(variable) = &gateway.api_key_env {
                need(
                    std::env::var(variable).is_ok(),
                    format!("`gateway.api_key_env`: environment variable `{variable}` is not set"),
                );
            }
        }
        if let Some(evaluate) = &self.evaluate {
            need(
                !evaluate.sources.is_empty() || evaluate.builtin.is_some(),
                "`evaluate` needs `sources` or `builtin`".to_owned(),
            );
            need((1..=1024).contains(&evaluate.samples), "`evaluate.samples` must be 1 to 1024".to_owned());
        }
        for (key, path) in self.local_paths() {
            need(path.exists(), format!("`{key}`: `{}` does not exist", path.display()));
        }
        problems
    }

    /// Returns whether the run has traces: generated by teachers or contained in sources.
    pub fn makes_traces(&self) -> bool {
        let given = self.collect.iter().flat_map(|section| &section.sources).any(|source| source.traces);
        self.generate.is_some() || given
    }

    /// Returns whether the run trains a student, rather than only producing data.
    pub fn trains_student(&self) -> bool {
        self.sft.is_some() || self.kd.is_some() || self.dpo.is_some() || self.grpo.is_some()
    }

    /// Returns the training settings of all algorithms, with their keys.
    fn training_settings(&self) -> impl Iterator<Item = (&'static str, &RunConfig)> {
        [
            ("sft.run", self.sft.as_ref().map(|section| &section.run)),
            ("reward.train.run", self.reward.as_ref().map(|section| &section.train.run)),
            ("kd.train.run", self.kd.as_ref().map(|section| &section.train.run)),
            ("dpo.train.run", self.dpo.as_ref().map(|section| &section.train.run)),
            ("grpo.train.run", self.grpo.as_ref().map(|section| &section.train.run)),
        ]
        .into_iter()
        .filter_map(|(key, run)| Some((key, run?)))
    }

    /// Returns every model that receives requests, with its key.
    pub fn models(&self) -> Vec<(String, &str)> {
        let mut models = Vec::new();
        for (i, teacher) in self.generate.iter().flat_map(|section| &section.teachers).enumerate() {
            models.push((format!("generate.teachers[{i}].model"), teacher.model.as_str()));
        }
        for (key, judge) in [
            ("classify", &self.classify),
            ("difficulty", &self.difficulty),
            ("verify", &self.verify),
            ("score", &self.score),
        ] {
            models.extend(judge.iter().map(|judge| (format!("{key}.model"), judge.model.as_str())));
        }
        models
            .extend(self.rewrite.iter().map(|section| ("rewrite.model".to_owned(), section.model.as_str())));
        let kd = self.kd.iter().flat_map(|section| &section.model);
        models.extend(kd.map(|model| ("kd.model".to_owned(), model.as_str())));
        models
    }

    /// Returns every local path that must exist, with its key.
    fn local_paths(&self) -> Vec<(String, &Path)> {
        let mut files: Vec<(String, &Path)> = Vec::new();
        files.extend(self.prompts.iter().map(|path| ("prompts".to_owned(), path.as_path())));
        files.extend(
            self.local.iter().enumerate().map(|(i, m)| (format!("local[{i}].path"), m.path.as_path())),
        );
        files.extend(self.student.base.iter().map(|path| ("student.base".to_owned(), path.as_path())));
        for (key, sources) in [
            ("collect.sources", self.collect.as_ref().map(|section| &section.sources)),
            ("collect.against", self.collect.as_ref().map(|section| &section.against)),
            ("evaluate.sources", self.evaluate.as_ref().map(|section| &section.sources)),
        ] {
            let sources = sources.into_iter().flatten().enumerate();
            files.extend(
                sources
                    .filter(|(_, source)| !hub::is_hub_address(&source.path))
                    .map(|(i, source)| (format!("{key}[{i}].path"), source.path.as_path())),
            );
        }
        let conversations = self.sft.iter().flat_map(|sft| &sft.conversations);
        let single = [
            ("sft.conversations.path", conversations.filter_map(|section| section.path.as_deref()).next()),
            ("reward.base", self.reward.as_ref().and_then(|section| section.base.as_deref())),
            ("kd.teacher", self.kd.as_ref().and_then(|section| section.teacher.as_deref())),
            ("dpo.pairs", self.dpo.as_ref().and_then(|section| section.pairs.as_deref())),
            ("grpo.rv", self.grpo.as_ref().and_then(|section| section.rv.as_deref())),
            ("grpo.cd", self.grpo.as_ref().and_then(|section| section.cd.as_deref())),
        ];
        files.extend(single.into_iter().filter_map(|(key, path)| Some((key.to_owned(), path?))));
        files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Recipe, RecipeError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        potstill_shared::durable::write_file(&path, text.as_bytes()).unwrap();
        Recipe::load(&path)
    }

    #[test]
    fn read_reports_all_errors_at_once() {
        let error = read(
            r#"
            name = "a b"
            colect = {}
            [gateway]
            url = "ftp://x"
            [collect]
            sources = [{ path = "missing.jsonl" }]
            [generate]
            teachers = [{ model = "r1", temperature = [0.6] }]
            [student]
            name = "s"
            [sft]
            learning_rate = 5
            [score]
            model = 3
            "#,
        )
        .unwrap_err();
        for part in [
            "`name`: `a b`",
            "`colect` is not known",
            "`gateway.url` must look like",
            "`collect.sources[0].path`",
            "`generate.teachers[0].temperature`: unknown field",
            "`student` needs either `base`",
            "`sft.learning_rate` must be",
            "`score.model`: invalid type",
        ] {
            assert!(error.errors.iter().any(|problem| problem.contains(part)), "{part} not in:\n{error}");
        }
    }

    #[test]
    fn shipped_recipes_have_no_errors_but_missing_user_files() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let checked = Recipe::load(&path);
                // Recipes for data and models of the user may lack files and environment variables, nothing else.
                let missing =
                    |problem: &String| problem.contains("does not exist") || problem.contains("is not set");
                if let Err(error) = checked {
                    assert!(error.errors.iter().all(missing), "{error}");
                }
                seen += 1;
            }
        }
        assert!(seen >= 2);
    }
}
