//! Chooses what to do with the pods of a workload so that their number becomes the target: [`reconcile`], pure.
//!
//! When `replicas` is lowered, Kubernetes chooses the pods to delete: a Deployment deletes pods that are not ready first, then
//! those with the lowest deletion cost; a StatefulSet and a LeaderWorkerSet delete the highest index. So a lower count is
//! published only when that choice hits pods without requests, and no more pods receive requests than the lowest count that
//! may still be applied.

/// Which pods Kubernetes deletes first when `replicas` is lowered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VictimOrder {
    /// Those that are not ready, then those with the lowest deletion cost (Deployment).
    DeletionCost,
    /// The one with the highest index (StatefulSet, LeaderWorkerSet).
    HighestIndex,
}

/// A pod that is not being deleted.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PodView {
    /// Index in its workload; unused for a Deployment.
    pub(super) index: usize,
    /// Ready in Kubernetes, and it has passed a health check here.
    pub(super) ready: bool,
    /// It has passed a health check, and is not ready in Kubernetes now: it would be deleted first, with all its requests.
    pub(super) down: bool,
    /// It receives no new requests.
    pub(super) draining: bool,
    /// It drains, and no gateway has a request on it, or its drain timeout is over.
    pub(super) empty: bool,
    /// It has the lowest deletion cost.
    pub(super) is_deletion_candidate: bool,
    /// Estimated tokens that it still has to process.
    pub(super) tokens: u64,
}

impl PodView {
    /// Returns whether its deletion loses no request.
    fn is_drained(&self) -> bool {
        self.draining && self.empty
    }

    /// Returns whether it drains and may have requests that can be saved. A pod that never was ready has none, and one that is
    /// down is deleted first in any case.
    fn has_requests(&self) -> bool {
        self.draining && !self.empty && self.ready
    }

    /// Returns whether it is among the first to be deleted, and loses no request.
    fn evictable(&self) -> bool {
        self.is_drained() && self.is_deletion_candidate
    }
}

/// What to do. Numbers are positions in the list of pods.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ReconcileSteps {
    /// Pods that receive requests again.
    pub(super) revive: Vec<usize>,
    /// Pods that begin to drain.
    pub(super) drain: Vec<usize>,
    /// Pods that are marked before the count is published.
    pub(super) deletion_candidates: Vec<usize>,
    /// Count to publish.
    pub(super) replicas: usize,
}

/// State of a workload besides its pods.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReconcileInput {
    /// Which pods Kubernetes deletes first.
    pub(super) order: VictimOrder,
    /// False while pods of two templates exist (a rollout), when the choice of a Deployment cannot be predicted.
    pub(super) settled: bool,
    /// Count that was published last.
    pub(super) published: usize,
    /// Lowest count that may still be applied; at most `published`.
    pub(super) min_pending_replicas: usize,
}

/// Returns one step towards `target` pods that are ready or starting.
pub(super) fn reconcile(input: ReconcileInput, pods: &[PodView], target: usize) -> ReconcileSteps {
    match input.order {
        VictimOrder::DeletionCost => by_deletion_cost(input, pods, target),
        VictimOrder::HighestIndex => highest_index(input, pods, target),
    }
}

/// For a Deployment. Pods that are ready or have requests are never more than `min_pending_replicas`; all others are marked, so
/// that they are deleted first whichever count is applied.
fn by_deletion_cost(input: ReconcileInput, pods: &[PodView], target: usize) -> ReconcileSteps {
    let mut steps = ReconcileSteps::default();
    let mut staying = positions(pods, |pod| !pod.draining);
    staying.sort_by_key(|at| (pods[*at].ready, pods[*at].tokens));
    let mut draining = positions(pods, |pod| pod.draining);
    draining.sort_by_key(|at| (pods[*at].evictable(), !pods[*at].ready, pods[*at].empty));
    let held = draining.iter().filter(|at| pods[**at].has_requests()).count();
    // A rollout creates new pods before it deletes old ones.
    let surge = if input.settled { 0 } else { pods.len().saturating_sub(input.published) };
    // Requests on draining pods never reduce the pods that are ready already: a pod that came back must not stop another.
    let working = staying.iter().filter(|at| pods[**at].ready).count();
    let most = target
        .min(input.min_pending_replicas.saturating_sub(held).max(working.min(input.min_pending_replicas)))
        + surge;
    steps.drain.extend(staying.drain(..staying.len().saturating_sub(most)));
    // An evictable pod is revived only if there is room for it.
    let peers = pods.iter().filter(|pod| !pod.evictable()).count();
    let mut places = input.min_pending_replicas.saturating_sub(peers);
    draining.retain(|at| {
        if !pods[*at].evictable() {
            return !pods[*at].empty || peers <= input.min_pending_replicas;
        }
        let free = places > 0;
        places = places.saturating_sub(1);
        free
    });
    let missing = target.min(input.min_pending_replicas).saturating_sub(staying.len());
    steps.revive.extend(draining.drain(..missing.min(draining.len())));
    // A starting pod would be deleted before a drained one, so the warm pod takes its place.
    let warm = draining.into_iter().filter(|at| pods[*at].ready);
    for (warm, cold) in warm.zip(staying.iter().filter(|at| !pods[**at].ready)) {
        steps.revive.push(warm);
        steps.drain.push(*cold);
    }
    steps.deletion_candidates = positions(pods, PodView::is_drained);
    steps.deletion_candidates.retain(|at| !steps.revive.contains(at));
    // Pods that are not ready are deleted first; the deletion cost counts once the watch has reported it.
    let cold = pods.iter().any(|pod| !(pod.ready || pod.is_drained()));
    let marked = steps.deletion_candidates.iter().filter(|at| pods[**at].is_deletion_candidate);
    let go = match (input.settled && steps.revive.is_empty(), cold) {
        (false, _) => 0,
        (true, true) => marked.filter(|at| !pods[**at].ready).count(),
        (true, false) => marked.count(),
    };
    steps.replicas = match pods.iter().any(|pod| pod.down && !pod.is_drained()) {
        // Keep all pods until the choice of Kubernetes is known again. Additional pods of a rollout are not counted.
        true => input.published.max(if input.settled { pods.len() } else { 0 }).max(target),
        false => input.published.min(pods.len() - go).max(target),
    };
    steps
}

/// For a StatefulSet and a LeaderWorkerSet. The lowest indices receive requests, those above drain. The count falls from the top
/// over pods without requests and over pods that do not exist, which would drain from their start.
fn highest_index(input: ReconcileInput, pods: &[PodView], target: usize) -> ReconcileSteps {
    let most = target.min(input.min_pending_replicas);
    let held = pods.iter().filter(|pod| !pod.is_drained()).map(|pod| pod.index + 1).max();
    ReconcileSteps {
        revive: positions(pods, |pod| pod.index < most && pod.draining),
        drain: positions(pods, |pod| pod.index >= most && !pod.draining),
        deletion_candidates: Vec::new(),
        replicas: input.published.min(held.unwrap_or(0)).max(target),
    }
}

/// Lowest count that an earlier leader may have published when it left the pods in this state: the pods that are ready.
pub(super) fn least_published(order: VictimOrder, pods: &[PodView]) -> usize {
    let working = pods.iter().filter(|pod| pod.ready && !pod.draining);
    match order {
        VictimOrder::DeletionCost => working.count(),
        VictimOrder::HighestIndex => working.map(|pod| pod.index + 1).max().unwrap_or(0),
    }
}

fn positions(pods: &[PodView], target: impl Fn(&PodView) -> bool) -> Vec<usize> {
    (0..pods.len()).filter(|at| target(&pods[*at])).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::super::replica_history::ReplicaHistory;
    use super::*;

    const APPLY_TIME: Duration = Duration::from_secs(60);
    const LAG: Duration = Duration::from_secs(5);

    /// A pod in Kubernetes, and the gateway's view of it.
    #[derive(Debug, Clone)]
    struct Pod {
        view: PodView,
        /// Ready in Kubernetes.
        up: bool,
        /// It has passed a health check.
        was: bool,
        held: u64,
        /// Whether the gateways have reported their requests on it.
        reported: bool,
    }

    /// A workload, the leading gateway, and the controllers.
    #[derive(Debug, Clone)]
    struct World {
        order: VictimOrder,
        now: Instant,
        replicas: usize,
        pods: Vec<Pod>,
        history: ReplicaHistory,
        /// All published counts, and the position of the one that KEDA applied last. `None` if the gateway sets `replicas` itself.
        keda: Option<(Vec<usize>, usize)>,
    }

    impl World {
        fn apply_time(&self) -> Duration {
            if self.keda.is_some() { APPLY_TIME } else { LAG }
        }

        /// Returns whether a pod that is up may receive requests.
        fn admits(&self) -> bool {
            let peers =
                self.pods.iter().filter(|pod| !(pod.view.draining && pod.view.is_deletion_candidate)).count();
            match self.order {
                VictimOrder::DeletionCost => {
                    peers <= self.history.min_pending_replicas(self.now).unwrap_or(0)
                }
                VictimOrder::HighestIndex => self.pods.iter().all(|pod| {
                    pod.view.draining
                        || pod.view.index < self.history.min_pending_replicas(self.now).unwrap_or(0)
                }),
            }
        }

        fn observe(&mut self) {
            self.now += Duration::from_millis(1);
            self.history.observe(self.replicas, self.pods.len(), self.now, LAG);
        }

        /// The gateway's view of the pods.
        fn views(&mut self) -> Vec<PodView> {
            let admits = self.admits();
            for pod in &mut self.pods {
                pod.was |= pod.up && (admits || pod.view.draining);
                let view = &mut pod.view;
                (view.ready, view.down, view.tokens) = (pod.was && pod.up, pod.was && !pod.up, pod.held);
                view.empty = view.draining && (view.is_deletion_candidate || pod.held == 0 && pod.reported);
            }
            self.pods.iter().map(|pod| pod.view.clone()).collect()
        }

        fn decide(&mut self, target: usize) -> ReconcileSteps {
            if self.keda.is_none() {
                self.observe();
            }
            let views = self.views();
            let published = self.history.current().unwrap();
            let min_pending_replicas = self.history.min_pending_replicas(self.now).unwrap();
            let steps = reconcile(
                ReconcileInput { order: self.order, settled: true, published, min_pending_replicas },
                &views,
                target,
            );
            for &at in &steps.drain {
                self.pods[at].view.draining = true;
            }
            for &at in &steps.revive {
                let view = &mut self.pods[at].view;
                (view.draining, view.empty, view.is_deletion_candidate) = (false, false, false);
            }
            for &at in &steps.deletion_candidates {
                self.pods[at].view.is_deletion_candidate = true;
            }
            self.history.publish(steps.replicas, self.now, self.apply_time());
            match &mut self.keda {
                Some((all, _)) if all.last() != Some(&steps.replicas) => all.push(steps.replicas),
                Some(_) => {}
                None => self.replicas = steps.replicas,
            }
            steps
        }

        /// KEDA applies a published count, never one older than the last that it applied.
        fn apply(&mut self, further: usize) {
            let Some((all, taken)) = &mut self.keda else { return };
            *taken = (*taken + further).min(all.len() - 1);
            self.replicas = all[*taken];
        }

        /// The controller creates or deletes one pod. Returns the requests of a deleted pod.
        fn run_controller(&mut self) -> u64 {
            if self.pods.len() > self.replicas {
                let pods = self.pods.iter().enumerate();
                let out = match self.order {
                    // Among equals the one that became ready last.
                    VictimOrder::DeletionCost => pods.min_by_key(|(at, pod)| {
                        (pod.up, !pod.view.is_deletion_candidate, std::cmp::Reverse(*at))
                    }),
                    VictimOrder::HighestIndex => pods.max_by_key(|(_, pod)| pod.view.index),
                };
                let out = out.unwrap().0;
                return self.pods.remove(out).held;
            }
            if self.pods.len() < self.replicas {
                let index = (0..).find(|index| self.pods.iter().all(|pod| pod.view.index != *index)).unwrap();
                let view = pod(index, false, false, 0);
                self.pods.push(Pod { view, up: false, was: false, held: 0, reported: true });
            }
            0
        }
    }

    #[derive(Debug, Clone)]
    enum Event {
        SetTarget(usize),
        RunController,
        Up(usize),
        Down(usize),
        Report(usize, bool),
        Work(usize, u64),
        Done(usize),
        Decide,
        Observe,
        Apply(usize),
        Elapse,
        NewLeader,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            (0usize..6).prop_map(Event::SetTarget),
            Just(Event::RunController),
            (0usize..8).prop_map(Event::Up),
            (0usize..8).prop_map(Event::Down),
            (0usize..8, any::<bool>()).prop_map(|(at, reported)| Event::Report(at, reported)),
            (0usize..8, 1u64..9).prop_map(|(at, held)| Event::Work(at, held)),
            (0usize..8).prop_map(Event::Done),
            Just(Event::Decide),
            Just(Event::Observe),
            (0usize..4).prop_map(Event::Apply),
            Just(Event::Elapse),
            Just(Event::NewLeader),
        ];
        prop::collection::vec(event, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// For every order of events: no pod with requests is deleted, no needed warm pod drains, the published count never exceeds
        /// the largest target, and when all is quiet the target is reached.
        #[test]
        fn deletes_no_pod_with_requests_and_reaches_the_target(
            order in prop_oneof![Just(VictimOrder::DeletionCost), Just(VictimOrder::HighestIndex)],
            keda: bool, events in events(),
        ) {
            let now = Instant::now();
            let mut world = World {
                order, now, replicas: 0, pods: Vec::new(), history: ReplicaHistory::begin(0, 0, None, now),
                keda: keda.then(|| (vec![0], 0)),
            };
            let (mut target, mut most) = (0, 0);
            for event in events {
                let pods = world.pods.len().max(1);
                match event {
                    Event::SetTarget(number) => { target = number; most = most.max(target); }
                    Event::RunController => prop_assert_eq!(world.run_controller(), 0),
                    Event::Up(at) if !world.pods.is_empty() => world.pods[at % pods].up = true,
                    // Requests on a pod that goes down while a lower count is being applied cannot be saved.
                    Event::Down(at) if !world.pods.is_empty() => {
                        let pod = &mut world.pods[at % pods];
                        pod.up &= pod.held > 0;
                    }
                    Event::Report(at, reported) if !world.pods.is_empty() => world.pods[at % pods].reported = reported,
                    // Every gateway sends requests to ready pods that do not drain.
                    Event::Work(at, held) if !world.pods.is_empty() => {
                        let admits = world.admits();
                        let pod = &mut world.pods[at % pods];
                        if pod.up && !pod.view.draining && (pod.view.ready || admits) {
                            (pod.was, pod.view.ready) = (true, true);
                            pod.held += held;
                        }
                    }
                    Event::Done(at) if !world.pods.is_empty() => world.pods[at % pods].held = 0,
                    Event::Decide => {
                        let warm = |world: &World| {
                            world.pods.iter().filter(|pod| pod.view.ready && !pod.view.draining).count()
                        };
                        world.views();
                        let before = warm(&world);
                        let steps = world.decide(target);
                        if order == VictimOrder::DeletionCost && warm(&world) < before.min(target) {
                            prop_assert!(false, "{before} warm, target {target}, {steps:?} {world:?}");
                        }
                    }
                    Event::Observe => world.observe(),
                    Event::Apply(further) => world.apply(further),
                    // The new leader knows the workload, the marks on the pods, and the published scale.
                    Event::NewLeader => {
                        let least = least_published(order, &world.views());
                        world.now += Duration::from_millis(1);
                        world.history = match &world.keda {
                            Some((all, _)) => {
                                let min_pending_replicas = world.history.min_pending_replicas(world.now).unwrap();
                                let last = *all.last().unwrap();
                                ReplicaHistory::begin(last, world.replicas, Some((min_pending_replicas.max(least), APPLY_TIME)), world.now)
                            }
                            None => ReplicaHistory::begin(world.replicas, world.replicas, None, world.now),
                        };
                    }
                    // KEDA and the controller have applied everything.
                    Event::Elapse => {
                        world.apply(usize::MAX / 2);
                        while world.pods.len() != world.replicas {
                            prop_assert_eq!(world.run_controller(), 0);
                        }
                        world.now += APPLY_TIME;
                    }
                    _ => {}
                }
                prop_assert!(world.replicas <= most, "{} of {most}", world.replicas);
            }
            for _ in 0..40 {
                world.pods.iter_mut().for_each(|pod| (pod.held, pod.up, pod.reported) = (0, true, true));
                world.decide(target);
                world.apply(usize::MAX / 2);
                prop_assert_eq!(world.run_controller(), 0);
                world.observe();
                world.now += LAG;
            }
            prop_assert_eq!((world.replicas, world.pods.len()), (target, target));
            prop_assert!(world.pods.iter().all(|pod| !pod.view.draining));
        }
    }

    fn input(order: VictimOrder, replicas: usize) -> ReconcileInput {
        ReconcileInput { order, settled: true, published: replicas, min_pending_replicas: replicas }
    }

    fn pod(index: usize, ready: bool, draining: bool, tokens: u64) -> PodView {
        let empty = draining && tokens == 0;
        PodView { index, ready, down: false, draining, empty, is_deletion_candidate: false, tokens }
    }

    #[test]
    fn warm_pod_replaces_a_starting_one() {
        let pods = [pod(0, true, true, 0), pod(1, true, false, 5), pod(2, false, false, 0)];
        let steps = reconcile(input(VictimOrder::DeletionCost, 3), &pods, 2);
        assert_eq!((steps.revive, steps.drain, steps.replicas), (vec![0], vec![2], 3));
    }

    #[test]
    fn keeps_replicas_during_a_rollout() {
        let pods = [PodView { is_deletion_candidate: true, ..pod(0, true, true, 0) }, pod(1, true, false, 5)];
        assert_eq!(
            reconcile(ReconcileInput { settled: false, ..input(VictimOrder::DeletionCost, 2) }, &pods, 1)
                .replicas,
            2
        );
        assert_eq!(reconcile(input(VictimOrder::DeletionCost, 2), &pods, 1).replicas, 1);
    }

    #[test]
    fn raised_and_lowered_count_keeps_warm_pods() {
        // Two more pods were requested and do not exist. If they still come, they drain from their start.
        let pods = [pod(0, true, false, 5), pod(1, true, false, 5)];
        let found = reconcile(input(VictimOrder::DeletionCost, 4), &pods, 2);
        assert_eq!((found.drain, found.replicas), (vec![], 2));
        let late = [&pods[..], &[pod(2, false, false, 0)]].concat();
        let found = reconcile(input(VictimOrder::DeletionCost, 2), &late, 2);
        assert_eq!((found.drain, found.replicas), (vec![2], 2));
        // While a lower count may be applied, no pod above it receives requests.
        let found = reconcile(
            ReconcileInput { min_pending_replicas: 2, ..input(VictimOrder::HighestIndex, 4) },
            &late,
            4,
        );
        assert_eq!((found.drain, found.replicas), (vec![2], 4));
    }

    #[test]
    fn highest_index_drains_first_even_if_it_is_the_busiest() {
        let pods = [pod(0, true, false, 0), pod(1, true, false, 90)];
        let found = reconcile(input(VictimOrder::HighestIndex, 2), &pods, 1);
        assert_eq!((found.drain, found.replicas), (vec![1], 2));
        // An empty pod below a busy draining one waits for it.
        let pods = [pod(0, true, true, 0), pod(1, true, true, 90)];
        assert_eq!(reconcile(input(VictimOrder::HighestIndex, 2), &pods, 0).replicas, 2);
        // The pod in the middle was evicted and will come back: a lower count would delete the last one, which has requests.
        let pods = [pod(0, true, false, 3), pod(2, true, false, 9)];
        let found = reconcile(input(VictimOrder::HighestIndex, 3), &pods, 2);
        assert_eq!((found.drain, found.replicas), (vec![1], 3));
    }

    #[test]
    fn lowers_the_count_for_pods_that_never_start() {
        // The cluster has room for one pod; the others hang, and the target is one more than ready.
        let evictable = |index| PodView { is_deletion_candidate: true, ..pod(index, false, true, 0) };
        let pods = [pod(0, true, false, 5), evictable(1), evictable(2), pod(3, false, false, 0)];
        assert_eq!(reconcile(input(VictimOrder::DeletionCost, 4), &pods, 2).replicas, 2);
        // Only after the deletion cost is on them.
        let pods = [pod(0, true, false, 5), pod(1, false, true, 0), evictable(2), pod(3, false, false, 0)];
        let found = reconcile(input(VictimOrder::DeletionCost, 4), &pods, 2);
        assert_eq!((found.deletion_candidates, found.replicas), (vec![1, 2], 3));
        // A starting pod would be deleted before the warm pod that has drained.
        let pods = [pod(0, true, false, 5), pod(1, true, true, 0), evictable(2), pod(3, false, false, 0)];
        let found = reconcile(input(VictimOrder::DeletionCost, 4), &pods, 2);
        assert_eq!((found.revive, found.drain, found.replicas), (vec![1], vec![3], 4));
        // So would a pod that is not ready and may have requests.
        let unknown = PodView { empty: false, ..pod(1, false, true, 0) };
        let warm = PodView { is_deletion_candidate: true, ..pod(2, true, true, 0) };
        let pods = [pod(0, true, false, 5), unknown, warm];
        assert_eq!(reconcile(input(VictimOrder::DeletionCost, 3), &pods, 1).replicas, 3);
    }

    #[test]
    fn raises_the_count_when_a_pod_with_requests_goes_down() {
        let down = PodView { ready: false, down: true, ..pod(0, true, false, 5) };
        let evictable = PodView { is_deletion_candidate: true, ..pod(1, false, true, 0) };
        let pods = [down.clone(), evictable];
        assert_eq!(reconcile(input(VictimOrder::DeletionCost, 1), &pods, 1).replicas, 2);
        // A rollout has more pods than `replicas`, and would create even more.
        let rollout = ReconcileInput { settled: false, ..input(VictimOrder::DeletionCost, 1) };
        assert_eq!(reconcile(rollout, &pods, 1).replicas, 1);
        let empty = PodView { draining: true, empty: true, is_deletion_candidate: true, ..down };
        assert_eq!(reconcile(input(VictimOrder::DeletionCost, 1), &[empty], 0).replicas, 0);
    }
}
