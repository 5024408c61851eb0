//! A flag that is set once and can be awaited. Checking it costs one atomic load, so that a connection can check on
//! every wake; a `CancellationToken` takes a lock.

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

/// A shutdown flag. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct ShutdownFlag(Arc<Flag>);

impl ShutdownFlag {
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

/// Polls a future until it is ready or the flag is set.
pub(crate) struct StopOnShutdown<'a> {
    stop: &'a ShutdownFlag,
}

impl<'a> StopOnShutdown<'a> {
    pub(crate) fn new(stop: &'a ShutdownFlag) -> Self {
        Self { stop }
    }

    /// Returns `None` if the flag was set first. The task registers with the flag on the first poll only. Later polls
    /// check the atomic.
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
