//! Every metric of the gateway, declared once. Labels are bounded: models come from the configuration, reasons and ends from
//! enums, keys and stages up to a number, beyond which they count as `other`. Names of what GenAI conventions of OpenTelemetry
//! cover are theirs.

pub mod access;
pub mod recording;
pub mod traces;
pub mod usage;

use std::sync::Arc;
use std::time::Duration;

use potstill_shared::openai::Usage;
use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use self::usage::UsageLedger;
use crate::autoscale::Status;
use crate::pool::ModelPool;

/// The metrics.
pub struct Metrics {
    registry: Registry,
    /// Answers by model, status and how they ended.
    pub requests: IntCounterVec,
    /// Clients that left, by phase.
    pub left: IntCounterVec,
    duration: HistogramVec,
    first_token: HistogramVec,
    per_token: HistogramVec,
    queue_wait: HistogramVec,
    overhead: HistogramVec,
    tokens: IntCounterVec,
    /// Requests refused, by reason.
    pub refused: IntCounterVec,
    retries: IntCounterVec,
    hedges: IntCounterVec,
    fallbacks: IntCounterVec,
    cut_streams: IntCounterVec,
    ejections: IntCounterVec,
    /// Nodes started and stopped.
    pub scale_events: IntCounterVec,
    /// Seconds from the request for a node until it is ready.
    pub cold_start: HistogramVec,
    desired_nodes: IntGaugeVec,
    starting_nodes: IntGaugeVec,
    node_cost: GaugeVec,
    budget_used: Gauge,
    /// 1 on the gateway that decides for all of a cluster.
    pub leader: IntGauge,
    stage_done: GaugeVec,
    /// Configurations read again, by outcome.
    pub reloads: IntCounterVec,
    /// Open client connections.
    pub connections: IntGauge,
    /// Bytes of bodies held.
    pub in_flight_bytes: IntGauge,
    nodes: IntGaugeVec,
    in_flight: IntGaugeVec,
    in_flight_tokens: IntGaugeVec,
    queued: IntGaugeVec,
    queued_bytes: IntGaugeVec,
    queue_age: IntGaugeVec,
    cost: CounterVec,
    key_tokens: IntCounterVec,
    /// Who has used what.
    pub usage: UsageLedger,
}

/// The counters of one pool, looked up once.
pub struct PoolMetrics {
    /// Time from request to end of the answer.
    pub duration: Histogram,
    /// Time from request to the first piece of the answer.
    pub first_token: Histogram,
    /// Time per token after the first.
    pub per_token: Histogram,
    /// Time spent waiting for a slot.
    pub queue_wait: Histogram,
    /// Time that the gateway itself took before the request was on its way, without waiting.
    pub overhead: Histogram,
    /// Requests sent to another node.
    pub retries: IntCounter,
    /// Second tries beside a slow first one.
    pub hedges: IntCounter,
    /// Requests that another pool served.
    pub fallbacks: IntCounter,
    /// Answers that broke off.
    pub cut_streams: IntCounter,
    /// Nodes ejected for their answers.
    pub ejections: IntCounter,
    complete: IntCounter,
    prompt: IntCounter,
    completion: IntCounter,
}

const SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0, 1800.0];

const COLD_SECONDS: [f64; 12] = [0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 30.0, 60.0, 120.0, 240.0, 600.0, 1800.0];

const MICROSECONDS: [f64; 12] =
    [10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 250e-3];

const TOKEN_SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0];

impl Metrics {
    /// Declares them.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
            let counter = IntCounterVec::new(Opts::new(format!("potstill_gateway_{name}"), help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
            let gauge = IntGaugeVec::new(Opts::new(format!("potstill_gateway_{name}"), help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let number = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::with_opts(Opts::new(format!("potstill_gateway_{name}"), help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let histogram = |name: &str,
                         help: &str,
                         label: &str,
                         buckets: &[f64]|
         -> Result<HistogramVec, prometheus::Error> {
            let histogram =
                HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[label])?;
            registry.register(Box::new(histogram.clone()))?;
            Ok(histogram)
        };
        let cost = CounterVec::new(
            Opts::new("potstill_gateway_cost_total", "Price of the tokens used"),
            &["key", "stage", "model"],
        )?;
        registry.register(Box::new(cost.clone()))?;
        let fraction = |name: &str, help: &str, labels: &[&str]| -> Result<GaugeVec, prometheus::Error> {
            let gauge = GaugeVec::new(Opts::new(format!("potstill_gateway_{name}"), help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let budget_used = Gauge::with_opts(Opts::new(
            "potstill_gateway_node_cost_per_hour",
            "Cost per hour of the nodes held now",
        ))?;
        registry.register(Box::new(budget_used.clone()))?;
        const MODEL: &str = "gen_ai_request_model";
        Ok(Arc::new(Self {
            requests: counter("requests_total", "Answers", &["model", "status", "end"])?,
            left: counter("clients_left_total", "Clients that left before the end", &["model", "phase"])?,
            duration: histogram(
                "gen_ai_server_request_duration_seconds",
                "Request to end of answer",
                MODEL,
                &SECONDS,
            )?,
            first_token: histogram(
                "gen_ai_server_time_to_first_token_seconds",
                "Request to first piece",
                MODEL,
                &SECONDS,
            )?,
            per_token: histogram(
                "gen_ai_server_time_per_output_token_seconds",
                "Per token after the first",
                MODEL,
                &TOKEN_SECONDS,
            )?,
            queue_wait: histogram(
                "potstill_gateway_queue_wait_seconds",
                "Waiting for a slot",
                "model",
                &SECONDS,
            )?,
            overhead: histogram(
                "potstill_gateway_overhead_seconds",
                "The gateway's own time before sending",
                "model",
                &MICROSECONDS,
            )?,
            tokens: counter("tokens_total", "Tokens", &["model", "direction"])?,
            refused: counter("refused_total", "Requests refused", &["reason"])?,
            retries: counter("retries_total", "Requests sent to another node", &["model"])?,
            hedges: counter("hedges_total", "Second tries beside a slow first one", &["model"])?,
            fallbacks: counter("fallbacks_total", "Requests that another pool served", &["model"])?,
            cut_streams: counter("cut_streams_total", "Answers that broke off", &["model"])?,
            ejections: counter("ejections_total", "Nodes ejected for their answers", &["model"])?,
            scale_events: counter(
                "scale_events_total",
                "Nodes started, stopped, lost, revived",
                &["model", "event"],
            )?,
            cold_start: histogram(
                "potstill_gateway_cold_start_seconds",
                "Request for a node until it is ready",
                "model",
                &COLD_SECONDS,
            )?,
            desired_nodes: gauge("desired_nodes", "Nodes that the scaling policy wants", &["model"])?,
            starting_nodes: gauge("starting_nodes", "Nodes that are starting", &["model"])?,
            node_cost: fraction(
                "node_cost",
                "Cost of the nodes held so far: node-hours times cost",
                &["model"],
            )?,
            stage_done: fraction(
                "stage_done_seconds",
                "Forecast until a stage is done",
                &["stage", "model"],
            )?,
            budget_used,
            leader: number("leader", "1 on the gateway that decides for all of a cluster")?,
            reloads: counter("reloads_total", "Configurations read again", &["outcome"])?,
            connections: number("connections", "Open client connections")?,
            in_flight_bytes: number("in_flight_bytes", "Bytes of bodies held")?,
            nodes: gauge("nodes", "Nodes", &["model", "state"])?,
            in_flight: gauge("in_flight_requests", "Requests on nodes", &["model"])?,
            in_flight_tokens: gauge("in_flight_tokens", "Tokens outstanding on nodes", &["model"])?,
            queued: gauge("queued_requests", "Requests waiting", &["model"])?,
            queued_bytes: gauge("queued_bytes", "Bytes of requests waiting", &["model"])?,
            queue_age: gauge("queue_age_milliseconds", "How long the first request has waited", &["model"])?,
            cost,
            key_tokens: counter("key_tokens_total", "Tokens by key and stage", &["key", "stage", "model"])?,
            usage: UsageLedger::default(),
            registry,
        }))
    }

    /// The counters of a pool.
    pub fn pool(&self, model: &str) -> PoolMetrics {
        let one = |counter: &IntCounterVec| counter.with_label_values(&[model]);
        let time = |histogram: &HistogramVec| histogram.with_label_values(&[model]);
        PoolMetrics {
            duration: time(&self.duration),
            first_token: time(&self.first_token),
            per_token: time(&self.per_token),
            queue_wait: time(&self.queue_wait),
            overhead: time(&self.overhead),
            retries: one(&self.retries),
            hedges: one(&self.hedges),
            fallbacks: one(&self.fallbacks),
            cut_streams: one(&self.cut_streams),
            ejections: one(&self.ejections),
            complete: self.requests.with_label_values(&[model, "200", "complete"]),
            prompt: self.tokens.with_label_values(&[model, "prompt"]),
            completion: self.tokens.with_label_values(&[model, "completion"]),
        }
    }

    /// Counts an answer that ended.
    pub fn ended(
        &self,
        pool: &PoolMetrics,
        model: &str,
        status: u16,
        end: &str,
        took: Duration,
        usage: Usage,
    ) {
        if status == 200 && end == "complete" {
            pool.complete.inc();
        } else {
            self.requests.with_label_values(&[model, &status.to_string(), end]).inc();
        }
        pool.duration.observe(took.as_secs_f64());
        pool.prompt.inc_by(usage.prompt_tokens);
        pool.completion.inc_by(usage.completion_tokens);
    }

    /// Takes what the autoscaler decided.
    pub(crate) fn scaling(&self, status: &Status) {
        self.desired_nodes.reset();
        self.starting_nodes.reset();
        self.stage_done.reset();
        for pool in &status.pools {
            let model = [pool.model.as_str()];
            self.desired_nodes.with_label_values(&model).set(pool.desired as i64);
            self.starting_nodes.with_label_values(&model).set(pool.starting as i64);
            self.node_cost.with_label_values(&model).set(pool.cost_so_far);
        }
        for forecast in &status.forecasts {
            self.stage_done.with_label_values(&[&forecast.stage, &forecast.model]).set(forecast.done_in_s);
        }
        self.budget_used.set(status.cost_now);
    }

    /// All metrics as text.
    pub fn render(&self, pools: &[Arc<ModelPool>]) -> String {
        for gauge in [
            &self.nodes,
            &self.in_flight,
            &self.in_flight_tokens,
            &self.queued,
            &self.queued_bytes,
            &self.queue_age,
        ] {
            gauge.reset();
        }
        for pool in pools {
            let (load, model) = (pool.load(), &*pool.model);
            let states = [
                ("ready", load.ready),
                ("unhealthy", load.unhealthy),
                ("draining", load.draining),
                ("ejected", load.ejected),
            ];
            for (state, count) in states {
                self.nodes.with_label_values(&[model, state]).set(count as i64);
            }
            let set = |gauge: &IntGaugeVec, value: i64| gauge.with_label_values(&[model]).set(value);
            set(&self.in_flight, load.active as i64);
            set(&self.in_flight_tokens, load.tokens as i64);
            set(&self.queued, load.queued as i64);
            set(&self.queued_bytes, load.queued_bytes as i64);
            set(&self.queue_age, load.oldest_ms as i64);
        }
        self.cost.reset();
        self.key_tokens.reset();
        for row in self.usage.rows() {
            let labels = [row.key.as_str(), row.stage.as_str(), row.model.as_str()];
            self.cost.with_label_values(&labels).inc_by(row.cost);
            self.key_tokens.with_label_values(&labels).inc_by(row.prompt_tokens + row.completion_tokens);
        }
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8(text).unwrap_or_default(),
            Err(error) => {
                tracing::error!(%error, "cannot write the metrics");
                String::new()
            }
        }
    }
}
