//! Traces: one span per request, sent to an OpenTelemetry collector in batches (OTLP over HTTP, JSON encoding), with the
//! attribute names of the GenAI conventions. A collector that is slow or away costs spans, never requests.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, header};
use potstill_shared::openai::Usage;
use rand::RngCore;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::pool::node::{Node, NodeSpec};
use crate::record::{End, Record};
use crate::upstream::connect::Connector;
use crate::upstream::send::{Outgoing, send};

/// Spans that may wait to be sent.
const WAITING: usize = 4096;
/// Spans of one batch.
const BATCH: usize = 512;
/// A batch that is not full leaves after this.
const EVERY: Duration = Duration::from_secs(2);

/// Where spans go.
pub struct Traces {
    spans: mpsc::Sender<Value>,
}

impl Traces {
    /// Starts the sender; `endpoint` is the collector's base URL.
    pub fn start(endpoint: &str, tasks: &TaskTracker, end: CancellationToken) -> Result<Self, String> {
        let node = Node::new(0, NodeSpec::new(endpoint, None))
            .map_err(|problem| format!("otlp_endpoint: {problem}"))?;
        let (spans, waiting) = mpsc::channel(WAITING);
        tasks.spawn(deliver(std::sync::Arc::new(node), waiting, end));
        Ok(Self { spans })
    }

    /// Hands over the span of a request that is over.
    pub(crate) fn push(&self, record: &Record, took: Duration, usage: Usage) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (trace, parent) = context(record.traceparent.as_deref());
        let mut attributes = vec![
            text("gen_ai.operation.name", "chat"),
            text("gen_ai.request.model", &record.asked.model),
            text("gen_ai.response.model", &record.pool.model),
            number("gen_ai.usage.input_tokens", usage.prompt_tokens),
            number("gen_ai.usage.output_tokens", usage.completion_tokens),
            number("http.response.status_code", record.status.into()),
            text("potstill.request.id", record.request_id.as_str()),
            text("potstill.key", &record.key.name),
            text("potstill.end", record.end.name()),
            number("potstill.attempts", record.attempts.into()),
            number("potstill.queue_ms", record.waited.as_millis() as u64),
        ];
        attributes.extend(record.node.as_ref().map(|node| text("server.address", &node.name)));
        attributes.extend(record.stage.as_deref().map(|stage| text("potstill.stage", stage)));
        let failed = record.end == End::Truncated || record.status >= 500;
        let span = json!({
            "traceId": trace, "spanId": hex(8), "parentSpanId": parent, "name": format!("chat {}", record.asked.model),
            "kind": 2, "startTimeUnixNano": now.saturating_sub(took).as_nanos().to_string(),
            "endTimeUnixNano": now.as_nanos().to_string(), "attributes": attributes,
            "status": {"code": if failed { 2 } else { 0 }},
        });
        // Full: the collector is too slow.
        let _left_out = self.spans.try_send(span);
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

/// Trace and parent of a `traceparent` header (W3C Trace Context), or a new trace.
fn context(traceparent: Option<&str>) -> (String, String) {
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

async fn deliver(node: std::sync::Arc<Node>, mut waiting: mpsc::Receiver<Value>, end: CancellationToken) {
    let connector = Connector::default();
    let mut ending = false;
    while !ending {
        let mut spans = Vec::new();
        tokio::select! {
            () = end.cancelled() => ending = true,
            // The first span of a batch opens it; it leaves when it is full or after a while.
            count = waiting.recv_many(&mut spans, BATCH) => {
                ending = count == 0;
                let deadline = tokio::time::Instant::now() + EVERY;
                while spans.len() < BATCH {
                    let room = BATCH - spans.len();
                    tokio::select! {
                        count = waiting.recv_many(&mut spans, room) => if count == 0 { break },
                        () = tokio::time::sleep_until(deadline) => break,
                        () = end.cancelled() => break,
                    }
                }
            }
        }
        if ending {
            waiting.close();
            while let Ok(span) = waiting.try_recv() {
                spans.push(span);
            }
        }
        if !spans.is_empty() {
            post(&connector, &node, spans).await;
        }
    }
}

async fn post(connector: &Connector, node: &std::sync::Arc<Node>, spans: Vec<Value>) {
    let count = spans.len();
    let body = json!({"resourceSpans": [{
        "resource": {"attributes": [text("service.name", "potstill-gateway")]},
        "scopeSpans": [{"scope": {"name": "potstill-gateway", "version": env!("CARGO_PKG_VERSION")}, "spans": spans}],
    }]});
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let path = PathAndQuery::from_static("/v1/traces");
    let outgoing =
        Outgoing { method: Method::POST, path, client: headers, body: Bytes::from(body.to_string()) };
    let limit = Duration::from_secs(5);
    match send(connector, node, &outgoing, tokio::time::Instant::now(), limit, limit).await {
        Ok(answer) if answer.head.status.is_success() => {}
        Ok(answer) => {
            tracing::warn!(status = answer.head.status.as_u16(), spans = count, "the collector refused spans")
        }
        Err(error) => tracing::warn!(%error, spans = count, "the collector cannot be reached"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_trace_goes_on() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(
            context(Some(good)),
            ("0af7651916cd43dd8448eb211c80319c".into(), "b7ad6b7169203331".into())
        );
        for bad in ["", "00-xyz-1-01", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "00-0af7"] {
            let (trace, parent) = context(Some(bad));
            assert!(trace.len() == 32 && parent.is_empty(), "{bad}");
        }
    }
}
