//! A flag that is set once and can be waited for. Looking at it costs one load, so a connection may do so on every wake; a
//! cancellation token takes a lock for that.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio_util::sync::CancellationToken;

#[derive(Default)]
struct Flag {
    set: AtomicBool,
    token: CancellationToken,
}

/// The flag; clones are the same one.
#[derive(Clone, Default)]
pub(crate) struct Stop(Arc<Flag>);

impl Stop {
    pub(crate) fn set(&self) {
        self.0.set.store(true, Ordering::Release);
        self.0.token.cancel();
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.set.load(Ordering::Acquire)
    }

    pub(crate) async fn wait(&self) {
        self.0.token.cancelled().await;
    }
}

/// Runs something until it is ready or the flag is set.
pub(crate) struct Watched<'a> {
    stop: &'a Stop,
}

impl<'a> Watched<'a> {
    pub(crate) fn new(stop: &'a Stop) -> Self {
        Self { stop }
    }

    /// `None` when the flag was set first. The task registers with the flag once; afterwards only the flag is looked at.
    pub(crate) async fn run<T>(self, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Option<T> {
        let mut set = pin!(self.stop.wait());
        let mut registered = false;
        std::future::poll_fn(|context| {
            if let Poll::Ready(value) = poll(context) {
                return Poll::Ready(Some(value));
            }
            let look = !std::mem::replace(&mut registered, true) || self.stop.is_set();
            if look && set.as_mut().poll(context).is_ready() { Poll::Ready(None) } else { Poll::Pending }
        })
        .await
    }
}
