//! Every metric of the gateway, declared once. Labels are bounded: models come from the configuration, reasons and ends
//! from enums.

use std::sync::Arc;
use std::time::Duration;

use potstill_shared::openai::Usage;
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::pool::ModelPool;

/// The metrics.
pub struct Metrics {
    registry: Registry,
    /// Answers by model, status and how they ended.
    requests: IntCounterVec,
    /// Time from request to end of the answer.
    duration: HistogramVec,
    /// Time from request to the node's response head.
    pub first_byte: HistogramVec,
    /// Time spent waiting for a slot.
    pub queue_wait: HistogramVec,
    /// Tokens by model and direction.
    tokens: IntCounterVec,
    /// Requests refused, by reason.
    pub refused: IntCounterVec,
    /// Requests sent to a second node.
    pub retries: IntCounterVec,
    /// Answers that broke off.
    pub cut_streams: IntCounterVec,
    /// Nodes started and stopped.
    pub scale_events: IntCounterVec,
    nodes: IntGaugeVec,
    in_flight: IntGaugeVec,
    in_flight_tokens: IntGaugeVec,
    queued: IntGaugeVec,
}

const SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0, 1800.0];

impl Metrics {
    /// Declares them.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let histogram = |name: &str, help: &str| {
            let options = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
            let metric = HistogramVec::new(options, &["model"])?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        Ok(Arc::new(Self {
            requests: counter(
                "potstill_gateway_requests_total",
                "Answers by model, status and end (complete, truncated, client_left)",
                &["model", "status", "end"],
            )?,
            duration: histogram("potstill_gateway_request_duration_seconds", "Request to end of the answer")?,
            first_byte: histogram(
                "potstill_gateway_first_byte_seconds",
                "Request to the node's response head",
            )?,
            queue_wait: histogram("potstill_gateway_queue_wait_seconds", "Wait for a slot")?,
            tokens: counter(
                "potstill_gateway_tokens_total",
                "Tokens by model and direction",
                &["model", "direction"],
            )?,
            refused: counter("potstill_gateway_refused_total", "Requests refused, by reason", &["reason"])?,
            retries: counter("potstill_gateway_retries_total", "Requests sent to a second node", &["model"])?,
            cut_streams: counter("potstill_gateway_cut_streams_total", "Answers that broke off", &["model"])?,
            scale_events: counter(
                "potstill_gateway_scale_events_total",
                "Nodes started, stopped and lost",
                &["model", "event"],
            )?,
            nodes: gauge("potstill_gateway_nodes", "Nodes by state", &["model", "state"])?,
            in_flight: gauge("potstill_gateway_in_flight_requests", "Requests on nodes", &["model"])?,
            in_flight_tokens: gauge(
                "potstill_gateway_in_flight_tokens",
                "Their estimated tokens",
                &["model"],
            )?,
            queued: gauge("potstill_gateway_queued_requests", "Requests waiting for a slot", &["model"])?,
            registry,
        }))
    }

    /// Counts an answer that has ended.
    pub fn finished(&self, model: &str, status: u16, end: &str, took: Duration, usage: Usage) {
        self.requests.with_label_values(&[model, &status.to_string(), end]).inc();
        self.duration.with_label_values(&[model]).observe(took.as_secs_f64());
        self.tokens.with_label_values(&[model, "prompt"]).inc_by(usage.prompt_tokens);
        self.tokens.with_label_values(&[model, "completion"]).inc_by(usage.completion_tokens);
    }

    /// Prometheus' text format; gauges are read from the pools now.
    pub fn render(&self, pools: &[Arc<ModelPool>]) -> String {
        for pool in pools {
            let (model, load) = (pool.config.model.as_str(), pool.load());
            for (state, count) in
                [("ready", load.ready), ("unhealthy", load.unhealthy), ("draining", load.draining)]
            {
                self.nodes.with_label_values(&[model, state]).set(count as i64);
            }
            self.in_flight.with_label_values(&[model]).set(load.active as i64);
            self.in_flight_tokens.with_label_values(&[model]).set(load.tokens as i64);
            self.queued.with_label_values(&[model]).set(load.queued as i64);
        }
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("# {error}\n"),
        }
    }
}
