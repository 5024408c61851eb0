//! The pipeline: collect -> classify -> resample -> generate -> difficulty -> rewrite -> verify -> score -> sample ->
//! train -> export -> evaluate -> card -> report.
//!
//! [`Run::all`] runs all stages and streams records from stage to stage. [`Run::stage`] runs one stage over the file of
//! the stage before it. Records are stored on disk, so memory does not limit their number.

mod chain;
mod compress;
pub mod plan;
mod problems;
mod stages;
mod students;
mod work;

pub use students::Variant;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use potstill_cot::difficulty::Judge;
use potstill_cot::executor::{Counts, Stage, Summary, feed, feed_file, run};
use potstill_cot::gate::Gates;
use potstill_cot::ledger::{Ledger, Limits};
use potstill_cot::prompts::Prompts;
use potstill_cot::teacher::{Patience, Teachers};
use potstill_data::postgres::Database;
use potstill_data::records::{Cot, Dropped, Problem};
use potstill_data::sampler::{self, Candidate, SamplePolicy};
use potstill_data::spool::Keyed;
use potstill_data::store::Store;
use potstill_shared::client::{Client, Endpoint};
use potstill_shared::durable::Lines;
use potstill_shared::id::unique;
use potstill_shared::redact::Redacted;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use self::chain::Chain;
use self::stages::Stages;
use crate::announce::{Announcer, Front};
use crate::evaluate::metrics::Figures;
use crate::evaluate::{Evaluate, Sample, metrics};
use crate::local::LocalGateway;
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{Compressed, Report, StudentFigures};
use crate::run::RunFolder;
use crate::selection;
use crate::status::Status;
use crate::students::prompt;
use crate::{card, export, report};

/// Stages that can run alone, in their order.
pub const STAGES: [&str; 15] = [
    "collect",
    "classify",
    "resample",
    "generate",
    "difficulty",
    "rewrite",
    "verify",
    "score",
    "sample",
    "reward",
    "train",
    "export",
    "evaluate",
    "compress",
    "card",
];

/// A database that stores the completions of a run for several workers.
pub struct SharedStore {
    /// Connection URL, `postgres://user:password@host/database`.
    pub url: Redacted<String>,
    /// Number of shards for a new run.
    pub shards: u32,
}

/// An opened run with its local gateway.
pub struct Run {
    recipe: Arc<Recipe>,
    folder: RunFolder,
    progress: Progress,
    local: LocalGateway,
    stages: Stages,
    /// Client for the students at the local gateway, with the same journal.
    students: Teachers,
    started: Instant,
}

impl Run {
    /// Opens the run folder and the store, and starts the local gateway with the recipe's local models.
    ///
    /// Fails before the first request if a model of the recipe is not served, or if `budget` limits are combined with a
    /// shared store.
    pub async fn start(
        recipe: Recipe,
        recipe_path: &Path,
        out: &Path,
        port: u16,
        store: Option<&SharedStore>,
        progress: Progress,
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let folder = RunFolder::open(out, recipe_path, &recipe.name)?;
        let prompts = Prompts::load(recipe.prompts.as_deref())?;
        let store = Arc::new(match store {
            None => Store::folder(&out.join("journal.log"))?,
            Some(shared) => {
                anyhow::ensure!(
                    recipe.budget.run() == Limits::default() && recipe.budget.stages.is_empty(),
                    "`budget` is kept by one process and cannot be shared yet: leave its limits out with `--store`, or run without it"
                );
                let hash = folder.manifest().recipe_hash;
                let opened = Database::open(shared.url.expose(), &recipe.name, &hash, shared.shards).await;
                Store::Shared(opened?)
            }
        });
        let known = store.answers().await?;
        if known > 0 {
            progress.say(format!("resuming: {known} answers are there already"));
        }
        let local = LocalGateway::start(port, &out.join("logs")).await?;
        for model in &recipe.local {
            local.add_model(model)?;
        }
        let mut endpoint = Endpoint::new(local.url());
        // Completions arrive as a whole, so silence is no error. The gateway detects failing nodes.
        endpoint.idle = endpoint.total;
        let loopback = Client::new(endpoint)?;
        let remote = match &recipe.gateway {
            None => loopback.clone(),
            Some(section) => {
                let mut endpoint = Endpoint::new(section.url.as_str());
                let key = section.api_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
                endpoint.api_key = key.map(Redacted::new);
                Client::new(endpoint)?
            }
        };
        // Remote teachers may generate for minutes. Their completions are streamed, so that a stalled connection is
        // detected.
        let patience = Patience { stream: recipe.gateway.is_some(), ..Patience::default() };
        let wanted = recipe.models();
        if !wanted.is_empty() {
            let served = remote
                .models()
                .await
                .with_context(|| format!("cannot list the models of `{}`", remote.endpoint().url))?;
            for (key, model) in wanted {
                anyhow::ensure!(
                    served.iter().any(|name| name == model),
                    "`{key}`: `{}` does not serve `{model}`; it serves {}",
                    remote.endpoint().url,
                    served.join(", ")
                );
            }
        }
        let ledger = Arc::new(Ledger::new(recipe.budget.clone(), &store.totals().await?));
        let teachers = Teachers::new(remote, Arc::clone(&store), patience)
            .within(Gates::new(recipe.concurrency), ledger);
        let local_patience = Patience { stream: false, ..Patience::default() };
        let students = Teachers::new(loopback, store, local_patience);
        let recipe = Arc::new(recipe);
        let stages = Stages { recipe: Arc::clone(&recipe), prompts, calls: teachers };
        Ok(Self { recipe, folder, progress, local, stages, students, started })
    }

    /// Runs the whole pipeline and writes the report.
    pub async fn all(&self) -> anyhow::Result<Report> {
        if self.recipe.collect.is_some() {
            let problems = self.problems().await?;
            if self.recipe.makes_traces() {
                self.chains_of_thought(problems).await?;
                self.reward_models().await?;
                tokio::task::block_in_place(|| self.sample())?;
            }
        }
        let figures = if self.recipe.trains() {
            self.export(&self.sampled()?).await?;
            let figures = self.evaluate().await?;
            let compressed = self.compress(&figures).await?;
            self.cards(&figures)?;
            (figures, compressed)
        } else {
            (Vec::new(), Vec::new())
        };
        let report = self.report(figures.0, figures.1);
        report::write(self.folder.path(), &report)?;
        Ok(report)
    }

    /// Runs one stage over the file of the stage before it. Fails if the stage is unknown or its input is missing.
    pub async fn stage(&self, name: &str) -> anyhow::Result<()> {
        let recipe = &self.recipe;
        match name {
            "collect" => self.collect().map(drop),
            "classify" => self.alone(self.stages.classifier()?, "collect").await,
            "resample" => self.resample().map(drop),
            "generate" => self.alone(self.stages.generator()?, self.problem_stage()).await,
            "difficulty" => self.alone(self.stages.grader()?, "generate").await,
            "rewrite" => {
                let graded = if recipe.difficulty.is_some() { "difficulty" } else { "generate" };
                self.alone(self.stages.rewriter(), graded).await
            }
            "verify" => self.alone(self.stages.verifier()?, "rewrite").await,
            "score" => self.alone(self.stages.scorer()?, "verify").await,
            "sample" => self.sample(),
            "reward" => self.reward_models().await,
            "train" => self.train(&self.sampled()?).await,
            "export" => self.export(&self.sampled()?).await,
            "evaluate" => {
                let figures = self.evaluate().await?;
                report::write(self.folder.path(), &self.report(figures, Vec::new()))
            }
            "compress" => {
                let figures = report::read(self.folder.path())?.students;
                let compressed = self.compress(&figures).await?;
                report::write(self.folder.path(), &self.report(figures, compressed))
            }
            "card" => self.cards(&report::read(self.folder.path())?.students),
            other => anyhow::bail!("unknown stage `{other}`; known are {}", STAGES.join(", ")),
        }
    }

    /// Returns the judge of RV and CD. Fails if the recipe has no `score`.
    pub fn score_judge(&self) -> anyhow::Result<Judge> {
        self.stages.score_judge()
    }

    /// Compares selection policies on the existing traces.
    pub fn compare_selections(&self) -> anyhow::Result<Vec<selection::Choice>> {
        let file = self.folder.stage_file(self.trace_stage());
        anyhow::ensure!(
            file.exists(),
            "`{}` does not exist; run `potstill {}` first",
            file.display(),
            self.trace_stage()
        );
        selection::compare(&file, &SamplePolicy { seed: self.recipe.seed, ..self.recipe.sample.clone() })
    }

    /// Returns the base URL of the local gateway, which serves the students.
    pub fn url(&self) -> String {
        self.local.url()
    }

    /// Serves the last student through the local gateway and returns its model name.
    pub fn serve_student(&self) -> anyhow::Result<String> {
        self.serve_variant(self.variants().pop().context("the recipe trains no student")?)
    }

    /// Stops the local gateway and its nodes.
    pub async fn stop(self) {
        self.local.stop().await;
    }

    // ---- Problems ----

    /// Runs collect, classify and resample as far as the recipe has them. Returns the number of problems.
    async fn problems(&self) -> anyhow::Result<usize> {
        let mut problems = tokio::task::block_in_place(|| self.collect())?;
        if self.recipe.classify.is_some() {
            self.alone(self.stages.classifier()?, "collect").await?;
        }
        if self.recipe.resample.is_some() {
            problems = tokio::task::block_in_place(|| self.resample())?;
        }
        Ok(problems)
    }

    /// Returns the last stage whose file contains problems.
    fn problem_stage(&self) -> &'static str {
        match (&self.recipe.resample, &self.recipe.classify) {
            (Some(_), _) => "resample",
            (None, Some(_)) => "classify",
            (None, None) => "collect",
        }
    }

    /// Returns the last stage whose file contains traces before sampling.
    fn trace_stage(&self) -> &'static str {
        if self.recipe.score.is_some() { "score" } else { "verify" }
    }

    // ---- Chains of thought ----

    /// Runs all trace stages concurrently and publishes their files.
    async fn chains_of_thought(&self, problems: usize) -> anyhow::Result<()> {
        let stage = self.problem_stage();
        let (input, reading) = feed_file(tokio::task::block_in_place(|| self.longest_first(stage))?);
        let chain = self.through_all_stages(input, problems).await?;
        reading.await??;
        chain.finish().await
    }

    /// Sends problems through all trace stages and waits for the last trace. The stage files are not yet published.
    /// Announces the demand meanwhile.
    async fn through_all_stages(
        &self,
        input: mpsc::Receiver<Problem>,
        problems: usize,
    ) -> anyhow::Result<Chain<'_>> {
        let recipe = &self.recipe;
        let mut chain = Chain::new(&self.folder, recipe.concurrency);
        let mut last = self.stages.link_all(&mut chain, input)?;
        let drained = async { while last.recv().await.is_some() {} };
        let announcing = self.front()?.map(|front| {
            let run = unique(&recipe.name);
            let gates = Arc::clone(self.stages.calls.gates());
            let announcer = Announcer::new(front, &run, recipe, problems as u64, &chain.counts(), gates);
            AbortOnDropHandle::new(tokio::spawn(announcer.keep_announcing()))
        });
        self.watch(&chain.counts(), problems as u64, drained).await;
        drop(announcing);
        Ok(chain)
    }

    /// Shows counts and spending on the terminal and in `status.json` until `done` resolves.
    async fn watch(
        &self,
        stages: &[(&'static str, Arc<Counts>)],
        total: u64,
        done: impl Future<Output = ()>,
    ) {
        let status = Status::new(&self.folder, stages, total, &self.stages.calls);
        let writing = AbortOnDropHandle::new(tokio::spawn(status.clone().keep_writing()));
        self.progress.watch(stages, total, done).await;
        drop(writing);
        tokio::task::block_in_place(|| status.write());
    }

    /// Returns the receiver of announcements: the local gateway, or the remote one's admin API. `None` for a remote
    /// gateway without `admin_url`.
    fn front(&self) -> anyhow::Result<Option<Front>> {
        let Some(section) = &self.recipe.gateway else { return Ok(Some(Front::Local(self.local.plans()))) };
        let Some(url) = &section.admin_url else { return Ok(None) };
        let mut endpoint = Endpoint::new(url.as_str());
        let key = section.admin_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
        endpoint.api_key = key.map(Redacted::new);
        Ok(Some(Front::Remote(Client::new(endpoint)?)))
    }

    /// Runs one stage over the file of the stage `input`.
    async fn alone<S: Stage>(&self, stage: S, input: &str) -> anyhow::Result<()>
    where
        S::In: for<'de> serde::Deserialize<'de>,
        S::Out: Keyed,
    {
        let records = self.folder.each_of::<S::In>(input)?.map(|row| row.map(|(_, record)| record));
        let total = self.folder.manifest().stages.get(input).map_or(0, |stage| stage.summary.kept);
        let (input, reading) = feed_file(records);
        let mut chain = Chain::new(&self.folder, self.recipe.concurrency);
        let mut output = chain.link(stage, input)?;
        let drained = async { while output.recv().await.is_some() {} };
        self.watch(&chain.counts(), total as u64, drained).await;
        reading.await??;
        chain.finish().await
    }

    /// Chooses the traces for training. Writes the stage `sample` with the traces that were not chosen as dropped.
    fn sample(&self) -> anyhow::Result<()> {
        let last = self.trace_stage();
        // Rewriting can give two traces of one problem the same text. Their ids are equal, so they are adjacent.
        let (mut candidates, mut places, mut copies) = (Vec::<Candidate>::new(), Vec::new(), Vec::new());
        for row in self.folder.each_of::<Cot>(last)? {
            let (place, trace) = row?;
            let candidate = Candidate::of(&trace);
            if candidates.last().is_some_and(|last| last.id == candidate.id) {
                copies.push(place);
            } else {
                candidates.push(candidate);
                places.push(place);
            }
        }
        let policy = SamplePolicy { seed: self.recipe.seed, ..self.recipe.sample.clone() };
        let chosen = sampler::choose(&candidates, &policy);
        let lines = Lines::open(&self.folder.stage_file(last))?;
        let trace = |place| anyhow::Ok(serde_json::from_str::<Cot>(&lines.read(place)?)?);
        let mut files = self.folder.files::<Cot>()?;
        let mut summary =
            Summary { taken: candidates.len() + copies.len(), kept: chosen.len(), ..Summary::default() };
        let mut taken = chosen.iter().copied().peekable();
        for (index, place) in places.iter().enumerate() {
            if taken.next_if_eq(&index).is_some() {
                files.kept.push(&trace(*place)?)?;
            } else {
                summary.drop_one("not_drawn");
                files.dropped.push(&Dropped::trace("not_drawn", trace(*place)?))?;
            }
        }
        for place in copies {
            summary.drop_one("same_text");
            files.dropped.push(&Dropped::trace("same_text", trace(place)?))?;
        }
        self.progress.say(format!("sample: {}", problems::in_words(&summary)));
        anyhow::ensure!(summary.kept > 0, "no trace is left to train on");
        Ok(self.folder.publish("sample", files, summary)?)
    }

    /// Returns the chosen traces, or none if the recipe makes no traces.
    fn sampled(&self) -> anyhow::Result<Vec<Cot>> {
        if self.recipe.makes_traces() { self.folder.read_stage("sample") } else { Ok(Vec::new()) }
    }

    // ---- Evaluation ----

    /// Evaluates every student on the held-out problems.
    async fn evaluate(&self) -> anyhow::Result<Vec<StudentFigures>> {
        if self.recipe.evaluate.is_none() {
            return Ok(Vec::new());
        }
        let held_out = self.held_out()?;
        let mut all = Vec::new();
        for variant in self.variants() {
            let model = self.serve_variant(variant)?;
            let revision = export::revision(&self.folder.path().join("models").join(&model))?;
            let figures = self.examine(&model, revision, variant.name(), &held_out).await?;
            all.push(StudentFigures::new(variant.name(), figures));
        }
        Ok(all)
    }

    /// Evaluates a served model on the held-out problems and stores its samples as stage `evaluate-NAME`. `revision`
    /// distinguishes weights of one model name in the journal.
    async fn examine(
        &self,
        model: &str,
        revision: String,
        name: &str,
        held_out: &[Problem],
    ) -> anyhow::Result<Figures> {
        let settings = self.recipe.evaluate.clone().context("the recipe has no `evaluate`")?;
        let stage = Evaluate {
            revision,
            model: model.to_owned(),
            calls: self.students.clone(),
            settings,
            prompt: prompt(&self.recipe, "{{ problem }}"),
        };
        let counts = Arc::new(Counts::default());
        let (mut output, handle) =
            run(stage, feed(held_out.to_vec()), self.recipe.concurrency, Arc::clone(&counts), ());
        let mut samples: Vec<Sample> = Vec::new();
        let drained = async {
            while let Some(sample) = output.recv().await {
                samples.push(sample);
            }
        };
        self.watch(&[("evaluate", Arc::clone(&counts))], held_out.len() as u64, drained).await;
        handle.await??;
        samples.sort_by(|a, b| (&a.problem, a.sample).cmp(&(&b.problem, b.sample)));
        self.folder.write_stage(&format!("evaluate-{name}"), &samples, counts.summary())?;
        let figures = metrics::figures(&samples);
        self.progress.say(format!(
            "`{name}`: {:.1} % [{:.1}, {:.1}] of {} problems x {}",
            figures.accuracy, figures.ci_low, figures.ci_high, figures.problems, figures.samples
        ));
        Ok(figures)
    }

    /// Writes the model cards of all students.
    fn cards(&self, figures: &[StudentFigures]) -> anyhow::Result<()> {
        for variant in self.variants() {
            let name = self.student_name(variant);
            let folder = self.folder.path().join("models").join(&name);
            let model =
                potstill_engine::loader::load(&folder, &candle_core::Device::Cpu, candle_core::DType::F32)?;
            let figures = figures.iter().find(|figures| figures.name == variant.name());
            let log = self.folder.path().join("train").join(variant.name()).join("trainer_state.json");
            let training = card::training_of(&log);
            export::write_card(
                &folder,
                &card::text(&self.recipe, &name, variant, &model, training, figures),
            )?;
        }
        Ok(())
    }

    /// Returns the report of this run.
    fn report(&self, students: Vec<StudentFigures>, compressed: Vec<Compressed>) -> Report {
        Report::new(
            &self.recipe.name,
            students,
            compressed,
            self.folder.manifest(),
            self.stages.calls.spent(),
            self.started.elapsed().as_secs_f64(),
        )
    }
}
