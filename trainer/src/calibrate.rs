//! `potstill calibrate`: measures how well the judge of RV and CD agrees with known scores. The judge scores each trace
//! several times. The report contains the error, also by band of scores, and the spread between repeats.

use std::path::PathBuf;

use anyhow::Context;
use potstill_cot::executor::{
    Stage, StageCounts, StageError, StageOutcome, channel_from_records, spawn_stage,
};
use potstill_cot::prompts::PromptRole;
use potstill_cot::rv_cd::parse_score;
use potstill_data::jsonl::read_records;
use potstill_data::records::Problem;
use potstill_learn::reward_model::Agreement;
use serde::{Deserialize, Serialize};

use crate::pipeline::Run;

/// Built-in traces, scored by the definitions of the scales.
const BUILTIN_SET: &str = include_str!("calibration.jsonl");

/// Arguments of `potstill calibrate`.
#[derive(clap::Args)]
pub struct CalibrateArguments {
    /// JSON lines with `problem`, `completion`, `rv` and `cd` (0 to 9); a small built-in set if left out.
    #[arg(long, value_name = "FILE.jsonl")]
    pub set: Option<PathBuf>,
    /// Times to score each trace: first greedily, as a run does, then sampled with other seeds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub repeats: u32,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// A trace with known scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KnownScores {
    /// Text of the problem.
    pub problem: String,
    /// Reasoning and answer.
    pub completion: String,
    /// Reasoning verbosity, 0 to 9.
    pub rv: u8,
    /// Cognitive difficulty, 0 to 9.
    pub cd: u8,
}

/// Scores that the judge gave to one trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JudgedTrace {
    known: KnownScores,
    /// RV of each repeat; `None` where the judge's completion could not be parsed.
    rv: Vec<Option<u8>>,
    /// CD of each repeat, in the same form.
    cd: Vec<Option<u8>>,
}

/// Calibration results of one scale.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScaleReport {
    /// Agreement of the first repeat with the known scores. A run makes the same request.
    pub agreement: Agreement,
    /// Fraction of first repeats that equal the known score, 0 to 1.
    pub exact: f64,
    /// Number of completions, over all repeats, without a parsable score.
    pub unscored: usize,
    /// Mean over traces of the largest difference between repeats, in points.
    pub spread: f64,
}

/// Results of a calibration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Calibration {
    /// Name of the judge model.
    pub model: String,
    /// Number of traces.
    pub traces: usize,
    /// Times that each trace was scored.
    pub repeats: u32,
    /// Results for reasoning verbosity.
    pub rv: ScaleReport,
    /// Results for cognitive difficulty.
    pub cd: ScaleReport,
}

/// Stage that scores each trace `repeats` times.
struct CalibrationStage {
    judge: potstill_cot::difficulty::Judge,
    repeats: u32,
}

impl Stage for CalibrationStage {
    type In = KnownScores;
    type Out = JudgedTrace;

    fn name(&self) -> &'static str {
        "calibrate"
    }

    async fn process(&self, known: KnownScores) -> Result<StageOutcome<JudgedTrace>, StageError> {
        let problem = Problem::new(known.problem.clone(), None, "calibration");
        let (mut rv, mut cd) = (Vec::new(), Vec::new());
        for variation in 0..self.repeats {
            let mut judge = self.judge.clone();
            judge.repetition = variation;
            for (role, scores) in [(PromptRole::Rv, &mut rv), (PromptRole::Cd, &mut cd)] {
                scores.push(
                    judge.assess_completion("score", role, &problem, &known.completion, parse_score).await?,
                );
            }
        }
        Ok(StageOutcome::keep(vec![JudgedTrace { known, rv, cd }]))
    }
}

/// Scores the known traces with the judge of `run_`'s recipe. Fails if the set is empty or contains a score above 9.
pub async fn calibrate_judge(run_: &Run, arguments: &CalibrateArguments) -> anyhow::Result<Calibration> {
    let known: Vec<KnownScores> = match &arguments.set {
        Some(path) => read_records(path)?,
        None => BUILTIN_SET
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .context("the built-in set is damaged")?,
    };
    anyhow::ensure!(!known.is_empty(), "the set holds no trace");
    anyhow::ensure!(known.iter().all(|known| known.rv <= 9 && known.cd <= 9), "scores go from 0 to 9");
    let judge = run_.score_judge()?;
    let model = judge.model.clone();
    let stage = CalibrationStage { judge, repeats: arguments.repeats };
    let (mut output, handle) =
        spawn_stage(stage, channel_from_records(known), 16, std::sync::Arc::new(StageCounts::default()), ());
    let mut judged = Vec::new();
    while let Some(row) = output.recv().await {
        judged.push(row);
    }
    handle.await??;
    Ok(Calibration {
        model,
        traces: judged.len(),
        repeats: arguments.repeats,
        rv: scale_report(judged.iter().map(|row| (row.known.rv, row.rv.as_slice()))),
        cd: scale_report(judged.iter().map(|row| (row.known.cd, row.cd.as_slice()))),
    })
}

/// Computes the results of one scale from pairs of known score and repeats.
fn scale_report<'a>(rows: impl Iterator<Item = (u8, &'a [Option<u8>])>) -> ScaleReport {
    let (mut predicted, mut truth, mut unscored, mut exact) = (Vec::new(), Vec::new(), 0, 0usize);
    let mut spreads = Vec::new();
    for (known, said) in rows {
        unscored += said.iter().filter(|score| score.is_none()).count();
        if let Some(Some(first)) = said.first() {
            predicted.push(f32::from(*first) / 9.0);
            truth.push(known);
            exact += usize::from(*first == known);
        }
        let readable = said.iter().flatten();
        if let (Some(least), Some(most)) = (readable.clone().min(), readable.max()) {
            spreads.push(f64::from(most - least));
        }
    }
    ScaleReport {
        exact: exact as f64 / truth.len().max(1) as f64,
        agreement: Agreement::compare(&predicted, &truth),
        unscored,
        spread: spreads.iter().sum::<f64>() / spreads.len().max(1) as f64,
    }
}

/// Formats the results as text for the terminal.
pub fn table(found: &Calibration) -> String {
    let mut text = format!(
        "`{}` on {} traces, each scored {} time(s)\n\n{:<6} {:>6} {:>13} {:>9} {:>8} {:>10} {:>9} {:>8}\n",
        found.model,
        found.traces,
        found.repeats,
        "scale",
        "MAE",
        "(of the mean)",
        "Spearman",
        "exact",
        "within 1",
        "unscored",
        "spread"
    );
    for (name, scale) in [("RV", &found.rv), ("CD", &found.cd)] {
        let of = &scale.agreement;
        text.push_str(&format!(
            "{name:<6} {:>6.2} {:>13.2} {:>9.2} {:>6.0} % {:>8.0} % {:>9} {:>8.2}\n",
            of.mae,
            of.mae_of_mean,
            of.spearman,
            100.0 * scale.exact,
            100.0 * of.within_one,
            scale.unscored,
            scale.spread
        ));
    }
    for (name, scale) in [("RV", &found.rv), ("CD", &found.cd)] {
        let bands: Vec<String> = scale
            .agreement
            .by_band
            .iter()
            .map(|(band, (count, mean))| format!("{band}: {mean:.1} ({count})"))
            .collect();
        text.push_str(&format!(
            "{name} said on average for each band of known scores: {}\n",
            bands.join(", ")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_set_covers_every_band_of_both_scales() {
        let known: Vec<KnownScores> =
            BUILTIN_SET.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for scale in [|known: &KnownScores| known.rv, |known: &KnownScores| known.cd] {
            let bands: std::collections::BTreeSet<u8> = known.iter().map(|known| scale(known) / 2).collect();
            assert_eq!(bands.len(), 5, "every band of two points");
        }
    }

    #[test]
    fn unparsable_repeats_count_as_unscored() {
        let rows: [(u8, &[Option<u8>]); 3] =
            [(4, &[Some(4), Some(6)]), (8, &[Some(6), None]), (2, &[None, Some(2)])];
        let report = scale_report(rows.into_iter());
        assert_eq!((report.agreement.traces, report.unscored), (2, 2));
        assert!((report.agreement.mae - 1.0).abs() < 1e-6 && (report.spread - 2.0 / 3.0).abs() < 1e-9);
    }
}
