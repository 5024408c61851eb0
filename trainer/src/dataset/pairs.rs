//! Pairs of a better and a worse trace of one problem. DPO pairs a correct trace with an incorrect one. CogPO
//! (DistilQwen2.5-R1, stage 2) pairs traces by the gap between their classes.
//!
//! A correct trace is suitable if it was graded medium or not at all, or if a rewrite made it medium. Other correct
//! traces are unsuitable. The gap is small between suitable and unsuitable, medium between unsuitable and incorrect,
//! large between suitable and incorrect.

use std::collections::BTreeMap;

use potstill_cot::rewrite::RewriteCandidate;
use potstill_data::jsonl::iter_records;
use potstill_data::records::{Difficulty, Dropped, Subject, Trace};
use potstill_shared::durable::LineReader;
use potstill_verify::check_completion;
use serde_json::{Value, json};

use super::RunReader;
use super::shapes::{message, student_prompt};

/// Location of a trace: the file, and the offset of its line.
#[derive(Clone, Copy)]
enum TraceLocation {
    Kept(u64),
    Dropped(u64),
    Original(u64),
}

/// The first trace of each class for one problem.
#[derive(Default, Clone, Copy)]
struct TracesByClass {
    suitable: Option<TraceLocation>,
    unsuitable: Option<TraceLocation>,
    wrong: Option<TraceLocation>,
}

/// Opened stage files, for reading traces by location.
struct StageReaders {
    kept: LineReader,
    dropped: LineReader,
    rewrites: LineReader,
}

impl StageReaders {
    /// Reads the trace at `place`.
    fn read_trace(&self, place: TraceLocation) -> anyhow::Result<Trace> {
        Ok(match place {
            TraceLocation::Kept(at) => serde_json::from_str(&self.kept.read_line_at(at)?)?,
            TraceLocation::Dropped(at) => {
                match serde_json::from_str::<Dropped>(&self.dropped.read_line_at(at)?)?.subject {
                    Subject::Trace(trace) => *trace,
                    Subject::Problem(_) => anyhow::bail!("`verify.dropped.jsonl` is damaged"),
                }
            }
            TraceLocation::Original(at) => {
                let candidate: RewriteCandidate = serde_json::from_str(&self.rewrites.read_line_at(at)?)?;
                candidate.original.unwrap_or(candidate.cot)
            }
        })
    }
}

/// Returns the stage files, and one entry per problem of the stage `stage` with the locations of its traces.
fn classify_traces(run: &RunReader, stage: &str) -> anyhow::Result<(StageReaders, Vec<TracesByClass>)> {
    let kept = run.stage_file(&format!("{stage}.jsonl"))?;
    let dropped = run.stage_file("verify.dropped.jsonl")?;
    let rewrites = run.stage_file("rewrite.jsonl")?;
    let mut kinds: BTreeMap<u64, TracesByClass> = BTreeMap::new();
    for row in iter_records::<Trace>(&kept)? {
        let (place, trace) = row?;
        let of = kinds.entry(trace.problem.id.seed()).or_default();
        let fits = matches!(trace.difficulty, None | Some(Difficulty::Medium));
        let slot = if fits { &mut of.suitable } else { &mut of.unsuitable };
        slot.get_or_insert(TraceLocation::Kept(place));
    }
    for row in iter_records::<Dropped>(&dropped)? {
        if let (place, Dropped { reason, subject: Subject::Trace(trace), .. }) = row?
            && reason == "wrong_answer"
            && let Some(of) = kinds.get_mut(&trace.problem.id.seed())
        {
            of.wrong.get_or_insert(TraceLocation::Dropped(place));
        }
    }
    // A trace that was replaced by a rewrite counts as unsuitable, but only if a rule finds its answer correct.
    for row in iter_records::<RewriteCandidate>(&rewrites)? {
        let (place, candidate) = row?;
        if let Some(original) = candidate.original
            && let Some(of) = kinds.get_mut(&original.problem.id.seed())
            && of.unsuitable.is_none()
            && let Some(answer) = &original.problem.answer
            && check_completion(answer, &original.completion()).correct == Some(true)
        {
            of.unsuitable = Some(TraceLocation::Original(place));
        }
    }
    let files = StageReaders {
        kept: LineReader::open(&kept)?,
        dropped: LineReader::open(&dropped)?,
        rewrites: LineReader::open(&rewrites)?,
    };
    Ok((files, kinds.into_values().collect()))
}

/// Returns a pair in TRL's conversational format.
fn pair_row(prompt: &str, chosen: &Trace, rejected: &Trace) -> Value {
    json!({
        "prompt": [message("user", &student_prompt(prompt, chosen))],
        "chosen": [message("assistant", &chosen.completion())],
        "rejected": [message("assistant", &rejected.completion())],
    })
}

/// Returns a DPO pair for each problem that has a correct and an incorrect trace.
pub(super) fn dpo_pairs(
    run: &RunReader,
    stage: &str,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Value>> + use<>> {
    let (files, kinds) = classify_traces(run, stage)?;
    let prompt = run.prompt.clone();
    let pairs = kinds.into_iter().filter_map(|of| Some((of.suitable.or(of.unsuitable)?, of.wrong?)));
    Ok(pairs.map(move |(chosen, rejected)| {
        Ok(pair_row(&prompt, &files.read_trace(chosen)?, &files.read_trace(rejected)?))
    }))
}

/// Returns CogPO pairs: for each problem, one pair per gap for which both classes exist. `betas` belong to small,
/// medium and large gaps.
pub(super) fn cogpo_pairs(
    run: &RunReader,
    stage: &str,
    betas: [f64; 3],
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Value>> + use<>> {
    let (files, kinds) = classify_traces(run, stage)?;
    let prompt = run.prompt.clone();
    let pairs = kinds.into_iter().flat_map(move |of| {
        [
            (of.suitable, of.unsuitable, "small", betas[0]),
            (of.unsuitable, of.wrong, "medium", betas[1]),
            (of.suitable, of.wrong, "large", betas[2]),
        ]
    });
    let pairs = pairs.filter_map(|(chosen, rejected, gap, beta)| Some((chosen?, rejected?, gap, beta)));
    Ok(pairs.map(move |(chosen, rejected, gap, beta)| {
        let mut row = pair_row(&prompt, &files.read_trace(chosen)?, &files.read_trace(rejected)?);
        row["beta"] = json!(beta);
        row["gap"] = json!(gap);
        Ok(row)
    }))
}
