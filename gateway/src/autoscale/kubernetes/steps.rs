//! What to do with a workload's pods so that its number becomes what is wanted: [`steps`], pure.
//!
//! Kubernetes chooses the victims of a smaller `replicas` by its own rules: a Deployment loses pods that are not ready
//! first, then those with the lowest deletion cost; a StatefulSet and a LeaderWorkerSet lose the highest index. So
//! a smaller number is said only when those rules hit pods that hold nothing, and no more pods work than the lowest number that
//! was said and may yet be acted on.

/// Which pods go when `replicas` is lowered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Those that are not ready, then those that are marked (Deployment).
    Marked,
    /// The one with the highest index (StatefulSet, LeaderWorkerSet).
    HighestIndex,
}

/// A pod that is not on its way out.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PodView {
    /// Its index; pods of a Deployment have none that counts.
    pub(super) index: usize,
    /// Kubernetes has it as ready, and it was let in.
    pub(super) ready: bool,
    /// It was let in, and Kubernetes has it as not ready now: it would be the first to go, whatever it holds.
    pub(super) down: bool,
    /// It gets no more requests.
    pub(super) draining: bool,
    /// It drains and holds nothing, on no gateway, or its time is over.
    pub(super) empty: bool,
    /// It carries the lowest deletion cost.
    pub(super) victim: bool,
    /// Tokens that it still has to read and write.
    pub(super) tokens: u64,
}

impl PodView {
    /// Nothing would be lost with it.
    fn left(&self) -> bool {
        self.draining && self.empty
    }

    /// It drains and may hold something still that can be saved: who was never let in holds nothing, and who is down goes first.
    fn holds(&self) -> bool {
        self.draining && !self.empty && self.ready
    }

    /// It is among the first to go, and nothing would be lost.
    fn given_up(&self) -> bool {
        self.left() && self.victim
    }
}

/// What to do; positions are those of the pods given.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Steps {
    /// Back to work.
    pub(super) revive: Vec<usize>,
    /// No more requests.
    pub(super) drain: Vec<usize>,
    /// To be marked before the number is said.
    pub(super) victims: Vec<usize>,
    /// The number to say.
    pub(super) replicas: usize,
}

/// What is known of a workload besides its pods.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// Which pods go first.
    pub(super) order: Order,
    /// False while pods of two templates live side by side, when a Deployment chooses victims in ways that cannot be foretold.
    pub(super) settled: bool,
    /// The number that was said last.
    pub(super) said: usize,
    /// The lowest that was said and may yet be acted on; no more than `said`.
    pub(super) floor: usize,
}

/// One step towards `wanted` pods that work or start.
pub(super) fn steps(terms: Terms, pods: &[PodView], wanted: usize) -> Steps {
    match terms.order {
        Order::Marked => marked(terms, pods, wanted),
        Order::HighestIndex => highest_index(terms, pods, wanted),
    }
}

/// Pods that work or hold something are never more than `floor`: the others are spare and marked, and hold out for any number
/// that comes about.
fn marked(terms: Terms, pods: &[PodView], wanted: usize) -> Steps {
    let mut steps = Steps::default();
    let mut staying = positions(pods, |pod| !pod.draining);
    staying.sort_by_key(|at| (pods[*at].ready, pods[*at].tokens));
    let mut draining = positions(pods, |pod| pod.draining);
    draining.sort_by_key(|at| (pods[*at].given_up(), !pods[*at].ready, pods[*at].empty));
    let held = draining.iter().filter(|at| pods[**at].holds()).count();
    // A rollout brings new pods before it takes the old ones.
    let surge = if terms.settled { 0 } else { pods.len().saturating_sub(terms.said) };
    // Those that work already are not fewer for what others hold: that a pod came up again is no reason to stop the next.
    let working = staying.iter().filter(|at| pods[**at].ready).count();
    let most = wanted.min(terms.floor.saturating_sub(held).max(working.min(terms.floor))) + surge;
    steps.drain.extend(staying.drain(..staying.len().saturating_sub(most)));
    // Who is given up comes back only where a place is left.
    let others = pods.iter().filter(|pod| !pod.given_up()).count();
    let mut places = terms.floor.saturating_sub(others);
    draining.retain(|at| {
        if !pods[*at].given_up() {
            return !pods[*at].empty || others <= terms.floor;
        }
        let free = places > 0;
        places = places.saturating_sub(1);
        free
    });
    let missing = wanted.min(terms.floor).saturating_sub(staying.len());
    steps.revive.extend(draining.drain(..missing.min(draining.len())));
    // A pod that starts would be taken before one that has drained: the warm one takes its place.
    let warm = draining.into_iter().filter(|at| pods[*at].ready);
    for (warm, cold) in warm.zip(staying.iter().filter(|at| !pods[**at].ready)) {
        steps.revive.push(warm);
        steps.drain.push(*cold);
    }
    steps.victims = positions(pods, PodView::left);
    steps.victims.retain(|at| !steps.revive.contains(at));
    // Pods that Kubernetes has as not ready go first, whichever they are; the cost counts once it was seen on the pod.
    let cold = pods.iter().any(|pod| !(pod.ready || pod.left()));
    let marked = steps.victims.iter().filter(|at| pods[**at].victim);
    let go = match (terms.settled && steps.revive.is_empty(), cold) {
        (false, _) => 0,
        (true, true) => marked.filter(|at| !pods[**at].ready).count(),
        (true, false) => marked.count(),
    };
    steps.replicas = match pods.iter().any(|pod| pod.down && !pod.left()) {
        // As many as there are, until it is known again who goes; those that a rollout brings besides are not asked for.
        true => terms.said.max(if terms.settled { pods.len() } else { 0 }).max(wanted),
        false => terms.said.min(pods.len() - go).max(wanted),
    };
    steps
}

/// The lowest indices work and those above drain; the number falls from the top over pods that hold nothing and over those that
/// do not exist, which would drain from their start.
fn highest_index(terms: Terms, pods: &[PodView], wanted: usize) -> Steps {
    let most = wanted.min(terms.floor);
    let held = pods.iter().filter(|pod| !pod.left()).map(|pod| pod.index + 1).max();
    Steps {
        revive: positions(pods, |pod| pod.index < most && pod.draining),
        drain: positions(pods, |pod| pod.index >= most && !pod.draining),
        victims: Vec::new(),
        replicas: terms.said.min(held.unwrap_or(0)).max(wanted),
    }
}

/// The least that may have been said by a leader who left the pods like this: as many as work.
pub(super) fn least(order: Order, pods: &[PodView]) -> usize {
    let working = pods.iter().filter(|pod| pod.ready && !pod.draining);
    match order {
        Order::Marked => working.count(),
        Order::HighestIndex => working.map(|pod| pod.index + 1).max().unwrap_or(0),
    }
}

fn positions(pods: &[PodView], wanted: impl Fn(&PodView) -> bool) -> Vec<usize> {
    (0..pods.len()).filter(|at| wanted(&pods[*at])).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::super::said::Said;
    use super::*;

    const ACTS: Duration = Duration::from_secs(60);
    const LAG: Duration = Duration::from_secs(5);

    /// A pod as Kubernetes has it, and what the gateway knows of it.
    #[derive(Debug, Clone)]
    struct Pod {
        view: PodView,
        /// Ready, by Kubernetes.
        up: bool,
        /// It was let in.
        was: bool,
        held: u64,
        /// Whether the gateways have said what they hold on it.
        told: bool,
    }

    /// A workload, the gateway that leads, and whoever acts on what it says.
    #[derive(Debug, Clone)]
    struct World {
        order: Order,
        now: Instant,
        replicas: usize,
        pods: Vec<Pod>,
        said: Said,
        /// All that was said, and how much of it KEDA has taken; none where the gateway sets the number itself.
        keda: Option<(Vec<usize>, usize)>,
    }

    impl World {
        fn acts(&self) -> Duration {
            if self.keda.is_some() { ACTS } else { LAG }
        }

        /// Whether a pod that is up may begin to work: the leader has seen it, or there is room for all.
        fn admits(&self) -> bool {
            let others = self.pods.iter().filter(|pod| !(pod.view.draining && pod.view.victim)).count();
            match self.order {
                Order::Marked => others <= self.said.floor(self.now).unwrap_or(0),
                Order::HighestIndex => self
                    .pods
                    .iter()
                    .all(|pod| pod.view.draining || pod.view.index < self.said.floor(self.now).unwrap_or(0)),
            }
        }

        fn look(&mut self) {
            self.now += Duration::from_millis(1);
            self.said.see(self.replicas, self.pods.len(), self.now, LAG);
        }

        /// What the gateway knows now.
        fn views(&mut self) -> Vec<PodView> {
            let admits = self.admits();
            for pod in &mut self.pods {
                pod.was |= pod.up && (admits || pod.view.draining);
                let view = &mut pod.view;
                (view.ready, view.down, view.tokens) = (pod.was && pod.up, pod.was && !pod.up, pod.held);
                view.empty = view.draining && (view.victim || pod.held == 0 && pod.told);
            }
            self.pods.iter().map(|pod| pod.view.clone()).collect()
        }

        fn decide(&mut self, wanted: usize) -> Steps {
            if self.keda.is_none() {
                self.look();
            }
            let views = self.views();
            let said = self.said.last().unwrap();
            let floor = self.said.floor(self.now).unwrap();
            let steps = steps(Terms { order: self.order, settled: true, said, floor }, &views, wanted);
            for &at in &steps.drain {
                self.pods[at].view.draining = true;
            }
            for &at in &steps.revive {
                let view = &mut self.pods[at].view;
                (view.draining, view.empty, view.victim) = (false, false, false);
            }
            for &at in &steps.victims {
                self.pods[at].view.victim = true;
            }
            self.said.say(steps.replicas, self.now, self.acts());
            match &mut self.keda {
                Some((all, _)) if all.last() != Some(&steps.replicas) => all.push(steps.replicas),
                Some(_) => {}
                None => self.replicas = steps.replicas,
            }
            steps
        }

        /// KEDA takes a number that it was told, never one from before the last that it took.
        fn hand(&mut self, further: usize) {
            let Some((all, taken)) = &mut self.keda else { return };
            *taken = (*taken + further).min(all.len() - 1);
            self.replicas = all[*taken];
        }

        /// What the controller does about one pod. Answers what a removed pod still held.
        fn control(&mut self) -> u64 {
            if self.pods.len() > self.replicas {
                let pods = self.pods.iter().enumerate();
                let out = match self.order {
                    // Among equals the one that is ready for the shortest time.
                    Order::Marked => {
                        pods.min_by_key(|(at, pod)| (pod.up, !pod.view.victim, std::cmp::Reverse(*at)))
                    }
                    Order::HighestIndex => pods.max_by_key(|(_, pod)| pod.view.index),
                };
                let out = out.unwrap().0;
                return self.pods.remove(out).held;
            }
            if self.pods.len() < self.replicas {
                let index = (0..).find(|index| self.pods.iter().all(|pod| pod.view.index != *index)).unwrap();
                let view = pod(index, false, false, 0);
                self.pods.push(Pod { view, up: false, was: false, held: 0, told: true });
            }
            0
        }
    }

    #[derive(Debug, Clone)]
    enum Event {
        Want(usize),
        Control,
        Up(usize),
        Down(usize),
        Tell(usize, bool),
        Work(usize, u64),
        Done(usize),
        Decide,
        Look,
        Hand(usize),
        Later,
        NewLeader,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            (0usize..6).prop_map(Event::Want),
            Just(Event::Control),
            (0usize..8).prop_map(Event::Up),
            (0usize..8).prop_map(Event::Down),
            (0usize..8, any::<bool>()).prop_map(|(at, told)| Event::Tell(at, told)),
            (0usize..8, 1u64..9).prop_map(|(at, held)| Event::Work(at, held)),
            (0usize..8).prop_map(Event::Done),
            Just(Event::Decide),
            Just(Event::Look),
            (0usize..4).prop_map(Event::Hand),
            Just(Event::Later),
            Just(Event::NewLeader),
        ];
        prop::collection::vec(event, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// Whatever the controller, KEDA, the nodes and the demand do: no pod is taken that holds anything, no warm pod that is
        /// wanted drains, no more are paid than were wanted at any time, and when all is quiet there are as many as are wanted.
        #[test]
        fn nothing_that_is_held_is_lost_and_the_number_is_reached(
            order in prop_oneof![Just(Order::Marked), Just(Order::HighestIndex)],
            keda: bool, events in events(),
        ) {
            let now = Instant::now();
            let mut world = World {
                order, now, replicas: 0, pods: Vec::new(), said: Said::begin(0, 0, None, now),
                keda: keda.then(|| (vec![0], 0)),
            };
            let (mut wanted, mut most) = (0, 0);
            for event in events {
                let pods = world.pods.len().max(1);
                match event {
                    Event::Want(number) => { wanted = number; most = most.max(wanted); }
                    Event::Control => prop_assert_eq!(world.control(), 0),
                    Event::Up(at) if !world.pods.is_empty() => world.pods[at % pods].up = true,
                    // Nobody can save what a pod holds that goes down while a lower number is on its way.
                    Event::Down(at) if !world.pods.is_empty() => {
                        let pod = &mut world.pods[at % pods];
                        pod.up &= pod.held > 0;
                    }
                    Event::Tell(at, told) if !world.pods.is_empty() => world.pods[at % pods].told = told,
                    // Any gateway gives requests to pods that are up, do not drain and were let in.
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
                        let steps = world.decide(wanted);
                        if order == Order::Marked && warm(&world) < before.min(wanted) {
                            prop_assert!(false, "{before} warm, {wanted} wanted, {steps:?} {world:?}");
                        }
                    }
                    Event::Look => world.look(),
                    Event::Hand(further) => world.hand(further),
                    // It knows the workload, what is written on the pods, and what was said last.
                    Event::NewLeader => {
                        let least = least(order, &world.views());
                        world.now += Duration::from_millis(1);
                        world.said = match &world.keda {
                            Some((all, _)) => {
                                let floor = world.said.floor(world.now).unwrap();
                                let last = *all.last().unwrap();
                                Said::begin(last, world.replicas, Some((floor.max(least), ACTS)), world.now)
                            }
                            None => Said::begin(world.replicas, world.replicas, None, world.now),
                        };
                    }
                    // KEDA has had its time, and the controller too.
                    Event::Later => {
                        world.hand(usize::MAX / 2);
                        while world.pods.len() != world.replicas {
                            prop_assert_eq!(world.control(), 0);
                        }
                        world.now += ACTS;
                    }
                    _ => {}
                }
                prop_assert!(world.replicas <= most, "{} of {most}", world.replicas);
            }
            for _ in 0..40 {
                world.pods.iter_mut().for_each(|pod| (pod.held, pod.up, pod.told) = (0, true, true));
                world.decide(wanted);
                world.hand(usize::MAX / 2);
                prop_assert_eq!(world.control(), 0);
                world.look();
                world.now += LAG;
            }
            prop_assert_eq!((world.replicas, world.pods.len()), (wanted, wanted));
            prop_assert!(world.pods.iter().all(|pod| !pod.view.draining));
        }
    }

    fn terms(order: Order, replicas: usize) -> Terms {
        Terms { order, settled: true, said: replicas, floor: replicas }
    }

    fn pod(index: usize, ready: bool, draining: bool, tokens: u64) -> PodView {
        let empty = draining && tokens == 0;
        PodView { index, ready, down: false, draining, empty, victim: false, tokens }
    }

    #[test]
    fn a_warm_pod_takes_the_place_of_one_that_starts() {
        let pods = [pod(0, true, true, 0), pod(1, true, false, 5), pod(2, false, false, 0)];
        let steps = steps(terms(Order::Marked, 3), &pods, 2);
        assert_eq!((steps.revive, steps.drain, steps.replicas), (vec![0], vec![2], 3));
    }

    #[test]
    fn nothing_is_removed_in_the_middle_of_a_rollout() {
        let pods = [PodView { victim: true, ..pod(0, true, true, 0) }, pod(1, true, false, 5)];
        assert_eq!(steps(Terms { settled: false, ..terms(Order::Marked, 2) }, &pods, 1).replicas, 2);
        assert_eq!(steps(terms(Order::Marked, 2), &pods, 1).replicas, 1);
    }

    #[test]
    fn a_raise_that_is_taken_back_costs_no_warm_pod() {
        // Two more were asked for and have not come; if they still do, they drain from their start.
        let pods = [pod(0, true, false, 5), pod(1, true, false, 5)];
        let found = steps(terms(Order::Marked, 4), &pods, 2);
        assert_eq!((found.drain, found.replicas), (vec![], 2));
        let late = [&pods[..], &[pod(2, false, false, 0)]].concat();
        let found = steps(terms(Order::Marked, 2), &late, 2);
        assert_eq!((found.drain, found.replicas), (vec![2], 2));
        // While a number below may be acted on, nothing above it works.
        let found = steps(Terms { floor: 2, ..terms(Order::HighestIndex, 4) }, &late, 4);
        assert_eq!((found.drain, found.replicas), (vec![2], 4));
    }

    #[test]
    fn the_highest_index_drains_first_even_when_it_is_the_busiest() {
        let pods = [pod(0, true, false, 0), pod(1, true, false, 90)];
        let found = steps(terms(Order::HighestIndex, 2), &pods, 1);
        assert_eq!((found.drain, found.replicas), (vec![1], 2));
        // An empty one below a busy one that drains has to wait for it.
        let pods = [pod(0, true, true, 0), pod(1, true, true, 90)];
        assert_eq!(steps(terms(Order::HighestIndex, 2), &pods, 0).replicas, 2);
        // The one in the middle was evicted and comes again: lowering would hit the last, which works.
        let pods = [pod(0, true, false, 3), pod(2, true, false, 9)];
        let found = steps(terms(Order::HighestIndex, 3), &pods, 2);
        assert_eq!((found.drain, found.replicas), (vec![1], 3));
    }

    #[test]
    fn pods_that_do_not_come_are_not_asked_for_any_longer() {
        // There is room for one; the others hang, and one more is wanted than works.
        let given_up = |index| PodView { victim: true, ..pod(index, false, true, 0) };
        let pods = [pod(0, true, false, 5), given_up(1), given_up(2), pod(3, false, false, 0)];
        assert_eq!(steps(terms(Order::Marked, 4), &pods, 2).replicas, 2);
        // Only once their cost is on them.
        let pods = [pod(0, true, false, 5), pod(1, false, true, 0), given_up(2), pod(3, false, false, 0)];
        let found = steps(terms(Order::Marked, 4), &pods, 2);
        assert_eq!((found.victims, found.replicas), (vec![1, 2], 3));
        // A warm one that has drained would not go before the one that starts.
        let pods = [pod(0, true, false, 5), pod(1, true, true, 0), given_up(2), pod(3, false, false, 0)];
        let found = steps(terms(Order::Marked, 4), &pods, 2);
        assert_eq!((found.revive, found.drain, found.replicas), (vec![1], vec![3], 4));
        // Nor before one that is not ready and may hold something.
        let unknown = PodView { empty: false, ..pod(1, false, true, 0) };
        let warm = PodView { victim: true, ..pod(2, true, true, 0) };
        let pods = [pod(0, true, false, 5), unknown, warm];
        assert_eq!(steps(terms(Order::Marked, 3), &pods, 1).replicas, 3);
    }

    #[test]
    fn a_pod_that_goes_down_with_what_it_holds_raises_the_number_that_may_hit_it() {
        let down = PodView { ready: false, down: true, ..pod(0, true, false, 5) };
        let given_up = PodView { victim: true, ..pod(1, false, true, 0) };
        let pods = [down.clone(), given_up];
        assert_eq!(steps(terms(Order::Marked, 1), &pods, 1).replicas, 2);
        // A rollout has more pods than were asked for, and would bring more yet.
        let rollout = Terms { settled: false, ..terms(Order::Marked, 1) };
        assert_eq!(steps(rollout, &pods, 1).replicas, 1);
        let empty = PodView { draining: true, empty: true, victim: true, ..down };
        assert_eq!(steps(terms(Order::Marked, 1), &[empty], 0).replicas, 0);
    }
}
