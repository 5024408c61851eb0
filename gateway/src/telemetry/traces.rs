//! Spans: one per request, sent to an OpenTelemetry collector in batches (OTLP over HTTP, JSON encoding), with the attribute
//! names of the GenAI semantic conventions. Spans that a slow or absent collector does not take are dropped; requests never
//! wait.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, header};
use rand::RngCore;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::request_summary::{Outcome, RequestSummary};
use crate::upstream::address::AddressPolicy;
use crate::upstream::connect::Connector;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::exchange::send;
use crate::upstream::request::UpstreamRequest;

/// Capacity of the queue, in spans.
const QUEUE_SPANS: usize = 4096;
/// Largest batch, in spans.
const BATCH_SPANS: usize = 512;
/// Longest time that a batch is collected.
const BATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Queue of spans to send.
pub struct Traces {
    spans: mpsc::Sender<Value>,
}

impl Traces {
    /// Starts the task that sends spans; `collector` is the collector's base URL. The task ends, after a last batch, when
    /// `shutdown` is cancelled.
    pub fn start(collector: &str, tasks: &TaskTracker, shutdown: CancellationToken) -> Result<Self, String> {
        let endpoint = Endpoint::new(collector, None, AddressPolicy::Trusted)
            .map_err(|problem| format!("otlp_endpoint: {problem}"))?;
        let (spans, queue) = mpsc::channel(QUEUE_SPANS);
        tasks.spawn(send_batches(Arc::new(endpoint), queue, shutdown));
        Ok(Self { spans })
    }

    /// Queues the span of a finished request.
    pub fn push(&self, request: &RequestSummary<'_>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (trace, parent) = parse_traceparent(request.traceparent);
        let mut attributes = vec![
            text("gen_ai.operation.name", "chat"),
            text("gen_ai.request.model", request.requested_model),
            text("gen_ai.response.model", request.served_model),
            number("gen_ai.usage.input_tokens", request.usage.prompt_tokens),
            number("gen_ai.usage.output_tokens", request.usage.completion_tokens),
            number("http.response.status_code", request.status.into()),
            text("potstill.request.id", request.request_id),
            text("potstill.key", request.key),
            text("potstill.outcome", request.outcome.name()),
            number("potstill.attempts", request.attempts.into()),
            number("potstill.queue_ms", request.queue_time.as_millis() as u64),
        ];
        attributes.extend(request.node.map(|node| text("server.address", node)));
        attributes.extend(request.stage.map(|stage| text("potstill.stage", stage)));
        let failed = request.outcome == Outcome::Truncated || request.status >= 500;
        let span = json!({
            "traceId": trace, "spanId": hex(8), "parentSpanId": parent,
            "name": format!("chat {}", request.requested_model),
            "kind": 2, "startTimeUnixNano": now.saturating_sub(request.duration).as_nanos().to_string(),
            "endTimeUnixNano": now.as_nanos().to_string(), "attributes": attributes,
            "status": {"code": if failed { 2 } else { 0 }},
        });
        // A full queue means that the collector is too slow.
        let _dropped = self.spans.try_send(span);
    }
}

fn text(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

fn number(key: &str, value: u64) -> Value {
    json!({"key": key, "value": {"intValue": value.to_string()}})
}

fn hex(bytes: usize) -> String {
    let mut random = vec![0u8; bytes];
    rand::rng().fill_bytes(&mut random);
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns trace id and parent span id of a `traceparent` header (W3C Trace Context), or a new trace id.
fn parse_traceparent(traceparent: Option<&str>) -> (String, String) {
    let parts: Vec<&str> = traceparent.unwrap_or_default().split('-').collect();
    let is_hex = |text: &str, length| {
        text.len() == length
            && text.bytes().all(|byte| byte.is_ascii_hexdigit())
            && text.bytes().any(|byte| byte != b'0')
    };
    match parts[..] {
        [_, trace, parent, ..] if is_hex(trace, 32) && is_hex(parent, 16) => {
            (trace.to_owned(), parent.to_owned())
        }
        _ => (hex(16), String::new()),
    }
}

async fn send_batches(
    endpoint: Arc<Endpoint>,
    mut queue: mpsc::Receiver<Value>,
    shutdown: CancellationToken,
) {
    let connector = Connector::default();
    let mut ending = false;
    while !ending {
        let mut spans = Vec::new();
        tokio::select! {
            () = shutdown.cancelled() => ending = true,
            // The first span opens a batch; it is sent when it is full or after the interval.
            count = queue.recv_many(&mut spans, BATCH_SPANS) => {
                ending = count == 0;
                let deadline = tokio::time::Instant::now() + BATCH_INTERVAL;
                while spans.len() < BATCH_SPANS {
                    let room = BATCH_SPANS - spans.len();
                    tokio::select! {
                        count = queue.recv_many(&mut spans, room) => if count == 0 { break },
                        () = tokio::time::sleep_until(deadline) => break,
                        () = shutdown.cancelled() => break,
                    }
                }
            }
        }
        if ending {
            queue.close();
            while let Ok(span) = queue.try_recv() {
                spans.push(span);
            }
        }
        if !spans.is_empty() {
            post(&connector, &endpoint, spans).await;
        }
    }
}

async fn post(connector: &Connector, endpoint: &Arc<Endpoint>, spans: Vec<Value>) {
    let count = spans.len();
    let body = json!({"resourceSpans": [{
        "resource": {"attributes": [text("service.name", "potstill-gateway")]},
        "scopeSpans": [{"scope": {"name": "potstill-gateway", "version": env!("CARGO_PKG_VERSION")}, "spans": spans}],
    }]});
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let path = PathAndQuery::from_static("/v1/traces");
    let body = Bytes::from(body.to_string());
    let request = UpstreamRequest { method: Method::POST, path, client_headers: headers, body };
    let timeout = Duration::from_secs(5);
    match send(connector, endpoint, &request, tokio::time::Instant::now(), timeout, timeout).await {
        Ok(response) if response.head.status.is_success() => {}
        Ok(response) => {
            tracing::warn!(
                status = response.head.status.as_u16(),
                spans = count,
                "the collector refused spans"
            )
        }
        Err(error) => tracing::warn!(%error, spans = count, "the collector cannot be reached"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continues_the_trace_of_the_client() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(
            parse_traceparent(Some(good)),
            ("0af7651916cd43dd8448eb211c80319c".into(), "b7ad6b7169203331".into())
        );
        for bad in ["", "00-xyz-1-01", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "00-0af7"] {
            let (trace, parent) = parse_traceparent(Some(bad));
            assert!(trace.len() == 32 && parent.is_empty(), "{bad}");
        }
    }
}
