//! Open-loop load: requests are sent at Poisson times, independent of responses. Latency counts from the scheduled time
//! of a request, which avoids coordinated omission.
use std::time::Duration;

use clap::Args;
use potstill_shared::client::{Client, Endpoint};
use potstill_shared::openai::{ChatMessage, ChatRequest, GenerationParams};
use potstill_shared::redact::Secret;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

/// Arguments of `load`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Base URL that ends in `/v1`
    #[arg(long)]
    url: String,
    /// Model to request
    #[arg(long)]
    model: String,
    /// Bearer key
    #[arg(long, env = "POTSTILL_API_KEY")]
    key: Option<String>,
    /// Requests per second
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// Total number of requests
    #[arg(long, default_value_t = 400)]
    requests: usize,
    /// Prompt of every request
    #[arg(long, default_value = "A Dan has 58 cards. B Dan buys 67 more. How many cards has Dan?")]
    prompt: String,
    /// Limit on completion tokens
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    /// Request streams
    #[arg(long)]
    stream: bool,
    /// Seed of the arrival times
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Measurements of one request.
struct Sample {
    latency: Duration,
    tokens: u64,
    error: Option<String>,
}

/// Sends the load and prints the results.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        arguments.rate > 0.0 && arguments.requests > 0,
        "`--rate` and `--requests` must be above 0"
    );
    let mut endpoint = Endpoint::new(arguments.url.as_str());
    endpoint.api_key = arguments.key.clone().map(Secret::new);
    let client = Client::new(endpoint)?;
    let request = ChatRequest {
        model: arguments.model.clone(),
        messages: vec![ChatMessage::from_text("user", arguments.prompt.as_str())],
        params: GenerationParams {
            stream: Some(arguments.stream),
            max_tokens: Some(arguments.max_tokens),
            ..GenerationParams::default()
        },
        ..ChatRequest::default()
    };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(arguments.seed);
    let started = Instant::now();
    let mut due = started;
    let mut running = Vec::with_capacity(arguments.requests);
    for _ in 0..arguments.requests {
        due += Duration::from_secs_f64(-(1.0 - rng.random::<f64>()).ln() / arguments.rate);
        tokio::time::sleep_until(due).await;
        let (client, request) = (client.clone(), request.clone());
        running.push(tokio::spawn(async move {
            let answer = client.chat(&request, &[]).await;
            let latency = due.elapsed();
            match answer {
                Ok(completion) => Sample { latency, tokens: completion.usage.completion_tokens, error: None },
                Err(error) => Sample { latency, tokens: 0, error: Some(error.to_string()) },
            }
        }));
    }
    let mut samples = Vec::with_capacity(running.len());
    for task in running {
        samples.push(task.await?);
    }
    print(&samples, started.elapsed());
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the result of a command")]
fn print(samples: &[Sample], took: Duration) {
    let mut latencies: Vec<Duration> =
        samples.iter().filter(|sample| sample.error.is_none()).map(|sample| sample.latency).collect();
    latencies.sort();
    let at = |share: f64| {
        latencies.get(((latencies.len() as f64 * share) as usize).min(latencies.len().saturating_sub(1)))
    };
    let milliseconds = |share: f64| at(share).map_or(0.0, |latency| latency.as_secs_f64() * 1e3);
    let tokens: u64 = samples.iter().map(|sample| sample.tokens).sum();
    let seconds = took.as_secs_f64();
    println!("requests   {} ({} failed) in {seconds:.1} s", samples.len(), samples.len() - latencies.len());
    println!("tokens/s   {:.0}", tokens as f64 / seconds);
    println!(
        "latency ms p50 {:.1}  p90 {:.1}  p99 {:.1}",
        milliseconds(0.5),
        milliseconds(0.9),
        milliseconds(0.99)
    );
    if let Some(error) = samples.iter().find_map(|sample| sample.error.as_ref()) {
        println!("first error: {error}");
    }
}
