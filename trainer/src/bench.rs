//! `potstill bench`: speed of prefill and decode on this machine, in wall time and in processor time. Processor time is
//! not affected by other programs. Training and arriving requests are measured in submodules.

mod arrivals;
mod train;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use potstill_engine::batch::Batch;
use potstill_engine::device;
use potstill_engine::kv::{BLOCK_TOKENS, BlockTable, KvCache};
use potstill_engine::loader::{load, load_for_serving};
use potstill_engine::model::CausalLm;
use potstill_engine::sharded::TensorParallelLm;
use serde::Serialize;

use crate::compress::{self, QualityLoss};

pub use arrivals::{ArrivalArguments, ArrivalReport, run as run_arrivals};
pub use train::{TrainArguments, TrainReport, run as run_train};

/// Arguments of `potstill bench`.
#[derive(Debug, clap::Args)]
#[command(subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
pub struct BenchArguments {
    /// Other measurements.
    #[command(subcommand)]
    pub work: Option<Benchmark>,
    /// Model folder or `.gguf` file.
    #[arg(long, required = true)]
    pub model: Option<PathBuf>,
    /// Prompt lengths in tokens, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    pub prompt: Vec<usize>,
    /// Tokens to generate after the first prompt length.
    #[arg(long = "gen", default_value_t = 64)]
    pub generate: usize,
    /// Batch sizes in sequences, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,16")]
    pub batch: Vec<usize>,
    /// Number of threads.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// `cpu`, `cuda` or `cuda:N`; several separated by commas use tensor parallelism.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Quantize unquantized matrices to 8 bits, as `potstill serve --eight-bits` does.
    #[arg(long)]
    pub eight_bits: bool,
    /// Repetitions of each measurement; the fastest counts.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Text file: also compare 8- or 4-bit weights with f32 on its tokens (top token, divergence, perplexity).
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Other measurements of `potstill bench`.
#[derive(Debug, clap::Subcommand)]
pub enum Benchmark {
    /// Training steps of a randomly initialized model on synthetic tokens.
    Train(TrainArguments),
    /// Requests of random length and arrival time: continuous against static batching.
    Arrivals(ArrivalArguments),
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    /// `prefill` or `decode`.
    pub work: &'static str,
    /// Tokens per prompt.
    pub prompt: usize,
    /// Number of sequences.
    pub batch: usize,
    /// Tokens per second of wall time, over all sequences.
    pub tokens_per_s: f64,
    /// Tokens per second of processor time, over all sequences.
    pub tokens_per_cpu_s: f64,
    /// Milliseconds until the first token; only for prefill.
    pub first_token_ms: Option<f64>,
}

/// Measurements of one model.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// Path of the model.
    pub model: String,
    /// Number of weights.
    pub parameters: u64,
    /// Number of threads.
    pub threads: usize,
    /// Peak memory of the process in bytes, including loading.
    pub peak_memory: u64,
    /// All measurements, prefill first.
    pub measured: Vec<Measurement>,
    /// Comparison of quantized weights with f32, if a text was given.
    pub quality: Option<QualityLoss>,
}

/// Number of tokens of the text that are compared.
const COMPARED_TOKENS: usize = 1024;

/// Loads the model and runs all measurements.
pub fn run(arguments: &BenchArguments) -> anyhow::Result<BenchReport> {
    anyhow::ensure!(
        arguments.generate > 0 && arguments.threads > 0 && arguments.rounds > 0,
        "--gen, --threads and --rounds must be at least 1"
    );
    let sizes = arguments.prompt.iter().chain(&arguments.batch);
    anyhow::ensure!(sizes.clone().all(|size| *size > 0), "--prompt and --batch must be at least 1");
    device::set_threads(arguments.threads);
    let devices = device::open_devices(&arguments.device)?;
    let path = arguments.model.as_ref().context("--model is missing")?;
    let failed = || format!("cannot load `{}`", path.display());
    let loaded = load_for_serving(path, &devices, arguments.eight_bits).with_context(failed)?;
    let parameters = loaded.config.parameter_count() as u64;
    let most = loaded.config.max_positions;
    let model = TensorParallelLm::new(&loaded, &devices)?;
    let quality = match &arguments.text {
        Some(text) => {
            let tokens = compress::tokenize_file(&loaded, text)?;
            let exact = load(path, &Device::Cpu, DType::F32).with_context(failed)?;
            let packed = load_for_serving(path, &[Device::Cpu], true).with_context(failed)?;
            let packed = CausalLm::new(&packed.config, &packed.weights)?;
            let exact = CausalLm::new(&exact.config, &exact.weights)?;
            Some(compress::measure_quality(&exact, &packed, &tokens[..tokens.len().min(COMPARED_TOKENS)])?)
        }
        None => None,
    };
    drop(loaded);
    let longest = arguments.prompt.iter().max().copied().unwrap_or(1) + arguments.generate;
    anyhow::ensure!(
        longest <= most,
        "--prompt and --gen make {longest} tokens; the model has room for {most}"
    );
    let mut measured = Vec::new();
    for prompt in &arguments.prompt {
        measured.push(device::run_in_pool(|| measure_prefill(&model, *prompt, arguments.rounds))?);
    }
    let first = arguments.prompt.first().copied().unwrap_or(1);
    for batch in &arguments.batch {
        let one = || measure_decode(&model, first, arguments.generate, *batch, arguments.rounds);
        measured.push(device::run_in_pool(one)?);
    }
    Ok(BenchReport {
        model: path.display().to_string(),
        parameters,
        threads: arguments.threads,
        peak_memory: peak_memory(),
        measured,
        quality,
    })
}

/// Returns `length` token ids that differ between sequences. Their meaning does not affect the time.
fn synthetic_prompt(model: &TensorParallelLm, length: usize, sequence: usize) -> Vec<u32> {
    let vocabulary = model.config().vocab_size;
    (0..length).map(|at| ((at * 7919 + sequence * 104_729 + 11) % vocabulary) as u32).collect()
}

/// KV caches, and the block table of each sequence.
struct SequenceCaches {
    caches: Vec<KvCache>,
    tables: Vec<Vec<u32>>,
}

impl SequenceCaches {
    /// Allocates blocks for `count` sequences of `tokens` tokens.
    fn new(model: &TensorParallelLm, count: usize, tokens: usize) -> anyhow::Result<Self> {
        let each = tokens.div_ceil(BLOCK_TOKENS);
        let caches = model.new_kv_caches(count * each)?;
        let tables = (0..count).map(|at| (at * each..(at + 1) * each).map(|block| block as u32).collect());
        Ok(Self { caches, tables: tables.collect() })
    }
}

/// Runs one forward pass over `batch` and returns the most likely next token of each sequence.
fn greedy_step(
    model: &TensorParallelLm,
    batch: &Batch,
    sequences: &mut SequenceCaches,
) -> anyhow::Result<Vec<u32>> {
    let tables: Vec<BlockTable<'_>> = sequences.tables.iter().map(Vec::as_slice).collect();
    let hidden = model.hidden_states(batch, &mut sequences.caches, &tables)?;
    let rows = batch.last_row_indices();
    let rows = Tensor::from_slice(&rows, rows.len(), hidden.device())?;
    let logits = model.logits(&hidden.index_select(&rows, 0)?)?;
    Ok(logits.argmax(1)?.to_vec1::<u32>()?)
}

/// Runs `work` several times and returns the smallest wall and processor time in seconds, each by itself.
fn best_time(
    rounds: usize,
    mut work: impl FnMut() -> anyhow::Result<(f64, f64)>,
) -> anyhow::Result<(f64, f64)> {
    let mut best = (f64::INFINITY, f64::INFINITY);
    for _ in 0..rounds {
        let (wall, cpu) = work()?;
        best = (best.0.min(wall), best.1.min(cpu));
    }
    Ok(best)
}

/// Measures the prefill of one prompt.
fn measure_prefill(model: &TensorParallelLm, prompt: usize, rounds: usize) -> anyhow::Result<Measurement> {
    let tokens = synthetic_prompt(model, prompt, 0);
    // Short prompts are processed several times, because processor time is counted in hundredths of a second.
    let repeats = (1024 / prompt).max(1);
    let mut sequences = SequenceCaches::new(model, 1, prompt)?;
    let (wall, cpu) = best_time(rounds, || {
        let (begin, cpu) = (Instant::now(), cpu_seconds());
        for _ in 0..repeats {
            let batch = Batch::new([(tokens.as_slice(), 0)]);
            greedy_step(model, &batch, &mut sequences)?;
        }
        Ok((begin.elapsed().as_secs_f64(), cpu_seconds() - cpu))
    })?;
    let all = (prompt * repeats) as f64;
    Ok(Measurement {
        work: "prefill",
        prompt,
        batch: 1,
        tokens_per_s: all / wall,
        tokens_per_cpu_s: all / cpu.max(0.01),
        first_token_ms: Some(wall / repeats as f64 * 1e3),
    })
}

/// Measures the decoding of `generate` tokens for `batch` sequences.
fn measure_decode(
    model: &TensorParallelLm,
    prompt: usize,
    generate: usize,
    batch: usize,
    rounds: usize,
) -> anyhow::Result<Measurement> {
    let mut sequences = SequenceCaches::new(model, batch, prompt + generate)?;
    let (wall, cpu) = best_time(rounds, || {
        let prompts: Vec<Vec<u32>> =
            (0..batch).map(|sequence| synthetic_prompt(model, prompt, sequence)).collect();
        let mut last = greedy_step(
            model,
            &Batch::new(prompts.iter().map(|prompt| (prompt.as_slice(), 0))),
            &mut sequences,
        )?;
        let (begin, cpu) = (Instant::now(), cpu_seconds());
        for at in 0..generate {
            let rows: Vec<[u32; 1]> = last.iter().map(|token| [*token]).collect();
            let batch = Batch::new(rows.iter().map(|row| (row.as_slice(), prompt + at)));
            last = greedy_step(model, &batch, &mut sequences)?;
        }
        Ok((begin.elapsed().as_secs_f64(), cpu_seconds() - cpu))
    })?;
    let all = (generate * batch) as f64;
    Ok(Measurement {
        work: "decode",
        prompt,
        batch,
        tokens_per_s: all / wall,
        tokens_per_cpu_s: all / cpu.max(0.01),
        first_token_ms: None,
    })
}

/// Returns the processor seconds of this process (user and system time of `/proc/self/stat`). Assumes 100 ticks per
/// second.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Returns the peak resident memory of this process in bytes, or 0 if unknown.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Formats the report as a table for the terminal.
pub fn table(report: &BenchReport) -> String {
    let mut text = format!(
        "{}: {:.1} M weights, {} threads, {:.0} MB at most\n{:<8} {:>7} {:>6} {:>12} {:>14} {:>14}",
        report.model,
        report.parameters as f64 / 1e6,
        report.threads,
        report.peak_memory as f64 / 1e6,
        "work",
        "prompt",
        "batch",
        "tokens/s",
        "tokens/CPU s",
        "first token"
    );
    for row in &report.measured {
        let first = row.first_token_ms.map_or(String::new(), |ms| format!("{ms:.1} ms"));
        text.push_str(&format!(
            "\n{:<8} {:>7} {:>6} {:>12.1} {:>14.1} {:>14}",
            row.work, row.prompt, row.batch, row.tokens_per_s, row.tokens_per_cpu_s, first
        ));
    }
    if let Some(quality) = &report.quality {
        text.push_str(&format!("\nbeside f32: {quality}"));
    }
    text
}
