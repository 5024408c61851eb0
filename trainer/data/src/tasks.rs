//! Task-aware resampling (DistilQwen2, section 3.1 of the paper): problems are sorted into 32 tasks and drawn so that each task
//! has its share. A task with too many problems is thinned out; of one with too few, problems are drawn several times.
//!
//! Beside the published formula (`n_c = floor(N · p_c)`): shares are renormalised over the tasks that occur and rounded by largest
//! remainder, so that the counts add up to `N`; no problem is drawn more often than a cap says.

use std::collections::BTreeMap;

use potstill_shared::id::ContentId;

/// The tasks with their shares as published; they add up to 1.
pub const TASKS: [(&str, f64); 32] = [
    ("Math", 0.167),
    ("Reasoning", 0.167),
    ("Code Generation", 0.083),
    ("Code Debug", 0.083),
    ("Others", 0.041),
    ("Writing", 0.017),
    ("Computer Science", 0.017),
    ("Complex Format", 0.017),
    ("Common-Sense", 0.017),
    ("Counterfactual", 0.017),
    ("Multilingual", 0.017),
    ("Roleplay", 0.017),
    ("Biology", 0.017),
    ("Technology", 0.017),
    ("Ethics", 0.017),
    ("Sport", 0.017),
    ("Law", 0.017),
    ("Medicine", 0.017),
    ("Literature", 0.017),
    ("Entertainment", 0.017),
    ("Art", 0.017),
    ("Music", 0.017),
    ("Toxicity", 0.017),
    ("Economy", 0.017),
    ("Physics", 0.017),
    ("History", 0.017),
    ("Chemistry", 0.017),
    ("Philosophy", 0.017),
    ("Health", 0.017),
    ("Ecology", 0.017),
    ("Grammar", 0.017),
    ("Paraphrase", 0.017),
];

/// The task that everything else belongs to.
pub const OTHERS: &str = "Others";

/// The known task that a classifier named: inside the last answer tags, or as the whole text. Anything else is not a task.
pub fn read_task(text: &str) -> Option<&'static str> {
    let inside = match text.rfind("<answer>") {
        Some(at) => text[at + "<answer>".len()..].split_once("</answer>")?.0,
        None => text,
    };
    let named = inside.trim().trim_end_matches('.');
    TASKS.iter().map(|(name, _)| *name).find(|name| name.eq_ignore_ascii_case(named))
}

/// How many problems a task has and gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Problems there are.
    pub have: usize,
    /// Problems that its share asks for.
    pub wanted: usize,
    /// Problems drawn, repetitions counted.
    pub drawn: usize,
}

/// Quotas by task: `total` problems in the proportions of `shares`, none drawn more than `cap` times.
pub fn quotas(
    have: &BTreeMap<String, usize>,
    shares: &BTreeMap<String, f64>,
    total: usize,
    cap: u32,
) -> BTreeMap<String, Quota> {
    let share = |task: &String| shares.get(task).copied().unwrap_or(0.0);
    let whole: f64 = have.iter().filter(|(_, have)| **have > 0).map(|(task, _)| share(task)).sum();
    let mut quotas = BTreeMap::new();
    let mut remainders = Vec::new();
    for (task, &have) in have {
        let exact = if whole > 0.0 && have > 0 { total as f64 * share(task) / whole } else { 0.0 };
        quotas.insert(task.clone(), Quota { have, wanted: exact.floor() as usize, drawn: 0 });
        remainders.push((exact - exact.floor(), task.clone()));
    }
    let rounded: usize = quotas.values().map(|quota| quota.wanted).sum();
    if whole > 0.0 {
        remainders.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        for (_, task) in remainders.into_iter().take(total - rounded.min(total)) {
            if let Some(quota) = quotas.get_mut(&task) {
                quota.wanted += 1;
            }
        }
    }
    for quota in quotas.values_mut() {
        quota.drawn = quota.wanted.min(quota.have * cap as usize);
    }
    quotas
}

/// How often each of a task's problems is drawn, in their order. Which ones get one more is decided by their ids and the seed,
/// not by their order.
pub fn draw(ids: &[u64], drawn: usize, seed: u64) -> Vec<u32> {
    let Some(whole) = drawn.checked_div(ids.len()) else { return Vec::new() };
    let mut copies = vec![whole as u32; ids.len()];
    let lot = |id: u64| ContentId::of(&["resample", &seed.to_string(), &id.to_string()]).seed();
    let mut order: Vec<(u64, usize)> = ids.iter().enumerate().map(|(at, id)| (lot(*id), at)).collect();
    order.sort_unstable();
    for (_, at) in order.into_iter().take(drawn % ids.len()) {
        copies[at] += 1;
    }
    copies
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn published() -> BTreeMap<String, f64> {
        TASKS.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect()
    }

    #[test]
    fn the_shares_add_up() {
        assert!((TASKS.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn only_known_tasks_are_read() {
        for (text, task) in [
            ("<answer>Math</answer>", Some("Math")),
            ("It could be <answer>Law</answer>, no: <answer> code debug </answer>.", Some("Code Debug")),
            ("Physics.", Some("Physics")),
            ("<answer>Cooking</answer>", None),
            ("<answer>Math", None),
            ("It has to do with Math and Art", None),
        ] {
            assert_eq!(read_task(text), task, "{text}");
        }
    }

    proptest! {
        #[test]
        fn counts_add_up_and_stay_within_the_cap(have in prop::collection::vec(0usize..50, 32), total in 0usize..500, cap in 1u32..5) {
            let have: BTreeMap<String, usize> = TASKS.iter().map(|(name, _)| (*name).to_owned()).zip(have).collect();
            let quotas = quotas(&have, &published(), total, cap);
            let wanted: usize = quotas.values().map(|quota| quota.wanted).sum();
            prop_assert_eq!(wanted, if have.values().all(|count| *count == 0) { 0 } else { total });
            for (task, quota) in &quotas {
                prop_assert!(quota.have > 0 || quota.wanted == 0, "{task}");
                prop_assert!(quota.drawn <= quota.wanted && quota.drawn <= quota.have * cap as usize);
            }
        }

        #[test]
        fn draws_are_even_and_do_not_depend_on_the_order(ids in prop::collection::hash_set(any::<u64>(), 1..40), drawn in 0usize..100, seed: u64) {
            let mut ids: Vec<u64> = ids.into_iter().collect();
            let copies = draw(&ids, drawn, seed);
            prop_assert_eq!(copies.iter().map(|count| *count as usize).sum::<usize>(), drawn);
            prop_assert!(copies.iter().max().unwrap() - copies.iter().min().unwrap() <= 1);
            let of: BTreeMap<u64, u32> = ids.iter().copied().zip(copies).collect();
            ids.reverse();
            let again: BTreeMap<u64, u32> = ids.iter().copied().zip(draw(&ids, drawn, seed)).collect();
            prop_assert_eq!(of, again);
        }
    }
}
