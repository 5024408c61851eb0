//! Simulation of pools of nodes. A node decodes its `b` requests in lockstep, each at `1000 / (itl[0] + itl[1] b)`
//! tokens per second; a prompt token costs a fortieth of a completion token. Requests wait in one queue per pool and
//! start on the least loaded ready node. A node needs its cold start and costs from the time of its request. A removed
//! node finishes its requests, and is readmitted before another is started. All pools together stay within the budget.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use potstill_gateway::scaling_policy::{Observation, PoolObservation, RequestCounts, Settings};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::spec::{PoolSpec, Request};
use super::workloads::Workload;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Ready,
    Draining,
}

/// A time with a total order, for heaps; never NaN.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub(crate) struct Time(pub f64);

impl Eq for Time {}

#[expect(clippy::derive_ord_xor_partial_ord, reason = "the two agree for numbers")]
impl Ord for Time {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

struct Node {
    id: u64,
    asked: f64,
    state: State,
    /// Tokens that each running request has received since the start of the node.
    made: f64,
    at: f64,
    /// Running requests by the value of `made` at which they end.
    ends: BinaryHeap<Reverse<(Time, usize)>>,
    version: u64,
}

/// A pool in the simulation.
pub(crate) struct Pool {
    pub(crate) spec: PoolSpec,
    nodes: Vec<Node>,
    queue: VecDeque<usize>,
    arrivals: VecDeque<f64>,
    finished: VecDeque<f64>,
    mean_tokens: Option<f64>,
    cold_seen: Vec<f64>,
    paid_s: f64,
    starts: usize,
}

enum Event {
    Arrive(usize),
    Done { pool: usize, node: u64, version: u64 },
    Ready { pool: usize, node: u64, cold: f64 },
    Tick,
}

/// Results of a simulation.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outcome {
    /// Share of requests that started within ten seconds.
    pub(crate) slo: f64,
    /// Node-hours times cost.
    pub(crate) cost: f64,
    /// Seconds until the last completion.
    pub(crate) end_s: f64,
    pub(crate) starts: usize,
    /// Largest cost at one time.
    pub(crate) most: f64,
}

/// A simulation.
pub(crate) struct Sim {
    pub(crate) t: f64,
    pub(crate) pools: Vec<Pool>,
    pub(crate) requests: Vec<Request>,
    budget: Option<f64>,
    events: BinaryHeap<Reverse<(Time, u64, usize)>>,
    kinds: Vec<Option<Event>>,
    serial: u64,
    random: ChaCha8Rng,
    open: usize,
    most: f64,
}

/// A scaling policy: nodes by pool for an observation. Reference policies also read the simulation itself.
pub(crate) trait Law {
    /// Seconds between decisions.
    fn interval_s(&self) -> f64;
    /// Initial number of nodes; by default that of the scenario.
    fn begin(&mut self, _sim: &Sim, _workload: &Workload, pool: usize, spec: &PoolSpec) -> usize {
        let _unused = pool;
        spec.begin
    }
    /// Returns the number of nodes by pool.
    fn decide(&mut self, seen: &Observation, sim: &Sim, workload: &Workload) -> Vec<usize>;
}

const PROMPT_SHARE: f64 = 40.0;
/// Time in seconds after which a simulation is stopped.
const LONGEST_S: f64 = 86_400.0;

impl Sim {
    pub(crate) fn new(specs: &[PoolSpec], budget: Option<f64>, random: ChaCha8Rng) -> Self {
        let pools = specs.iter().map(|spec| Pool {
            spec: spec.clone(),
            nodes: Vec::new(),
            queue: VecDeque::new(),
            arrivals: VecDeque::new(),
            finished: VecDeque::new(),
            mean_tokens: None,
            cold_seen: Vec::new(),
            paid_s: 0.0,
            starts: 0,
        });
        Self {
            t: 0.0,
            pools: pools.collect(),
            requests: Vec::new(),
            budget,
            events: BinaryHeap::new(),
            kinds: Vec::new(),
            serial: 0,
            random,
            open: 0,
            most: 0.0,
        }
    }

    fn at(&mut self, t: f64, event: Event) {
        self.serial += 1;
        self.events.push(Reverse((Time(t), self.serial, self.kinds.len())));
        self.kinds.push(Some(event));
    }

    /// Schedules a future request.
    pub(crate) fn schedule(&mut self, request: Request) {
        self.open += 1;
        let (t, number) = (request.arrived, self.requests.len());
        self.requests.push(request);
        self.at(t, Event::Arrive(number));
    }

    /// Tokens that the requests of a pool still need; for reference policies only.
    pub(crate) fn tokens_left(&self, pool: usize) -> f64 {
        let pool = &self.pools[pool];
        let running =
            pool.nodes.iter().flat_map(|node| node.ends.iter().map(|Reverse((end, _))| end.0 - node.made));
        running.sum::<f64>() + pool.queue.iter().map(|request| self.requests[*request].tokens).sum::<f64>()
    }

    fn cost_now(&self) -> f64 {
        self.pools.iter().map(|pool| pool.nodes.len() as f64 * pool.spec.cost).sum()
    }

    fn reschedule(&mut self, pool: usize, index: usize) {
        let node = &mut self.pools[pool].nodes[index];
        node.version += 1;
        let Some(Reverse((end, _))) = node.ends.peek() else { return };
        let (id, version, left) = (node.id, node.version, end.0 - node.made);
        let rate = self.pools[pool].spec.rate(self.pools[pool].nodes[index].ends.len());
        self.at(self.t + left.max(0.0) / rate, Event::Done { pool, node: id, version });
    }

    fn advance(&mut self, pool: usize, index: usize) {
        let t = self.t;
        let Pool { spec, nodes, .. } = &mut self.pools[pool];
        let node = &mut nodes[index];
        if !node.ends.is_empty() {
            node.made += (t - node.at) * spec.rate(node.ends.len());
        }
        node.at = t;
    }

    fn admit(&mut self, pool: usize) {
        while let Some(&request) = self.pools[pool].queue.front() {
            let ready =
                self.pools[pool].nodes.iter().enumerate().filter(|(_, node)| node.state == State::Ready);
            let Some((index, node)) = ready.min_by_key(|(_, node)| node.ends.len()) else { return };
            if node.ends.len() >= self.pools[pool].spec.slots {
                return;
            }
            self.pools[pool].queue.pop_front();
            self.advance(pool, index);
            let asked = &mut self.requests[request];
            asked.wait = Some(self.t - asked.arrived);
            let work = asked.tokens + asked.prompt / PROMPT_SHARE;
            let node = &mut self.pools[pool].nodes[index];
            node.ends.push(Reverse((Time(node.made + work), request)));
            self.reschedule(pool, index);
        }
    }

    fn start(&mut self, pool: usize, cold: f64) {
        self.serial += 1;
        let node = Node {
            id: self.serial,
            asked: self.t,
            state: State::Starting,
            made: 0.0,
            at: self.t,
            ends: BinaryHeap::new(),
            version: 0,
        };
        self.at(self.t + cold, Event::Ready { pool, node: node.id, cold });
        self.pools[pool].nodes.push(node);
        self.most = self.most.max(self.cost_now());
    }

    fn remove(&mut self, pool: usize, index: usize) {
        let node = self.pools[pool].nodes.swap_remove(index);
        self.pools[pool].paid_s += self.t - node.asked;
    }

    /// Starts and drains nodes as the gateway's actuators do.
    fn actuate(&mut self, pool: usize, wanted: usize) {
        let PoolSpec { min, max, cost, cold_s, .. } = self.pools[pool].spec;
        let wanted = wanted.clamp(min, max);
        loop {
            let nodes = &self.pools[pool].nodes;
            let have = nodes.iter().filter(|node| node.state != State::Draining).count();
            if have < wanted {
                let draining = nodes.iter().enumerate().filter(|(_, node)| node.state == State::Draining);
                if let Some((index, _)) = draining.max_by_key(|(_, node)| node.ends.len()) {
                    self.pools[pool].nodes[index].state = State::Ready;
                    self.admit(pool);
                } else if self.budget.is_some_and(|budget| self.cost_now() + cost > budget + 1e-9) {
                    return;
                } else {
                    self.pools[pool].starts += 1;
                    let cold = self.random.random_range(cold_s.0..=cold_s.1);
                    self.start(pool, cold);
                }
            } else if have > wanted {
                let staying = nodes.iter().enumerate().filter(|(_, node)| node.state != State::Draining);
                let victim = staying.min_by_key(|(_, node)| (node.state == State::Ready, node.ends.len()));
                let Some((index, node)) = victim else { return };
                if node.ends.is_empty() {
                    self.remove(pool, index);
                } else {
                    self.pools[pool].nodes[index].state = State::Draining;
                }
            } else {
                return;
            }
        }
    }

    fn observe(&mut self, workload: &Workload) -> Observation {
        let t = self.t;
        let pools = self.pools.iter_mut().enumerate().map(|(index, pool)| {
            for times in [&mut pool.arrivals, &mut pool.finished] {
                while times.front().is_some_and(|at| *at < t - 300.0) {
                    times.pop_front();
                }
            }
            let last =
                |times: &VecDeque<f64>, span: f64| times.iter().filter(|at| **at >= t - span).count() as u64;
            let mut cold = pool.cold_seen[pool.cold_seen.len().saturating_sub(20)..].to_vec();
            cold.sort_by(f64::total_cmp);
            let with = |state| pool.nodes.iter().filter(move |node| node.state == state);
            PoolObservation {
                model: pool.spec.model.to_owned(),
                min: pool.spec.min,
                max: pool.spec.max,
                slots: pool.spec.slots,
                cost_per_node_s: pool.spec.cost,
                itl_ms: pool.spec.itl_ms,
                ready: with(State::Ready).count(),
                draining: with(State::Draining).count(),
                starting_age_s: with(State::Starting).map(|node| t - node.asked).collect(),
                cold_start_s_p90: cold.get(cold.len() * 9 / 10).copied(),
                active: Some(pool.nodes.iter().map(|node| node.ends.len()).sum()),
                queued: Some(pool.queue.len()),
                arrivals: RequestCounts {
                    s10: last(&pool.arrivals, 10.0),
                    s60: last(&pool.arrivals, 60.0),
                    s300: last(&pool.arrivals, 300.0),
                },
                finished_60: last(&pool.finished, 60.0),
                out_tokens_ewma: pool.mean_tokens,
                plan: workload.plan(index, t),
                stale: false,
                settings: Settings::default(),
            }
        });
        let pools = pools.collect();
        Observation { t, budget: self.budget, pools }
    }

    fn finish(&mut self, pool: usize, request: usize, workload: &mut Workload) {
        self.open -= 1;
        let (t, tokens) = (self.t, self.requests[request].tokens);
        let into = &mut self.pools[pool];
        into.finished.push_back(t);
        into.mean_tokens = Some(into.mean_tokens.map_or(tokens, |mean| 0.98 * mean + 0.02 * tokens));
        let requests = workload.finished(self.t, pool);
        requests.into_iter().for_each(|request| self.schedule(request));
    }

    /// Runs the simulation to its end.
    pub(crate) fn run(mut self, mut workload: Workload, law: &mut dyn Law) -> Outcome {
        for pool in 0..self.pools.len() {
            let spec = self.pools[pool].spec.clone();
            for _ in 0..law.begin(&self, &workload, pool, &spec) {
                self.start(pool, 0.0);
            }
        }
        workload.begin(self.t).into_iter().for_each(|request| self.schedule(request));
        self.at(0.0, Event::Tick);
        let mut end_s = 0.0;
        while let Some(Reverse((Time(t), _, kind))) = self.events.pop() {
            self.t = t;
            let Some(event) = self.kinds[kind].take() else { continue };
            match event {
                Event::Arrive(request) => {
                    let pool = self.requests[request].pool;
                    self.pools[pool].arrivals.push_back(t);
                    self.pools[pool].queue.push_back(request);
                    self.admit(pool);
                }
                Event::Ready { pool, node, cold } => {
                    let into = &mut self.pools[pool];
                    let Some(node) = into.nodes.iter_mut().find(|known| known.id == node) else { continue };
                    if node.state == State::Starting {
                        node.state = State::Ready;
                        node.at = t;
                        if cold > 0.0 {
                            into.cold_seen.push(cold);
                        }
                        self.admit(pool);
                    }
                }
                Event::Done { pool, node, version } => {
                    let nodes = &self.pools[pool].nodes;
                    let known = nodes.iter().position(|known| known.id == node && known.version == version);
                    let Some(index) = known else { continue };
                    self.advance(pool, index);
                    let node = &mut self.pools[pool].nodes[index];
                    let mut ended = Vec::new();
                    while node.ends.peek().is_some_and(|Reverse((end, _))| end.0 <= node.made + 1e-6) {
                        ended.extend(node.ends.pop().map(|Reverse((_, request))| request));
                    }
                    if node.ends.is_empty() && node.state == State::Draining {
                        self.remove(pool, index);
                    } else {
                        self.reschedule(pool, index);
                    }
                    for request in ended {
                        end_s = t;
                        self.finish(pool, request, &mut workload);
                    }
                    self.admit(pool);
                }
                Event::Tick => {
                    let seen = self.observe(&workload);
                    let wanted = law.decide(&seen, &self, &workload);
                    // Pools that shrink first, so that the others find room in the budget.
                    let mut order: Vec<usize> = (0..wanted.len()).collect();
                    let have = |pool: &PoolObservation| pool.nodes() as i64;
                    order.sort_by_key(|at| wanted[*at] as i64 - have(&seen.pools[*at]));
                    for at in order {
                        self.actuate(at, wanted[at]);
                    }
                    if (self.open == 0 && workload.is_over()) || t > LONGEST_S {
                        break;
                    }
                    self.at(t + law.interval_s(), Event::Tick);
                }
            }
        }
        let nodes = self.pools.iter().map(|pool| {
            (pool.paid_s + pool.nodes.iter().map(|node| self.t - node.asked).sum::<f64>()) * pool.spec.cost
        });
        let in_time =
            self.requests.iter().filter(|request| request.wait.is_some_and(|wait| wait <= 10.0)).count();
        Outcome {
            slo: in_time as f64 / self.requests.len().max(1) as f64,
            cost: nodes.sum::<f64>() / 3600.0,
            end_s,
            starts: self.pools.iter().map(|pool| pool.starts).sum(),
            most: self.most,
        }
    }
}
