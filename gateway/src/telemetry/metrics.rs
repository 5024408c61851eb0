//! Every metric of the gateway, declared once. Labels are bounded: models come from the configuration, reasons and outcomes
//! from enums; keys and stages beyond a number count as `other`. Metrics that the GenAI semantic conventions of OpenTelemetry
//! define have their names.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::request_summary::{Outcome, RequestSummary};
use super::usage::UsageLedger;

/// The metrics.
pub struct Metrics {
    registry: Registry,
    specs: Vec<MetricSpec>,
    /// Finished requests.
    requests: IntCounterVec,
    client_disconnects: IntCounterVec,
    duration: HistogramVec,
    time_to_first_token: HistogramVec,
    time_per_output_token: HistogramVec,
    queue_wait: HistogramVec,
    overhead: HistogramVec,
    tokens: IntCounterVec,
    /// Rejected requests by reason.
    pub rejected: IntCounterVec,
    retries: IntCounterVec,
    hedges: IntCounterVec,
    fallbacks: IntCounterVec,
    truncated_streams: IntCounterVec,
    ejections: IntCounterVec,
    /// Nodes started, stopped, lost and revived.
    pub scale_events: IntCounterVec,
    /// Time from the request for a node until it is ready.
    pub cold_start: HistogramVec,
    /// Target of the scaling policy.
    pub desired_nodes: IntGaugeVec,
    /// Nodes that are starting.
    pub starting_nodes: IntGaugeVec,
    /// Cost of the nodes so far.
    pub node_cost: CounterVec,
    /// Cost per hour of the nodes held now.
    pub node_cost_per_hour: Gauge,
    /// 1 on the gateway that decides for all of a cluster.
    pub leader: IntGauge,
    /// Forecast of the time until a stage is finished.
    pub stage_eta: GaugeVec,
    /// Reloads of the configuration by outcome.
    pub config_reloads: IntCounterVec,
    /// Open client connections.
    pub connections: IntGauge,
    in_flight_bytes: IntGauge,
    nodes: IntGaugeVec,
    ejected_nodes: IntGaugeVec,
    in_flight_requests: IntGaugeVec,
    in_flight_tokens: IntGaugeVec,
    queued_requests: IntGaugeVec,
    queued_bytes: IntGaugeVec,
    oldest_queued_request_age: GaugeVec,
    cost: CounterVec,
    key_tokens: IntCounterVec,
    /// Totals by key, stage and model.
    pub usage: UsageLedger,
    /// Held while the gauges of pools and the totals of usage are set and read.
    rendering: Mutex<()>,
}

/// A metric as it is documented.
#[derive(Debug, Clone)]
pub struct MetricSpec {
    /// Full name.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Names of the labels.
    pub labels: Vec<String>,
    /// Meaning and unit.
    pub help: String,
}

/// The counters of one pool, looked up once.
pub struct PoolMetrics {
    duration: Histogram,
    /// Time from arrival to the first piece of the response.
    pub time_to_first_token: Histogram,
    time_per_output_token: Histogram,
    /// Time spent waiting for a slot.
    pub queue_wait: Histogram,
    /// Time that the gateway itself takes before it sends a request, without waiting.
    pub overhead: Histogram,
    /// Attempts after the first one.
    pub retries: IntCounter,
    /// Second attempts made while the first one was still running.
    pub hedges: IntCounter,
    /// Requests that a fallback pool served.
    pub fallbacks: IntCounter,
    truncated_streams: IntCounter,
    /// Nodes ejected as outliers.
    pub ejections: IntCounter,
    complete: IntCounter,
    prompt_tokens: IntCounter,
    completion_tokens: IntCounter,
}

/// Levels of one pool at the moment of a scrape.
#[derive(Debug, Clone, Default)]
pub struct PoolGauges {
    /// Model of the pool.
    pub model: String,
    /// Nodes that may receive requests.
    pub ready: usize,
    /// Nodes that start or fail their health checks.
    pub unhealthy: usize,
    /// Nodes that finish their requests and receive no new ones.
    pub draining: usize,
    /// Ready nodes that are ejected as outliers.
    pub ejected: usize,
    /// Requests on nodes.
    pub in_flight_requests: usize,
    /// Estimated tokens that nodes still have to process.
    pub in_flight_tokens: u64,
    /// Requests waiting for a slot.
    pub queued_requests: usize,
    /// Bytes of their bodies.
    pub queued_bytes: usize,
    /// Seconds that the oldest of them has waited.
    pub oldest_queued_request_age_s: f64,
}

const SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0, 1800.0];

const COLD_SECONDS: [f64; 12] = [0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 30.0, 60.0, 120.0, 240.0, 600.0, 1800.0];

const MICROSECONDS: [f64; 12] =
    [10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 250e-3];

const TOKEN_SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0];

const MODEL: &[&str] = &["model"];
const NONE: &[&str] = &[];
const GEN_AI_MODEL: &[&str] = &["gen_ai_request_model"];
const USAGE: &[&str] = &["key", "stage", "model"];

/// Registers metrics and remembers how they are documented.
struct Registrar {
    registry: Registry,
    specs: Vec<MetricSpec>,
}

impl Registrar {
    /// `name` without a prefix of its own gets the gateway's.
    fn opts(&mut self, kind: &'static str, name: &str, help: &str, labels: &[&str]) -> Opts {
        let name =
            if name.starts_with("gen_ai_") { name.to_owned() } else { format!("potstill_gateway_{name}") };
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.specs.push(MetricSpec { name: name.clone(), kind, labels, help: help.to_owned() });
        Opts::new(name, help)
    }

    fn register<C: Collector + Clone + 'static>(
        &mut self,
        metric: Result<C, prometheus::Error>,
    ) -> Result<C, prometheus::Error> {
        let metric = metric?;
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        let opts = self.opts("counter", name, help, labels);
        self.register(IntCounterVec::new(opts, labels))
    }

    fn sums(&mut self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec, prometheus::Error> {
        let opts = self.opts("counter", name, help, labels);
        self.register(CounterVec::new(opts, labels))
    }

    fn gauges(&mut self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        let opts = self.opts("gauge", name, help, labels);
        self.register(IntGaugeVec::new(opts, labels))
    }

    fn real_gauges(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<GaugeVec, prometheus::Error> {
        let opts = self.opts("gauge", name, help, labels);
        self.register(GaugeVec::new(opts, labels))
    }

    fn gauge(&mut self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        let opts = self.opts("gauge", name, help, NONE);
        self.register(IntGauge::with_opts(opts))
    }

    fn histograms(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        let opts = HistogramOpts::from(self.opts("histogram", name, help, labels)).buckets(buckets.to_vec());
        self.register(HistogramVec::new(opts, labels))
    }
}

impl Metrics {
    /// Declares all metrics.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let mut new = Registrar { registry: Registry::new(), specs: Vec::new() };
        let cost_per_hour =
            new.opts("gauge", "node_cost_per_hour", "Cost per hour of the nodes held now.", NONE);
        Ok(Arc::new(Self {
            requests: new.counters(
                "requests_total",
                "Finished requests.",
                &["model", "status", "outcome"],
            )?,
            client_disconnects: new.counters(
                "client_disconnects_total",
                "Requests whose client disconnected before the end, by what the request waited for.",
                &["model", "phase"],
            )?,
            duration: new.histograms(
                "gen_ai_server_request_duration_seconds",
                "Time from arrival to the end of the response.",
                GEN_AI_MODEL,
                &SECONDS,
            )?,
            time_to_first_token: new.histograms(
                "gen_ai_server_time_to_first_token_seconds",
                "Time from arrival to the first piece of the response.",
                GEN_AI_MODEL,
                &SECONDS,
            )?,
            time_per_output_token: new.histograms(
                "gen_ai_server_time_per_output_token_seconds",
                "Time per completion token after the first one.",
                GEN_AI_MODEL,
                &TOKEN_SECONDS,
            )?,
            queue_wait: new.histograms(
                "queue_wait_seconds",
                "Time spent waiting for a slot.",
                MODEL,
                &SECONDS,
            )?,
            overhead: new.histograms(
                "overhead_seconds",
                "Time that the gateway itself takes before it sends a request, without waiting.",
                MODEL,
                &MICROSECONDS,
            )?,
            tokens: new.counters(
                "tokens_total",
                "Tokens of prompts and completions.",
                &["model", "direction"],
            )?,
            rejected: new.counters(
                "rejected_requests_total",
                "Requests rejected before a node received them; `reason` is the error code.",
                &["reason"],
            )?,
            retries: new.counters("retries_total", "Attempts after the first one.", MODEL)?,
            hedges: new.counters(
                "hedges_total",
                "Second attempts made while the first one was still running.",
                MODEL,
            )?,
            fallbacks: new.counters("fallbacks_total", "Requests that a fallback pool served.", MODEL)?,
            truncated_streams: new.counters(
                "truncated_streams_total",
                "Responses that broke off before their end.",
                MODEL,
            )?,
            ejections: new.counters("ejections_total", "Nodes ejected as outliers.", MODEL)?,
            scale_events: new.counters(
                "scale_events_total",
                "Nodes started, stopped, lost and revived.",
                &["model", "event"],
            )?,
            cold_start: new.histograms(
                "cold_start_seconds",
                "Time from the request for a node until it is ready.",
                MODEL,
                &COLD_SECONDS,
            )?,
            desired_nodes: new.gauges("desired_nodes", "Target of the scaling policy.", MODEL)?,
            starting_nodes: new.gauges("starting_nodes", "Nodes that are starting.", MODEL)?,
            node_cost: new.sums(
                "node_cost_total",
                "Cost of the nodes so far: node-hours times cost per hour.",
                MODEL,
            )?,
            node_cost_per_hour: new.register(Gauge::with_opts(cost_per_hour))?,
            stage_eta: new.real_gauges(
                "stage_eta_seconds",
                "Forecast of the time until a stage is finished.",
                &["stage", "model"],
            )?,
            leader: new.gauge("leader", "1 on the gateway that decides for all of a cluster, else 0.")?,
            config_reloads: new.counters(
                "config_reloads_total",
                "Reloads of the configuration.",
                &["outcome"],
            )?,
            connections: new.gauge("connections", "Open client connections.")?,
            in_flight_bytes: new.gauge("in_flight_bytes", "Bytes of request bodies in flight.")?,
            nodes: new.gauges(
                "nodes",
                "Nodes by state: `ready`, `unhealthy` (starting ones too) or `draining`.",
                &["model", "state"],
            )?,
            ejected_nodes: new.gauges("ejected_nodes", "Ready nodes that are ejected as outliers.", MODEL)?,
            in_flight_requests: new.gauges("in_flight_requests", "Requests on nodes.", MODEL)?,
            in_flight_tokens: new.gauges(
                "in_flight_tokens",
                "Estimated tokens that nodes still have to process.",
                MODEL,
            )?,
            queued_requests: new.gauges("queued_requests", "Requests waiting for a slot.", MODEL)?,
            queued_bytes: new.gauges("queued_bytes", "Bytes of request bodies waiting for a slot.", MODEL)?,
            oldest_queued_request_age: new.real_gauges(
                "oldest_queued_request_age_seconds",
                "Time that the oldest waiting request has waited.",
                MODEL,
            )?,
            cost: new.sums("cost_total", "Price of the tokens used.", USAGE)?,
            key_tokens: new.counters(
                "key_tokens_total",
                "Tokens of prompts and completions by key.",
                USAGE,
            )?,
            usage: UsageLedger::default(),
            rendering: Mutex::new(()),
            registry: new.registry,
            specs: new.specs,
        }))
    }

    /// All metrics as they are documented, in the order of their declaration.
    pub fn specs(&self) -> &[MetricSpec] {
        &self.specs
    }

    /// The counters of a pool.
    pub fn pool(&self, model: &str) -> PoolMetrics {
        let counter = |counter: &IntCounterVec| counter.with_label_values(&[model]);
        let histogram = |histogram: &HistogramVec| histogram.with_label_values(&[model]);
        PoolMetrics {
            duration: histogram(&self.duration),
            time_to_first_token: histogram(&self.time_to_first_token),
            time_per_output_token: histogram(&self.time_per_output_token),
            queue_wait: histogram(&self.queue_wait),
            overhead: histogram(&self.overhead),
            retries: counter(&self.retries),
            hedges: counter(&self.hedges),
            fallbacks: counter(&self.fallbacks),
            truncated_streams: counter(&self.truncated_streams),
            ejections: counter(&self.ejections),
            complete: self.requests.with_label_values(&[model, "200", Outcome::Complete.name()]),
            prompt_tokens: self.tokens.with_label_values(&[model, "prompt"]),
            completion_tokens: self.tokens.with_label_values(&[model, "completion"]),
        }
    }

    /// Counts a finished request.
    pub fn request_ended(&self, request: &RequestSummary<'_>, pool: &PoolMetrics) {
        let (model, usage) = (request.served_model, request.usage);
        if request.status == 200 && request.outcome == Outcome::Complete {
            pool.complete.inc();
        } else {
            let status = request.status.to_string();
            self.requests.with_label_values(&[model, &status, request.outcome.name()]).inc();
        }
        pool.duration.observe(request.duration.as_secs_f64());
        pool.prompt_tokens.inc_by(usage.prompt_tokens);
        pool.completion_tokens.inc_by(usage.completion_tokens);
        self.usage.add(request.key, request.stage, model, usage, request.cost);
        match request.outcome {
            Outcome::ClientDisconnected => {
                self.client_disconnects.with_label_values(&[model, request.phase.name()]).inc();
            }
            Outcome::Truncated => pool.truncated_streams.inc(),
            Outcome::Complete | Outcome::Rejected => {}
        }
        if let Some(first) = request.time_to_first_token.filter(|_| usage.completion_tokens > 1) {
            let rest = request.duration.saturating_sub(first).as_secs_f64();
            pool.time_per_output_token.observe(rest / (usage.completion_tokens - 1) as f64);
        }
    }

    /// All metrics in Prometheus' text format. `pools` and `in_flight_bytes` are the levels of this moment.
    pub fn render(&self, pools: &[PoolGauges], in_flight_bytes: usize) -> String {
        let _rendering = self.rendering.lock().unwrap_or_else(PoisonError::into_inner);
        self.in_flight_bytes.set(in_flight_bytes as i64);
        for gauge in [
            &self.nodes,
            &self.ejected_nodes,
            &self.in_flight_requests,
            &self.in_flight_tokens,
            &self.queued_requests,
            &self.queued_bytes,
        ] {
            gauge.reset();
        }
        self.oldest_queued_request_age.reset();
        for pool in pools {
            let model = pool.model.as_str();
            let states = [("ready", pool.ready), ("unhealthy", pool.unhealthy), ("draining", pool.draining)];
            for (state, count) in states {
                self.nodes.with_label_values(&[model, state]).set(count as i64);
            }
            let set = |gauge: &IntGaugeVec, value: i64| gauge.with_label_values(&[model]).set(value);
            set(&self.ejected_nodes, pool.ejected as i64);
            set(&self.in_flight_requests, pool.in_flight_requests as i64);
            set(&self.in_flight_tokens, pool.in_flight_tokens as i64);
            set(&self.queued_requests, pool.queued_requests as i64);
            set(&self.queued_bytes, pool.queued_bytes as i64);
            let age = pool.oldest_queued_request_age_s;
            self.oldest_queued_request_age.with_label_values(&[model]).set(age);
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
