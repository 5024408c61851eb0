//! Quantization: writes a model as GGUF with fewer bits, and measures the loss of quality on a text. The measurements
//! are stored beside the file. A file above the limit is not published.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use potstill_engine::batch::Batch;
use potstill_engine::gguf_files::write_gguf;
use potstill_engine::loader::{LoadedModel, load};
use potstill_engine::model::CausalLm;
use potstill_shared::durable::{create_folder, publish_folder, write_file};

pub use crate::quantize_report::{QualityLoss, QuantizedFile, QuantizedFormat};
use crate::report::QuantizedResult;

/// Arguments of `potstill quantise`.
#[derive(Debug, clap::Args)]
pub struct QuantizeArguments {
    /// Model folder or `.gguf` file.
    #[arg(long)]
    pub model: PathBuf,
    /// Format of the weights.
    #[arg(long, value_enum)]
    pub to: QuantizedFormat,
    /// Output folder for the file, its card and its measurements.
    #[arg(long)]
    pub out: PathBuf,
    /// Text similar to the model's use; the first half calibrates, the second half measures.
    #[arg(long)]
    pub text: PathBuf,
    /// Largest allowed rise of the perplexity in percent; above it nothing is published.
    #[arg(long, default_value_t = 5.0)]
    pub limit: f64,
    /// Round to nearest, without calibration.
    #[arg(long)]
    pub no_calibration: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Tokens per window. Each window is evaluated by itself.
const WINDOW_TOKENS: usize = 512;
/// Maximum number of windows for calibration, and the same for measurement.
const MAX_WINDOWS: usize = 16;
/// Number of tokens that calibration and measurement can use; further tokens are ignored.
pub const MAX_USED_TOKENS: usize = 2 * MAX_WINDOWS * WINDOW_TOKENS;

/// Reads a text file and returns its token ids. Fails if there are fewer than two.
pub fn tokenize_file(model: &LoadedModel, text: &Path) -> anyhow::Result<Vec<u32>> {
    let text = std::fs::read_to_string(text).with_context(|| format!("cannot read `{}`", text.display()))?;
    let tokens = model.tokenizer.encode(&text)?;
    anyhow::ensure!(tokens.len() > 1, "the text has fewer than two tokens");
    Ok(tokens)
}

/// Quantizes a model and publishes the folder `arguments.out`. Fails, and publishes nothing, if the perplexity rises
/// above the limit.
pub fn quantize(arguments: &QuantizeArguments) -> anyhow::Result<QuantizedFile> {
    let model = load(&arguments.model, &Device::Cpu, DType::F32)
        .with_context(|| format!("cannot load `{}`", arguments.model.display()))?;
    let tokens = tokenize_file(&model, &arguments.text)?;
    let name = arguments
        .model
        .file_stem()
        .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    let file = format!("{name}-{}.gguf", arguments.to.gguf_format().name());
    let mut found = None;
    if let Some(parent) = arguments.out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        create_folder(parent)?;
    }
    publish_folder::<anyhow::Error>(&arguments.out, |folder| {
        let path = folder.join(&file);
        let mut written =
            quantize_and_measure(&model, &name, arguments.to, !arguments.no_calibration, &tokens, &path)?;
        let quality = &written.quality;
        let rise = 100.0 * (quality.perplexity / quality.perplexity_f32 - 1.0);
        anyhow::ensure!(
            rise <= arguments.limit,
            "not published: the perplexity rises by {rise:.1} %, the limit is {} % ({quality})",
            arguments.limit
        );
        written.path = arguments.out.join(&file);
        let form = format!("{name}, {}", arguments.to.gguf_format().name());
        write_file(&folder.join("README.md"), quantized_card(&form, &name, &written, None).as_bytes())?;
        write_file(
            &folder.join("quality.json"),
            format!("{:#}\n", serde_json::to_value(&written)?).as_bytes(),
        )?;
        found = Some(written);
        Ok(())
    })?;
    found.context("nothing was written")
}

/// Writes `model` in the format `bits` to `path` and measures the result. The first half of `tokens` calibrates the
/// rounding (`q4_k_m` only), the second half measures.
pub fn quantize_and_measure(
    model: &LoadedModel,
    name: &str,
    bits: QuantizedFormat,
    calibrate: bool,
    tokens: &[u32],
    path: &Path,
) -> anyhow::Result<QuantizedFile> {
    let window = WINDOW_TOKENS.min(model.config.max_positions);
    anyhow::ensure!(
        tokens.len() >= 2 * window,
        "{} tokens of text; calibration and measurement need at least {}",
        tokens.len(),
        2 * window
    );
    let (first, second) = tokens.split_at(tokens.len() / 2);
    let importance = if calibrate && bits == QuantizedFormat::Q4 {
        let batches: Vec<Batch> =
            first.chunks(window).take(MAX_WINDOWS).map(|part| Batch::new([(part, 0)])).collect();
        Some(CausalLm::importance_matrix(&model.config, &model.weights, &batches)?)
    } else {
        None
    };
    write_gguf(path, model, name, bits.gguf_format(), importance.as_ref())?;
    let back = load(path, &Device::Cpu, DType::F32)?;
    let exact = CausalLm::new(&model.config, &model.weights)?;
    let small = CausalLm::new(&back.config, &back.weights)?;
    let measured = &second[..second.len().min(window * MAX_WINDOWS)];
    let quality = measure_quality_in_windows(&exact, &small, measured, window)?;
    let bytes = std::fs::metadata(path)?.len();
    Ok(QuantizedFile { path: path.to_owned(), bytes, calibrated: importance.is_some(), quality })
}

/// Returns the card of a quantized `base`. `tested` adds its evaluation on the problems of the run.
pub fn quantized_card(
    title: &str,
    base: &str,
    written: &QuantizedFile,
    tested: Option<&QuantizedResult>,
) -> String {
    let q = &written.quality;
    let mut card = format!(
        "---\nlibrary_name: gguf\npipeline_tag: text-generation\nbase_model: {base}\ntags: [gguf, potstill]\n---\n\n# {title}\n\n\
         {:.1} MB, {}.\n\n| tokens compared | perplexity f32 | perplexity here | same next token | divergence, nats |\n\
         |---|---|---|---|---|\n| {} | {:.3} | {:.3} | {:.1} % | {:.4} |\n",
        written.bytes as f64 / 1e6,
        if written.calibrated {
            "rounded with importances from a calibration text"
        } else {
            "rounded to nearest"
        },
        q.tokens,
        q.perplexity_f32,
        q.perplexity,
        100.0 * q.same_top,
        q.divergence
    );
    if let Some(tested) = tested {
        let f = &tested.figures.details;
        let _infallible = write!(
            card,
            "\n## Evaluation\n\n{} held-out problems, {} samples each; 95 % interval by bootstrap over problems.\n\n\
             | accuracy | interval | before | mean tokens | cut off |\n|---|---|---|---|---|\n\
             | {:.1} % | {:.1} to {:.1} | {:.1} % | {:.0} | {:.1} % |\n",
            f.problems, f.samples, f.accuracy, f.ci_low, f.ci_high, tested.before, f.mean_tokens, f.truncated
        );
    }
    card
}

/// Returns the quality over all windows of `tokens`. Windows do not attend to each other.
fn measure_quality_in_windows(
    exact: &CausalLm,
    other: &CausalLm,
    tokens: &[u32],
    window: usize,
) -> anyhow::Result<QualityLoss> {
    let parts: Vec<QualityLoss> = tokens
        .chunks(window)
        .filter(|part| part.len() > 1)
        .map(|part| measure_quality(exact, other, part))
        .collect::<anyhow::Result<_>>()?;
    let total: usize = parts.iter().map(|part| part.tokens).sum();
    let mean = |value: &dyn Fn(&QualityLoss) -> f64| {
        parts.iter().map(|part| value(part) * part.tokens as f64).sum::<f64>() / total.max(1) as f64
    };
    Ok(QualityLoss {
        tokens: total,
        same_top: mean(&|part| part.same_top),
        divergence: mean(&|part| part.divergence),
        perplexity_f32: mean(&|part| part.perplexity_f32.ln()).exp(),
        perplexity: mean(&|part| part.perplexity.ln()).exp(),
    })
}

/// Compares two models on `tokens`, as one sequence of at least two tokens.
pub fn measure_quality(exact: &CausalLm, other: &CausalLm, tokens: &[u32]) -> anyhow::Result<QualityLoss> {
    let logits = |model: &CausalLm| -> anyhow::Result<Vec<Vec<f32>>> {
        let hidden = model.hidden_states(&Batch::new([(tokens, 0)]))?;
        let log = log_softmax(&model.logits(&hidden)?)?;
        Ok(log.to_vec2::<f32>()?)
    };
    let (p, q) = (logits(exact)?, logits(other)?);
    let top = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(at, _)| at);
    let rows = tokens.len() - 1;
    let (mut same, mut divergence, mut loss_p, mut loss_q) = (0, 0.0, 0.0, 0.0);
    for (at, (p, q)) in p.iter().zip(&q).take(rows).enumerate() {
        same += usize::from(top(p) == top(q));
        divergence += p.iter().zip(q).map(|(p, q)| f64::from(p.exp()) * f64::from(p - q)).sum::<f64>();
        let next = tokens[at + 1] as usize;
        loss_p -= f64::from(p[next]);
        loss_q -= f64::from(q[next]);
    }
    let mean = |sum: f64| sum / rows as f64;
    Ok(QualityLoss {
        tokens: rows,
        same_top: same as f64 / rows as f64,
        divergence: mean(divergence),
        perplexity_f32: mean(loss_p).exp(),
        perplexity: mean(loss_q).exp(),
    })
}

/// Computes the log softmax of each row.
fn log_softmax(logits: &Tensor) -> anyhow::Result<Tensor> {
    let most = logits.max_keepdim(1)?;
    let shifted = logits.broadcast_sub(&most)?;
    let sum = shifted.exp()?.sum_keepdim(1)?.log()?;
    Ok(shifted.broadcast_sub(&sum)?)
}
