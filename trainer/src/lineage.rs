//! `potstill why`: shows where a record comes from, and its outcome at every stage. Reads only the run folder; no model
//! is called.

use std::path::Path;

use anyhow::Context;
use potstill_cot::rewrite::RewriteCandidate;
use potstill_data::journal::{Entry, Journal};
use potstill_data::records::{Dropped, Problem, Subject, Trace};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};

use crate::stage_id::{RecordKind, StageId};

/// Maximum number of traces listed for one problem.
const MAX_LISTED_TRACES: usize = 200;

/// Outcome of a record at one stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageOutcome {
    /// Name of the stage.
    pub stage: &'static str,
    /// `kept`, `rewritten`, or the drop reason.
    pub outcome: String,
    /// Result of the stage, such as task, difficulty, verdict or scores.
    pub found: String,
}

/// Request that produced a trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TeacherRequest {
    /// Id of the request in the journal.
    pub request: ContentId,
    /// Name of the teacher model.
    pub teacher: String,
    /// Hash of the prompt template.
    pub prompt_hash: ContentId,
    /// Sampling temperature.
    pub temperature: f64,
    /// Sampling seed.
    pub seed: i64,
    /// Usage and finish reason, if the journal still has the completion.
    pub answer: Option<CompletionUsage>,
}

/// Usage of a completion, from the journal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompletionUsage {
    prompt_tokens: u64,
    completion_tokens: u64,
    seconds: f64,
    finish_reason: String,
}

/// Lineage of one trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TraceLineage {
    /// Id of the trace.
    pub id: ContentId,
    /// Name of the teacher model.
    pub teacher: String,
    /// Request that produced the trace; `None` if the trace came with its source.
    pub call: Option<TeacherRequest>,
    /// Outcome at each stage.
    pub steps: Vec<StageOutcome>,
    /// Trace from which this one was rewritten.
    pub parent: Option<Box<TraceLineage>>,
}

/// Lineage of a problem with its traces.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lineage {
    /// The problem.
    pub problem: Problem,
    /// Outcome of the problem at each stage.
    pub steps: Vec<StageOutcome>,
    /// The requested trace, or all traces of the requested problem.
    pub traces: Vec<TraceLineage>,
}

/// Returns the lineage of a trace or problem, given its id or at least six first digits. Fails if there is no match, or
/// if several traces match.
pub fn explain(folder: &Path, row: &str) -> anyhow::Result<Lineage> {
    let row = row.trim().to_lowercase();
    anyhow::ensure!(
        row.len() >= 6 && row.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "`{row}` is no id: give at least six of the hexadecimal digits that stand as `id` in the stage files"
    );
    anyhow::ensure!(folder.join("run.json").exists(), "`{}` holds no run", folder.display());
    let stages = StageReader { folder, journal: Journal::read_only(&folder.join("journal.log")).ok() };
    let mut traces = stages.find_traces(&row, |trace| trace.id.as_str().starts_with(&row))?;
    let problem = match traces.first() {
        Some(trace) => {
            anyhow::ensure!(
                traces.iter().all(|other| other.id == trace.id),
                "`{row}` begins several ids; give more digits"
            );
            // The last entry is the trace as the last stage wrote it.
            traces = traces.pop().into_iter().collect();
            traces[0].problem.clone()
        }
        None => {
            let problem = stages.find_problem(&row)?.with_context(|| {
                format!(
                    "no problem and no trace in `{}` has an id that begins with `{row}`",
                    folder.display()
                )
            })?;
            let id = problem.id.as_str().to_owned();
            traces = stages.find_traces(&id, |trace| trace.problem.id == problem.id)?;
            traces.sort_by(|a, b| a.id.cmp(&b.id));
            traces.dedup_by(|a, b| a.id == b.id);
            traces.truncate(MAX_LISTED_TRACES);
            problem
        }
    };
    let steps = stages.problem_outcomes(&problem.id)?;
    let traces = traces.iter().map(|trace| stages.trace_lineage(trace)).collect::<anyhow::Result<_>>()?;
    Ok(Lineage { problem, steps, traces })
}

/// Readers for the stage files and the journal of a run.
struct StageReader<'a> {
    folder: &'a Path,
    journal: Option<Journal>,
}

/// A row of a stage file.
enum StageRow {
    Kept(Box<Trace>),
    Rewritten(Box<RewriteCandidate>),
    Dropped(Dropped),
}

impl StageReader<'_> {
    /// Calls `take` for every line of a stage file that contains `text`. A missing file counts as empty.
    fn matching_lines(
        &self,
        file: &str,
        text: &str,
        mut take: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        use std::io::BufRead;
        let path = self.folder.join("stages").join(file);
        if !path.exists() {
            return Ok(());
        }
        let file = std::fs::File::open(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
        for line in std::io::BufReader::new(file).lines() {
            let line = line?;
            if line.contains(text) {
                take(&line).with_context(|| format!("`{}` is damaged", path.display()))?;
            }
        }
        Ok(())
    }

    /// Returns the kept and dropped rows of a stage whose line contains `text`.
    fn matching_rows(&self, stage: &'static str, text: &str) -> anyhow::Result<Vec<StageRow>> {
        let mut rows = Vec::new();
        self.matching_lines(&format!("{stage}.jsonl"), text, |line| {
            rows.push(if stage == "rewrite" {
                StageRow::Rewritten(serde_json::from_str(line)?)
            } else {
                StageRow::Kept(serde_json::from_str(line)?)
            });
            Ok(())
        })?;
        self.matching_lines(&format!("{stage}.dropped.jsonl"), text, |line| {
            rows.push(StageRow::Dropped(serde_json::from_str(line)?));
            Ok(())
        })?;
        Ok(rows)
    }

    /// Returns all versions of traces that satisfy `is`, in the order of the stages.
    fn find_traces(&self, text: &str, is: impl Fn(&Trace) -> bool) -> anyhow::Result<Vec<Trace>> {
        let mut found = Vec::new();
        for stage in StageId::with_records(RecordKind::Trace).map(StageId::name) {
            for row in self.matching_rows(stage, text)? {
                match row {
                    StageRow::Kept(trace) => found.push(*trace),
                    StageRow::Rewritten(candidate) => {
                        found.push(candidate.cot);
                        found.extend(candidate.original);
                    }
                    StageRow::Dropped(Dropped { subject: Subject::Trace(trace), .. }) => found.push(*trace),
                    StageRow::Dropped(_) => {}
                }
            }
        }
        found.retain(is);
        Ok(found)
    }

    /// Returns the problem whose id starts with `text`, as the last stage kept it. A dropped problem is returned only
    /// if no earlier stage kept it.
    fn find_problem(&self, text: &str) -> anyhow::Result<Option<Problem>> {
        let mut found = None;
        for stage in StageId::with_records(RecordKind::Problem).map(StageId::name) {
            self.matching_lines(&format!("{stage}.jsonl"), text, |line| {
                let problem: Problem = serde_json::from_str(line)?;
                if problem.id.as_str().starts_with(text) {
                    found = Some(problem);
                }
                Ok(())
            })?;
            self.matching_lines(&format!("{stage}.dropped.jsonl"), text, |line| {
                if let Subject::Problem(problem) = serde_json::from_str::<Dropped>(line)?.subject
                    && problem.id.as_str().starts_with(text)
                {
                    found.get_or_insert(*problem);
                }
                Ok(())
            })?;
        }
        Ok(found)
    }

    /// Returns the outcomes of a problem, including its samples that `generate` dropped.
    fn problem_outcomes(&self, id: &ContentId) -> anyhow::Result<Vec<StageOutcome>> {
        #[derive(Deserialize)]
        struct Sorted {
            id: ContentId,
            task: Option<String>,
            #[serde(default)]
            copies: Option<u32>,
        }
        let mut steps = Vec::new();
        for stage in StageId::with_records(RecordKind::Problem).map(StageId::name) {
            self.matching_lines(&format!("{stage}.jsonl"), id.as_str(), |line| {
                let row: Sorted = serde_json::from_str(line)?;
                if row.id == *id {
                    let found = match stage {
                        "classify" => row.task.unwrap_or_else(|| "no known task".to_owned()),
                        "resample" => format!("drawn {} time(s)", row.copies.unwrap_or(1)),
                        _ => String::new(),
                    };
                    steps.push(StageOutcome { stage, outcome: "kept".to_owned(), found });
                }
                Ok(())
            })?;
            self.matching_lines(&format!("{stage}.dropped.jsonl"), id.as_str(), |line| {
                let dropped: Dropped = serde_json::from_str(line)?;
                if let Subject::Problem(problem) = &dropped.subject
                    && problem.id == *id
                {
                    let found = dropped.like.map(|like| format!("like: {}", truncate_text(&like)));
                    steps.push(StageOutcome {
                        stage,
                        outcome: dropped.reason,
                        found: found.unwrap_or_default(),
                    });
                }
                Ok(())
            })?;
        }
        // Requests of `generate` that produced no trace.
        self.matching_lines("generate.dropped.jsonl", id.as_str(), |line| {
            let dropped: Dropped = serde_json::from_str(line)?;
            if let Subject::Problem(problem) = &dropped.subject
                && problem.id == *id
            {
                steps.push(StageOutcome {
                    stage: "generate",
                    outcome: dropped.reason,
                    found: "one sample".to_owned(),
                });
            }
            Ok(())
        })?;
        Ok(steps)
    }

    /// Returns the lineage of a trace, including its parents.
    fn trace_lineage(&self, trace: &Trace) -> anyhow::Result<TraceLineage> {
        let mut steps = Vec::new();
        for stage in StageId::with_records(RecordKind::Trace).map(StageId::name) {
            for row in self.matching_rows(stage, trace.id.as_str())? {
                match row {
                    StageRow::Kept(row) if row.id == trace.id => steps.push(kept_outcome(stage, &row)),
                    StageRow::Rewritten(row) if row.cot.id == trace.id => steps.push(StageOutcome {
                        stage,
                        outcome: "kept".to_owned(),
                        found: match row.cot.parent {
                            Some(parent) => format!("rewritten from {parent}"),
                            None => "as it is".to_owned(),
                        },
                    }),
                    StageRow::Rewritten(row)
                        if row.original.as_ref().is_some_and(|cot| cot.id == trace.id) =>
                    {
                        steps.push(StageOutcome {
                            stage,
                            outcome: "rewritten".to_owned(),
                            found: format!("into {}", row.cot.id),
                        });
                    }
                    StageRow::Dropped(Dropped { reason, subject: Subject::Trace(row), .. })
                        if row.id == trace.id =>
                    {
                        steps.push(StageOutcome { outcome: reason, ..kept_outcome(stage, &row) });
                    }
                    _ => {}
                }
            }
        }
        let call = trace.origin.asked.as_ref().map(|asked| TeacherRequest {
            request: asked.request.clone(),
            teacher: trace.origin.teacher.clone(),
            prompt_hash: asked.prompt_hash.clone(),
            temperature: asked.temperature,
            seed: asked.seed,
            answer: self.journal.as_ref().and_then(|journal| {
                let entry = journal.get(&asked.request).ok()??;
                let Entry { prompt_tokens, completion_tokens, seconds, .. } = *entry;
                let finish_reason = entry.finish_reason.clone();
                Some(CompletionUsage { prompt_tokens, completion_tokens, seconds, finish_reason })
            }),
        });
        let parent = match &trace.parent {
            None => None,
            Some(id) => {
                let parents = self.find_traces(id.as_str(), |other| other.id == *id)?;
                parents.last().map(|parent| self.trace_lineage(parent)).transpose()?.map(Box::new)
            }
        };
        Ok(TraceLineage { id: trace.id.clone(), teacher: trace.origin.teacher.clone(), call, steps, parent })
    }
}

/// Returns the outcome `kept` with the result of the stage.
fn kept_outcome(stage: &'static str, row: &Trace) -> StageOutcome {
    let found = match stage {
        "difficulty" => row.difficulty.map(|grade| format!("{grade:?}").to_lowercase()),
        "verify" => row.verdict.as_ref().map(|verdict| {
            let correct = verdict.correct.map_or("undecided", |right| if right { "right" } else { "wrong" });
            format!("{correct} by {:?}: {}", verdict.method, verdict.evidence).to_lowercase()
        }),
        "score" => row.scores.map(|scores| {
            let score = |value: Option<u8>| value.map_or("none".to_owned(), |value| value.to_string());
            format!("RV {}, CD {}", score(scores.rv), score(scores.cd))
        }),
        "generate" => Some(format!("{} tokens, {}", row.completion_tokens, row.finish_reason)),
        _ => None,
    };
    StageOutcome { stage, outcome: "kept".to_owned(), found: found.unwrap_or_default() }
}

/// Returns the first 160 characters of `text` on one line.
fn truncate_text(text: &str) -> String {
    let mut short: String = text.chars().take(160).map(|c| if c == '\n' { ' ' } else { c }).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Formats the lineage as text for the terminal.
pub fn lineage_table(lineage: &Lineage) -> String {
    let problem = &lineage.problem;
    let mut text =
        format!("problem {}\n  {}\n  from {}", problem.id, truncate_text(&problem.problem), problem.source);
    if let Some(answer) = &problem.answer {
        text.push_str(&format!(", answer {}", truncate_text(answer)));
    }
    text.push('\n');
    append_outcomes(&mut text, &lineage.steps, "  ");
    for trace in &lineage.traces {
        text.push('\n');
        append_trace(&mut text, trace, "");
    }
    if lineage.traces.is_empty() {
        text.push_str("\nno trace of it was written\n");
    }
    text
}

/// Appends the outcomes, one per line.
fn append_outcomes(text: &mut String, steps: &[StageOutcome], indent: &str) {
    for step in steps {
        text.push_str(&format!("{indent}{:<11} {:<14} {}\n", step.stage, step.outcome, step.found));
    }
}

/// Appends the lineage of a trace and, indented, of its parents.
fn append_trace(text: &mut String, trace: &TraceLineage, indent: &str) {
    text.push_str(&format!("{indent}trace {} by {}\n", trace.id, trace.teacher));
    match &trace.call {
        None => text.push_str(&format!("{indent}  brought along by its source\n")),
        Some(call) => {
            text.push_str(&format!(
                "{indent}  asked with prompt {}, temperature {}, seed {}, request {}\n",
                call.prompt_hash, call.temperature, call.seed, call.request
            ));
            if let Some(answer) = &call.answer {
                text.push_str(&format!(
                    "{indent}  answered in {:.1} s: {} + {} tokens, {}\n",
                    answer.seconds, answer.prompt_tokens, answer.completion_tokens, answer.finish_reason
                ));
            }
        }
    }
    append_outcomes(text, &trace.steps, &format!("{indent}  "));
    if let Some(parent) = &trace.parent {
        text.push_str(&format!("{indent}  its source:\n"));
        append_trace(text, parent, &format!("{indent}    "));
    }
}
