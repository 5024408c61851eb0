//! Report of a run: `report.json` for programs, `report.html` for people, and a table for the terminal. The pages of
//! `potstill eval` are in [`crate::eval`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::Context;
use minijinja::value::Serde;
use minijinja::{Environment, context};
use potstill_cot::teacher::UsageCounters;
use potstill_shared::durable::write_file;
use serde::{Deserialize, Serialize};

use crate::evaluate::metrics::StudentMetrics;
use crate::quantize_report::QuantizedFile;
use crate::run::Manifest;
use crate::selection;
use crate::training_view;

/// Metrics of one student; accuracies in percent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudentResult {
    /// Name of the variant, such as `raw` or `distilled`, or the format of a quantized version.
    pub name: String,
    /// Mean accuracy.
    pub accuracy: f64,
    /// Lower bound of the 95 % interval.
    pub ci_low: f64,
    /// Upper bound of the interval.
    pub ci_high: f64,
    /// Unbiased pass@k by k.
    pub pass_at_k: BTreeMap<u32, f64>,
    /// Mean tokens of a completion, by level of the problem.
    pub mean_cot_tokens: BTreeMap<String, f64>,
    /// All metrics.
    pub details: StudentMetrics,
}

impl StudentResult {
    /// Creates the entry of a student from its metrics.
    pub fn new(name: &str, figures: StudentMetrics) -> Self {
        Self {
            name: name.to_owned(),
            accuracy: figures.accuracy,
            ci_low: figures.ci_low,
            ci_high: figures.ci_high,
            pass_at_k: figures.pass_at_k.clone(),
            mean_cot_tokens: figures.mean_tokens_by_level.clone(),
            details: figures,
        }
    }
}

/// Usage of the teachers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TeacherUsage {
    /// Successful requests.
    pub calls: u64,
    /// Requests whose completion came from the journal.
    pub remembered: u64,
    /// Failed attempts that were retried.
    pub retries: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Completion tokens.
    pub completion_tokens: u64,
}

/// Report of a run, as in `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the recipe.
    pub name: String,
    /// Students in the order of their training; the final one is last.
    pub students: Vec<StudentResult>,
    /// Quantized versions of the last student.
    #[serde(default)]
    pub compressed: Vec<QuantizedResult>,
    /// Manifest with the counts of each stage.
    pub manifest: Manifest,
    /// Usage of the teachers by this process. Completions of earlier processes count as `remembered`.
    pub teachers: TeacherUsage,
    /// Wall time of this process in seconds.
    pub wall_seconds: f64,
    /// Number of cores that this process may use.
    pub cores: usize,
}

impl Report {
    /// Creates a report of this process.
    pub fn new(
        name: &str,
        students: Vec<StudentResult>,
        compressed: Vec<QuantizedResult>,
        manifest: Manifest,
        spent: &UsageCounters,
        seconds: f64,
    ) -> Self {
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        Self {
            name: name.to_owned(),
            students,
            compressed,
            manifest,
            teachers: TeacherUsage {
                calls: read(&spent.calls),
                remembered: read(&spent.remembered),
                retries: read(&spent.retries),
                prompt_tokens: read(&spent.prompt_tokens),
                completion_tokens: read(&spent.completion_tokens),
            },
            wall_seconds: seconds,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Formats the students and quantized versions as a table for the terminal.
    pub fn table(&self) -> String {
        let levels: std::collections::BTreeSet<&String> =
            self.students.iter().flat_map(|student| student.mean_cot_tokens.keys()).collect();
        let mut levels: Vec<&String> = levels.into_iter().collect();
        levels.sort_by_key(|level| ["easy", "medium", "hard"].iter().position(|name| name == level));
        let best_k =
            self.students.iter().filter_map(|s| s.pass_at_k.keys().max()).max().copied().unwrap_or(1);
        let mut text = format!(
            "{:<14} {:>9} {:>15} {:>8}",
            "student",
            "accuracy",
            "95 % interval",
            format!("pass@{best_k}")
        );
        for level in &levels {
            text.push_str(&format!(" {:>8} {:>7}", level, "tokens"));
        }
        for student in self.students.iter().chain(self.compressed.iter().map(|form| &form.figures)) {
            text.push_str(&format!(
                "\n{:<14} {:>7.1} % {:>15} {:>6.1} %",
                student.name,
                student.accuracy,
                format!("{:.1} to {:.1}", student.ci_low, student.ci_high),
                student.pass_at_k.get(&best_k).copied().unwrap_or_default()
            ));
            for level in &levels {
                let accuracy = student.details.accuracy_by_level.get(*level).copied().unwrap_or_default();
                let tokens = student.mean_cot_tokens.get(*level).copied().unwrap_or_default();
                text.push_str(&format!(" {accuracy:>6.1} % {tokens:>7.0}"));
            }
        }
        text
    }
}

/// Returns name and curves of every training of the run, in their order.
fn training_curves(folder: &Path) -> Vec<(&'static str, String)> {
    ["reward-rv", "reward-cd", "answers_only", "distilled", "kd", "dpo", "grpo"]
        .into_iter()
        .filter_map(|name| {
            let entries = training_view::read_log(&folder.join("train").join(name));
            (!entries.is_empty()).then(|| (name, training_view::render_curves(&entries)))
        })
        .collect()
}

/// Returns histograms of RV by CD before and after sampling, as SVG.
fn score_histograms(folder: &Path) -> Vec<String> {
    [("score", "before the sampling"), ("sample", "after it")]
        .into_iter()
        .filter_map(|(stage, title)| {
            let histogram = selection::histogram(&folder.join("stages").join(format!("{stage}.jsonl")))?;
            let title = format!("{} traces {title}", histogram.scored_count());
            Some(selection::score_histogram(&histogram, &title))
        })
        .collect()
}

/// Writes `report.json` and `report.html` to a run folder.
pub fn write_report(folder: &Path, report: &Report) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    write_file(&folder.join("report.json"), format!("{json}\n").as_bytes())?;
    let mut environment = Environment::new();
    environment.add_template("report.html", include_str!("report.html.jinja"))?;
    let html = environment.get_template("report.html")?.render(context! {
        report => minijinja::Value::from(Serde(report)),
        style => training_view::CURVES_CSS,
        trainings => training_curves(folder),
        histograms => score_histograms(folder),
    })?;
    Ok(write_file(&folder.join("report.html"), html.as_bytes())?)
}

/// Reads the report of a run folder. Fails if it is missing or damaged.
pub fn read_report(folder: &Path) -> anyhow::Result<Report> {
    let path = folder.join("report.json");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read `{}`; run `potstill evaluate` first", path.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// A quantized version of the last student.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizedResult {
    /// File and its similarity to the f32 model.
    pub written: QuantizedFile,
    /// Accuracy of the student itself, in percent.
    pub before: f64,
    /// Loss of accuracy in points; negative for a gain.
    pub lost: f64,
    /// Whether the loss is within the recipe's limit, so the version was published.
    pub published: bool,
    /// Metrics of the quantized version.
    pub figures: StudentResult,
}
