//! All Prometheus metrics of a node. The engine keeps its own counters, which are read when `/metrics` is requested.

use std::sync::atomic::Ordering;
use std::time::Duration;

use potstill_engine::scheduler::EngineStats;
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// Metrics of a node.
pub(crate) struct NodeMetrics {
    registry: Registry,
    requests: IntCounterVec,
    duration: HistogramVec,
    engine: IntGaugeVec,
}

impl NodeMetrics {
    /// Registers all metrics.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let requests = IntCounterVec::new(
            Opts::new("potstill_node_requests_total", "Completions by model and end (stop, length, failed)"),
            &["model", "end"],
        )?;
        let duration = HistogramVec::new(
            HistogramOpts::new("potstill_node_request_duration_seconds", "Submission to the last token")
                .buckets(vec![0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 1800.0]),
            &["model"],
        )?;
        let state = IntGaugeVec::new(
            Opts::new(
                "potstill_node_engine",
                "Engine: running and waiting requests and KV blocks in use; prompt tokens computed and found at hand, completion \
                 tokens, steps and requests that were put back since the start",
            ),
            &["model", "what"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(duration.clone()))?;
        registry.register(Box::new(state.clone()))?;
        Ok(Self { registry, requests, duration, engine: state })
    }

    /// Counts a finished choice. `end` is its finish reason or `failed`.
    pub(crate) fn record_finished(&self, model: &str, end: &str, took: Duration) {
        self.requests.with_label_values(&[model, end]).inc();
        self.duration.with_label_values(&[model]).observe(took.as_secs_f64());
    }

    /// Returns all metrics in Prometheus' text format.
    pub(crate) fn render(&self, model: &str, stats: &EngineStats) -> String {
        for (what, value) in [
            ("running", stats.running.load(Ordering::Relaxed) as i64),
            ("waiting", stats.waiting.load(Ordering::Relaxed) as i64),
            ("prompt_tokens", stats.prompt_tokens.load(Ordering::Relaxed) as i64),
            ("completion_tokens", stats.completion_tokens.load(Ordering::Relaxed) as i64),
            ("cached_tokens", stats.cached_tokens.load(Ordering::Relaxed) as i64),
            ("preempted", stats.preempted.load(Ordering::Relaxed) as i64),
            ("blocks_used", stats.blocks_used.load(Ordering::Relaxed) as i64),
            ("steps", stats.steps.load(Ordering::Relaxed) as i64),
        ] {
            self.engine.with_label_values(&[model, what]).set(value);
        }
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("# {error}\n"),
        }
    }
}
