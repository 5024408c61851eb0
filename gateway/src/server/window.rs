//! Resets HTTP/2 streams whose client does not open its flow-control window. The connection of such a client still
//! answers pings. hyper polls a response body only while the window has room, so no other deadline applies and the slot
//! would stay occupied.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};
use tokio::time::Sleep;

/// Events while the task of a stream was polled.
#[derive(Clone, Copy, Default)]
struct StreamProgress {
    /// A response has begun.
    answered: bool,
    /// A part of the response body was read.
    taken: bool,
    /// The response body was polled and is pending: the node is slow, not the client.
    waits: bool,
}

thread_local! {
    static PROGRESS: Cell<StreamProgress> = const { Cell::new(StreamProgress { answered: false, taken: false, waits: false }) };
}

/// Executor of HTTP/2 stream tasks. Ends a task, which resets the stream, if the client takes nothing of an available
/// response for `patience`.
#[derive(Clone)]
pub(crate) struct StreamExecutor {
    pub(crate) patience: Duration,
}

impl<F> hyper::rt::Executor<F> for StreamExecutor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let patience = self.patience;
        tokio::spawn(async move {
            let mut stream = pin!(stream);
            let mut answered = false;
            let mut stalled: Option<Pin<Box<Sleep>>> = None;
            poll_fn(|context| {
                PROGRESS.set(StreamProgress::default());
                if stream.as_mut().poll(context).is_ready() {
                    return Poll::Ready(());
                }
                let seen = PROGRESS.get();
                answered |= seen.answered;
                if seen.taken || seen.waits {
                    stalled = None;
                }
                if seen.waits || !answered {
                    return Poll::Pending;
                }
                let stalled = stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
                stalled.as_mut().poll(context)
            })
            .await;
        });
    }
}

/// Response body that records in `SEEN` when it is polled.
pub(crate) struct TrackedBody<B>(Pin<Box<B>>);

impl<B> TrackedBody<B> {
    /// Wraps the body of a new response.
    pub(crate) fn new(body: B) -> Self {
        PROGRESS.set(StreamProgress { answered: true, ..PROGRESS.get() });
        Self(Box::pin(body))
    }
}

impl<B: Body> Body for TrackedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let polled = self.0.as_mut().poll_frame(context);
        let taken = polled.is_ready() || PROGRESS.get().taken;
        PROGRESS.set(StreamProgress { taken, waits: polled.is_pending(), ..PROGRESS.get() });
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}
