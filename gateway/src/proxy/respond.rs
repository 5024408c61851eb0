//! Builds the response to the client from the response of a node.

use std::sync::Arc;

use http::{HeaderName, HeaderValue, header};

use super::attempt::UpstreamResponse;
use super::relay::RelayBody;
use super::request_record::RequestRecord;
use super::response_body::{GatewayResponse, ResponseBody, event_stream};
use crate::api::request_fields::RequestFields;
use crate::api::responses;
use crate::api::responses::request::ResponsesRequest;
use crate::normalize::EndpointKind;
use crate::normalize::sse_stream::SseNormalizer;
use crate::normalize::stream_chunk::ChunkNormalizer;
use crate::pool::ModelPool;
use crate::telemetry::request_summary::Phase;

/// Number of headers of a usual response.
const RESPONSE_HEADERS: usize = 9;

/// `responses_request` is set when the client speaks the Responses API. `heartbeat_ms` is the interval of comments in a
/// stream.
pub(super) fn build_response(
    response: UpstreamResponse,
    fields: &RequestFields,
    kind: EndpointKind,
    responses_request: Option<ResponsesRequest>,
    pool: &Arc<ModelPool>,
    heartbeat_ms: Option<u64>,
    mut record: RequestRecord,
) -> GatewayResponse {
    let model = Arc::clone(&pool.model);
    let mut response = match response {
        UpstreamResponse::Stream { exchange, permit } => {
            record.phase = Phase::Stream;
            record.status = exchange.head.status.as_u16();
            let config = pool.config();
            let usage_chunk_requested = fields.usage_chunk_requested || responses_request.is_some();
            let normalizer =
                ChunkNormalizer::new(kind, Arc::clone(&model), usage_chunk_requested, config.reasoning);
            let events = SseNormalizer::new(normalizer, true);
            let relay =
                RelayBody::new(exchange.body, events, &config.deadlines, heartbeat_ms, permit, record);
            event_stream(match responses_request {
                None => ResponseBody::Relay(Box::new(relay)),
                Some(request) => {
                    ResponseBody::Responses(Box::new(responses::stream::ResponsesStream::new(relay, request)))
                }
            })
        }
        UpstreamResponse::Whole { status, content_type, body } => {
            let body = match responses_request {
                None => body,
                Some(request) => responses::whole::from_chat(&body, &request),
            };
            record.status = status.as_u16();
            let mut response = GatewayResponse::new(ResponseBody::from(body));
            *response.status_mut() = status;
            let headers = response.headers_mut();
            headers.reserve(RESPONSE_HEADERS);
            headers.insert(header::CONTENT_TYPE, content_type);
            let duration = record.duration().as_millis() as u64;
            headers.insert(HeaderName::from_static("openai-processing-ms"), HeaderValue::from(duration));
            response
        }
    };
    if *model != *fields.model
        && let Ok(value) = HeaderValue::from_str(&model)
    {
        response.headers_mut().insert(HeaderName::from_static("x-potstill-served-model"), value);
    }
    response
}
