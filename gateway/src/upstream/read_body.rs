//! Reads an body that is not streamed to its end, within its clocks and its bound. Nothing of it has reached the client
//! yet, so one that breaks off can still be asked for elsewhere.

use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::exchange::{SendError, UpstreamBody};

/// Largest whole body.
pub const MAX_BYTES: usize = 64 << 20;

/// Reads `body`; `idle` bounds the time between two pieces, `until` the whole.
pub async fn read_full_body(
    body: &mut UpstreamBody,
    idle: Duration,
    until: tokio::time::Instant,
) -> Result<Bytes, SendError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        // What is there already costs no timer.
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
                if first.len() + rest.len() + data.len() > MAX_BYTES {
                    return Err(SendError::Failed(format!("the body is longer than {MAX_BYTES} bytes")));
                }
                // Most answers are one piece, which is then not copied.
                if first.is_empty() && rest.is_empty() {
                    first = data;
                } else {
                    if rest.is_empty() {
                        rest.reserve(
                            first.len() + data.len() + body.lower_bound().min(MAX_BYTES as u64) as usize,
                        );
                        rest.extend_from_slice(&first);
                        first = Bytes::new();
                    }
                    rest.extend_from_slice(&data);
                }
                if body.ended() {
                    break;
                }
            }
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}
