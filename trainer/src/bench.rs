//! `potstill bench`: how fast a model reads and writes on this machine, by wall clock and by processor time, which other
//! programs on the machine do not change.

mod arrivals;
mod train;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use potstill_engine::batch::Batch;
use potstill_engine::device;
use potstill_engine::kv::{BLOCK, KvCache, Table};
use potstill_engine::loader::{load, load_to_serve};
use potstill_engine::model::CausalLm;
use potstill_engine::sharded::ShardedLm;
use serde::Serialize;

use crate::compress::{self, Quality};

pub use arrivals::{ArrivalArguments, ArrivalReport, run as run_arrivals};
pub use train::{TrainArguments, TrainReport, run as run_train};

/// What to measure.
#[derive(Debug, clap::Args)]
#[command(subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
pub struct BenchArguments {
    /// A training step instead.
    #[command(subcommand)]
    pub work: Option<Work>,
    /// Model folder or `.gguf` file.
    #[arg(long, required = true)]
    pub model: Option<PathBuf>,
    /// Lengths of prompts, by comma.
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    pub prompt: Vec<usize>,
    /// Tokens written behind the first prompt.
    #[arg(long = "gen", default_value_t = 64)]
    pub generate: usize,
    /// Sequences at once, by comma.
    #[arg(long, value_delimiter = ',', default_value = "1,16")]
    pub batch: Vec<usize>,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// `cpu`, `cuda` or `cuda:N`; several with commas between them share the model out.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Round matrices of more bits to eight, as `potstill serve --eight-bits` does.
    #[arg(long)]
    pub eight_bits: bool,
    /// Times that each is measured; the fastest counts.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// A text: how often packed matrices (eight bits, or four where a file has four) choose the same next token as f32 on it, and how
    /// far apart they are.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// What else can be measured.
#[derive(Debug, clap::Subcommand)]
pub enum Work {
    /// Training steps of a fresh model on made-up tokens.
    Train(TrainArguments),
    /// Requests of unequal length that arrive at random, beside static batching.
    Arrivals(ArrivalArguments),
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// `prefill` or `decode`.
    pub work: &'static str,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Sequences at once.
    pub batch: usize,
    /// Tokens per second of wall time, all sequences together.
    pub tokens_per_s: f64,
    /// Tokens per second of processor time.
    pub tokens_per_cpu_s: f64,
    /// Milliseconds until the first token; for prefill.
    pub first_token_ms: Option<f64>,
}

/// What was measured of a model.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// The model.
    pub model: String,
    /// Weights.
    pub parameters: u64,
    /// Threads.
    pub threads: usize,
    /// Most memory that the process held, in bytes, loading included.
    pub peak_memory: u64,
    /// The measurements.
    pub measured: Vec<Measured>,
    /// Beside f32, where a text was given.
    pub quality: Option<Quality>,
}

/// Tokens of a text that are compared.
const COMPARED: usize = 1024;

/// Measures.
pub fn run(arguments: &BenchArguments) -> anyhow::Result<BenchReport> {
    anyhow::ensure!(
        arguments.generate > 0 && arguments.threads > 0 && arguments.rounds > 0,
        "--gen, --threads and --rounds must be at least 1"
    );
    let sizes = arguments.prompt.iter().chain(&arguments.batch);
    anyhow::ensure!(sizes.clone().all(|size| *size > 0), "--prompt and --batch must be at least 1");
    device::set_threads(arguments.threads);
    let devices = device::parse_all(&arguments.device)?;
    let path = arguments.model.as_ref().context("--model is missing")?;
    let failed = || format!("cannot load `{}`", path.display());
    let loaded = load_to_serve(path, &devices, arguments.eight_bits).with_context(failed)?;
    let parameters = loaded.config.parameters() as u64;
    let most = loaded.config.max_positions;
    let model = ShardedLm::new(&loaded, &devices)?;
    let quality = match &arguments.text {
        Some(text) => {
            let tokens = compress::tokens_of(&loaded, text)?;
            let exact = load(path, &Device::Cpu, DType::F32).with_context(failed)?;
            let packed = load_to_serve(path, &[Device::Cpu], true).with_context(failed)?;
            let packed = CausalLm::new(&packed.config, &packed.weights)?;
            let exact = CausalLm::new(&exact.config, &exact.weights)?;
            Some(compress::quality(&exact, &packed, &tokens[..tokens.len().min(COMPARED)])?)
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
        measured.push(device::in_pool(|| prefill(&model, *prompt, arguments.rounds))?);
    }
    let first = arguments.prompt.first().copied().unwrap_or(1);
    for batch in &arguments.batch {
        let one = || decode(&model, first, arguments.generate, *batch, arguments.rounds);
        measured.push(device::in_pool(one)?);
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

/// Token ids that are all different enough; what they say does not change the time.
fn prompt_of(model: &ShardedLm, length: usize, sequence: usize) -> Vec<u32> {
    let vocabulary = model.config().vocab_size;
    (0..length).map(|at| ((at * 7919 + sequence * 104_729 + 11) % vocabulary) as u32).collect()
}

/// Caches with the blocks of some sequences.
struct Sequences {
    caches: Vec<KvCache>,
    tables: Vec<Vec<u32>>,
}

impl Sequences {
    fn new(model: &ShardedLm, count: usize, tokens: usize) -> anyhow::Result<Self> {
        let each = tokens.div_ceil(BLOCK);
        let caches = model.caches(count * each)?;
        let tables = (0..count).map(|at| (at * each..(at + 1) * each).map(|block| block as u32).collect());
        Ok(Self { caches, tables: tables.collect() })
    }
}

/// Reads a prompt and picks the most likely next token.
fn step(model: &ShardedLm, batch: &Batch, sequences: &mut Sequences) -> anyhow::Result<Vec<u32>> {
    let tables: Vec<Table<'_>> = sequences.tables.iter().map(Vec::as_slice).collect();
    let hidden = model.hidden(batch, &mut sequences.caches, &tables)?;
    let rows = batch.last_rows();
    let rows = Tensor::from_slice(&rows, rows.len(), hidden.device())?;
    let logits = model.logits(&hidden.index_select(&rows, 0)?)?;
    Ok(logits.argmax(1)?.to_vec1::<u32>()?)
}

/// The fastest of some rounds: wall and processor seconds.
fn fastest(
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

fn prefill(model: &ShardedLm, prompt: usize, rounds: usize) -> anyhow::Result<Measured> {
    let tokens = prompt_of(model, prompt, 0);
    // Short prompts are read several times, as processor time comes in hundredths of a second.
    let repeats = (1024 / prompt).max(1);
    let mut sequences = Sequences::new(model, 1, prompt)?;
    let (wall, cpu) = fastest(rounds, || {
        let (begin, cpu) = (Instant::now(), cpu_seconds());
        for _ in 0..repeats {
            let batch = Batch::new([(tokens.as_slice(), 0)]);
            step(model, &batch, &mut sequences)?;
        }
        Ok((begin.elapsed().as_secs_f64(), cpu_seconds() - cpu))
    })?;
    let all = (prompt * repeats) as f64;
    Ok(Measured {
        work: "prefill",
        prompt,
        batch: 1,
        tokens_per_s: all / wall,
        tokens_per_cpu_s: all / cpu.max(0.01),
        first_token_ms: Some(wall / repeats as f64 * 1e3),
    })
}

fn decode(
    model: &ShardedLm,
    prompt: usize,
    generate: usize,
    batch: usize,
    rounds: usize,
) -> anyhow::Result<Measured> {
    let mut sequences = Sequences::new(model, batch, prompt + generate)?;
    let (wall, cpu) = fastest(rounds, || {
        let prompts: Vec<Vec<u32>> = (0..batch).map(|sequence| prompt_of(model, prompt, sequence)).collect();
        let mut last =
            step(model, &Batch::new(prompts.iter().map(|prompt| (prompt.as_slice(), 0))), &mut sequences)?;
        let (begin, cpu) = (Instant::now(), cpu_seconds());
        for at in 0..generate {
            let rows: Vec<[u32; 1]> = last.iter().map(|token| [*token]).collect();
            let batch = Batch::new(rows.iter().map(|row| (row.as_slice(), prompt + at)));
            last = step(model, &batch, &mut sequences)?;
        }
        Ok((begin.elapsed().as_secs_f64(), cpu_seconds() - cpu))
    })?;
    let all = (generate * batch) as f64;
    Ok(Measured {
        work: "decode",
        prompt,
        batch,
        tokens_per_s: all / wall,
        tokens_per_cpu_s: all / cpu.max(0.01),
        first_token_ms: None,
    })
}

/// Processor seconds of this process: user and system time of `/proc/self/stat`, in hundredths.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The report for a terminal.
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
