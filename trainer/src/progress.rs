//! Progress display: bars on a terminal, plain lines elsewhere. All output goes to stderr, so that stdout contains only
//! results. Status files and HTML pages are written elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use potstill_cot::executor::StageCounts;

/// Interval between two plain lines of one [`Line`].
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Progress display of a run. Clones share one display.
#[derive(Clone)]
pub struct Progress {
    bars: Option<MultiProgress>,
    started: Instant,
}

/// Progress of one stage or training phase.
pub struct ProgressLine {
    bar: Option<ProgressBar>,
    name: String,
    started: Instant,
    last_plain: Mutex<Instant>,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// Creates a display, with bars if stderr is a terminal.
    pub fn new() -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { bars, started: Instant::now() }
    }

    /// Prints a message with the time since the start.
    pub fn message(&self, text: impl AsRef<str>) {
        let line = format!("[{:>6.1} s] {}", self.started.elapsed().as_secs_f64(), text.as_ref());
        match &self.bars {
            Some(bars) => {
                let _no_terminal = bars.println(line);
            }
            None => print(&line),
        }
    }

    /// Adds a line for `total` steps; 0 means that the number is unknown.
    pub fn add_line(&self, name: &str, total: u64) -> ProgressLine {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(total));
            let template = if total > 0 {
                "{prefix:<12} [{bar:28}] {pos:>6}/{len:<6} {elapsed_precise} {msg}"
            } else {
                "{prefix:<12} {pos:>6} {elapsed_precise} {msg}"
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(name.to_owned());
            bar
        });
        let now = Instant::now();
        ProgressLine { bar, name: name.to_owned(), started: now, last_plain: Mutex::new(now) }
    }

    /// Shows the counts of stages until `done` resolves, then prints a summary of each.
    pub async fn show_until(
        &self,
        stages: &[(&'static str, Arc<StageCounts>)],
        total: u64,
        done: impl Future<Output = ()>,
    ) {
        self.show_until_with_remark(stages, total, String::new, done).await;
    }

    /// Does the same as [`Progress::watch`], with a remark after the counts. A single stage also shows the time left.
    pub async fn show_until_with_remark(
        &self,
        stages: &[(&'static str, Arc<StageCounts>)],
        total: u64,
        remark: impl Fn() -> String,
        done: impl Future<Output = ()>,
    ) {
        let begun = Instant::now();
        let lines: Vec<ProgressLine> = stages
            .iter()
            .map(|(name, _)| self.add_line(name, if stages.len() == 1 { total } else { 0 }))
            .collect();
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        tokio::pin!(done);
        loop {
            let over = tokio::select! {
                () = &mut done => true,
                _ = ticks.tick() => false,
            };
            for (line, (_, counts)) in lines.iter().zip(stages) {
                let summary = counts.summary();
                let dropped: usize = summary.dropped.values().sum();
                let position = counts.done.load(Ordering::Relaxed) as u64;
                let mut message = format!("{} in, {} kept, {dropped} dropped", summary.taken, summary.kept);
                message.push_str(&remark());
                if stages.len() == 1 && (1..total).contains(&position) {
                    let left = begun.elapsed().as_secs_f64() * (total - position) as f64 / position as f64;
                    message.push_str(&format!(", {left:.0} s left"));
                }
                line.update(position, &message);
            }
            if over {
                for (line, (name, counts)) in lines.iter().zip(stages) {
                    let summary = counts.summary();
                    let reasons: Vec<String> =
                        summary.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
                    let reasons =
                        if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
                    line.clear();
                    self.message(format!("{name}: {} in, {} kept{reasons}", summary.taken, summary.kept));
                }
                return;
            }
        }
    }
}

impl ProgressLine {
    /// Updates position and message. Without a terminal, prints at most one line per interval.
    pub fn update(&self, position: u64, message: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(position);
                bar.set_message(message.to_owned());
            }
            None => {
                let mut last = self.last_plain.lock().unwrap_or_else(PoisonError::into_inner);
                if last.elapsed() >= PLAIN_INTERVAL {
                    *last = Instant::now();
                    print(&format!(
                        "  {} after {:.0} s: {message}",
                        self.name,
                        self.started.elapsed().as_secs_f64()
                    ));
                }
            }
        }
    }

    /// Removes the bar.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[expect(clippy::print_stderr, reason = "progress is what stderr is for")]
fn print(line: &str) {
    eprintln!("{line}");
}
