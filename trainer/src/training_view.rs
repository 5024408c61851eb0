//! HTML view of a training: curves of all metrics, the last sample, speed and memory. During a training, the view is
//! the run's `report.html` and reloads itself. Afterwards the report contains the curves.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use potstill_learn::checkpoint::LogEntry;
use potstill_learn::run::Progress;
use potstill_shared::durable::write_file;
use serde_json::Value;

/// Interval between two writes of the page.
const WRITE_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum number of points of a curve; longer histories are averaged.
const MAX_CURVE_POINTS: usize = 400;
/// Maximum number of characters of the sample.
const MAX_SAMPLE_CHARS: usize = 2000;

/// Live page of a running training.
pub struct TrainingDashboard {
    name: String,
    page: PathBuf,
    entries: Vec<LogEntry>,
    sample: String,
    tokens: usize,
    started: Instant,
    written: Instant,
}

impl TrainingDashboard {
    /// Creates the view of the training in `RUN/train/NAME`. The page is `RUN/report.html`.
    pub fn new(name: &str, folder: &Path) -> Self {
        let run = folder.parent().and_then(Path::parent).unwrap_or(folder);
        let now = Instant::now();
        Self {
            name: name.to_owned(),
            page: run.join("report.html"),
            entries: Vec::new(),
            sample: String::new(),
            tokens: 0,
            started: now,
            written: now,
        }
    }

    /// Records a step and writes the page at a fixed interval. A failed write is only logged.
    pub fn record_step(&mut self, now: &Progress<'_>) {
        self.entries.push(now.entry.clone());
        self.tokens += now.tokens;
        if let Some(sample) = now.sample {
            self.sample = sample.chars().take(MAX_SAMPLE_CHARS).collect();
        }
        if self.written.elapsed() >= WRITE_INTERVAL {
            self.written = Instant::now();
            let speed = self.tokens as f64 / self.started.elapsed().as_secs_f64();
            let mut page = format!(
                "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"5\">\
                 <title>{0}</title><style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; \
                 padding: 0 1em; color: #1c2430 }} {CURVES_CSS}</style><h1>Training {0}</h1>\
                 <p>Phase {1}, step {2} of {3}; {speed:.0} tokens/s, {4:.0} MB in memory.</p>{5}",
                escape_html(&self.name),
                escape_html(now.phase),
                now.step,
                now.steps,
                resident_bytes() as f64 / 1e6,
                render_curves(&self.entries)
            );
            if !self.sample.is_empty() {
                let _infallible =
                    write!(page, "<h2>The last sample</h2><pre>{}</pre>", escape_html(&self.sample));
            }
            page.push_str("</html>\n");
            if let Err(error) = write_file(&self.page, page.as_bytes()) {
                tracing::warn!(%error, "the page of the training could not be written");
            }
        }
    }
}

/// CSS of the curves, also used by the report.
pub const CURVES_CSS: &str = ".curves { display: flex; flex-wrap: wrap; gap: 1em } .curves figure { margin: 0 } \
    .curves svg { width: 18em; height: 7em; background: #f4f6f9 } .curves path { fill: none; stroke: #3b76b8; stroke-width: 1.5 } \
    .curves figcaption { font-size: .85em; color: #5b6673 } pre { white-space: pre-wrap; background: #f4f6f9; padding: .6em }";

/// Returns the log of a finished training, or an empty list if there is none.
pub fn read_log(folder: &Path) -> Vec<LogEntry> {
    let read = || -> Option<Vec<LogEntry>> {
        let state = std::fs::read_to_string(folder.join("trainer_state.json")).ok()?;
        let mut state: Value = serde_json::from_str(&state).ok()?;
        serde_json::from_value(state.get_mut("log_history")?.take()).ok()
    };
    read().unwrap_or_default()
}

/// Returns one SVG curve per metric. Values that are not finite are left out.
pub fn render_curves(entries: &[LogEntry]) -> String {
    let mut html = "<div class=\"curves\">".to_owned();
    let mut names: Vec<&str> = vec!["loss", "learning_rate", "grad_norm"];
    names.extend(entries.last().into_iter().flat_map(|entry| entry.metrics.keys().map(String::as_str)));
    for name in names {
        let value = |entry: &LogEntry| match name {
            "loss" => Some(entry.loss),
            "learning_rate" => Some(entry.learning_rate),
            "grad_norm" => Some(entry.grad_norm),
            other => entry.metrics.get(other).copied(),
        };
        let values: Vec<f64> = entries.iter().filter_map(value).filter(|value| value.is_finite()).collect();
        let Some(last) = values.last() else { continue };
        let _infallible = write!(
            html,
            "<figure>{}<figcaption>{}: {}</figcaption></figure>",
            render_curve(&downsample(&values)),
            escape_html(name),
            if last.abs() < 1e-3 { format!("{last:.1e}") } else { format!("{last:.4}") }
        );
    }
    html.push_str("</div>");
    html
}

/// Returns the means of equal segments, at most [`POINTS`] of them.
fn downsample(values: &[f64]) -> Vec<f64> {
    let size = values.len().div_ceil(MAX_CURVE_POINTS).max(1);
    values.chunks(size).map(|chunk| chunk.iter().sum::<f64>() / chunk.len() as f64).collect()
}

/// Draws a curve, scaled to its smallest and largest value.
fn render_curve(values: &[f64]) -> String {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = if high > low { high - low } else { 1.0 };
    let mut path = String::new();
    for (at, value) in values.iter().enumerate() {
        let x = 2.0 + 296.0 * at as f64 / (values.len() - 1).max(1) as f64;
        let y = 97.0 - 94.0 * (value - low) / span;
        let _infallible = write!(path, "{}{x:.1} {y:.1}", if at == 0 { "M" } else { "L" });
    }
    format!("<svg viewBox=\"0 0 300 100\" preserveAspectRatio=\"none\"><path d=\"{path}\"/></svg>")
}

/// Escapes text for HTML.
fn escape_html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Returns the resident memory of this process in bytes, or 0 if unknown.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn draws_one_curve_per_metric_and_escapes_names() {
        let entry = |step: usize, loss: f64| LogEntry {
            step,
            epoch: 0.0,
            loss,
            grad_norm: 1.0,
            learning_rate: 0.1,
            wall_time: 0.0,
            metrics: BTreeMap::from([("reward/<b>".to_owned(), 0.5)]),
        };
        let entries: Vec<LogEntry> =
            (0..1000).map(|i| entry(i, if i == 3 { f64::NAN } else { i as f64 })).collect();
        let html = render_curves(&entries);
        assert_eq!(html.matches("<svg").count(), 4);
        assert!(html.contains("reward/&lt;b&gt;") && !html.contains("NaN"));
        assert!(downsample(&vec![1.0; 1000]).len() <= MAX_CURVE_POINTS);
    }
}
