//! The compared policies: ours, documented policies of other products reimplemented, and one that knows the future. A
//! reimplementation suggests tests of a product; it does not measure it.

use std::collections::VecDeque;

use potstill_gateway::scaling_policy::{Mode, Observation, PolicyState, PoolObservation, decide};

use super::sim::{Law, Sim};
use super::spec::PoolSpec;
use super::workloads::{OPEN, Workload};

/// Names of the policies.
pub(crate) const NAMES: [&str; 6] = ["static", "hpa", "knative", "qps", "potstill", "oracle"];

pub(crate) fn by_name(name: &str) -> Option<Box<dyn Law>> {
    Some(match name {
        "static" => Box::new(Static),
        "hpa" => Box::<Hpa>::default(),
        "knative" => Box::<Knative>::default(),
        "qps" => Box::<Potstill>::new(Potstill { mode: Mode::Qps, ..Potstill::default() }),
        "potstill" => Box::<Potstill>::default(),
        "oracle" => Box::<Oracle>::default(),
        _ => return None,
    })
}

/// The gateway's own policy.
#[derive(Default)]
struct Potstill {
    memory: PolicyState,
    mode: Mode,
    /// Requests per second and node, as an operator would measure on the first requests.
    target: Vec<f64>,
}

impl Law for Potstill {
    fn interval_s(&self) -> f64 {
        5.0
    }

    fn begin(&mut self, _: &Sim, workload: &Workload, pool: usize, spec: &PoolSpec) -> usize {
        let lengths: Vec<f64> = match workload {
            Workload::Online { requests, .. } => {
                requests.iter().take(500).map(|request| request.tokens).collect()
            }
            Workload::Run(run) => {
                let batches =
                    run.stages.iter().flat_map(|(_, batches)| batches).filter(|batch| batch.pool == pool);
                batches.flat_map(|batch| batch.requests.iter().map(|(_, tokens)| *tokens)).take(500).collect()
            }
        };
        let mean = lengths.iter().sum::<f64>() / lengths.len().max(1) as f64;
        self.target.push(0.7 * spec.node_rate() / mean.max(1.0));
        spec.begin
    }

    fn decide(&mut self, seen: &Observation, _: &Sim, _: &Workload) -> Vec<usize> {
        let mut seen = seen.clone();
        for (pool, target) in seen.pools.iter_mut().zip(&self.target) {
            pool.settings.mode = self.mode;
            pool.settings.target_qps = *target;
        }
        let decision = decide(&seen, &mut self.memory);
        seen.pools.iter().map(|pool| decision.desired[&pool.model]).collect()
    }
}

/// The largest constant number of nodes per pool that fits the budget.
struct Static;

impl Static {
    fn nodes(pool: &PoolSpec, pools: usize, budget: Option<f64>) -> usize {
        budget.map_or(pool.max, |budget| pool.max.min((budget / pools as f64 / pool.cost) as usize))
    }
}

impl Law for Static {
    fn interval_s(&self) -> f64 {
        15.0
    }

    fn decide(&mut self, seen: &Observation, sim: &Sim, _: &Workload) -> Vec<usize> {
        sim.pools.iter().map(|pool| Self::nodes(&pool.spec, seen.pools.len(), seen.budget)).collect()
    }
}

/// HPA (autoscaling/v2) on open requests with its defaults: every 15 s, 10 % tolerance, at most four more or twice as
/// many nodes, stabilization window of 300 s. From zero by the queue.
#[derive(Default)]
struct Hpa {
    recommended: Vec<VecDeque<(f64, usize)>>,
}

impl Hpa {
    fn pool(t: f64, pool: &PoolObservation, recommended: &mut VecDeque<(f64, usize)>) -> usize {
        let open = pool.open_requests().unwrap_or(0);
        let (have, target) = (pool.nodes(), 0.7 * pool.slots as f64);
        if have == 0 {
            return usize::from(open > 0);
        }
        let ratio = open as f64 / (target * have as f64);
        let raw = if (ratio - 1.0).abs() <= 0.1 { have } else { (have as f64 * ratio).ceil() as usize };
        let raw = raw.min((have + 4).max(2 * have));
        recommended.push_back((t, raw));
        while recommended.front().is_some_and(|(at, _)| *at < t - 300.0) {
            recommended.pop_front();
        }
        let greatest = recommended.iter().map(|(_, nodes)| *nodes).max().unwrap_or(raw);
        if raw >= have { raw } else { greatest.min(have) }
    }
}

impl Law for Hpa {
    fn interval_s(&self) -> f64 {
        15.0
    }

    fn decide(&mut self, seen: &Observation, _: &Sim, _: &Workload) -> Vec<usize> {
        self.recommended.resize_with(seen.pools.len(), VecDeque::new);
        let pools = seen.pools.iter().zip(&mut self.recommended);
        pools.map(|(pool, recommended)| Self::pool(seen.t, pool, recommended)).collect()
    }
}

/// Knative's policy on open requests with its defaults. Every 2 s: mean over 60 s, or over 6 s in panic; target 70 % of
/// the slots; at most halved. Panic begins at twice the ready nodes, lasts a minute and never scales down.
#[derive(Default)]
struct Knative {
    pools: Vec<KnativePool>,
}

#[derive(Default)]
struct KnativePool {
    /// Open requests over time.
    open: VecDeque<(f64, f64)>,
    /// Start of panic and its number of nodes.
    panic: Option<(f64, usize)>,
}

impl Law for Knative {
    fn interval_s(&self) -> f64 {
        2.0
    }

    fn decide(&mut self, seen: &Observation, _: &Sim, _: &Workload) -> Vec<usize> {
        self.pools.resize_with(seen.pools.len(), KnativePool::default);
        let t = seen.t;
        let one = |pool: &PoolObservation, memory: &mut KnativePool| {
            let KnativePool { open, panic } = memory;
            open.push_back((t, pool.open_requests().unwrap_or(0) as f64));
            while open.front().is_some_and(|(at, _)| *at < t - 60.0) {
                open.pop_front();
            }
            let mean = |span: f64| {
                let within: Vec<f64> =
                    open.iter().filter(|(at, _)| *at >= t - span).map(|(_, open)| *open).collect();
                within.iter().sum::<f64>() / within.len().max(1) as f64
            };
            let target = 0.7 * pool.slots as f64;
            let least = pool.ready.div_ceil(2);
            let stable = ((mean(60.0) / target).ceil() as usize).max(if pool.ready > 1 { least } else { 0 });
            let urgent = (mean(6.0) / target).ceil() as usize;
            if urgent >= 2 * pool.ready.max(1) {
                let before = panic.map_or(0, |(_, nodes)| nodes);
                *panic = Some((t, urgent.max(before)));
            } else if panic.is_some_and(|(since, _)| t - since >= 60.0) {
                *panic = None;
            }
            let nodes = panic.map_or(stable, |(_, nodes)| nodes.max(urgent).max(pool.ready));
            if nodes == 0 && pool.open_requests().unwrap_or(0) > 0 { 1 } else { nodes }
        };
        seen.pools.iter().zip(&mut self.pools).map(|(pool, memory)| one(pool, memory)).collect()
    }
}

/// Knows all arrivals and lengths. Online: nodes for the requests that will be open one cold start ahead, filled to 92
/// %. Stages: the true remaining tokens, and nodes for a stage that begins within a cold start. A reference rather than
/// an optimum: it keeps waiting near zero.
#[derive(Default)]
struct Oracle {
    /// Open requests per five seconds, if every request started at once.
    open: Vec<Vec<usize>>,
}

const FILL: f64 = 0.92;
const STEP_S: f64 = 5.0;
/// Value of an hour of waiting.
pub(crate) const HOUR_WORTH: f64 = 8.0;

impl Oracle {
    fn profile(&mut self, workload: &Workload, spec: &PoolSpec) {
        let Workload::Online { requests, .. } = workload else {
            self.open.push(Vec::new());
            return;
        };
        let rate = spec.rate((FILL * spec.slots as f64) as usize);
        let mut changes: Vec<(f64, i64)> = Vec::new();
        for request in requests {
            let stay = (request.tokens + request.prompt / 40.0) / rate;
            changes.extend([(request.arrived, 1), (request.arrived + stay, -1)]);
        }
        changes.sort_by(|a, b| a.0.total_cmp(&b.0));
        let end = changes.last().map_or(0.0, |(t, _)| *t);
        let mut most = vec![0; (end / STEP_S) as usize + 2];
        let (mut open, mut at) = (0i64, 0);
        for (step, most) in most.iter_mut().enumerate() {
            *most = open as usize;
            while let Some((_, change)) = changes.get(at).filter(|(t, _)| *t < (step + 1) as f64 * STEP_S) {
                open += change;
                *most = (*most).max(open as usize);
                at += 1;
            }
        }
        self.open.push(most);
    }

    fn online(&self, pool: usize, t: f64, ahead: f64, slots: usize) -> usize {
        let open = &self.open[pool];
        let from = ((t / STEP_S) as usize).min(open.len());
        let to = (((t + ahead) / STEP_S) as usize + 1).min(open.len());
        let most = open[from..to].iter().max().copied().unwrap_or(0);
        (most as f64 / (FILL * slots as f64)).ceil() as usize
    }

    fn worth(tokens: f64, spec: &PoolSpec) -> usize {
        let cold = (spec.cold_s.0 + spec.cold_s.1) / 2.0;
        let nodes = (HOUR_WORTH * tokens / spec.node_rate() / (spec.cost * cold)).sqrt().round();
        (nodes as usize).max(1)
    }

    fn stages(seen: &Observation, sim: &Sim, run: &super::workloads::Run) -> Vec<usize> {
        let empty = Vec::new();
        let batches = run.stages.get(run.at).map_or(&empty, |(_, batches)| batches);
        let next = run.stages.get(run.at + 1).map_or(&empty, |(_, batches)| batches);
        let tokens_of = |pool: usize| {
            let waiting = batches.iter().zip(&run.left).filter(|(batch, _)| batch.pool == pool);
            sim.tokens_left(pool) + waiting.flat_map(|(_, left)| left).map(|(_, tokens)| *tokens).sum::<f64>()
        };
        let left_s = batches.iter().map(|batch| {
            let (spec, ready) = (&sim.pools[batch.pool].spec, seen.pools[batch.pool].ready.max(1));
            tokens_of(batch.pool) / (ready as f64 * spec.node_rate())
        });
        let left_s = left_s.fold(0.0, f64::max);
        let mut wanted: Vec<(f64, usize)> = Vec::new();
        for (pool, observed) in seen.pools.iter().enumerate() {
            let spec = &sim.pools[pool].spec;
            let fill = |requests: usize| requests.min(OPEN).div_ceil(spec.slots);
            let plan = |order: u32| {
                observed.plan.iter().find(|stage| stage.order == order).map(|stage| stage.remaining as usize)
            };
            let tokens = tokens_of(pool);
            wanted.push(match (plan(0), plan(1)) {
                (Some(remaining), _) => (
                    tokens * spec.cost,
                    fill(remaining).min(observed.nodes().max(Self::worth(tokens, spec))).max(1),
                ),
                (None, Some(remaining)) if left_s <= spec.cold_s.1 => {
                    let batch = next.iter().filter(|batch| batch.pool == pool);
                    let tokens: f64 =
                        batch.flat_map(|batch| &batch.requests).map(|(_, tokens)| *tokens).sum();
                    (0.0, fill(remaining).min(Self::worth(tokens, spec)))
                }
                _ => (-1.0, 0),
            });
        }
        let budget = seen.budget.unwrap_or(f64::INFINITY);
        let work: f64 = wanted.iter().map(|(work, _)| work.max(0.0)).sum();
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_by(|a, b| wanted[*b].0.total_cmp(&wanted[*a].0));
        let running = wanted.iter().filter(|(work, _)| *work > 0.0).count();
        let mut left = budget;
        for at in order {
            let cost = sim.pools[at].spec.cost;
            let mut most = (left / cost + 1e-9) as usize;
            if wanted[at].0 > 0.0 && running > 1 {
                most = most.min(((budget * wanted[at].0 / work / cost).round() as usize).max(1));
            }
            wanted[at].1 = wanted[at].1.min(most);
            left -= wanted[at].1 as f64 * cost;
        }
        wanted.into_iter().map(|(_, nodes)| nodes).collect()
    }
}

impl Law for Oracle {
    fn interval_s(&self) -> f64 {
        5.0
    }

    fn begin(&mut self, _: &Sim, workload: &Workload, pool: usize, spec: &PoolSpec) -> usize {
        self.profile(workload, spec);
        spec.begin.max(self.online(pool, 0.0, 0.0, spec.slots))
    }

    fn decide(&mut self, seen: &Observation, sim: &Sim, workload: &Workload) -> Vec<usize> {
        match workload {
            Workload::Run(run) => Self::stages(seen, sim, run),
            Workload::Online { .. } => {
                let pools = seen.pools.iter().enumerate();
                pools
                    .map(|(index, pool)| {
                        let now = pool.open_requests().unwrap_or(0).div_ceil(pool.slots);
                        let ahead = sim.pools[index].spec.cold_s.1 + STEP_S;
                        self.online(index, seen.t, ahead, pool.slots).max(now.min(pool.nodes()))
                    })
                    .collect()
            }
        }
    }
}
