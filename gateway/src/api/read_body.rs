//! Reads a request body with three bounds: its size, the time between two frames, and its average rate.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http::header;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::Instant;

use crate::config::Limits;
use crate::error::GatewayError;
use crate::time::ms;

/// Lowest average rate, in bytes per second, of a body that takes longer than `limits.body_slow_ms`.
const MIN_BYTES_PER_SECOND: f64 = 1024.0;

/// Reads the whole body.
///
/// Errors: [`GatewayError::UnsupportedContentEncoding`] for a `content-encoding` other than `identity`;
/// [`GatewayError::TooLarge`] above `limits.body_bytes`; [`GatewayError::SlowBody`] after `limits.body_idle_ms` without
/// a frame, or below 1 KiB/s after `limits.body_slow_ms`; [`GatewayError::Invalid`] if the connection breaks.
pub async fn read_body<B>(mut body: B, headers: &HeaderMap, limits: &Limits) -> Result<Bytes, GatewayError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    if headers.get(header::CONTENT_ENCODING).is_some_and(|value| value != "identity") {
        return Err(GatewayError::UnsupportedContentEncoding);
    }
    let limit = limits.body_bytes;
    let announced = body.size_hint().lower();
    if announced > limit as u64 {
        return Err(GatewayError::RequestTooLarge { limit });
    }
    let mut waited: Option<Instant> = None;
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        let idle = ms(limits.body_idle_ms);
        // A frame that has already arrived needs neither a timer nor the clock.
        let frame = match futures_util::FutureExt::now_or_never(body.frame()) {
            Some(frame) => frame,
            None => {
                waited.get_or_insert_with(Instant::now);
                tokio::time::timeout(idle, body.frame()).await.map_err(|_| GatewayError::RequestTimeout)?
            }
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|error| GatewayError::InvalidRequest {
            message: format!("the request body broke off: {error}"),
            param: None,
            code: "invalid_body",
        })?;
        let Ok(data) = frame.into_data() else { continue };
        let length = first.len() + rest.len() + data.len();
        if length > limit {
            return Err(GatewayError::RequestTooLarge { limit });
        }
        let took = waited.map_or(Duration::ZERO, |since| since.elapsed());
        if took > ms(limits.body_slow_ms) && (length as f64) < MIN_BYTES_PER_SECOND * took.as_secs_f64() {
            return Err(GatewayError::RequestTimeout);
        }
        // Most bodies arrive in one frame, which is not copied.
        if first.is_empty() && rest.is_empty() {
            first = data;
        } else {
            if rest.is_empty() {
                rest.reserve(length.max(announced as usize));
                rest.extend_from_slice(&first);
                first = Bytes::new();
            }
            rest.extend_from_slice(&data);
        }
        if body.is_end_stream() {
            break;
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}
