//! The pipeline on one screen: collect -> generate -> difficulty -> rewrite -> verify -> score -> sample -> train ->
//! export -> evaluate -> card -> report. [`Run::all`] streams records from stage to stage; [`Run::stage`] runs one of
//! them over the file that the stage before it left.

mod chain;
mod problems;
mod students;

pub use students::Variant;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use potstill_cot::difficulty::{Grade, Judge};
use potstill_cot::executor::{Counts, Stage, Summary, feed, run};
use potstill_cot::generate::Generate;
use potstill_cot::prompts::Prompts;
use potstill_cot::rewrite::{Candidate, Rewrite};
use potstill_cot::rv_cd::Score;
use potstill_cot::teacher::{Patience, Teachers};
use potstill_cot::verify::Verify;
use potstill_data::journal::Journal;
use potstill_data::records::{Cot, Problem};
use potstill_data::sampler;
use potstill_shared::client::{Client, Endpoint};
use potstill_shared::id::{ContentId, unique};
use potstill_shared::redact::Redacted;
use potstill_verify::verifier::Verifier;
use tokio_util::task::AbortOnDropHandle;

use self::chain::Chain;
use crate::announce::{Announcer, Front};
use crate::evaluate::{Evaluate, Sample, metrics};
use crate::local::LocalGateway;
use crate::progress::Progress;
use crate::recipe::{JudgeSection, Recipe};
use crate::report::{Report, StudentFigures};
use crate::run::RunFolder;
use crate::students::prompt;
use crate::{card, export, report};

/// Stages that run alone, in order.
pub const STAGES: [&str; 12] = [
    "collect",
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
    "card",
];

/// A run that is under way.
pub struct Run {
    recipe: Arc<Recipe>,
    folder: RunFolder,
    progress: Progress,
    local: LocalGateway,
    teachers: Teachers,
    /// The same journal, but the local gateway, where the students are.
    students: Teachers,
    prompts: Prompts,
    started: Instant,
}

impl Run {
    /// Opens the run folder and starts what the recipe needs. Every model is asked for before the first call.
    pub async fn start(
        recipe: Recipe,
        recipe_path: &Path,
        out: &Path,
        port: u16,
        progress: Progress,
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let folder = RunFolder::open(out, recipe_path, &recipe.name)?;
        let prompts = Prompts::load(recipe.prompts.as_deref())?;
        let journal = Arc::new(Journal::open(&out.join("journal.log"))?);
        if !journal.is_empty() {
            progress.say(format!("resuming: the journal holds {} answers", journal.len()));
        }
        let local = LocalGateway::start(port, &out.join("logs")).await?;
        for model in &recipe.local {
            local.add_model(model)?;
        }
        let mut endpoint = Endpoint::new(local.url());
        // Answers come whole: silence is no sign of trouble, and the gateway watches its nodes.
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
        // A remote teacher thinks for minutes: its answer is read as a stream, so that silence is noticed.
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
        let teachers = Teachers::new(remote, Arc::clone(&journal), patience);
        let local_patience = Patience { stream: false, ..Patience::default() };
        let students = Teachers::new(loopback, journal, local_patience);
        Ok(Self { recipe: Arc::new(recipe), folder, progress, local, teachers, students, prompts, started })
    }

    /// The whole pipeline.
    pub async fn all(&self) -> anyhow::Result<Report> {
        let problems = if self.recipe.collect.is_some() { self.collect()? } else { Vec::new() };
        let traces = if self.recipe.generate.is_some() {
            let scored = self.chains_of_thought(problems).await?;
            self.reward_models(&scored).await?;
            self.sample(scored)?
        } else {
            Vec::new()
        };
        self.export(&traces).await?;
        let figures = self.evaluate().await?;
        self.cards(&figures)?;
        let report = self.report(figures);
        report::write(self.folder.path(), &report)?;
        Ok(report)
    }

    /// One stage alone, over the file of the stage before it.
    pub async fn stage(&self, name: &str) -> anyhow::Result<()> {
        match name {
            "collect" => drop(self.collect()?),
            "generate" => {
                drop(self.alone(self.generator()?, self.folder.read_stage("collect")?, trace_key).await?)
            }
            "difficulty" => {
                drop(self.alone(self.grader()?, self.folder.read_stage("generate")?, trace_key).await?)
            }
            "rewrite" => {
                let graded = if self.recipe.difficulty.is_some() { "difficulty" } else { "generate" };
                let input = self.folder.read_stage(graded)?;
                drop(self.alone(self.rewriter(), input, |c: &Candidate| trace_key(&c.cot)).await?);
            }
            "verify" => {
                drop(self.alone(self.verifier(), self.folder.read_stage("rewrite")?, trace_key).await?)
            }
            "score" => drop(self.alone(self.scorer()?, self.folder.read_stage("verify")?, trace_key).await?),
            "sample" => {
                let last = if self.recipe.score.is_some() { "score" } else { "verify" };
                drop(self.sample(self.folder.read_stage(last)?)?);
            }
            "reward" => self.reward_models(&self.folder.read_stage("score")?).await?,
            "train" => self.train(&self.sampled()?).await?,
            "export" => self.export(&self.sampled()?).await?,
            "evaluate" => {
                let figures = self.evaluate().await?;
                report::write(self.folder.path(), &self.report(figures))?;
            }
            "card" => self.cards(&report::read(self.folder.path())?.students)?,
            other => anyhow::bail!("unknown stage `{other}`; known are {}", STAGES.join(", ")),
        }
        Ok(())
    }

    /// Base URL of the local gateway, where the students are.
    pub fn url(&self) -> String {
        self.local.url()
    }

    /// Puts the last student behind the gateway.
    pub fn serve_student(&self) -> anyhow::Result<String> {
        self.serve_variant(self.variants().pop().context("the recipe trains no student")?)
    }

    /// Stops the gateway and its nodes.
    pub async fn stop(self) {
        self.local.stop().await;
    }

    // ---- chains of thought ----

    fn generator(&self) -> anyhow::Result<Generate> {
        let section = self.recipe.generate.as_ref().context("the recipe has no `generate`")?;
        Ok(Generate {
            teachers: section.teachers.clone(),
            calls: self.teachers.clone(),
            prompts: self.prompts.clone(),
            seed: self.recipe.seed,
        })
    }

    fn judge(&self, section: &JudgeSection) -> Judge {
        Judge {
            model: section.model.clone(),
            max_tokens: section.max_tokens,
            reasks: section.reasks,
            calls: self.teachers.clone(),
            prompts: self.prompts.clone(),
        }
    }

    fn grader(&self) -> anyhow::Result<Grade> {
        let section = self.recipe.difficulty.as_ref().context("the recipe has no `difficulty`")?;
        Ok(Grade { judge: self.judge(section) })
    }

    fn rewriter(&self) -> Rewrite {
        let section = self.recipe.rewrite.as_ref();
        Rewrite {
            model: section.map(|section| section.model.clone()),
            temperature: section.map_or(0.0, |section| section.temperature),
            max_tokens: section.map_or(0, |section| section.max_tokens),
            calls: self.teachers.clone(),
            prompts: self.prompts.clone(),
        }
    }

    fn verifier(&self) -> Verify {
        let judge = self.recipe.verify.as_ref().map(|section| self.judge(section));
        Verify { verifier: Verifier::default(), judge }
    }

    fn scorer(&self) -> anyhow::Result<Score> {
        let section = self.recipe.score.as_ref().context("the recipe has no `score`")?;
        Ok(Score { judge: self.judge(section) })
    }

    /// All CoT stages at once: a trace is graded while others are still being written.
    async fn chains_of_thought(&self, problems: Vec<Problem>) -> anyhow::Result<Vec<Cot>> {
        let total = problems.len() as u64;
        let mut chain = Chain::new(self.recipe.concurrency);
        let generated = chain.link(self.generator()?, feed(problems), trace_key);
        let graded = match self.recipe.difficulty {
            Some(_) => chain.link(self.grader()?, generated, trace_key),
            None => generated,
        };
        let rewritten = chain.link(self.rewriter(), graded, |c: &Candidate| trace_key(&c.cot));
        let verified = chain.link(self.verifier(), rewritten, trace_key);
        let mut last = match self.recipe.score {
            Some(_) => chain.link(self.scorer()?, verified, trace_key),
            None => verified,
        };
        let mut scored = Vec::new();
        let drained = async {
            while let Some(trace) = last.recv().await {
                scored.push(trace);
            }
        };
        let announcing = self.front()?.map(|front| {
            let run = unique(&self.recipe.name);
            let announcer = Announcer::new(front, &run, &self.recipe, total, &chain.counts());
            AbortOnDropHandle::new(tokio::spawn(announcer.keep_announcing()))
        });
        self.progress.watch(&chain.counts(), total, drained).await;
        drop(announcing);
        chain.finish(&self.folder).await?;
        scored.sort_by_key(trace_key);
        Ok(scored)
    }

    /// Where the stages are announced: at the gateway where the teachers are, if it takes plans.
    fn front(&self) -> anyhow::Result<Option<Front>> {
        let Some(section) = &self.recipe.gateway else { return Ok(Some(Front::Local(self.local.plans()))) };
        let Some(url) = &section.admin_url else { return Ok(None) };
        let mut endpoint = Endpoint::new(url.as_str());
        let key = section.admin_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
        endpoint.api_key = key.map(Redacted::new);
        Ok(Some(Front::Remote(Client::new(endpoint)?)))
    }

    async fn alone<S: Stage, K: Ord>(
        &self,
        stage: S,
        input: Vec<S::In>,
        key: impl Fn(&S::Out) -> K,
    ) -> anyhow::Result<Vec<S::Out>>
    where
        S::Out: serde::Serialize,
    {
        let name = stage.name();
        let (counts, total) = (Arc::new(Counts::default()), input.len() as u64);
        let (mut output, handle) = run(stage, feed(input), self.recipe.concurrency, Arc::clone(&counts));
        let mut records = Vec::new();
        let drained = async {
            while let Some(record) = output.recv().await {
                records.push(record);
            }
        };
        self.progress.watch(&[(name, Arc::clone(&counts))], total, drained).await;
        handle.await??;
        records.sort_by_key(key);
        self.folder.write_stage(name, &records, counts.summary())?;
        Ok(records)
    }

    fn sample(&self, mut scored: Vec<Cot>) -> anyhow::Result<Vec<Cot>> {
        let taken = scored.len();
        // Two traces of one problem may have become the same text by rewriting.
        scored.dedup_by(|a, b| a.id == b.id);
        let copies = taken - scored.len();
        let policy = sampler::SamplePolicy { seed: self.recipe.seed, ..self.recipe.sample };
        let chosen: Vec<Cot> =
            sampler::choose(&scored, &policy).into_iter().map(|index| scored[index].clone()).collect();
        let mut summary = Summary { taken, kept: chosen.len(), ..Summary::default() };
        for (reason, count) in [("same_text", copies), ("not_drawn", scored.len() - chosen.len())] {
            if count > 0 {
                summary.dropped.insert(reason.to_owned(), count);
            }
        }
        self.folder.write_stage("sample", &chosen, summary)?;
        self.progress.say(format!("sample: {taken} in, {} kept ({copies} same_text)", chosen.len()));
        anyhow::ensure!(!chosen.is_empty(), "no trace is left to train on");
        Ok(chosen)
    }

    fn sampled(&self) -> anyhow::Result<Vec<Cot>> {
        if self.recipe.generate.is_some() { self.folder.read_stage("sample") } else { Ok(Vec::new()) }
    }

    // ---- figures ----

    async fn evaluate(&self) -> anyhow::Result<Vec<StudentFigures>> {
        let Some(section) = &self.recipe.evaluate else { return Ok(Vec::new()) };
        let held_out = self.held_out()?;
        let mut all = Vec::new();
        for variant in self.variants() {
            let model = self.serve_variant(variant)?;
            let stage = Evaluate {
                revision: export::revision(&self.folder.path().join("models").join(&model))?,
                model,
                calls: self.students.clone(),
                settings: section.clone(),
                prompt: prompt(&self.recipe, "{{ problem }}"),
            };
            let name = format!("evaluate-{}", variant.name());
            let counts = Arc::new(Counts::default());
            let (mut output, handle) =
                run(stage, feed(held_out.clone()), self.recipe.concurrency, Arc::clone(&counts));
            let mut samples: Vec<Sample> = Vec::new();
            let drained = async {
                while let Some(sample) = output.recv().await {
                    samples.push(sample);
                }
            };
            self.progress.watch(&[("evaluate", Arc::clone(&counts))], held_out.len() as u64, drained).await;
            handle.await??;
            samples.sort_by(|a, b| (&a.problem, a.sample).cmp(&(&b.problem, b.sample)));
            self.folder.write_stage(&name, &samples, counts.summary())?;
            let figures = metrics::figures(&samples);
            self.progress.say(format!(
                "`{}`: {:.1} % [{:.1}, {:.1}] of {} problems x {}",
                variant.name(),
                figures.accuracy,
                figures.ci_low,
                figures.ci_high,
                figures.problems,
                figures.samples
            ));
            all.push(StudentFigures::new(variant.name(), figures));
        }
        Ok(all)
    }

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

    fn report(&self, students: Vec<StudentFigures>) -> Report {
        Report::new(
            &self.recipe.name,
            students,
            self.folder.manifest(),
            self.teachers.spent(),
            self.started.elapsed().as_secs_f64(),
        )
    }
}

/// Order of traces in files: by content, then by where they came from, so that it does not depend on timing.
fn trace_key(trace: &Cot) -> (ContentId, Option<ContentId>, i64) {
    (trace.id.clone(), trace.parent.clone(), trace.origin.seed)
}
