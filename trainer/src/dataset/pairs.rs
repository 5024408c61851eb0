//! Pairs of a better and a worse trace of one problem. DPO pairs a correct trace with an incorrect one. CogPO
//! (DistilQwen2.5-R1, stage 2) pairs traces by the gap between their classes.
//!
//! A correct trace is suitable if it was graded medium or not at all, or if a rewrite made it medium. Other correct
//! traces are unsuitable. The gap is small between suitable and unsuitable, medium between unsuitable and incorrect,
//! large between suitable and incorrect.

use std::collections::BTreeMap;

use potstill_cot::rewrite::Candidate;
use potstill_data::jsonl::each_record;
use potstill_data::records::{Cot, Difficulty, Dropped, Subject};
use potstill_shared::durable::Lines;
use potstill_verify::check;
use serde_json::{Value, json};

use super::Folder;
use super::shapes::{asked, turn};

/// Location of a trace: the file, and the offset of its line.
#[derive(Clone, Copy)]
enum Place {
    Kept(u64),
    Dropped(u64),
    Original(u64),
}

/// The first trace of each class for one problem.
#[derive(Default, Clone, Copy)]
struct Kinds {
    suitable: Option<Place>,
    unsuitable: Option<Place>,
    wrong: Option<Place>,
}

/// Opened stage files, for reading traces by location.
struct Files {
    kept: Lines,
    dropped: Lines,
    rewrites: Lines,
}

impl Files {
    /// Reads the trace at `place`.
    fn read(&self, place: Place) -> anyhow::Result<Cot> {
        Ok(match place {
            Place::Kept(at) => serde_json::from_str(&self.kept.read(at)?)?,
            Place::Dropped(at) => match serde_json::from_str::<Dropped>(&self.dropped.read(at)?)?.subject {
                Subject::Trace(trace) => *trace,
                Subject::Problem(_) => anyhow::bail!("`verify.dropped.jsonl` is damaged"),
            },
            Place::Original(at) => {
                let candidate: Candidate = serde_json::from_str(&self.rewrites.read(at)?)?;
                candidate.original.unwrap_or(candidate.cot)
            }
        })
    }
}

/// Returns the stage files, and one entry per problem of the stage `stage` with the locations of its traces.
fn sorted(run: &Folder, stage: &str) -> anyhow::Result<(Files, Vec<Kinds>)> {
    let kept = run.file(&format!("{stage}.jsonl"))?;
    let dropped = run.file("verify.dropped.jsonl")?;
    let rewrites = run.file("rewrite.jsonl")?;
    let mut kinds: BTreeMap<u64, Kinds> = BTreeMap::new();
    for row in each_record::<Cot>(&kept)? {
        let (place, trace) = row?;
        let of = kinds.entry(trace.problem.id.seed()).or_default();
        let fits = matches!(trace.difficulty, None | Some(Difficulty::Medium));
        let slot = if fits { &mut of.suitable } else { &mut of.unsuitable };
        slot.get_or_insert(Place::Kept(place));
    }
    for row in each_record::<Dropped>(&dropped)? {
        if let (place, Dropped { reason, subject: Subject::Trace(trace), .. }) = row?
            && reason == "wrong_answer"
            && let Some(of) = kinds.get_mut(&trace.problem.id.seed())
        {
            of.wrong.get_or_insert(Place::Dropped(place));
        }
    }
    // A trace that was replaced by a rewrite counts as unsuitable, but only if a rule finds its answer correct.
    for row in each_record::<Candidate>(&rewrites)? {
        let (place, candidate) = row?;
        if let Some(original) = candidate.original
            && let Some(of) = kinds.get_mut(&original.problem.id.seed())
            && of.unsuitable.is_none()
            && let Some(answer) = &original.problem.answer
            && check(answer, &original.completion()).correct == Some(true)
        {
            of.unsuitable = Some(Place::Original(place));
        }
    }
    let files = Files {
        kept: Lines::open(&kept)?,
        dropped: Lines::open(&dropped)?,
        rewrites: Lines::open(&rewrites)?,
    };
    Ok((files, kinds.into_values().collect()))
}

/// Returns a pair in TRL's conversational format.
fn row(prompt: &str, chosen: &Cot, rejected: &Cot) -> Value {
    json!({
        "prompt": [turn("user", &asked(prompt, chosen))],
        "chosen": [turn("assistant", &chosen.completion())],
        "rejected": [turn("assistant", &rejected.completion())],
    })
}

/// Returns a DPO pair for each problem that has a correct and an incorrect trace.
pub(super) fn better_over_worse(
    run: &Folder,
    stage: &str,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Value>> + use<>> {
    let (files, kinds) = sorted(run, stage)?;
    let prompt = run.prompt.clone();
    let pairs = kinds.into_iter().filter_map(|of| Some((of.suitable.or(of.unsuitable)?, of.wrong?)));
    Ok(pairs.map(move |(chosen, rejected)| Ok(row(&prompt, &files.read(chosen)?, &files.read(rejected)?))))
}

/// Returns CogPO pairs: for each problem, one pair per gap for which both classes exist. `betas` belong to small,
/// medium and large gaps.
pub(super) fn by_gap(
    run: &Folder,
    stage: &str,
    betas: [f64; 3],
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Value>> + use<>> {
    let (files, kinds) = sorted(run, stage)?;
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
        let mut row = row(&prompt, &files.read(chosen)?, &files.read(rejected)?);
        row["beta"] = json!(beta);
        row["gap"] = json!(gap);
        Ok(row)
    }))
}
