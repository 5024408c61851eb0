//! Task-aware resampling (DistilQwen2, section 3.1 of the paper). Each of 32 tasks gets a fixed share of the
//! problems: large tasks lose problems, small tasks repeat some.
//!
//! Differences from the published `n_c = floor(N · p_c)`: shares are normalized over the tasks that occur. Counts are
//! rounded by largest remainder, so that they sum to `N`. A cap limits the repetitions of a problem. Deliberately
//! absent: the classification of problems.

use std::collections::BTreeMap;

use potstill_shared::id::ContentId;

/// Names of the tasks with their published shares, which sum to 1.
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

/// Task of problems that fit no other task.
pub const OTHERS: &str = "Others";

/// Parses a classifier's completion: the task in the last answer tags, or the whole text as a task name. Returns
/// `None` for unknown names.
pub fn parse_task(text: &str) -> Option<&'static str> {
    let inside = match text.rfind("<answer>") {
        Some(at) => text[at + "<answer>".len()..].split_once("</answer>")?.0,
        None => text,
    };
    let named = inside.trim().trim_end_matches('.');
    TASKS.iter().map(|(name, _)| *name).find(|name| name.eq_ignore_ascii_case(named))
}

/// Number of problems of a task, before and after resampling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Available problems.
    pub available: usize,
    /// Problems according to the task's share.
    pub target: usize,
    /// Problems drawn, including repetitions; below `wanted` where the cap applies.
    pub drawn: usize,
}

/// Returns the quota of each task: `total` problems in proportion to `shares`, none drawn more than `cap` times.
pub fn compute_quotas(
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
        quotas.insert(task.clone(), Quota { available: have, target: exact.floor() as usize, drawn: 0 });
        remainders.push((exact - exact.floor(), task.clone()));
    }
    let rounded: usize = quotas.values().map(|quota| quota.target).sum();
    if whole > 0.0 {
        remainders.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        for (_, task) in remainders.into_iter().take(total - rounded.min(total)) {
            if let Some(quota) = quotas.get_mut(&task) {
                quota.target += 1;
            }
        }
    }
    for quota in quotas.values_mut() {
        quota.drawn = quota.target.min(quota.available * cap as usize);
    }
    quotas
}

/// Returns how often each problem of a task is drawn, in the order of `ids`. The counts differ by at most one. Ids
/// and seed decide which problems get one more; the order of `ids` has no influence.
pub fn draw_counts(ids: &[u64], drawn: usize, seed: u64) -> Vec<u32> {
    let Some(whole) = drawn.checked_div(ids.len()) else { return Vec::new() };
    let mut copies = vec![whole as u32; ids.len()];
    let lot = |id: u64| ContentId::from_parts(&["resample", &seed.to_string(), &id.to_string()]).seed();
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
    fn published_shares_sum_to_one() {
        assert!((TASKS.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn parses_only_known_tasks() {
        for (text, task) in [
            ("<answer>Math</answer>", Some("Math")),
            ("It could be <answer>Law</answer>, no: <answer> code debug </answer>.", Some("Code Debug")),
            ("Physics.", Some("Physics")),
            ("<answer>Cooking</answer>", None),
            ("<answer>Math", None),
            ("It has to do with Math and Art", None),
        ] {
            assert_eq!(parse_task(text), task, "{text}");
        }
    }

    proptest! {
        #[test]
        fn quotas_sum_to_the_total_within_the_cap(have in prop::collection::vec(0usize..50, 32), total in 0usize..500, cap in 1u32..5) {
            let have: BTreeMap<String, usize> = TASKS.iter().map(|(name, _)| (*name).to_owned()).zip(have).collect();
            let quotas = compute_quotas(&have, &published(), total, cap);
            let wanted: usize = quotas.values().map(|quota| quota.target).sum();
            prop_assert_eq!(wanted, if have.values().all(|count| *count == 0) { 0 } else { total });
            for (task, quota) in &quotas {
                prop_assert!(quota.available > 0 || quota.target == 0, "{task}");
                prop_assert!(quota.drawn <= quota.target && quota.drawn <= quota.available * cap as usize);
            }
        }

        #[test]
        fn draws_are_even_and_ignore_the_order(ids in prop::collection::hash_set(any::<u64>(), 1..40), drawn in 0usize..100, seed: u64) {
            let mut ids: Vec<u64> = ids.into_iter().collect();
            let copies = draw_counts(&ids, drawn, seed);
            prop_assert_eq!(copies.iter().map(|count| *count as usize).sum::<usize>(), drawn);
            prop_assert!(copies.iter().max().unwrap() - copies.iter().min().unwrap() <= 1);
            let of: BTreeMap<u64, u32> = ids.iter().copied().zip(copies).collect();
            ids.reverse();
            let again: BTreeMap<u64, u32> = ids.iter().copied().zip(draw_counts(&ids, drawn, seed)).collect();
            prop_assert_eq!(of, again);
        }
    }
}
