//! Collect: problems from files and generators, without copies and without what the evaluation will ask.

use anyhow::Context;
use potstill_cot::executor::Summary;
use potstill_data::jsonl::{read_problems, write_records};
use potstill_data::near::near;
use potstill_data::records::Problem;
use potstill_data::{arithmetic, decontaminate, dedup};

use serde::Serialize;

use super::Run;
use crate::recipe::Builtin;

/// A line of `dropped.jsonl`: a problem that was left out, why, and what it is like.
#[derive(Serialize)]
struct Dropped<'a> {
    reason: &'static str,
    problem: &'a str,
    like: &'a str,
}

impl<'a> Dropped<'a> {
    fn new(reason: &'static str, problem: &'a str, like: &'a str) -> Self {
        Self { reason, problem, like }
    }
}

impl Run {
    pub(super) fn collect(&self) -> anyhow::Result<Vec<Problem>> {
        let section = self.recipe.collect.as_ref().context("the recipe has no `collect`")?;
        let held_out = self.held_out()?;
        let mut problems = Vec::new();
        let mut quarantined = Vec::new();
        for source in &section.sources {
            let (good, bad) = read_problems(source)?;
            problems.extend(good);
            quarantined.extend(bad);
        }
        let mut taken = problems.len() + quarantined.len();
        if !quarantined.is_empty() {
            let path = self.folder.path().join("quarantine.jsonl");
            write_records(&path, &quarantined)?;
            let count = quarantined.len();
            self.progress.say(format!("{count} lines could not be read; see `{}`", path.display()));
        }
        let (problems, contaminated) = decontaminate::decontaminate(problems, &held_out);
        let (problems, copies) = dedup::exact(problems);
        let (mut problems, near_copies) = match section.near {
            Some(threshold) => near(problems, threshold),
            None => (problems, Vec::new()),
        };
        // Generated problems differ from the held-out ones by construction; their few sentence patterns would all count
        // as shared runs of words.
        if let Some(builtin) = &section.builtin {
            let held_out = held_out.iter().map(|problem| problem.problem.clone()).collect();
            let made = generated(builtin, &held_out);
            taken += made.len();
            problems.extend(made);
        }
        let dropped: Vec<Dropped> = contaminated
            .iter()
            .map(|hit| Dropped::new("contaminated", &hit.problem, &hit.evaluation))
            .chain(copies.iter().map(|copy| Dropped::new("duplicate", &copy.problem, &copy.problem)))
            .chain(
                near_copies
                    .iter()
                    .map(|copy| Dropped::new("near_duplicate", &copy.problem.problem, &copy.like)),
            )
            .collect();
        if !dropped.is_empty() {
            write_records(&self.folder.path().join("dropped.jsonl"), &dropped)?;
        }
        problems.sort_by(|a, b| a.id.cmp(&b.id));
        let mut summary = Summary { taken, kept: problems.len(), ..Summary::default() };
        for (reason, count) in [
            ("quarantined", quarantined.len()),
            ("duplicate", copies.len()),
            ("near_duplicate", near_copies.len()),
            ("contaminated", contaminated.len()),
        ] {
            if count > 0 {
                summary.dropped.insert(reason.to_owned(), count);
            }
        }
        self.folder.write_stage("collect", &problems, summary)?;
        self.progress.say(format!(
            "collect: {taken} in, {} kept ({} quarantined, {} duplicate, {} nearly so, {} contaminated)",
            problems.len(),
            quarantined.len(),
            copies.len(),
            near_copies.len(),
            contaminated.len()
        ));
        anyhow::ensure!(!problems.is_empty(), "no problem is left to work on");
        Ok(problems)
    }

    pub(super) fn held_out(&self) -> anyhow::Result<Vec<Problem>> {
        let Some(section) = &self.recipe.evaluate else { return Ok(Vec::new()) };
        let mut problems = Vec::new();
        for source in &section.sources {
            problems.extend(read_problems(source)?.0);
        }
        if let Some(builtin) = &section.builtin {
            problems.extend(generated(builtin, &std::collections::HashSet::new()));
        }
        Ok(problems)
    }
}

/// Problems from a generator; none of them is in `taken`.
fn generated(builtin: &Builtin, taken: &std::collections::HashSet<String>) -> Vec<Problem> {
    let problems = arithmetic::distinct(builtin.problems, builtin.seed, taken);
    let keep_every = if builtin.without_answer > 0.0 {
        (1.0 / builtin.without_answer).round() as usize
    } else {
        usize::MAX
    };
    problems
        .iter()
        .enumerate()
        .map(|(index, problem)| {
            let mut record = problem.record(&format!("arithmetic:{}:{index}", builtin.seed));
            if (index + 1).is_multiple_of(keep_every) {
                record.answer = None;
            }
            record
        })
        .collect()
}
