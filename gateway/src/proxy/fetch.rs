//! Fetches a document that a node serves itself, such as `/tokenizer_info`.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, header};
use tokio::time::Instant;

use super::attempt::{Attempt, UpstreamResponse, try_pool};
use super::context::ProxyContext;
use super::request_record::RequestRecord;
use crate::api::request_id::RequestId;
use crate::auth::keys::Key;
use crate::error::GatewayError;
use crate::normalize::EndpointKind;
use crate::pool::{AcquireRequest, ModelPool};
use crate::upstream::request::UpstreamRequest;

/// Sends `GET path` to any node of `pool`.
pub(crate) async fn fetch(
    context: &Arc<ProxyContext>,
    key: &Arc<Key>,
    pool: &Arc<ModelPool>,
    path: &'static str,
) -> Result<Response, GatewayError> {
    let config = pool.config().clone();
    let mut record = RequestRecord::new(
        context,
        RequestId::generate(),
        Arc::clone(key),
        Arc::clone(pool),
        Instant::now(),
        0,
    );
    let request = UpstreamRequest {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        client_headers: HeaderMap::new(),
        body: Bytes::new(),
    };
    let attempt = Attempt {
        connector: &context.connector,
        kind: EndpointKind::Other,
        stream: false,
        token_limit: Some(1),
        model: &config.model,
        request: &request,
        config: &config,
    };
    let acquire = AcquireRequest {
        class: key.request_class(None),
        key: Arc::clone(&key.name),
        max_wait: None,
        tokens: 1,
        bytes: 0,
        affinity: None,
    };
    match try_pool(pool, &attempt, &acquire, &mut record).await {
        Ok(UpstreamResponse::Whole { status, content_type, body }) => {
            record.status = status.as_u16();
            Ok((status, [(header::CONTENT_TYPE, content_type)], body).into_response())
        }
        Ok(UpstreamResponse::Stream { .. }) => {
            Err(GatewayError::NodeFailed { reason: "a stream where none was requested".into() })
        }
        Err(error) => {
            record.reject(error.status().as_u16());
            Err(error)
        }
    }
}
