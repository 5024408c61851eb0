//! Properties of every decision, and cases of each policy that were computed by hand.

use proptest::prelude::*;

use super::*;

fn pool(model: &str) -> PoolObservation {
    serde_json::from_value(serde_json::json!({
        "model": model, "max": 8, "slots": 10, "itl_ms": [10.0, 0.0], "ready": 0, "active": 0, "queued": 0
    }))
    .unwrap()
}

fn seen(t: f64, pools: Vec<PoolObservation>) -> Observation {
    Observation { t, budget: None, pools }
}

fn stage(order: u32, remaining: u64, tokens: f64, concurrency: u64) -> StagePlan {
    StagePlan {
        stage: format!("s{order}"),
        order,
        remaining,
        est_out_tokens: tokens,
        concurrency,
        starts_in_s: None,
        deadline_s: None,
        cost_ceiling: None,
    }
}

fn nodes(observation: &Observation, memory: &mut PolicyState) -> usize {
    decide(observation, memory).desired["m"]
}

prop_compose! {
    fn any_plan()(order in 0u32..3, remaining in 0u64..5000, tokens in 0.0f64..20_000.0, concurrency in 0u64..600,
        starts in prop::option::of(0.0f64..2000.0), deadline in prop::option::of(0.0f64..5000.0), ceiling in prop::option::of(0.0f64..9.0)) -> StagePlan {
        StagePlan { starts_in_s: starts, deadline_s: deadline, cost_ceiling: ceiling, ..stage(order, remaining, tokens, concurrency) }
    }
}

prop_compose! {
    fn any_pool(model: &'static str)(min in 0usize..3, more in 0usize..8, slots in 0usize..70, cost in 0.0f64..3.0, ready in 0usize..9,
        ages in prop::collection::vec(0.0f64..300.0, 0..3), cold in prop::option::of(0.0f64..400.0), active in prop::option::of(0usize..700),
        queued in 0usize..900, arrivals in 0u64..3000, finished in 0u64..3000, plan in prop::collection::vec(any_plan(), 0..4), stale in any::<bool>(),
        mode in prop::sample::select(vec![Mode::Adaptive, Mode::Qps, Mode::Fixed]), fixed in prop::option::of(0usize..12)) -> PoolObservation {
        PoolObservation { min, max: (min + more).max(1), slots, cost_per_node_s: cost, itl_ms: [15.0, 0.25], ready, starting_age_s: ages,
            cold_start_s_p90: cold, active, queued: Some(queued), arrivals: RequestCounts { s10: arrivals / 6, s60: arrivals, s300: arrivals * 5 },
            finished_60: finished, plan, stale, settings: Settings { mode, nodes: fixed, target_qps: 2.0, ..Settings::default() }, ..pool(model) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// For any sequence of observations: bounds and budget hold, nothing is scaled down without metrics, and every pool
    /// has a decision.
    #[test]
    fn every_decision_respects_bounds_and_budget(steps in prop::collection::vec((0.0f64..200.0, any_pool("a"), any_pool("m")), 1..12), budget in prop::option::of(0.0f64..20.0)) {
        let (mut memory, mut t) = (PolicyState::default(), 0.0);
        for (step, a, m) in steps {
            t += step;
            let observation = Observation { t, budget, pools: vec![a, m] };
            let decision = decide(&observation, &mut memory);
            let mut cost = 0.0;
            for pool in &observation.pools {
                let desired = decision.desired[&pool.model];
                cost += desired as f64 * pool.cost_per_node_s;
                prop_assert!(desired <= pool.max);
                prop_assert!(budget.is_some() || desired >= pool.min);
                if (pool.stale || pool.active.is_none()) && budget.is_none() {
                    prop_assert!(desired >= pool.nodes().min(pool.max), "down without figures");
                }
                prop_assert!(decision.reason[&pool.model].len() > 3);
            }
            prop_assert!(budget.is_none_or(|budget| cost <= budget + 1e-6), "{cost} over {budget:?}");
        }
    }

    /// The same sequence gives the same decisions.
    #[test]
    fn decisions_are_deterministic(steps in prop::collection::vec(any_pool("m"), 1..8)) {
        let run = || {
            let mut memory = PolicyState::default();
            let decide = |(at, pool): (usize, &PoolObservation)| decide(&seen(at as f64 * 5.0, vec![pool.clone()]), &mut memory);
            steps.iter().enumerate().map(decide).collect::<Vec<_>>()
        };
        prop_assert_eq!(run(), run());
    }

    /// Every open request has a slot, up to `max` nodes.
    #[test]
    fn provides_slots_for_open_requests(open in 0usize..200) {
        let pool = PoolObservation { queued: Some(open), ..pool("m") };
        prop_assert!(nodes(&seen(0.0, vec![pool]), &mut PolicyState::default()) >= open.div_ceil(10).min(8));
    }
}

#[test]
fn scales_down_after_window_and_cold_start() {
    let mut memory = PolicyState::default();
    let settings = Settings { demand_window_s: 400.0, ..Settings::default() };
    let at = |active, ready| PoolObservation {
        active: Some(active),
        ready,
        cold_start_s_p90: Some(100.0),
        settings: settings.clone(),
        ..pool("m")
    };
    assert_eq!(nodes(&seen(0.0, vec![at(40, 0)]), &mut memory), 4);
    let mut went = None;
    for tick in 1..200 {
        let t = f64::from(tick) * 5.0;
        if nodes(&seen(t, vec![at(5, 4)]), &mut memory) < 4 {
            went = went.or(Some(t));
        }
    }
    // The peak is a single value. After 50 further values it is below the 98th percentile; then a cold start passes.
    assert_eq!(went, Some(350.0));
}

#[test]
fn scales_ahead_of_significant_growth() {
    let calm = PoolObservation {
        active: Some(20),
        ready: 2,
        arrivals: RequestCounts { s10: 1, s60: 12, s300: 50 },
        finished_60: 10,
        ..pool("m")
    };
    let growing = PoolObservation { arrivals: RequestCounts { s10: 20, s60: 90, s300: 120 }, ..calm.clone() };
    let cold = |pool: PoolObservation| PoolObservation { cold_start_s_p90: Some(60.0), ..pool };
    assert_eq!(nodes(&seen(600.0, vec![cold(calm)]), &mut PolicyState::default()), 2);
    // (90 - 10 - 10) / 60 per second, 120 s of mean stay, 60 s ahead: 20 + 1.17 * 120 * (1 - e^-0.5) = 75.
    assert_eq!(nodes(&seen(600.0, vec![cold(growing)]), &mut PolicyState::default()), 8);
}

#[test]
fn stage_nodes_balance_delay_against_cold_starts() {
    // 3,000 x 1,000 tokens at 10 x 100 tokens/s are 3,000 node-seconds. sqrt(8 * 3000 / 240) = 10 nodes, bounded to 8.
    let with = |plan: StagePlan| PoolObservation { plan: vec![plan], ..pool("m") };
    assert_eq!(nodes(&seen(0.0, vec![with(stage(0, 3000, 1000.0, 300))]), &mut PolicyState::default()), 8);
    // A tenth of the work: sqrt(8 * 300 / 240) = 3.
    assert_eq!(nodes(&seen(0.0, vec![with(stage(0, 300, 1000.0, 300))]), &mut PolicyState::default()), 3);
    // Bounded by the nodes that open requests fill, raised for a deadline, bounded by `cost_ceiling`.
    assert_eq!(nodes(&seen(0.0, vec![with(stage(0, 300, 1000.0, 12))]), &mut PolicyState::default()), 2);
    let soon = StagePlan { deadline_s: Some(290.0), ..stage(0, 300, 1000.0, 300) };
    assert_eq!(
        nodes(&seen(0.0, vec![with(soon.clone())]), &mut PolicyState::default()),
        6,
        "300 node-seconds in 50"
    );
    let dear = StagePlan { cost_ceiling: Some(4.0), ..soon };
    assert_eq!(nodes(&seen(0.0, vec![with(dear)]), &mut PolicyState::default()), 4);
}

#[test]
fn warms_the_next_stage_one_cold_start_ahead() {
    // 100 x 1,000 tokens, ten at a time on one node: 100 s until the next stage.
    let at = |remaining: u64| {
        let now = PoolObservation {
            plan: vec![stage(0, remaining, 1000.0, 10)],
            ready: 1,
            active: Some(10),
            ..pool("a")
        };
        let next = PoolObservation {
            plan: vec![stage(1, 500, 1000.0, 100)],
            cold_start_s_p90: Some(60.0),
            ..pool("m")
        };
        nodes(&seen(0.0, vec![now, next]), &mut PolicyState::default())
    };
    assert_eq!((at(100), at(60)), (0, 8));
}

#[test]
fn follows_demand_beyond_the_plan() {
    // A plan that is too low: 10 requests planned, but 75 open.
    let lies = PoolObservation {
        plan: vec![stage(0, 10, 100.0, 10)],
        active: Some(30),
        queued: Some(45),
        ready: 3,
        ..pool("m")
    };
    assert!(nodes(&seen(0.0, vec![lies]), &mut PolicyState::default()) >= 7);
    // A plan with few open requests gets no more nodes than they fill.
    let empty = PoolObservation { plan: vec![stage(0, 1_000_000, 1e5, 5)], ..pool("m") };
    assert_eq!(nodes(&seen(0.0, vec![empty]), &mut PolicyState::default()), 1);
}

#[test]
fn budget_serves_unplanned_demand_first() {
    let waiting = PoolObservation { queued: Some(30), ..pool("a") };
    let batch =
        PoolObservation { plan: vec![stage(0, 5000, 1000.0, 500)], cost_per_node_s: 2.0, ..pool("m") };
    let observation = Observation { t: 0.0, budget: Some(9.0), pools: vec![batch, waiting] };
    let decision = decide(&observation, &mut PolicyState::default());
    assert_eq!((decision.desired["a"], decision.desired["m"]), (3, 3), "{decision:?}");
    assert!(decision.reason["m"].contains("budget"));
}

#[test]
fn keeps_nodes_after_restart_or_clock_jump() {
    let idle = |ready| PoolObservation { ready, ..pool("m") };
    let mut memory = PolicyState::default();
    for tick in 0..150 {
        let t = f64::from(tick) * 5.0;
        assert_eq!(nodes(&seen(t, vec![idle(4)]), &mut memory), 4, "at {t}");
    }
    assert_eq!(nodes(&seen(10_000.0, vec![idle(4)]), &mut memory), 4, "forward");
    assert_eq!(nodes(&seen(3.0, vec![idle(4)]), &mut memory), 4, "and back");
    for tick in 1..=160 {
        nodes(&seen(3.0 + f64::from(tick) * 5.0, vec![idle(4)]), &mut memory);
    }
    assert_eq!(nodes(&seen(810.0, vec![idle(4)]), &mut memory), 0);
}

#[test]
fn keeps_the_last_node_until_idle_timeout() {
    let settings = Settings { demand_window_s: 10.0, idle_timeout_s: 100.0, ..Settings::default() };
    let at = |active| PoolObservation {
        active: Some(active),
        ready: 1,
        cold_start_s_p90: Some(1.0),
        settings: settings.clone(),
        ..pool("m")
    };
    let mut memory = PolicyState::default();
    nodes(&seen(0.0, vec![at(1)]), &mut memory);
    let gone =
        (1..60).map(|tick| f64::from(tick) * 5.0).find(|t| nodes(&seen(*t, vec![at(0)]), &mut memory) == 0);
    // Idle since 0, so not needed from 100 on, and kept for another 30 (scale-down delay).
    assert_eq!(gone, Some(130.0));
}

#[test]
fn qps_applies_tolerance_panic_and_stabilization_window() {
    let settings = Settings { mode: Mode::Qps, target_qps: 2.0, ..Settings::default() };
    let at = |ready, s10, s60| PoolObservation {
        ready,
        active: Some(1),
        arrivals: RequestCounts { s10, s60, s300: s60 * 5 },
        settings: settings.clone(),
        ..pool("m")
    };
    let mut memory = PolicyState::default();
    assert_eq!(nodes(&seen(100.0, vec![at(3, 60, 360)]), &mut memory), 3, "6/s at 2 a node");
    assert_eq!(nodes(&seen(105.0, vec![at(3, 64, 384)]), &mut memory), 3, "within a tenth");
    assert_eq!(nodes(&seen(110.0, vec![at(3, 70, 420)]), &mut memory), 4);
    assert_eq!(nodes(&seen(115.0, vec![at(3, 140, 430)]), &mut memory), 7, "panic: 14/s over ten seconds");
    assert_eq!(nodes(&seen(150.0, vec![at(7, 10, 120)]), &mut memory), 7, "never down in panic");
    let down = (31..120)
        .map(|tick| f64::from(tick) * 5.0)
        .find(|t| nodes(&seen(*t, vec![at(7, 10, 60)]), &mut memory) < 7);
    assert_eq!(down, Some(475.0), "the window after the last time that seven were needed");
}

#[test]
fn fixed_mode_ignores_demand() {
    let settings = Settings { mode: Mode::Fixed, nodes: Some(3), ..Settings::default() };
    for (ready, queued) in [(0, 0), (3, 500), (8, 0)] {
        let pool = PoolObservation { ready, queued: Some(queued), settings: settings.clone(), ..pool("m") };
        assert_eq!(nodes(&seen(0.0, vec![pool]), &mut PolicyState::default()), 3);
    }
}

#[test]
fn forecasts_begin_when_the_previous_stage_ends() {
    let now = PoolObservation { plan: vec![stage(0, 100, 1000.0, 10)], ready: 1, ..pool("a") };
    let next = PoolObservation { plan: vec![stage(1, 500, 1000.0, 100)], ..pool("m") };
    let forecasts = Forecast::all_stages(&seen(0.0, vec![now, next]));
    assert_eq!((forecasts[0].done_in_s, forecasts[1].begins_in_s), (100.0, 100.0));
    // sqrt(8 * 500 / 240) = 4 nodes: 125 s, 4 * 125 / 3600 node-hours, 4 * 10 slots and an eighth more open.
    assert_eq!((forecasts[1].done_in_s, forecasts[1].advised_open), (225.0, 45));
    assert!((forecasts[1].cost_hours - 500.0 / 3600.0).abs() < 1e-9);
}

#[test]
fn history_is_bounded_and_keeps_peaks() {
    let mut history = DemandHistory::default();
    for tick in 0..100_000u32 {
        history.push(f64::from(tick) * 0.01, usize::from(tick == 99_000) * 50, 100.0);
    }
    assert!(history.values.len() <= 1100 && history.peak() == 50);
}
