//! Compares scaling policies on simulated pools: chat, code and document loads, reasoning lengths that shift and burst,
//! and the stages of a distillation run on two teachers under one budget. `just elastic` prints the table.

mod laws;
mod sim;
mod spec;
mod workloads;

use clap::Args;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use self::laws::HOUR_WORTH;
use self::sim::{Outcome, Sim};

/// Arguments of `elastic`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Scenarios to run, separated by commas; default: all
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Policies to run, separated by commas; default: all
    #[arg(long, value_delimiter = ',')]
    laws: Vec<String>,
    /// Number of seeds per scenario and policy
    #[arg(long, default_value_t = 5)]
    seeds: u64,
    /// First seed
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
}

fn mean(outcomes: &[Outcome], of: impl Fn(&Outcome) -> f64) -> f64 {
    outcomes.iter().map(of).sum::<f64>() / outcomes.len().max(1) as f64
}

/// Returns the cost including the price of waiting.
fn with_waiting(outcome: &Outcome) -> f64 {
    outcome.cost + HOUR_WORTH * outcome.end_s / 3600.0
}

fn simulate(scenario: &str, law: &str, seed: u64) -> anyhow::Result<Outcome> {
    let described = workloads::scenario(scenario, seed).ok_or_else(|| {
        anyhow::anyhow!("no scenario `{scenario}`; there are {}", workloads::NAMES.join(", "))
    })?;
    let mut law = laws::by_name(law)
        .ok_or_else(|| anyhow::anyhow!("no law `{law}`; there are {}", laws::NAMES.join(", ")))?;
    let sim = Sim::new(&described.pools, described.budget, ChaCha8Rng::seed_from_u64(seed ^ 0x5eed));
    Ok(sim.run(described.load, law.as_mut()))
}

#[expect(clippy::print_stdout, reason = "the answer of a command")]
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let chosen = |asked: &[String], all: &[&str]| -> Vec<String> {
        if asked.is_empty() { all.iter().map(|name| (*name).to_owned()).collect() } else { asked.to_vec() }
    };
    println!(
        "| scenario | law | started within 10 s, % | lowest seed | cost | of oracle | with waiting | of oracle | starts | most at once | end s |"
    );
    println!("|{}", "---|".repeat(11));
    for scenario in chosen(&arguments.only, &workloads::NAMES) {
        let seeds = arguments.first_seed..arguments.first_seed + arguments.seeds;
        let runs = |law: &str| -> anyhow::Result<Vec<Outcome>> {
            seeds.clone().map(|seed| simulate(&scenario, law, seed)).collect()
        };
        let oracle = runs("oracle")?;
        for law in chosen(&arguments.laws, &laws::NAMES) {
            let outcomes = if law == "oracle" { oracle.clone() } else { runs(&law)? };
            let lowest = outcomes.iter().map(|outcome| outcome.slo).fold(1.0, f64::min);
            println!(
                "| {scenario} | {law} | {:.1} | {:.1} | {:.2} | {:.2}x | {:.1} | {:.3}x | {:.0} | {:.1} | {:.0} |",
                100.0 * mean(&outcomes, |outcome| outcome.slo),
                100.0 * lowest,
                mean(&outcomes, |outcome| outcome.cost),
                mean(&outcomes, |outcome| outcome.cost) / mean(&oracle, |outcome| outcome.cost),
                mean(&outcomes, with_waiting),
                mean(&outcomes, with_waiting) / mean(&oracle, with_waiting),
                mean(&outcomes, |outcome| outcome.starts as f64),
                outcomes.iter().map(|outcome| outcome.most).fold(0.0, f64::max),
                mean(&outcomes, |outcome| outcome.end_s),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(scenario: &str, seeds: std::ops::Range<u64>) -> (Vec<Outcome>, Vec<Outcome>) {
        let runs = |law: &str| seeds.clone().map(|seed| simulate(scenario, law, seed).unwrap()).collect();
        (runs("potstill"), runs("oracle"))
    }

    /// Simulated time: results are the same on every machine.
    #[test]
    fn adaptive_policy_meets_its_bounds() {
        for (scenario, slo, cost) in [
            ("chat", 0.995, 1.15),
            ("code", 0.995, 1.15),
            ("documents", 0.995, 1.15),
            ("reason", 0.97, 1.10),
            ("reason-shift", 0.96, 1.12),
            ("burst", 0.82, 1.5),
            ("burst-declared", 0.95, 1.5),
        ] {
            let (ours, oracle) = both(scenario, 0..3);
            let (found, ratio) = (
                mean(&ours, |outcome| outcome.slo),
                mean(&ours, |outcome| outcome.cost) / mean(&oracle, |outcome| outcome.cost),
            );
            assert!(found >= slo && ratio <= cost, "{scenario}: {found} at {ratio}");
        }
        for (scenario, bar) in [("distill", 1.02), ("distill-chunks", 1.05)] {
            let (ours, oracle) = both(scenario, 0..2);
            let ratio = mean(&ours, with_waiting) / mean(&oracle, with_waiting);
            assert!(ratio <= bar, "{scenario}: {ratio}");
            assert!(ours.iter().all(|outcome| outcome.most <= 16.0 + 1e-9), "over the budget");
            for other in ["static", "hpa", "knative"] {
                let other: Vec<_> = (0..2).map(|seed| simulate(scenario, other, seed).unwrap()).collect();
                assert!(mean(&ours, with_waiting) < mean(&other, with_waiting));
            }
        }
    }
}
