//! Requests of random length and arrival time: continuous batching against static batching.
//!
//! The engine's step loop lets requests join and leave at every step. Static batching collects the requests that have
//! arrived and computes them as one rectangle. Prompts are padded to the longest, and generation lasts until the
//! longest completion ends, as in transformers' `generate`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use potstill_engine::device;
use potstill_engine::loader::load_for_serving;
use potstill_engine::sampler::SamplingParams;
use potstill_engine::scheduler::{Engine, EngineConfig, Request, RequestUpdate};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tokio::sync::mpsc;

/// Maximum number of requests in a static batch.
const STATIC_BATCH_SIZE: usize = 16;
/// Smallest and largest number of tokens of a prompt; log-uniform, so long prompts are rarer.
const PROMPT_TOKENS: (f64, f64) = (16.0, 256.0);
/// Smallest and largest number of tokens of a completion; also log-uniform.
const COMPLETION_TOKENS: (f64, f64) = (16.0, 256.0);

/// Arguments of `potstill bench arrivals`.
#[derive(Debug, Clone, clap::Args)]
pub struct ArrivalArguments {
    /// Model folder or `.gguf` file.
    #[arg(long)]
    pub model: PathBuf,
    /// Number of requests.
    #[arg(long, default_value_t = 48)]
    pub requests: usize,
    /// Seconds within which the requests arrive.
    #[arg(long, default_value_t = 4.0)]
    pub within: f64,
    /// Number of threads.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Seed of lengths and arrival times.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Results of one kind of batching.
#[derive(Debug, Clone, Serialize)]
pub struct BatchingResult {
    /// `continuous` or `static`.
    pub way: &'static str,
    /// Generated tokens per second, from the start until the last token.
    pub tokens_per_s: f64,
    /// Seconds from arrival to the first token: median and 99th percentile.
    pub first_token_s: (f64, f64),
    /// Seconds from arrival to the last token: median and 99th percentile.
    pub whole_s: (f64, f64),
}

/// Results of both kinds of batching.
#[derive(Debug, Clone, Serialize)]
pub struct ArrivalReport {
    /// Path of the model.
    pub model: String,
    /// Number of threads.
    pub threads: usize,
    /// Number of requests, and of generated tokens in all completions.
    pub requests: (usize, usize),
    /// Results, continuous batching first.
    pub ways: Vec<BatchingResult>,
}

/// One request: arrival time, prompt, and number of tokens to generate.
struct Arrival {
    at: Duration,
    prompt: Vec<u32>,
    completion_tokens: usize,
}

/// Times of the first and last token of a request, since the start.
#[derive(Clone, Copy, Default)]
struct TokenTimes {
    first: Duration,
    last: Duration,
}

/// Runs both kinds of batching on the same arrivals.
pub fn run(arguments: &ArrivalArguments) -> anyhow::Result<ArrivalReport> {
    anyhow::ensure!(
        arguments.requests > 0 && arguments.threads > 0,
        "--requests and --threads must be at least 1"
    );
    device::set_threads(arguments.threads);
    let model = load_for_serving(&arguments.model, &[device::open_device("cpu")?], false)
        .with_context(|| format!("cannot load `{}`", arguments.model.display()))?;
    let arrivals = arrivals(arguments, model.config.vocab_size);
    let tokens: usize = arrivals.iter().map(|arrival| arrival.completion_tokens).sum();
    let config = EngineConfig { max_waiting: arguments.requests, ..EngineConfig::default() };
    let mut ways = Vec::new();
    for (way, measure) in [
        ("continuous", run_continuous as fn(&Engine, &[Arrival]) -> anyhow::Result<Vec<TokenTimes>>),
        ("static", run_static),
    ] {
        let engine = Engine::start(&model, config.clone())?;
        let times = measure(&engine, &arrivals)?;
        let end = times.iter().map(|times| times.last).max().unwrap_or_default();
        let percentiles = |of: fn(&TokenTimes) -> Duration| {
            let waits =
                times.iter().zip(&arrivals).map(|(times, arrival)| of(times).saturating_sub(arrival.at));
            let mut waits: Vec<f64> = waits.map(|wait| wait.as_secs_f64()).collect();
            waits.sort_by(f64::total_cmp);
            let at =
                |share: f64| waits[((waits.len() as f64 * share).ceil() as usize).clamp(1, waits.len()) - 1];
            (at(0.5), at(0.99))
        };
        ways.push(BatchingResult {
            way,
            tokens_per_s: tokens as f64 / end.as_secs_f64(),
            first_token_s: percentiles(|times| times.first),
            whole_s: percentiles(|times| times.last),
        });
    }
    Ok(ArrivalReport {
        model: arguments.model.display().to_string(),
        threads: arguments.threads,
        requests: (arrivals.len(), tokens),
        ways,
    })
}

/// Returns random requests, ordered by arrival time.
fn arrivals(arguments: &ArrivalArguments, vocabulary: usize) -> Vec<Arrival> {
    let mut random = ChaCha8Rng::seed_from_u64(arguments.seed);
    let mut length =
        |(least, most): (f64, f64)| (least * (most / least).powf(random.random::<f64>())) as usize;
    let lengths: Vec<(usize, usize)> =
        (0..arguments.requests).map(|_| (length(PROMPT_TOKENS), length(COMPLETION_TOKENS))).collect();
    let mut arrivals: Vec<Arrival> = lengths
        .into_iter()
        .map(|(prompt, answer)| Arrival {
            at: Duration::from_secs_f64(random.random::<f64>() * arguments.within.max(0.0)),
            prompt: (0..prompt).map(|_| random.random_range(0..vocabulary as u32)).collect(),
            completion_tokens: answer,
        })
        .collect();
    arrivals.sort_by_key(|arrival| arrival.at);
    arrivals
}

/// Returns an engine request that generates exactly `max_tokens` tokens, greedily. Requests log probabilities, so that
/// the engine reports every token.
fn request(prompt: &[u32], max_tokens: usize) -> Request {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        ignore_eos: true,
        logprobs: Some(0),
        ..Request::default()
    }
}

/// Repeats the prompt up to `length` tokens.
fn repeat_to_length(prompt: &[u32], length: usize) -> Vec<u32> {
    prompt.iter().copied().cycle().take(length).collect()
}

/// Waits for the request to end and returns the times of its first token and of token number `count`.
fn token_times(
    mut updates: mpsc::Receiver<RequestUpdate>,
    count: usize,
    begin: Instant,
) -> anyhow::Result<TokenTimes> {
    let (mut times, mut written) = (TokenTimes::default(), 0);
    while let Some(update) = updates.blocking_recv() {
        match update {
            RequestUpdate::Sampled(_) => {
                written += 1;
                if written == 1 {
                    times.first = begin.elapsed();
                }
                if written == count {
                    times.last = begin.elapsed();
                }
            }
            RequestUpdate::Failed(reason) => anyhow::bail!("the engine failed: {reason}"),
            _ => {}
        }
    }
    anyhow::ensure!(written >= count, "only {written} of {count} tokens were written");
    Ok(times)
}

/// Submits every request at its arrival time, from a thread of its own.
fn run_continuous(engine: &Engine, arrivals: &[Arrival]) -> anyhow::Result<Vec<TokenTimes>> {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = arrivals
            .iter()
            .map(|arrival| {
                scope.spawn(move || {
                    std::thread::sleep(arrival.at.saturating_sub(begin.elapsed()));
                    let updates = engine.submit(request(&arrival.prompt, arrival.completion_tokens))?;
                    token_times(updates, arrival.completion_tokens, begin)
                })
            })
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().map_err(|_| anyhow::anyhow!("a client failed"))?)
            .collect()
    })
}

/// Submits requests in static batches. In a batch all prompts and completions are as long as the longest, because a
/// static batch is one tensor. Padding costs as much as other tokens.
fn run_static(engine: &Engine, arrivals: &[Arrival]) -> anyhow::Result<Vec<TokenTimes>> {
    let begin = Instant::now();
    let mut all = Vec::with_capacity(arrivals.len());
    let mut left = arrivals;
    while let Some(first) = left.first() {
        std::thread::sleep(first.at.saturating_sub(begin.elapsed()));
        let arrived = left
            .iter()
            .take(STATIC_BATCH_SIZE)
            .take_while(|arrival| arrival.at <= begin.elapsed())
            .count()
            .max(1);
        let (batch, rest) = left.split_at(arrived);
        let longest = batch.iter().map(|arrival| arrival.completion_tokens).max().unwrap_or(1);
        let widest = batch.iter().map(|arrival| arrival.prompt.len()).max().unwrap_or(0);
        let requests = batch
            .iter()
            .map(|arrival| request(&repeat_to_length(&arrival.prompt, widest), longest))
            .collect();
        let updates = engine.submit_all(requests)?;
        let times: anyhow::Result<Vec<TokenTimes>> = std::thread::scope(|scope| {
            let clients: Vec<_> = updates
                .into_iter()
                .zip(batch)
                .map(|(updates, arrival)| {
                    scope.spawn(move || token_times(updates, arrival.completion_tokens, begin))
                })
                .collect();
            clients
                .into_iter()
                .map(|client| client.join().map_err(|_| anyhow::anyhow!("a client failed"))?)
                .collect()
        });
        all.extend(times?);
        left = rest;
    }
    Ok(all)
}

impl std::fmt::Display for ArrivalReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (requests, tokens) = self.requests;
        write!(f, "{}, {} threads: {requests} requests, {tokens} tokens", self.model, self.threads)?;
        for way in &self.ways {
            write!(
                f,
                "\n{:<11} {:>7.1} tokens/s, first token {:.2} s (p99 {:.2}), whole answer {:.2} s (p99 {:.2})",
                way.way,
                way.tokens_per_s,
                way.first_token_s.0,
                way.first_token_s.1,
                way.whole_s.0,
                way.whole_s.1
            )?;
        }
        Ok(())
    }
}
