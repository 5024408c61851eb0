//! Tries the pool of the requested model, then its fallback pools.

use std::sync::Arc;

use super::attempt::{Attempt, UpstreamResponse, try_pool};
use super::context::ProxyContext;
use super::request_record::RequestRecord;
use crate::api::request_fields::{RequestFields, replace_model};
use crate::auth::keys::Key;
use crate::error::GatewayError;
use crate::normalize::EndpointKind;
use crate::pool::{AcquireRequest, ModelPool};
use crate::upstream::request::UpstreamRequest;

/// Returns the response and the pool that served it. The error of the last pool is returned if none did.
pub(super) async fn try_with_fallback(
    context: &Arc<ProxyContext>,
    first: Arc<ModelPool>,
    fields: &RequestFields,
    kind: EndpointKind,
    acquire: &AcquireRequest,
    mut request: UpstreamRequest,
    record: &mut RequestRecord,
) -> Result<(Arc<ModelPool>, UpstreamResponse), GatewayError> {
    let body = request.body.clone();
    let mut others = fallback_pools(context, &first, &record.key).into_iter();
    let mut next = Some(Arc::clone(&first));
    while let Some(pool) = next.take() {
        let config = pool.config().clone();
        request.body =
            replace_model(&body, fields, config.upstream_model.as_deref().unwrap_or(&config.model));
        record.pool = Arc::clone(&pool);
        let attempt = Attempt {
            connector: &context.connector,
            kind,
            stream: fields.stream,
            token_limit: fields.token_limit,
            model: &config.model,
            request: &request,
            config: &config,
        };
        match try_pool(&pool, &attempt, acquire, record).await {
            Ok(response) => {
                if !Arc::ptr_eq(&pool, &first) {
                    first.metrics.fallbacks.inc();
                }
                return Ok((pool, response));
            }
            Err(error) => {
                next = if error.is_retryable_on_fallback() { others.next() } else { None };
                if next.is_none() {
                    record.reject(error.status().as_u16());
                    return Err(error);
                }
                tracing::info!(model = fields.model, reason = error.code(), "trying a fallback pool");
            }
        }
    }
    Err(GatewayError::NoUpstream { model: fields.model.clone(), retry_after: 5 })
}

/// The fallback pools of `first` that `key` may use.
fn fallback_pools(context: &ProxyContext, first: &ModelPool, key: &Key) -> Vec<Arc<ModelPool>> {
    let config = first.config();
    let allowed = config.fallback.iter().filter(|model| key.allows(model));
    allowed.filter_map(|model| context.pools.get(model)).collect()
}
