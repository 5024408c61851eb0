//! `potstill eval`: evaluates a model behind any OpenAI endpoint on public benchmarks or on the user's own tables. All
//! samples are stored, and every accuracy has a confidence interval. The same command resumes a stopped evaluation.

pub mod benchmarks;
pub mod compare;
pub mod figures;
pub mod page;
pub mod sample;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::future::join_all;
use potstill_cot::difficulty::Judge;
use potstill_cot::executor::{
    Stage, StageCounts, StageError, StageOutcome, channel_from_records, spawn_stage,
};
use potstill_cot::prompts::{PromptRole, PromptTemplates};
use potstill_cot::teacher::{CompletionRequest, RetryPolicy, TeacherClient, TeacherError};
use potstill_data::jsonl::write_records;
use potstill_data::records::Problem;
use potstill_data::store::Store;
use potstill_sandbox::{Limits, Sandbox};
use potstill_shared::client::{Client, Endpoint};
use potstill_shared::durable;
use potstill_shared::id::ContentId;
use potstill_shared::redact::Secret;
use potstill_verify::verifier::{Reference, VerdictSource, Verifier};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use self::benchmarks::{EvalProblem, EvalProfile, LoadedBenchmark};
use self::figures::{EvalMetrics, compute_metrics};
pub use self::sample::EvalSample;
use crate::progress::Progress;

/// Maximum number of new tokens of a judge; a judge may reason before its verdict.
const MAX_JUDGE_TOKENS: u32 = 2048;

/// Arguments of `potstill eval`.
#[derive(Debug, Clone, clap::Args)]
pub struct EvalArguments {
    /// Base URL of an OpenAI endpoint, such as `http://127.0.0.1:8080/v1`.
    #[arg(long)]
    pub endpoint: String,
    /// Name of the model.
    #[arg(long)]
    pub model: String,
    /// Benchmarks, separated by commas: gsm8k, math500, aime24, aime25, amc23, gpqa, humaneval, mbpp, lcb
    /// (NAME@REVISION selects a revision of the hub), or tables of your own (JSON lines, JSON, CSV, Parquet,
    /// hf://datasets/OWNER/NAME/FILE).
    #[arg(long, value_delimiter = ',', required = true)]
    pub bench: Vec<String>,
    /// Folder with benchmark files; missing ones are read from the Hugging Face Hub and cached.
    #[arg(long, default_value = "benchmarks")]
    pub data: PathBuf,
    /// `paper`: as many samples as published results use, 32,768 tokens. `quick`: few samples, 4,096 tokens.
    #[arg(long, default_value = "quick", value_parser = parse_profile)]
    pub profile: EvalProfile,
    /// Samples per problem, instead of the profile's number.
    #[arg(long)]
    pub samples: Option<u32>,
    /// Evaluate only this many problems of each benchmark.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Maximum number of new tokens per completion, instead of the profile's number.
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Sampling temperature.
    #[arg(long, default_value_t = 0.6)]
    pub temperature: f64,
    /// Nucleus sampling (top-p).
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Seed of the samples and of the order of choices.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Maximum number of open requests.
    #[arg(long, default_value_t = 32)]
    pub concurrency: usize,
    /// Environment variable that holds the API key of the endpoint.
    #[arg(long)]
    pub api_key_env: Option<String>,
    /// Model that grades answers that no rule can verify; without a judge they count as incorrect.
    #[arg(long)]
    pub judge: Option<String>,
    /// Base URL of the judge's endpoint; the model's endpoint if left out.
    #[arg(long, requires = "judge")]
    pub judge_endpoint: Option<String>,
    /// Environment variable that holds the API key of the judge's endpoint.
    #[arg(long, requires = "judge")]
    pub judge_key_env: Option<String>,
    /// Price per million prompt tokens.
    #[arg(long, default_value_t = 0.0)]
    pub price_prompt: f64,
    /// Price per million completion tokens.
    #[arg(long, default_value_t = 0.0)]
    pub price_completion: f64,
    /// Run folder; `runs/eval-MODEL` if left out. The same command resumes a stopped evaluation.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Print the report as JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Parses the name of a profile.
fn parse_profile(text: &str) -> Result<EvalProfile, String> {
    match text {
        "paper" => Ok(EvalProfile::Paper),
        "quick" => Ok(EvalProfile::Quick),
        _ => Err("one of quick, paper".to_owned()),
    }
}

/// Report of an evaluation, as in `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Name of the model.
    pub model: String,
    /// Base URL of the endpoint.
    pub endpoint: String,
    /// Temperature, top-p, maximum number of new tokens, and seed.
    pub sampling: (f64, f64, u32, u64),
    /// Metrics of each benchmark.
    pub benchmarks: Vec<EvalMetrics>,
    /// Files from which the problems were read; hub files include the commit.
    #[serde(default)]
    pub files: Vec<String>,
    /// Name of the judge model, if any.
    #[serde(default)]
    pub judge: Option<String>,
    /// Rows of benchmarks that could not be read, with the reason.
    pub bad_rows: Vec<String>,
    /// Prompt tokens paid for by this process.
    pub prompt_tokens: u64,
    /// Completion tokens paid for by this process.
    pub completion_tokens: u64,
    /// Price of these tokens.
    pub cost: f64,
    /// Wall time of this process in seconds.
    pub seconds: f64,
}

/// The evaluation of one benchmark, as a stage over its problems.
struct Evaluation {
    client: TeacherClient,
    verifier: Arc<Verifier>,
    settings: Arc<EvalArguments>,
    samples: u32,
    max_tokens: u32,
    request_permits: Arc<Semaphore>,
    /// Limits the programs that run at the same time.
    program_permits: Arc<Semaphore>,
    judge: Option<Judge>,
}

impl Evaluation {
    /// Requests sample `number` of a problem and verifies it. A request that the endpoint rejects gives a failed
    /// sample.
    async fn sample(&self, item: &EvalProblem, number: u32) -> Result<EvalSample, StageError> {
        let stop = |problem: String| StageError { stage: "eval", reason: problem };
        let seed =
            ContentId::from_parts(&[item.id.as_str(), &self.settings.seed.to_string(), &number.to_string()]);
        let question = CompletionRequest {
            stage: "eval",
            model: self.settings.model.clone(),
            prompt: item.prompt.clone(),
            temperature: self.settings.temperature,
            top_p: self.settings.top_p,
            max_tokens: self.max_tokens,
            seed: (seed.seed() >> 2) as i64,
            revision: Some(self.settings.endpoint.clone()),
        };
        let mut sample = EvalSample {
            problem: item.name.clone(),
            sample: number,
            level: item.level.clone(),
            ..EvalSample::default()
        };
        let entry = {
            let _slot = self.request_permits.acquire().await.map_err(|error| stop(error.to_string()))?;
            match self.client.complete(&question).await {
                Ok(entry) => entry,
                Err(TeacherError::Run(error)) => return Err(error),
                Err(TeacherError::Row(problem)) => {
                    return Ok(EvalSample {
                        evidence: format!("no answer: {problem}"),
                        failed: true,
                        ..sample
                    });
                }
            }
        };
        let completion = match &entry.reasoning {
            Some(thinking) => format!("<think>{thinking}</think>{}", entry.content),
            None => entry.content.clone(),
        };
        (sample.thinking, sample.text) = match completion.rsplit_once("</think>") {
            Some((thinking, text)) => (thinking.replacen("<think>", "", 1), text.to_owned()),
            None if completion.starts_with("<think>") => {
                (completion.replacen("<think>", "", 1), String::new())
            }
            None => (String::new(), completion.clone()),
        };
        sample.tokens = entry.completion_tokens;
        sample.truncated = entry.finish_reason == "length";
        let mut verdict = {
            let _turn = self.program_permits.acquire().await.map_err(|error| stop(error.to_string()))?;
            let (verifier, gold, completion) =
                (Arc::clone(&self.verifier), item.gold.clone(), completion.clone());
            tokio::task::spawn_blocking(move || verifier.verify(&gold, &completion))
                .await
                .map_err(|error| stop(error.to_string()))?
                .map_err(|error| stop(error.to_string()))?
        };
        if let (None, false, Some(judge)) = (verdict.correct, sample.truncated, &self.judge) {
            let known = match &item.gold {
                Reference::Answer(answer) => answer.clone(),
                Reference::Choice(letter) => letter.to_string(),
                // Tests always reach a verdict, so the judge is never asked here.
                Reference::Functions { .. } | Reference::Prints(_) => String::new(),
            };
            let problem = Problem::new(item.prompt.clone(), Some(known), item.name.clone());
            let _slot = self.request_permits.acquire().await.map_err(|error| stop(error.to_string()))?;
            // The judge grades only the final text, not the reasoning.
            if let Some(said) =
                judge.decide_binary("eval", PromptRole::Solution, &problem, &sample.text).await?
            {
                verdict.correct = Some(said);
                verdict.source = VerdictSource::Judge;
                verdict.evidence = format!("{}; `{}` says {}", verdict.evidence, judge.model, u8::from(said));
            }
        }
        // A truncated completion may contain a box by chance, but it is not a final answer.
        sample.correct = if sample.truncated { Some(false) } else { verdict.correct };
        sample.evidence =
            if sample.truncated { format!("cut off; {}", verdict.evidence) } else { verdict.evidence };
        sample.method = Some(verdict.source);
        sample.answer = verdict.answer;
        Ok(sample)
    }
}

impl Stage for Evaluation {
    type In = EvalProblem;
    type Out = EvalSample;

    fn name(&self) -> &'static str {
        "eval"
    }

    async fn process(&self, item: EvalProblem) -> Result<StageOutcome<EvalSample>, StageError> {
        let samples = join_all((0..self.samples).map(|number| self.sample(&item, number))).await;
        Ok(StageOutcome::keep(samples.into_iter().collect::<Result<_, _>>()?))
    }
}

/// Runs an evaluation and writes its folder: `report.json`, `report.html`, and all samples as JSON lines and pages.
///
/// Fails if an argument is invalid, if a benchmark has no readable row, or if the endpoint does not serve the model.
pub async fn evaluate(arguments: EvalArguments) -> anyhow::Result<EvalReport> {
    let progress = Progress::new();
    let started = std::time::Instant::now();
    anyhow::ensure!(arguments.samples != Some(0), "--samples must be at least 1");
    anyhow::ensure!(
        arguments.temperature >= 0.0 && arguments.top_p > 0.0 && arguments.top_p <= 1.0,
        "--temperature must not be negative, --top-p must be above 0 and at most 1"
    );
    let (names, data) = (arguments.bench.clone(), arguments.data.clone());
    let (profile, seed) = (arguments.profile, arguments.seed);
    let loaded: Vec<LoadedBenchmark> = tokio::task::spawn_blocking(move || {
        names
            .iter()
            .map(|name| benchmarks::load_benchmark(name, &data, profile, seed))
            .collect::<anyhow::Result<_>>()
    })
    .await??;
    let out = arguments.out.clone().unwrap_or_else(|| {
        Path::new("runs").join(format!("eval-{}", arguments.model.replace(['/', '\\'], "_")))
    });
    let sandbox = if loaded.iter().any(|loaded| loaded.code) {
        // This program also contains the sandbox helper.
        Some(Sandbox::new(std::env::current_exe()?, Limits::default())?)
    } else {
        None
    };
    durable::create_folder(&out)?;
    let store = Arc::new(Store::open_journal(&out.join("journal.log"))?);
    let known = store.completion_count().await?;
    if known > 0 {
        progress.message(format!("going on: the journal holds {known} answers"));
    }
    let calls =
        connect(&arguments.endpoint, arguments.api_key_env.as_deref(), &arguments.model, Arc::clone(&store))
            .await?;
    let judge = match &arguments.judge {
        None => None,
        Some(model) => {
            let (endpoint, key) = match &arguments.judge_endpoint {
                Some(endpoint) => (endpoint, arguments.judge_key_env.as_deref()),
                None => (&arguments.endpoint, arguments.api_key_env.as_deref()),
            };
            let calls = connect(endpoint, key, model, store).await?;
            let prompts = PromptTemplates::load(None)?;
            Some(Judge {
                model: model.clone(),
                max_tokens: MAX_JUDGE_TOKENS,
                parse_retries: 2,
                repetition: 0,
                client: calls,
                prompts,
            })
        }
    };
    let max_tokens = arguments.max_tokens.unwrap_or(match arguments.profile {
        EvalProfile::Paper => 32_768,
        EvalProfile::Quick => 4_096,
    });
    let settings = Arc::new(arguments);
    let open = Arc::new(Semaphore::new(settings.concurrency.max(1)));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let programs = Arc::new(Semaphore::new(cores));
    let verifier = Arc::new(Verifier::new(sandbox));
    let (mut all, mut bad_rows, mut files) = (Vec::new(), Vec::new(), Vec::new());
    for mut benchmark in loaded {
        for bad in &benchmark.bad {
            let said = format!("{} row {} of `{}`: {}", benchmark.name, bad.line, bad.file, bad.problem);
            progress.message(format!("left out: {said}"));
            bad_rows.push(said);
        }
        benchmark.items.truncate(settings.limit.unwrap_or(usize::MAX));
        let evaluation = Evaluation {
            client: calls.clone(),
            verifier: Arc::clone(&verifier),
            settings: Arc::clone(&settings),
            samples: settings.samples.unwrap_or(benchmark.samples),
            max_tokens,
            request_permits: Arc::clone(&open),
            program_permits: Arc::clone(&programs),
            judge: judge.clone(),
        };
        files.append(&mut benchmark.files);
        let (counts, total) = (Arc::new(StageCounts::default()), benchmark.items.len() as u64);
        let (mut output, handle) = spawn_stage(
            evaluation,
            channel_from_records(benchmark.items.clone()),
            settings.concurrency,
            Arc::clone(&counts),
            (),
        );
        let mut samples = Vec::new();
        let drained = async {
            while let Some(sample) = output.recv().await {
                samples.push(sample);
            }
        };
        let remark = || {
            let (prompt, completion) = tokens_used(&calls, judge.as_ref());
            let cost = price(&settings, prompt, completion);
            let cost = if cost > 0.0 { format!(", cost {cost:.2}") } else { String::new() };
            format!(", {completion} tokens written{cost}")
        };
        progress.show_until_with_remark(&[("eval", counts)], total, remark, drained).await;
        handle.await??;
        let order: std::collections::HashMap<&str, usize> =
            benchmark.items.iter().enumerate().map(|(at, item)| (item.name.as_str(), at)).collect();
        samples.sort_by_key(|sample| (order.get(sample.problem.as_str()).copied(), sample.sample));
        write_records(&out.join(format!("{}.jsonl", benchmark.name)), &samples)?;
        let figures = compute_metrics(&benchmark.name, &samples, benchmark.code);
        progress.message(summary_line(&figures));
        page::write_problem_pages(&out, &benchmark, &samples)?;
        all.push((figures, samples));
    }
    let (prompt_tokens, completion_tokens) = tokens_used(&calls, judge.as_ref());
    let report = EvalReport {
        model: settings.model.clone(),
        endpoint: settings.endpoint.clone(),
        sampling: (settings.temperature, settings.top_p, max_tokens, settings.seed),
        benchmarks: all.iter().map(|(figures, _)| figures.clone()).collect(),
        files,
        judge: settings.judge.clone(),
        bad_rows,
        prompt_tokens,
        completion_tokens,
        cost: price(&settings, prompt_tokens, completion_tokens),
        seconds: started.elapsed().as_secs_f64(),
    };
    page::write_report(&out, &report, &all)?;
    progress.message(format!("report   {}", out.join("report.html").display()));
    Ok(report)
}

/// Returns the prompt and completion tokens paid for, by the model and the judge together.
fn tokens_used(calls: &TeacherClient, judge: Option<&Judge>) -> (u64, u64) {
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    let all = std::iter::once(calls).chain(judge.map(|judge| &judge.client)).map(TeacherClient::counters);
    all.fold((0, 0), |(prompt, completion), spent| {
        (prompt + read(&spent.prompt_tokens), completion + read(&spent.completion_tokens))
    })
}

/// Returns the price of the tokens.
fn price(settings: &EvalArguments, prompt_tokens: u64, completion_tokens: u64) -> f64 {
    (prompt_tokens as f64 * settings.price_prompt + completion_tokens as f64 * settings.price_completion)
        / 1e6
}

/// Returns a client for `model` at `url`. Fails if the endpoint does not list the model.
async fn connect(
    url: &str,
    key_variable: Option<&str>,
    model: &str,
    store: Arc<Store>,
) -> anyhow::Result<TeacherClient> {
    let mut endpoint = Endpoint::new(url.trim_end_matches('/'));
    if let Some(variable) = key_variable {
        let key = std::env::var(variable)
            .with_context(|| format!("environment variable `{variable}` is not set"))?;
        endpoint.api_key = Some(Secret::new(key));
    }
    // A node with a queue may send nothing for minutes.
    endpoint.idle_timeout = Duration::from_secs(600);
    let calls = TeacherClient::new(Client::new(endpoint)?, store, RetryPolicy::default());
    let served =
        calls.client().list_models().await.with_context(|| format!("cannot list the models of `{url}`"))?;
    anyhow::ensure!(
        served.iter().any(|name| name == model),
        "`{url}` does not serve `{model}`; it serves {}",
        served.join(", ")
    );
    Ok(calls)
}

/// Formats the metrics of a benchmark on one line.
pub fn summary_line(figures: &EvalMetrics) -> String {
    format!(
        "{}: {:.1} % [{:.1}, {:.1}] of {} problems x {}{}, {:.0} tokens, {:.1} % cut off, {:.1} % undecided",
        figures.bench,
        figures.accuracy,
        figures.ci_low,
        figures.ci_high,
        figures.problems,
        figures.samples,
        figures.cons.map_or(String::new(), |cons| format!(", cons@{} {cons:.1} %", figures.samples)),
        figures.tokens.mean,
        figures.truncated,
        figures.undecided
    )
}
