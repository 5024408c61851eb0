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

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use potstill_cot::difficulty::Judge;
use potstill_cot::executor::{
    Stage, StageCounts, StageSummary, channel_from_iter, channel_from_records, spawn_stage,
};
use potstill_cot::gate::ConcurrencyLimits;
use potstill_cot::ledger::{BudgetLimits, Ledger};
use potstill_cot::prompts::PromptTemplates;
use potstill_cot::teacher::{RetryPolicy, TeacherClient};
use potstill_data::postgres::PostgresStore;
use potstill_data::records::{Dropped, Problem, Trace};
use potstill_data::sampler::{self, SamplingCandidate, SamplingConfig};
use potstill_data::spool::SortKey;
use potstill_data::store::Store;
use potstill_shared::client::{Client, Endpoint};
use potstill_shared::durable::LineReader;
use potstill_shared::id::unique_id;
use potstill_shared::redact::Secret;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use self::chain::Chain;
use self::stages::StageFactory;
use crate::announce::{Announcer, PlanReceiver};
use crate::evaluate::metrics::StudentMetrics;
use crate::evaluate::{EvaluateStage, StudentSample, metrics};
use crate::local::LocalGateway;
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{QuantizedResult, Report, StudentResult};
use crate::run::RunFolder;
use crate::selection;
use crate::stage_id::StageId;
use crate::status::StatusWriter;
use crate::students::student_prompt;
use crate::{card, export, report};

/// A database that stores the completions of a run for several workers.
pub struct SharedStore {
    /// Connection URL, `postgres://user:password@host/database`.
    pub url: Secret<String>,
    /// Number of shards for a new run.
    pub shards: u32,
}

/// An opened run with its local gateway.
pub struct Run {
    recipe: Arc<Recipe>,
    folder: RunFolder,
    progress: Progress,
    local_gateway: LocalGateway,
    stages: StageFactory,
    /// Client for the students at the local gateway, with the same journal.
    student_client: TeacherClient,
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
        let prompts = PromptTemplates::load(recipe.prompts.as_deref())?;
        let store = Arc::new(match store {
            None => Store::open_journal(&out.join("journal.log"))?,
            Some(shared) => {
                anyhow::ensure!(
                    recipe.budget.run_limits() == BudgetLimits::default() && recipe.budget.stages.is_empty(),
                    "`budget` is kept by one process and cannot be shared yet: leave its limits out with `--store`, or run without it"
                );
                let hash = folder.manifest().recipe_hash;
                let opened =
                    PostgresStore::open(shared.url.expose_secret(), &recipe.name, &hash, shared.shards).await;
                Store::Postgres(opened?)
            }
        });
        let known = store.completion_count().await?;
        if known > 0 {
            progress.message(format!("resuming: {known} answers are there already"));
        }
        let local = LocalGateway::start(port, &out.join("logs")).await?;
        for model in &recipe.local {
            local.add_model(model)?;
        }
        let mut endpoint = Endpoint::new(local.url());
        // Completions arrive as a whole, so silence is no error. The gateway detects failing nodes.
        endpoint.idle_timeout = endpoint.total_timeout;
        let loopback = Client::new(endpoint)?;
        let remote = match &recipe.gateway {
            None => loopback.clone(),
            Some(section) => {
                let mut endpoint = Endpoint::new(section.url.as_str());
                let key = section.api_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
                endpoint.api_key = key.map(Secret::new);
                Client::new(endpoint)?
            }
        };
        // Remote teachers may generate for minutes. Their completions are streamed, so that a stalled connection is
        // detected.
        let patience = RetryPolicy { stream: recipe.gateway.is_some(), ..RetryPolicy::default() };
        let wanted = recipe.models();
        if !wanted.is_empty() {
            let served = remote
                .list_models()
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
        let teachers = TeacherClient::new(remote, Arc::clone(&store), patience)
            .with_limits(ConcurrencyLimits::new(recipe.concurrency), ledger);
        let local_patience = RetryPolicy { stream: false, ..RetryPolicy::default() };
        let students = TeacherClient::new(loopback, store, local_patience);
        let recipe = Arc::new(recipe);
        let stages = StageFactory { recipe: Arc::clone(&recipe), prompts, calls: teachers };
        Ok(Self { recipe, folder, progress, local_gateway: local, stages, student_client: students, started })
    }

    /// Runs the whole pipeline and writes the report.
    pub async fn run_all(&self) -> anyhow::Result<Report> {
        if self.recipe.collect.is_some() {
            let problems = self.prepare_problems().await?;
            if self.recipe.makes_traces() {
                self.make_traces(problems).await?;
                self.train_reward_models().await?;
                tokio::task::block_in_place(|| self.select_traces())?;
            }
        }
        let figures = if self.recipe.trains_student() {
            self.export_students(&self.selected_traces()?).await?;
            let figures = self.evaluate_students().await?;
            let compressed = self.quantize_student(&figures).await?;
            self.write_cards(&figures)?;
            (figures, compressed)
        } else {
            (Vec::new(), Vec::new())
        };
        let report = self.build_report(figures.0, figures.1);
        report::write_report(self.folder.path(), &report)?;
        Ok(report)
    }

    /// Runs one stage over the file of the stage before it. Fails if its input is missing.
    pub async fn run_stage(&self, stage: StageId) -> anyhow::Result<()> {
        let recipe = &self.recipe;
        match stage {
            StageId::Collect => self.collect().map(drop),
            StageId::Classify => {
                self.run_single_stage(self.stages.classifier()?, StageId::Collect.name()).await
            }
            StageId::Resample => self.resample().map(drop),
            StageId::Generate => self.run_single_stage(self.stages.generator()?, self.problem_stage()).await,
            StageId::Difficulty => {
                self.run_single_stage(self.stages.grader()?, StageId::Generate.name()).await
            }
            StageId::Rewrite => {
                let graded =
                    if recipe.difficulty.is_some() { StageId::Difficulty } else { StageId::Generate };
                self.run_single_stage(self.stages.rewriter(), graded.name()).await
            }
            StageId::Verify => self.run_single_stage(self.stages.verifier()?, StageId::Rewrite.name()).await,
            StageId::Score => self.run_single_stage(self.stages.scorer()?, StageId::Verify.name()).await,
            StageId::Sample => self.select_traces(),
            StageId::Reward => self.train_reward_models().await,
            StageId::Train => self.train_students(&self.selected_traces()?).await,
            StageId::Export => self.export_students(&self.selected_traces()?).await,
            StageId::Evaluate => {
                let figures = self.evaluate_students().await?;
                report::write_report(self.folder.path(), &self.build_report(figures, Vec::new()))
            }
            StageId::Quantize => {
                let figures = report::read_report(self.folder.path())?.students;
                let compressed = self.quantize_student(&figures).await?;
                report::write_report(self.folder.path(), &self.build_report(figures, compressed))
            }
            StageId::Card => self.write_cards(&report::read_report(self.folder.path())?.students),
        }
    }

    /// Returns the judge of RV and CD. Fails if the recipe has no `score`.
    pub fn score_judge(&self) -> anyhow::Result<Judge> {
        self.stages.score_judge()
    }

    /// Compares selection policies on the existing traces.
    pub fn compare_selections(&self) -> anyhow::Result<Vec<selection::SelectionStats>> {
        let file = self.folder.stage_file(self.trace_stage());
        anyhow::ensure!(
            file.exists(),
            "`{}` does not exist; run `potstill {}` first",
            file.display(),
            self.trace_stage()
        );
        selection::compare_policies(
            &file,
            &SamplingConfig { seed: self.recipe.seed, ..self.recipe.sample.clone() },
        )
    }

    /// Returns the base URL of the local gateway, which serves the students.
    pub fn url(&self) -> String {
        self.local_gateway.url()
    }

    /// Serves the last student through the local gateway and returns its model name.
    pub fn serve_student(&self) -> anyhow::Result<String> {
        self.serve_variant(self.variants().pop().context("the recipe trains no student")?)
    }

    /// Stops the local gateway and its nodes.
    pub async fn stop(self) {
        self.local_gateway.stop().await;
    }

    // ---- Problems ----

    /// Runs collect, classify and resample as far as the recipe has them. Returns the number of problems.
    async fn prepare_problems(&self) -> anyhow::Result<usize> {
        let mut problems = tokio::task::block_in_place(|| self.collect())?;
        if self.recipe.classify.is_some() {
            self.run_single_stage(self.stages.classifier()?, "collect").await?;
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
    async fn make_traces(&self, problems: usize) -> anyhow::Result<()> {
        let stage = self.problem_stage();
        let (input, reading) =
            channel_from_iter(tokio::task::block_in_place(|| self.problems_longest_first(stage))?);
        let chain = self.run_trace_stages(input, problems).await?;
        reading.await??;
        chain.finish().await
    }

    /// Sends problems through all trace stages and waits for the last trace. The stage files are not yet published.
    /// Announces the demand meanwhile.
    async fn run_trace_stages(
        &self,
        input: mpsc::Receiver<Problem>,
        problems: usize,
    ) -> anyhow::Result<Chain<'_>> {
        let recipe = &self.recipe;
        let mut chain = Chain::new(&self.folder, recipe.concurrency);
        let mut last = self.stages.append_trace_stages(&mut chain, input)?;
        let drained = async { while last.recv().await.is_some() {} };
        let announcing = self.plan_receiver()?.map(|front| {
            let run = unique_id(&recipe.name);
            let gates = Arc::clone(self.stages.calls.limits());
            let announcer = Announcer::new(front, &run, recipe, problems as u64, &chain.counts(), gates);
            AbortOnDropHandle::new(tokio::spawn(announcer.announce_periodically()))
        });
        self.show_progress(&chain.counts(), problems as u64, drained).await;
        drop(announcing);
        Ok(chain)
    }

    /// Shows counts and spending on the terminal and in `status.json` until `done` resolves.
    async fn show_progress(
        &self,
        stages: &[(&'static str, Arc<StageCounts>)],
        total: u64,
        done: impl Future<Output = ()>,
    ) {
        let status = StatusWriter::new(&self.folder, stages, total, &self.stages.calls);
        let writing = AbortOnDropHandle::new(tokio::spawn(status.clone().write_periodically()));
        self.progress.show_until(stages, total, done).await;
        drop(writing);
        tokio::task::block_in_place(|| status.write());
    }

    /// Returns the receiver of announcements: the local gateway, or the remote one's admin API. `None` for a remote
    /// gateway without `admin_url`.
    fn plan_receiver(&self) -> anyhow::Result<Option<PlanReceiver>> {
        let Some(section) = &self.recipe.gateway else {
            return Ok(Some(PlanReceiver::Local(self.local_gateway.plan_registry())));
        };
        let Some(url) = &section.admin_url else { return Ok(None) };
        let mut endpoint = Endpoint::new(url.as_str());
        let key = section.admin_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
        endpoint.api_key = key.map(Secret::new);
        Ok(Some(PlanReceiver::Remote(Client::new(endpoint)?)))
    }

    /// Runs one stage over the file of the stage `input`.
    async fn run_single_stage<S: Stage>(&self, stage: S, input: &str) -> anyhow::Result<()>
    where
        S::In: for<'de> serde::Deserialize<'de>,
        S::Out: SortKey,
    {
        let records = self.folder.stage_records::<S::In>(input)?.map(|row| row.map(|(_, record)| record));
        let total = self.folder.manifest().stages.get(input).map_or(0, |stage| stage.summary.kept);
        let (input, reading) = channel_from_iter(records);
        let mut chain = Chain::new(&self.folder, self.recipe.concurrency);
        let mut output = chain.append(stage, input)?;
        let drained = async { while output.recv().await.is_some() {} };
        self.show_progress(&chain.counts(), total as u64, drained).await;
        reading.await??;
        chain.finish().await
    }

    /// Chooses the traces for training. Writes the stage `sample` with the traces that were not chosen as dropped.
    fn select_traces(&self) -> anyhow::Result<()> {
        let last = self.trace_stage();
        // Rewriting can give two traces of one problem the same text. Their ids are equal, so they are adjacent.
        let (mut candidates, mut places, mut copies) =
            (Vec::<SamplingCandidate>::new(), Vec::new(), Vec::new());
        for row in self.folder.stage_records::<Trace>(last)? {
            let (place, trace) = row?;
            let candidate = SamplingCandidate::from_trace(&trace);
            if candidates.last().is_some_and(|last| last.id == candidate.id) {
                copies.push(place);
            } else {
                candidates.push(candidate);
                places.push(place);
            }
        }
        let policy = SamplingConfig { seed: self.recipe.seed, ..self.recipe.sample.clone() };
        let chosen = sampler::select_traces(&candidates, &policy);
        let lines = LineReader::open(&self.folder.stage_file(last))?;
        let trace = |place| anyhow::Ok(serde_json::from_str::<Trace>(&lines.read_line_at(place)?)?);
        let mut files = self.folder.create_stage_files::<Trace>()?;
        let mut summary = StageSummary {
            taken: candidates.len() + copies.len(),
            kept: chosen.len(),
            ..StageSummary::default()
        };
        let mut taken = chosen.iter().copied().peekable();
        for (index, place) in places.iter().enumerate() {
            if taken.next_if_eq(&index).is_some() {
                files.kept.push(&trace(*place)?)?;
            } else {
                summary.count_dropped("not_drawn");
                files.dropped.push(&Dropped::trace("not_drawn", trace(*place)?))?;
            }
        }
        for place in copies {
            summary.count_dropped("same_text");
            files.dropped.push(&Dropped::trace("same_text", trace(place)?))?;
        }
        self.progress.message(format!("sample: {}", problems::summary_line(&summary)));
        anyhow::ensure!(summary.kept > 0, "no trace is left to train on");
        Ok(self.folder.publish_stage("sample", files, summary)?)
    }

    /// Returns the chosen traces, or none if the recipe makes no traces.
    fn selected_traces(&self) -> anyhow::Result<Vec<Trace>> {
        if self.recipe.makes_traces() { self.folder.read_stage("sample") } else { Ok(Vec::new()) }
    }

    // ---- Evaluation ----

    /// Evaluates every student on the held-out problems.
    async fn evaluate_students(&self) -> anyhow::Result<Vec<StudentResult>> {
        if self.recipe.evaluate.is_none() {
            return Ok(Vec::new());
        }
        let held_out = self.held_out()?;
        let mut all = Vec::new();
        for variant in self.variants() {
            let model = self.serve_variant(variant)?;
            let revision = export::weights_hash(&self.folder.path().join("models").join(&model))?;
            let figures = self.evaluate_model(&model, revision, variant.name(), &held_out).await?;
            all.push(StudentResult::new(variant.name(), figures));
        }
        Ok(all)
    }

    /// Evaluates a served model on the held-out problems and stores its samples as stage `evaluate-NAME`. `revision`
    /// distinguishes weights of one model name in the journal.
    async fn evaluate_model(
        &self,
        model: &str,
        revision: String,
        name: &str,
        held_out: &[Problem],
    ) -> anyhow::Result<StudentMetrics> {
        let settings = self.recipe.evaluate.clone().context("the recipe has no `evaluate`")?;
        let stage = EvaluateStage {
            revision,
            model: model.to_owned(),
            calls: self.student_client.clone(),
            settings,
            prompt: student_prompt(&self.recipe, "{{ problem }}"),
        };
        let counts = Arc::new(StageCounts::default());
        let (mut output, handle) = spawn_stage(
            stage,
            channel_from_records(held_out.to_vec()),
            self.recipe.concurrency,
            Arc::clone(&counts),
            (),
        );
        let mut samples: Vec<StudentSample> = Vec::new();
        let drained = async {
            while let Some(sample) = output.recv().await {
                samples.push(sample);
            }
        };
        self.show_progress(&[("evaluate", Arc::clone(&counts))], held_out.len() as u64, drained).await;
        handle.await??;
        samples.sort_by(|a, b| (&a.problem, a.sample).cmp(&(&b.problem, b.sample)));
        self.folder.write_stage(&format!("evaluate-{name}"), &samples, counts.summary())?;
        let figures = metrics::compute_metrics(&samples);
        self.progress.message(format!(
            "`{name}`: {:.1} % [{:.1}, {:.1}] of {} problems x {}",
            figures.accuracy, figures.ci_low, figures.ci_high, figures.problems, figures.samples
        ));
        Ok(figures)
    }

    /// Writes the model cards of all students.
    fn write_cards(&self, figures: &[StudentResult]) -> anyhow::Result<()> {
        for variant in self.variants() {
            let name = self.student_name(variant);
            let folder = self.folder.path().join("models").join(&name);
            let model =
                potstill_engine::loader::load(&folder, &candle_core::Device::Cpu, candle_core::DType::F32)?;
            let figures = figures.iter().find(|figures| figures.name == variant.name());
            let log = self.folder.path().join("train").join(variant.name()).join("trainer_state.json");
            let training = card::read_training(&log);
            export::write_card(
                &folder,
                &card::student_card(&self.recipe, &name, variant, &model, training, figures),
            )?;
        }
        Ok(())
    }

    /// Returns the report of this run.
    fn build_report(&self, students: Vec<StudentResult>, compressed: Vec<QuantizedResult>) -> Report {
        Report::new(
            &self.recipe.name,
            students,
            compressed,
            self.folder.manifest(),
            self.stages.calls.counters(),
            self.started.elapsed().as_secs_f64(),
        )
    }
}
