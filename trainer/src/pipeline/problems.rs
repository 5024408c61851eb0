//! Collect: reads problems from sources and generators, and removes duplicates and benchmark problems. Resample:
//! samples problems so that each task reaches its share. Both keep only a few bytes per problem in memory.

use std::collections::{BTreeMap, HashSet};

use anyhow::Context;
use potstill_cot::executor::StageSummary;
use potstill_data::decontaminate::BenchmarkIndex;
use potstill_data::dedup::ExactDedup;
use potstill_data::jsonl::{ReadError, Source, for_each_problem, read_problems, write_records};
use potstill_data::near::NearDedup;
use potstill_data::records::{Dropped, Problem};
use potstill_data::tasks::{self, OTHERS, TASKS};
use potstill_data::{arithmetic, hub};
use potstill_shared::durable::LineReader;

use super::Run;
use crate::recipe::{BuiltinProblems, ResampleSection};
use crate::run::{SourceManifest, StageFiles};

/// Filters for the problems of sources, with the files of kept and dropped problems.
struct ProblemFilter {
    held_out: BenchmarkIndex,
    seen: ExactDedup,
    near: Option<NearDedup>,
    files: StageFiles<Problem>,
    summary: StageSummary,
}

impl ProblemFilter {
    /// Keeps or drops a problem. Returns whether it was kept.
    fn process(&mut self, problem: Problem) -> anyhow::Result<bool> {
        self.summary.taken += 1;
        let text = &problem.problem;
        let reason = if let Some((rule, like)) = self.held_out.find_contamination(text) {
            Some((rule.drop_reason(), like.to_owned()))
        } else if !self.seen.insert(text) {
            Some(("duplicate", text.clone()))
        } else {
            let like = self.near.as_mut().map(|near| near.find_or_insert(text)).transpose()?.flatten();
            like.map(|like| ("near_duplicate", like))
        };
        match reason {
            None => self.keep(&problem)?,
            Some((reason, like)) => {
                self.summary.count_dropped(reason);
                let dropped = Dropped { like: Some(like), ..Dropped::problem(reason, problem) };
                self.files.dropped.push(&dropped)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes a problem to the kept file.
    fn keep(&mut self, problem: &Problem) -> anyhow::Result<()> {
        self.summary.kept += 1;
        Ok(self.files.kept.push(problem)?)
    }
}

/// Error of the filter or of reading a source.
struct FilterError(anyhow::Error);

impl From<ReadError> for FilterError {
    fn from(error: ReadError) -> Self {
        Self(error.into())
    }
}

impl Run {
    /// Reads all sources into `stages/collect.jsonl` and returns the number of kept problems. Unreadable rows go to
    /// `quarantine.jsonl`.
    pub(super) fn collect(&self) -> anyhow::Result<usize> {
        let section = self.recipe.collect.as_ref().context("the recipe has no `collect`")?;
        let held_out = self.held_out()?;
        let mut against = held_out.clone();
        for source in &section.against {
            against.extend(read_problems(source)?.0);
        }
        let near = section.near.map(|share| NearDedup::new(share, self.folder.path())).transpose()?;
        let mut sieve = ProblemFilter {
            held_out: BenchmarkIndex::new(&against),
            seen: ExactDedup::default(),
            near,
            files: self.folder.create_stage_files()?,
            summary: StageSummary::default(),
        };
        let (mut sources, mut quarantined) = (Vec::new(), Vec::new());
        for source in &section.sources {
            let (mut rows, mut kept) = (0, 0);
            let bad = for_each_problem::<FilterError>(source, |problem| {
                rows += 1;
                kept += usize::from(sieve.process(problem).map_err(FilterError)?);
                Ok(())
            })
            .map_err(|FilterError(error)| error)?;
            rows += bad.len();
            sieve.summary.taken += bad.len();
            bad.iter().for_each(|_| sieve.summary.count_dropped("quarantined"));
            quarantined.extend(bad);
            sources.push(SourceManifest {
                path: source.path.display().to_string(),
                licence: source_license(source),
                rows,
                kept,
            });
        }
        let aside = self.folder.path().join("quarantine.jsonl");
        if !quarantined.is_empty() {
            write_records(&aside, &quarantined)?;
            let count = quarantined.len();
            self.progress.message(format!("{count} rows could not be read; see `{}`", aside.display()));
        }
        if let Some(builtin) = &section.builtin {
            sources.push(SourceManifest {
                path: format!("built in: {:?}, seed {}", builtin.task, builtin.seed).to_lowercase(),
                licence: Some(env!("CARGO_PKG_LICENSE").to_lowercase()),
                rows: builtin.problems,
                kept: builtin.problems,
            });
        }
        // Generated problems differ from held-out ones by construction. Their few sentence patterns would all count as
        // shared word sequences.
        if let Some(builtin) = &section.builtin {
            let held_out = held_out.iter().map(|problem| problem.problem.clone()).collect();
            for problem in builtin_problems(builtin, &held_out) {
                sieve.summary.taken += 1;
                sieve.keep(&problem)?;
            }
        }
        let ProblemFilter { files, summary, .. } = sieve;
        self.progress.message(format!("collect: {}", summary_line(&summary)));
        anyhow::ensure!(summary.kept > 0, "no problem is left to work on");
        let kept = summary.kept;
        self.folder.publish_stage("collect", files, summary)?;
        self.folder.set_sources(sources)?;
        Ok(kept)
    }

    /// Samples problems so that each task reaches its share. Returns the number of distinct problems kept.
    pub(super) fn resample(&self) -> anyhow::Result<usize> {
        let section = self.recipe.resample.as_ref().context("the recipe has no `resample`")?;
        let mut by_task: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
        for row in self.folder.stage_records::<Problem>("classify")? {
            let (place, problem) = row?;
            let task = problem.task.unwrap_or_else(|| OTHERS.to_owned());
            by_task.entry(task).or_default().push((problem.id.seed(), place));
        }
        let taken = by_task.values().map(Vec::len).sum();
        let have = by_task.iter().map(|(task, ids)| (task.clone(), ids.len())).collect();
        let total = section.total.unwrap_or(taken);
        let quotas = tasks::compute_quotas(&have, &section.shares(), total, section.cap);
        let mut copies: Vec<(u64, u32)> = Vec::with_capacity(taken);
        for (task, problems) in &by_task {
            let ids: Vec<u64> = problems.iter().map(|(id, _)| *id).collect();
            let drawn = tasks::draw_counts(&ids, quotas[task].drawn, self.recipe.seed);
            copies.extend(problems.iter().map(|(_, place)| *place).zip(drawn));
        }
        let lines = LineReader::open(&self.folder.stage_file("classify"))?;
        let mut files = self.folder.create_stage_files::<Problem>()?;
        let mut summary = StageSummary { taken, ..StageSummary::default() };
        for (place, copies) in copies {
            let mut problem: Problem = serde_json::from_str(&lines.read_line_at(place)?)?;
            if copies == 0 {
                summary.count_dropped("not_drawn");
                files.dropped.push(&Dropped::problem("not_drawn", problem))?;
            } else {
                problem.copies = copies;
                summary.kept += 1;
                files.kept.push(&problem)?;
            }
        }
        self.progress.message(format!("resample: {}", summary_line(&summary)));
        let mut table = String::from("task                  have  wanted   drawn");
        for (task, quota) in &quotas {
            table.push_str(&format!(
                "\n{task:<18} {:>7} {:>7} {:>7}",
                quota.available, quota.target, quota.drawn
            ));
        }
        self.progress.message(table);
        anyhow::ensure!(summary.kept > 0, "no problem is left to work on");
        let kept = summary.kept;
        self.folder.publish_stage("resample", files, summary)?;
        Ok(kept)
    }

    /// Returns the held-out problems of the evaluation.
    pub(super) fn held_out(&self) -> anyhow::Result<Vec<Problem>> {
        let Some(section) = &self.recipe.evaluate else { return Ok(Vec::new()) };
        let mut problems = Vec::new();
        for source in &section.sources {
            problems.extend(read_problems(source)?.0);
        }
        if let Some(builtin) = &section.builtin {
            problems.extend(builtin_problems(builtin, &HashSet::new()));
        }
        Ok(problems)
    }

    /// Returns, for each problem of a stage, the first bits of its id and its offset in the file. The problems with the
    /// longest expected traces come first, so that long requests do not run alone at the end.
    ///
    /// The expected length is that of the source's own traces, or else that of the problem.
    pub(super) fn offsets_longest_first(&self, stage: &str) -> anyhow::Result<Vec<(u64, u64)>> {
        let mut found = Vec::new();
        for row in self.folder.stage_records::<Problem>(stage)? {
            let (place, problem) = row?;
            let trace = problem.traces.iter().map(|trace| trace.thinking.len()).max();
            let length = trace.unwrap_or(problem.problem.len()) as u32;
            found.push((std::cmp::Reverse(length), place, problem.id.seed()));
        }
        found.sort_unstable();
        Ok(found.into_iter().map(|(_, place, id)| (id, place)).collect())
    }

    /// Returns the problems of a stage, longest expected trace first.
    pub(super) fn problems_longest_first(
        &self,
        stage: &str,
    ) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Problem>> + Send + use<>> {
        let places = self.offsets_longest_first(stage)?;
        let lines = LineReader::open(&self.folder.stage_file(stage))?;
        Ok(places.into_iter().map(move |(_, place)| Ok(serde_json::from_str(&lines.read_line_at(place)?)?)))
    }
}

impl ResampleSection {
    /// Returns the shares of the recipe, or the published ones of DistilQwen2.
    fn shares(&self) -> BTreeMap<String, f64> {
        match &self.shares {
            Some(shares) => shares.clone(),
            None => TASKS.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect(),
        }
    }
}

/// Returns the license that the recipe names, or else the hub.
fn source_license(source: &Source) -> Option<String> {
    source.licence.clone().or_else(|| hub::license(&source.path))
}

/// Formats counts and drop reasons on one line.
pub(super) fn summary_line(summary: &StageSummary) -> String {
    let mut text = format!("{} in, {} kept", summary.taken, summary.kept);
    if !summary.dropped.is_empty() {
        let reasons: Vec<String> =
            summary.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        text.push_str(&format!(" ({})", reasons.join(", ")));
    }
    text
}

/// Returns problems of a generator, without those in `taken`. Removes the answer from the configured fraction.
fn builtin_problems(builtin: &BuiltinProblems, taken: &HashSet<String>) -> Vec<Problem> {
    let problems = arithmetic::generate_distinct(builtin.problems, builtin.seed, taken);
    let keep_every = if builtin.without_answer > 0.0 {
        (1.0 / builtin.without_answer).round() as usize
    } else {
        usize::MAX
    };
    problems
        .iter()
        .enumerate()
        .map(|(index, problem)| {
            let mut record = problem.to_problem(&format!("arithmetic:{}:{index}", builtin.seed));
            if (index + 1).is_multiple_of(keep_every) {
                record.answer = None;
            }
            record
        })
        .collect()
}
