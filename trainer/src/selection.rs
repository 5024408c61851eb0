//! Effect of a selection of traces on RV and CD: histograms as SVG for the report, and a table that compares policies
//! before training. The policies themselves are in `potstill_data::sampler`.

use std::path::Path;

use potstill_data::jsonl::iter_records;
use potstill_data::records::{Scores, Trace};
use potstill_data::sampler::{
    SamplingCandidate, SamplingConfig, ScoreHistogram, SelectionRule, select_traces,
};
use serde::Serialize;

/// Size of a cell of the picture in pixels.
const CELL_PIXELS: usize = 22;

/// Returns the histogram of a stage's traces. Returns `None` if the file is missing or damaged, or if no trace has
/// scores.
pub fn histogram(file: &Path) -> Option<ScoreHistogram> {
    let mut scores = Vec::new();
    for row in iter_records::<Trace>(file).ok()? {
        scores.push(row.ok()?.1.scores.unwrap_or_default());
    }
    let histogram = ScoreHistogram::from_scores(scores);
    (histogram.scored_count() > 0).then_some(histogram)
}

/// Draws the histogram as SVG: CD on the horizontal axis, RV on the vertical axis. Darker cells have more traces.
pub fn score_histogram(histogram: &ScoreHistogram, title: &str) -> String {
    let most = f64::from(histogram.counts.iter().flatten().copied().max().unwrap_or(0).max(1));
    let (left, top, side) = (46, 26, CELL_PIXELS * 10);
    let mut svg = format!(
        r#"<svg class="histogram" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{title}"><text x="{left}" y="16" class="title">{title}</text>"#,
        left + side + 60,
        top + side + 40
    );
    for (rv, row) in histogram.counts.iter().enumerate() {
        let y = top + (9 - rv) * CELL_PIXELS;
        for (cd, count) in row.iter().enumerate() {
            let x = left + cd * CELL_PIXELS;
            // The square root makes small counts easier to distinguish.
            let share = (f64::from(*count) / most).sqrt();
            svg.push_str(&format!(
                r##"<rect x="{x}" y="{y}" width="{CELL_PIXELS}" height="{CELL_PIXELS}" fill="#3b76b8" fill-opacity="{share:.3}" stroke="#d8dee6"><title>RV {rv}, CD {cd}: {count}</title></rect>"##
            ));
        }
        svg.push_str(&format!(r#"<text x="{}" y="{}" text-anchor="end">{rv}</text>"#, left - 6, y + 16));
        svg.push_str(&format!(
            r#"<text x="{}" y="{}" text-anchor="middle">{rv}</text>"#,
            left + rv * CELL_PIXELS + CELL_PIXELS / 2,
            top + side + 15
        ));
    }
    svg.push_str(&format!(
        r#"<text x="14" y="{}" text-anchor="middle">RV</text><text x="{}" y="{}" text-anchor="middle">CD</text></svg>"#,
        top + side / 2,
        left + side / 2,
        top + side + 32
    ));
    svg
}

/// Selection by one policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SelectionStats {
    /// Name of the policy.
    pub policy: String,
    /// Number of chosen traces.
    pub traces: usize,
    /// Number of problems with at least one chosen trace.
    pub problems: usize,
    /// Mean RV of the chosen traces with scores.
    pub rv: f64,
    /// Mean CD of the chosen traces with scores.
    pub cd: f64,
    /// Mean absolute difference between RV and CD.
    pub gap: f64,
    /// Fraction of scored traces within the student's window of CD, 0 to 1.
    pub in_window: f64,
    /// Completion tokens of all chosen traces.
    pub tokens: u64,
}

/// Compares all traces, the recipe's policy and the other published policies on the traces of `file`.
pub fn compare_policies(file: &Path, policy: &SamplingConfig) -> anyhow::Result<Vec<SelectionStats>> {
    let (mut candidates, mut tokens) = (Vec::<SamplingCandidate>::new(), Vec::new());
    for row in iter_records::<Trace>(file)? {
        let (_, trace) = row?;
        let candidate = SamplingCandidate::from_trace(&trace);
        if candidates.last().is_none_or(|last| last.id != candidate.id) {
            candidates.push(candidate);
            tokens.push(trace.completion_tokens);
        }
    }
    let mut choices = Vec::new();
    let all: Vec<usize> = (0..candidates.len()).collect();
    choices.push(selection_stats("all traces", &all, &candidates, &tokens, policy));
    for (name, selection) in
        [("window", SelectionRule::Window), ("range", SelectionRule::Range), ("bins", SelectionRule::Bins)]
    {
        let other = SamplingConfig { selection, ..policy.clone() };
        let mark = if selection == policy.selection { " (the recipe's)" } else { "" };
        let chosen = select_traces(&candidates, &other);
        choices.push(selection_stats(&format!("{name}{mark}"), &chosen, &candidates, &tokens, policy));
    }
    Ok(choices)
}

/// Computes the statistics of a selection.
fn selection_stats(
    name: &str,
    chosen: &[usize],
    candidates: &[SamplingCandidate],
    tokens: &[u64],
    policy: &SamplingConfig,
) -> SelectionStats {
    let scores: Vec<Scores> = chosen.iter().map(|index| candidates[*index].scores).collect();
    let histogram = ScoreHistogram::from_scores(scores);
    let (least, most) = policy.cd_window();
    let problems: std::collections::HashSet<u64> =
        chosen.iter().map(|index| candidates[*index].problem).collect();
    SelectionStats {
        policy: name.to_owned(),
        traces: chosen.len(),
        problems: problems.len(),
        rv: histogram.mean(|rv, _| rv),
        cd: histogram.mean(|_, cd| cd),
        gap: histogram.mean(|rv, cd| (rv - cd).abs()),
        in_window: histogram
            .mean(|_, cd| f64::from(u8::from((f64::from(least)..=f64::from(most)).contains(&cd)))),
        tokens: chosen.iter().map(|index| tokens[*index]).sum(),
    }
}

/// Formats the comparison as a table for the terminal.
pub fn table(choices: &[SelectionStats]) -> String {
    let mut text = format!(
        "{:<24} {:>8} {:>9} {:>8} {:>8} {:>9} {:>10} {:>12}\n",
        "policy", "traces", "problems", "mean RV", "mean CD", "|RV - CD|", "in window", "tokens"
    );
    for choice in choices {
        text.push_str(&format!(
            "{:<24} {:>8} {:>9} {:>8.2} {:>8.2} {:>9.2} {:>8.0} % {:>12}\n",
            choice.policy,
            choice.traces,
            choice.problems,
            choice.rv,
            choice.cd,
            choice.gap,
            100.0 * choice.in_window,
            choice.tokens
        ));
    }
    text
}
