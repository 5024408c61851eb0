//! The outputs of telemetry, handed to whoever has something to report.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::access_log::{AccessLog, LogLine};
use super::load_recording::LoadRecording;
use super::metrics::{Metrics, PoolMetrics};
use super::request_summary::{Outcome, RequestSummary};
use super::traces::Traces;

/// All outputs. Absent ones are not configured.
pub struct Sinks {
    /// Prometheus metrics and usage totals.
    pub metrics: Arc<Metrics>,
    /// One JSON line per request.
    pub access_log: Option<AccessLog>,
    /// One span per request.
    pub traces: Option<Traces>,
    /// One CSV row per complete request.
    pub load_recording: Option<LoadRecording>,
}

impl Sinks {
    /// Counts and logs a request that was rejected with `code` and `status`.
    pub fn request_rejected(&self, request_id: &str, code: &'static str, status: u16) {
        self.metrics.rejected.with_label_values(&[code]).inc();
        tracing::info!(request = request_id, status, reason = code, "request rejected");
    }

    /// Reports a request that is over. `pool` holds the metrics of the pool that served it.
    pub fn request_ended(&self, request: &RequestSummary<'_>, pool: &PoolMetrics) {
        self.metrics.request_ended(request, pool);
        if let Some(log) = &self.access_log {
            log.push(&LogLine {
                time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
                request: request.request_id,
                key: request.key,
                model: request.requested_model,
                stage: request.stage,
                node: request.node,
                status: request.status,
                outcome: request.outcome.name(),
                attempts: request.attempts,
                queue_ms: request.queue_time.as_secs_f64() * 1e3,
                first_ms: request.time_to_first_token.map(|first| first.as_secs_f64() * 1e3),
                total_ms: request.duration.as_secs_f64() * 1e3,
                prompt_tokens: request.usage.prompt_tokens,
                completion_tokens: request.usage.completion_tokens,
                cost: request.cost,
            });
        }
        if let (Some(recording), Outcome::Complete) = (&self.load_recording, request.outcome) {
            recording.push(request);
        }
        if let Some(traces) = &self.traces {
            traces.push(request);
        }
    }
}
