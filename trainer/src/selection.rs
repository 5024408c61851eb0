//! Effect of a selection of traces on RV and CD: histograms as SVG for the report, and a table that compares policies
//! before training. The policies themselves are in `potstill_data::sampler`.

use std::path::Path;

use potstill_data::jsonl::each_record;
use potstill_data::records::{Cot, Scores};
use potstill_data::sampler::{Candidate, Histogram, SamplePolicy, Selection, choose};
use serde::Serialize;

/// Size of a cell of the picture in pixels.
const CELL: usize = 22;

/// Returns the histogram of a stage's traces. Returns `None` if the file is missing or damaged, or if no trace has
/// scores.
pub fn histogram(file: &Path) -> Option<Histogram> {
    let mut scores = Vec::new();
    for row in each_record::<Cot>(file).ok()? {
        scores.push(row.ok()?.1.scores.unwrap_or_default());
    }
    let histogram = Histogram::of(scores);
    (histogram.scored() > 0).then_some(histogram)
}

/// Draws the histogram as SVG: CD on the horizontal axis, RV on the vertical axis. Darker cells have more traces.
pub fn picture(histogram: &Histogram, title: &str) -> String {
    let most = f64::from(histogram.counts.iter().flatten().copied().max().unwrap_or(0).max(1));
    let (left, top, side) = (46, 26, CELL * 10);
    let mut svg = format!(
        r#"<svg class="histogram" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{title}"><text x="{left}" y="16" class="title">{title}</text>"#,
        left + side + 60,
        top + side + 40
    );
    for (rv, row) in histogram.counts.iter().enumerate() {
        let y = top + (9 - rv) * CELL;
        for (cd, count) in row.iter().enumerate() {
            let x = left + cd * CELL;
            // The square root makes small counts easier to distinguish.
            let share = (f64::from(*count) / most).sqrt();
            svg.push_str(&format!(
                r##"<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#3b76b8" fill-opacity="{share:.3}" stroke="#d8dee6"><title>RV {rv}, CD {cd}: {count}</title></rect>"##
            ));
        }
        svg.push_str(&format!(r#"<text x="{}" y="{}" text-anchor="end">{rv}</text>"#, left - 6, y + 16));
        svg.push_str(&format!(
            r#"<text x="{}" y="{}" text-anchor="middle">{rv}</text>"#,
            left + rv * CELL + CELL / 2,
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
pub struct Choice {
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
pub fn compare(file: &Path, policy: &SamplePolicy) -> anyhow::Result<Vec<Choice>> {
    let (mut candidates, mut tokens) = (Vec::<Candidate>::new(), Vec::new());
    for row in each_record::<Cot>(file)? {
        let (_, trace) = row?;
        let candidate = Candidate::of(&trace);
        if candidates.last().is_none_or(|last| last.id != candidate.id) {
            candidates.push(candidate);
            tokens.push(trace.completion_tokens);
        }
    }
    let mut choices = Vec::new();
    let all: Vec<usize> = (0..candidates.len()).collect();
    choices.push(describe("all traces", &all, &candidates, &tokens, policy));
    for (name, selection) in
        [("window", Selection::Window), ("range", Selection::Range), ("bins", Selection::Bins)]
    {
        let other = SamplePolicy { selection, ..policy.clone() };
        let mark = if selection == policy.selection { " (the recipe's)" } else { "" };
        let chosen = choose(&candidates, &other);
        choices.push(describe(&format!("{name}{mark}"), &chosen, &candidates, &tokens, policy));
    }
    Ok(choices)
}

/// Computes the statistics of a selection.
fn describe(
    name: &str,
    chosen: &[usize],
    candidates: &[Candidate],
    tokens: &[u64],
    policy: &SamplePolicy,
) -> Choice {
    let scores: Vec<Scores> = chosen.iter().map(|index| candidates[*index].scores).collect();
    let histogram = Histogram::of(scores);
    let (least, most) = policy.window();
    let problems: std::collections::HashSet<u64> =
        chosen.iter().map(|index| candidates[*index].problem).collect();
    Choice {
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
pub fn table(choices: &[Choice]) -> String {
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
