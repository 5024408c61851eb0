//! Reads a response body that is not streamed, with bounds on time and size. The client has received nothing yet, so a
//! broken response can still be retried.

use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::exchange::{SendError, UpstreamBody};

/// Largest body in bytes, 64 MiB.
pub const MAX_BODY_BYTES: usize = 64 << 20;

/// Reads `body` to its end. `idle` bounds the time between two chunks; `until` is the deadline of the whole body.
///
/// Errors: [`SendError::Timeout`] after a deadline; [`SendError::Failed`] for a broken or too large body.
pub async fn read_full_body(
    body: &mut UpstreamBody,
    idle: Duration,
    until: tokio::time::Instant,
) -> Result<Bytes, SendError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        // Data that has already arrived needs no timer.
        let ready = std::future::poll_fn(|context| Poll::Ready(body.poll_data(context))).await;
        let data = match ready {
            Poll::Ready(data) => Ok(data),
            Poll::Pending => {
                let limit = until.min(tokio::time::Instant::now() + idle);
                let data = std::future::poll_fn(|context| body.poll_data(context));
                tokio::time::timeout_at(limit, data).await
            }
        };
        match data {
            Err(_) => return Err(SendError::Timeout),
            Ok(None) => break,
            Ok(Some(Err(error))) => return Err(SendError::Failed(error.to_string())),
            Ok(Some(Ok(data))) => {
                if first.len() + rest.len() + data.len() > MAX_BODY_BYTES {
                    return Err(SendError::Failed(format!("the body is longer than {MAX_BODY_BYTES} bytes")));
                }
                // Most bodies arrive in one chunk, which is not copied.
                if first.is_empty() && rest.is_empty() {
                    first = data;
                } else {
                    if rest.is_empty() {
                        rest.reserve(
                            first.len() + data.len() + body.lower_bound().min(MAX_BODY_BYTES as u64) as usize,
                        );
                        rest.extend_from_slice(&first);
                        first = Bytes::new();
                    }
                    rest.extend_from_slice(&data);
                }
                if body.has_ended() {
                    break;
                }
            }
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}
