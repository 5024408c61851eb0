//! `potstill compare`: compares two evaluations problem by problem. Statistics are in [`super::figures`].

use std::path::Path;

use anyhow::Context;
use potstill_data::jsonl::read_records;

use super::figures::{Comparison, compare_samples};
use super::{EvalReport, EvalSample};

/// Compares the benchmarks that both run folders contain. Fails if a report is missing, or if there is no common
/// benchmark.
pub fn compare_runs(a: &Path, b: &Path) -> anyhow::Result<Vec<Comparison>> {
    let report = |folder: &Path| -> anyhow::Result<EvalReport> {
        let path = folder.join("report.json");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("cannot read `{}`; run `potstill eval` with --out there first", path.display())
        })?;
        serde_json::from_str(&text)
            .with_context(|| format!("`{}` is no report of an evaluation", path.display()))
    };
    let (first, second) = (report(a)?, report(b)?);
    let mut found = Vec::new();
    for figures in &first.benchmarks {
        if !second.benchmarks.iter().any(|other| other.bench == figures.bench) {
            continue;
        }
        let samples = |folder: &Path| -> anyhow::Result<Vec<EvalSample>> {
            Ok(read_records(&folder.join(format!("{}.jsonl", figures.bench)))?)
        };
        found.extend(compare_samples(&figures.bench, &samples(a)?, &samples(b)?));
    }
    anyhow::ensure!(!found.is_empty(), "the two runs have no benchmark in common");
    Ok(found)
}

/// Formats the comparisons as a table for the terminal.
pub fn comparison_table(found: &[Comparison]) -> String {
    let mut text = format!(
        "{:<14} {:>8} {:>8} {:>8} {:>11} {:>17} {:>7} {:>6} {:>7}",
        "benchmark",
        "problems",
        "first",
        "second",
        "difference",
        "95 % interval",
        "better",
        "worse",
        "tokens"
    );
    for row in found {
        text.push_str(&format!(
            "\n{:<14} {:>8} {:>6.1} % {:>6.1} % {:>+9.1} pt {:>17} {:>7} {:>6} {:>6.2}x",
            row.bench,
            row.problems,
            row.a,
            row.b,
            row.difference,
            format!("{:+.1} to {:+.1}", row.ci_low, row.ci_high),
            row.better,
            row.worse,
            row.length_ratio
        ));
    }
    text
}
