//! The workloads. Online requests arrive whether or not they are served. A distillation run keeps a number of requests
//! open and runs its stages in order. Lengths of reasoning completions are log-normal, because no trace of them has
//! been published.

use std::collections::VecDeque;

use potstill_gateway::scaling_policy::StagePlan;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::spec::{PoolSpec, Request, announced};

/// A scenario: pools, budget and workload.
pub(crate) struct Scenario {
    pub(crate) pools: Vec<PoolSpec>,
    pub(crate) budget: Option<f64>,
    pub(crate) load: Workload,
}

/// A workload.
#[derive(Clone)]
pub(crate) enum Workload {
    /// Requests by time, and the planned phases.
    Online { requests: Vec<Request>, phases: Vec<Phase> },
    /// A distillation run.
    Run(Run),
}

/// A planned phase of an online workload.
#[derive(Clone)]
pub(crate) struct Phase {
    name: &'static str,
    begin: f64,
    end: f64,
    tokens: f64,
    open: usize,
}

/// Stages in order, each with a batch per pool.
#[derive(Clone)]
pub(crate) struct Run {
    pub(crate) stages: Vec<(&'static str, Vec<Batch>)>,
    pub(crate) at: usize,
    /// Unsent requests of the running stage, by batch.
    pub(crate) left: Vec<VecDeque<(f64, f64)>>,
    open: Vec<usize>,
    begun: bool,
}

/// Requests of a stage for one pool as (prompt, completion) tokens, and the estimated mean length of completions.
#[derive(Clone)]
pub(crate) struct Batch {
    pub(crate) pool: usize,
    pub(crate) requests: Vec<(f64, f64)>,
    tokens: f64,
}

/// Number of open requests per batch.
pub(crate) const OPEN: usize = 384;

pub(crate) const NAMES: [&str; 9] = [
    "chat",
    "code",
    "documents",
    "reason",
    "reason-shift",
    "burst",
    "burst-declared",
    "distill",
    "distill-chunks",
];

fn qwq() -> PoolSpec {
    PoolSpec {
        model: "qwq",
        slots: 64,
        itl_ms: [15.0, 0.25],
        cold_s: (60.0, 180.0),
        min: 1,
        max: 16,
        begin: 2,
        cost: 1.0,
    }
}

fn r1() -> PoolSpec {
    PoolSpec {
        model: "r1",
        slots: 64,
        itl_ms: [35.0, 0.6],
        cold_s: (180.0, 300.0),
        min: 0,
        max: 8,
        begin: 0,
        cost: 2.0,
    }
}

/// Returns a log-normal length with this mean.
fn length(random: &mut ChaCha8Rng, mean: f64, sigma: f64, most: f64) -> f64 {
    // Box-Muller transform.
    let (u, v): (f64, f64) = (random.random_range(1e-12..1.0), random.random());
    let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
    (mean.ln() - sigma * sigma / 2.0 + sigma * normal).exp().clamp(1.0, most)
}

fn reasoning(random: &mut ChaCha8Rng, mean: f64) -> f64 {
    length(random, mean, 0.9, 32_768.0).max(64.0)
}

/// Returns arrivals at a varying rate, by thinning.
fn arrivals(
    random: &mut ChaCha8Rng,
    seconds: f64,
    most: f64,
    rate: impl Fn(f64) -> f64,
    mut lengths: impl FnMut(&mut ChaCha8Rng, f64) -> (f64, f64),
) -> Vec<Request> {
    let (mut t, mut requests) = (0.0, Vec::new());
    loop {
        t -= random.random_range(1e-12..1.0f64).ln() / most;
        if t >= seconds {
            return requests;
        }
        if random.random_range(0.0..most) < rate(t) {
            let (prompt, tokens) = lengths(random, t);
            requests.push(Request { pool: 0, arrived: t, prompt, tokens, wait: None });
        }
    }
}

/// A wave around a mean, with a faster wave on it.
fn wave(t: f64, mean: f64) -> f64 {
    mean * (1.0 + 0.4 * (t / 570.0).sin() + 0.2 * (t / 83.0).sin())
}

fn burst(t: f64) -> bool {
    t % 1200.0 >= 900.0
}

/// Returns the scenario with this name.
pub(crate) fn scenario(name: &str, seed: u64) -> Option<Scenario> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let random = &mut random;
    let online = |pool: PoolSpec, requests| Scenario {
        pools: vec![pool],
        budget: None,
        load: Workload::Online { requests, phases: Vec::new() },
    };
    let small = |begin| PoolSpec { slots: 8, begin, ..qwq() };
    Some(match name {
        "chat" => online(
            small(3),
            arrivals(
                random,
                3500.0,
                9.0,
                |t| wave(t, 5.5),
                |random, _| (length(random, 1000.0, 1.0, 14_000.0), length(random, 210.0, 0.7, 1500.0)),
            ),
        ),
        // Short completions to long prompts, in waves of some minutes with pauses between them.
        "code" => online(
            small(2),
            arrivals(
                random,
                3450.0,
                8.0,
                |t| if (t / 240.0).sin() > 0.2 { 6.0 } else { 0.3 },
                |random, _| (length(random, 2000.0, 0.8, 8000.0), length(random, 28.0, 0.8, 600.0)),
            ),
        ),
        "documents" => online(
            small(6),
            arrivals(
                random,
                3600.0,
                6.0,
                |t| wave(t, 3.3),
                |random, _| (length(random, 12_000.0, 1.0, 100_000.0), length(random, 340.0, 0.6, 2000.0)),
            ),
        ),
        "reason" => online(
            PoolSpec { max: 12, begin: 3, ..qwq() },
            arrivals(random, 3500.0, 3.0, |t| wave(t, 1.85), |random, _| (1000.0, reasoning(random, 6000.0))),
        ),
        // A constant rate, but completions become five times longer for a while.
        "reason-shift" => online(
            qwq(),
            arrivals(
                random,
                4200.0,
                1.5,
                |_| 1.5,
                |random, t| {
                    let mean = if (1200.0..2800.0).contains(&t) { 10_000.0 } else { 2000.0 };
                    (300.0, reasoning(random, mean))
                },
            ),
        ),
        "burst" | "burst-declared" => {
            let requests = arrivals(
                random,
                5400.0,
                3.0,
                |t| if burst(t) { 3.0 } else { 0.3 },
                |random, _| (300.0, reasoning(random, 4000.0)),
            );
            let phases = (0..9).map(|number| {
                let (round, is_burst) = (f64::from(number / 2), number % 2 == 1);
                let begin = round * 1200.0 + if is_burst { 900.0 } else { 0.0 };
                let (name, end, open) =
                    if is_burst { ("burst", begin + 300.0, 372) } else { ("calm", begin + 900.0, 24) };
                Phase { name, begin, end, tokens: 4000.0, open }
            });
            let phases = if name == "burst" { Vec::new() } else { phases.collect() };
            let pool = PoolSpec { begin: 1, ..qwq() };
            Scenario { pools: vec![pool], budget: None, load: Workload::Online { requests, phases } }
        }
        "distill" | "distill-chunks" => {
            let (problems, passes) = if name == "distill" { (1500, 1) } else { (250, 6) };
            let stages = (0..passes).flat_map(|_| run_stages(random, problems)).collect();
            Scenario {
                pools: vec![r1(), PoolSpec { min: 0, begin: 0, ..qwq() }],
                budget: Some(16.0),
                load: Workload::Run(Run { stages, at: 0, left: Vec::new(), open: Vec::new(), begun: false }),
            }
        }
        _ => return None,
    })
}

/// The stages of the paper on two teachers.
fn run_stages(random: &mut ChaCha8Rng, problems: usize) -> Vec<(&'static str, Vec<Batch>)> {
    let mut long = |count: usize, prompt: f64, mean: f64| -> Vec<(f64, f64)> {
        (0..count).map(|_| (prompt, reasoning(random, mean))).collect()
    };
    let rewritten = problems * 14 / 10;
    let (first, second) = (long(problems, 400.0, 5000.0), long(2 * problems, 400.0, 6500.0));
    let (rewrite, verify) = (long(rewritten, 400.0, 3000.0), long(rewritten, 4000.0, 1500.0));
    let mut short = || (0..3 * problems).map(|_| (6000.0, random.random_range(80.0..600.0))).collect();
    let batch = |pool, requests, tokens| Batch { pool, requests, tokens };
    vec![
        ("generate", vec![batch(0, first, 4000.0), batch(1, second, 5000.0)]),
        ("difficulty", vec![batch(0, short(), 300.0)]),
        ("rewrite", vec![batch(0, rewrite, 3000.0)]),
        ("verify", vec![batch(1, verify, 1500.0)]),
        ("rv-cd", vec![batch(1, short(), 300.0)]),
    ]
}

impl Workload {
    /// Returns the first requests.
    pub(crate) fn begin(&mut self, t: f64) -> Vec<Request> {
        match self {
            Self::Online { requests, .. } => requests.clone(),
            Self::Run(run) => run.next_stage(t),
        }
    }

    /// Handles the end of a request of `pool`. Returns the requests that follow it.
    pub(crate) fn finished(&mut self, t: f64, pool: usize) -> Vec<Request> {
        match self {
            Self::Online { .. } => Vec::new(),
            Self::Run(run) => run.finished(t, pool),
        }
    }

    /// Returns whether no request is left.
    pub(crate) fn is_over(&self) -> bool {
        match self {
            Self::Online { .. } => true,
            Self::Run(run) => run.at >= run.stages.len(),
        }
    }

    /// Returns the plan for a pool: counts and estimated lengths, never the actual ones.
    pub(crate) fn plan(&self, pool: usize, t: f64) -> Vec<StagePlan> {
        match self {
            Self::Online { requests, phases } => {
                let coming = phases.iter().filter(|phase| phase.end > t).take(2).enumerate();
                coming
                    .map(|(order, phase)| {
                        let within =
                            |request: &&Request| (phase.begin.max(t)..phase.end).contains(&request.arrived);
                        let remaining = requests.iter().filter(within).count();
                        announced(phase.name, order, remaining, phase.tokens, phase.open)
                    })
                    .collect()
            }
            Self::Run(run) => run.plan(pool),
        }
    }
}

impl Run {
    fn next_stage(&mut self, t: f64) -> Vec<Request> {
        if self.begun {
            self.at += 1;
        }
        self.begun = true;
        let Some((_, batches)) = self.stages.get(self.at) else { return Vec::new() };
        self.left = batches.iter().map(|batch| batch.requests.iter().copied().collect()).collect();
        self.open = vec![0; batches.len()];
        let batches = 0..self.left.len();
        batches
            .flat_map(|batch| (0..OPEN).map(move |_| batch))
            .filter_map(|batch| self.next_request(t, batch))
            .collect()
    }

    fn next_request(&mut self, t: f64, batch: usize) -> Option<Request> {
        let (prompt, tokens) = self.left[batch].pop_front()?;
        self.open[batch] += 1;
        let pool = self.stages[self.at].1[batch].pool;
        Some(Request { pool, arrived: t, prompt, tokens, wait: None })
    }

    fn finished(&mut self, t: f64, pool: usize) -> Vec<Request> {
        let Some(batch) = self.stages[self.at].1.iter().position(|batch| batch.pool == pool) else {
            return Vec::new();
        };
        self.open[batch] -= 1;
        let mut requests: Vec<Request> = self.next_request(t, batch).into_iter().collect();
        if self.open.iter().all(|open| *open == 0) && self.left.iter().all(VecDeque::is_empty) {
            requests.extend(self.next_stage(t));
        }
        requests
    }

    fn plan(&self, pool: usize) -> Vec<StagePlan> {
        let mut plan = Vec::new();
        for (order, (name, batches)) in self.stages.iter().skip(self.at).enumerate() {
            for (index, batch) in batches.iter().enumerate().filter(|(_, batch)| batch.pool == pool) {
                let remaining =
                    if order == 0 { self.left[index].len() + self.open[index] } else { batch.requests.len() };
                if remaining > 0 {
                    plan.push(announced(name, order, remaining, batch.tokens, OPEN));
                }
            }
        }
        plan
    }
}
