//! Our own accept loop, since the stock one waits for ever: for the first byte of a connection, for the rest of a head,
//! for the next request. Body deadlines are the stack's. On stop: no new connections, open streams finish within the
//! grace, then everything closes.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, ms};
use crate::stall::StallGuard;

/// Largest request head.
const HEAD_BYTES: usize = 64 << 10;

/// Accepts connections until `stop`, cancels `draining`, and returns when the last connection has ended or the grace is
/// over.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    config: &Config,
    draining: &CancellationToken,
    stop: impl Future<Output = ()>,
) {
    let slots = Arc::new(Semaphore::new(config.limits.connections));
    let connections = TaskTracker::new();
    let abort = CancellationToken::new();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = async {
                // Over the bound nobody is accepted: the kernel's backlog holds them.
                let slot = Arc::clone(&slots).acquire_owned().await;
                (listener.accept().await, slot)
            } => accepted,
        };
        match accepted {
            (Ok((stream, _)), Ok(slot)) => {
                let connection = connection(stream, router.clone(), config, draining.clone());
                let abort = abort.clone();
                connections.spawn(async move {
                    tokio::select! {
                        () = connection => {}
                        () = abort.cancelled() => {}
                    }
                    drop(slot);
                });
            }
            (Err(error), _) => {
                // Out of file descriptors, mostly: give connections time to end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            (Ok(_), Err(_)) => break,
        }
    }
    drop(listener);
    draining.cancel();
    connections.close();
    let grace = Duration::from_secs(config.drain_seconds);
    if tokio::time::timeout(grace, connections.wait()).await.is_err() {
        tracing::warn!(
            open = connections.len(),
            "the grace is over; closing the connections that are still open"
        );
        abort.cancel();
        connections.wait().await;
    }
}

fn connection(
    stream: TcpStream,
    router: Router,
    config: &Config,
    draining: CancellationToken,
) -> impl Future<Output = ()> + use<> {
    let (first_byte, head) = (ms(config.limits.first_byte_ms), ms(config.limits.head_ms));
    let write_idle = ms(config.limits.write_idle_ms);
    async move {
        let _unset = stream.set_nodelay(true);
        let silent = tokio::select! {
            readable = tokio::time::timeout(first_byte, stream.readable()) => !matches!(readable, Ok(Ok(()))),
            () = draining.cancelled() => true,
        };
        if silent {
            return;
        }
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(head)
            .max_buf_size(HEAD_BYTES)
            .serve_connection(
                TokioIo::new(StallGuard::new(stream, write_idle)),
                TowerToHyperService::new(router),
            );
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = draining.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended early");
        }
    }
}
