//! An HTTP/2 stream whose client opens its window no further is given up after a while. Its connection is well and answers pings,
//! and hyper asks the relayed answer for more only when the window has room: nothing else would notice, and the slot would be
//! held for ever.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};
use tokio::time::Sleep;

/// What happened while a stream's task was polled.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// There is an answer.
    answered: bool,
    /// Something of it was taken.
    taken: bool,
    /// It was asked for more and has none yet: the node is waited for, not the client.
    waits: bool,
}

thread_local! {
    static SEEN: Cell<Seen> = const { Cell::new(Seen { answered: false, taken: false, waits: false }) };
}

/// Runs the tasks of streams; one that has an answer to write and has not taken any of it for `patience` ends, with a reset.
#[derive(Clone)]
pub(crate) struct Streams {
    pub(crate) patience: Duration,
}

impl<F> hyper::rt::Executor<F> for Streams
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
                SEEN.set(Seen::default());
                if stream.as_mut().poll(context).is_ready() {
                    return Poll::Ready(());
                }
                let seen = SEEN.get();
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

/// The body of an answer to a stream, which says what becomes of it.
pub(crate) struct Noticed<B>(Pin<Box<B>>);

impl<B> Noticed<B> {
    /// An answer begins.
    pub(crate) fn new(body: B) -> Self {
        SEEN.set(Seen { answered: true, ..SEEN.get() });
        Self(Box::pin(body))
    }
}

impl<B: Body> Body for Noticed<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let polled = self.0.as_mut().poll_frame(context);
        let taken = polled.is_ready() || SEEN.get().taken;
        SEEN.set(Seen { taken, waits: polled.is_pending(), ..SEEN.get() });
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}
