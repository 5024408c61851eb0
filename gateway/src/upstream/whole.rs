//! Reads an answer that is not streamed to its end, within its clocks and its bound. Nothing of it has reached the client
//! yet, so one that breaks off can still be asked for elsewhere.

use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::send::{Answer, SendError};

/// Largest whole answer.
pub const MAX_BYTES: usize = 64 << 20;

/// Reads `answer`; `idle` bounds the time between two pieces, `until` the whole.
pub async fn read(
    answer: &mut Answer,
    idle: Duration,
    until: tokio::time::Instant,
) -> Result<Bytes, SendError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        // What is there already costs no timer.
        let ready = std::future::poll_fn(|context| Poll::Ready(answer.poll_data(context))).await;
        let data = match ready {
            Poll::Ready(data) => Ok(data),
            Poll::Pending => {
                let limit = until.min(tokio::time::Instant::now() + idle);
                let data = std::future::poll_fn(|context| answer.poll_data(context));
                tokio::time::timeout_at(limit, data).await
            }
        };
        match data {
            Err(_) => return Err(SendError::Timeout),
            Ok(None) => break,
            Ok(Some(Err(fault))) => return Err(SendError::Failed(fault.to_string())),
            Ok(Some(Ok(data))) => {
                if first.len() + rest.len() + data.len() > MAX_BYTES {
                    return Err(SendError::Failed(format!("the answer is longer than {MAX_BYTES} bytes")));
                }
                // Most answers are one piece, which is then not copied.
                if first.is_empty() && rest.is_empty() {
                    first = data;
                } else {
                    if rest.is_empty() {
                        rest.reserve(
                            first.len() + data.len() + answer.lower_bound().min(MAX_BYTES as u64) as usize,
                        );
                        rest.extend_from_slice(&first);
                        first = Bytes::new();
                    }
                    rest.extend_from_slice(&data);
                }
                if answer.ended() {
                    break;
                }
            }
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}
