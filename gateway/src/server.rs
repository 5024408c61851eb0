//! The accept loop of the gateway. Unlike `axum::serve` it limits the time to the first byte of a connection, to the
//! end of a request head, and between requests. Deadlines of request bodies are set in [`crate::api::read_body`]. On
//! shutdown no connection is accepted, running requests continue for a grace period, and then all connections are
//! closed.

pub mod addresses;
pub mod stall;
pub mod stop;
pub mod tls;
mod window;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use self::addresses::AddressCounts;
use self::stall::StallGuard;
use self::stop::{ShutdownFlag, StopOnShutdown};
use self::tls::Tls;
use self::window::{StreamExecutor, TrackedBody};
use crate::auth::keys::ClientCertificate;
use crate::config::Limits;
use crate::time::ms;

/// Largest request head in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// First bytes of an HTTP/2 connection (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0";

/// Serves requests, and provides the bounds of connections.
pub(crate) trait Handler: Clone + Send + Sync + 'static {
    /// Body of responses.
    type Body: Body<Data = bytes::Bytes, Error = std::io::Error> + Send + 'static;
    /// Serves a request.
    fn handle(&self, request: Request<Incoming>) -> impl Future<Output = Response<Self::Body>> + Send;
    /// Returns the current limits.
    fn limits(&self) -> Arc<Limits>;
    /// Returns the current TLS settings; `None` for plain HTTP.
    fn tls(&self) -> Option<Tls>;
    /// Counts an opened (+1) or closed (-1) connection.
    fn count_connection(&self, change: i64);
}

/// Accepts connections until `stop`, then sets `draining`. Returns when all connections have ended, at the latest after
/// `grace`.
pub(crate) async fn serve(
    listener: TcpListener,
    handler: impl Handler,
    grace: Duration,
    draining: &ShutdownFlag,
    stop: impl Future<Output = ()>,
) {
    let slots = Arc::new(Semaphore::new(handler.limits().connections));
    let addresses = AddressCounts::default();
    let connections = TaskTracker::new();
    let abort = ShutdownFlag::default();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = async {
                // Above the bound, new connections wait in the backlog of the kernel.
                let slot = Arc::clone(&slots).acquire_owned().await;
                (listener.accept().await, slot)
            } => accepted,
        };
        match accepted {
            (Ok((stream, peer)), Ok(slot)) => {
                let limits = handler.limits();
                // One address cannot use all connections.
                let Some(place) =
                    addresses.count_connection(client_address(peer), limits.connections_per_address)
                else {
                    continue;
                };
                let mut connection =
                    Box::pin(accept_connection(stream, handler.clone(), limits, draining.clone()));
                let abort = abort.clone();
                let handler = handler.clone();
                connections.spawn(async move {
                    handler.count_connection(1);
                    StopOnShutdown::new(&abort).run(|context| connection.as_mut().poll(context)).await;
                    handler.count_connection(-1);
                    drop((slot, place));
                });
            }
            (Err(error), _) => {
                // Mostly a lack of file descriptors. A pause lets connections end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            (Ok(_), Err(_)) => break,
        }
    }
    drop(listener);
    draining.set();
    connections.close();
    if tokio::time::timeout(grace, connections.wait()).await.is_err() {
        tracing::warn!(
            open = connections.len(),
            "the grace is over; closing the connections that are still open"
        );
        abort.set();
        connections.wait().await;
    }
}

/// Returns the address that counts as one client: an IPv4 address, or the /64 network of an IPv6 address.
fn client_address(peer: SocketAddr) -> IpAddr {
    match peer.ip() {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_none() => {
            let mut bytes = v6.octets();
            bytes[8..].fill(0);
            IpAddr::from(bytes)
        }
        other => other,
    }
}

async fn accept_connection(
    stream: TcpStream,
    handler: impl Handler,
    limits: Arc<Limits>,
    draining: ShutdownFlag,
) {
    let _unset = stream.set_nodelay(true);
    let mut first = [0u8; HTTP2_PREFACE.len()];
    let silent = tokio::select! {
        peeked = tokio::time::timeout(ms(limits.first_byte_ms), stream.peek(&mut first)) => peeked,
        () = draining.wait() => return,
    };
    let Ok(Ok(seen)) = silent else { return };
    if seen == 0 {
        return;
    }
    let Some(tls) = handler.tls() else {
        let http2 = first[..seen] == HTTP2_PREFACE[..seen] && seen > 3;
        return serve_connection(stream, http2, None, handler, limits, draining).await;
    };
    let accepted = handshake(&tls, stream, ms(limits.head_ms)).await;
    match accepted {
        Ok(Ok(stream)) => {
            let (_, session) = stream.get_ref();
            let http2 = session.alpn_protocol() == Some(b"h2");
            let certificate = session
                .peer_certificates()
                .and_then(|chain| chain.first())
                .map(|der| ClientCertificate(*blake3::hash(der).as_bytes()));
            serve_connection(stream, http2, certificate, handler, limits, draining).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "no TLS session"),
        Err(_) => {}
    }
}

type Session = tokio_rustls::server::TlsStream<TcpStream>;

/// Boxed, so that a plain connection does not carry the state of a handshake.
fn handshake(
    tls: &Tls,
    stream: TcpStream,
    limit: Duration,
) -> Pin<Box<dyn Future<Output = Result<std::io::Result<Session>, tokio::time::error::Elapsed>> + Send>> {
    Box::pin(tokio::time::timeout(limit, tls.accept(stream)))
}

/// Serves a connection with a known protocol.
pub(crate) fn serve_connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    http2: bool,
    certificate: Option<ClientCertificate>,
    handler: impl Handler,
    limits: Arc<Limits>,
    draining: ShutdownFlag,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    let io = TokioIo::new(StallGuard::new(stream, ms(limits.write_idle_ms)));
    let service = service_fn(move |mut request: Request<Incoming>| {
        let handler = handler.clone();
        if let Some(certificate) = certificate {
            request.extensions_mut().insert(certificate);
        }
        // Boxed, so that a connection that relays a stream does not carry the state of the request's start.
        Box::pin(async move { Ok::<_, Infallible>(handler.handle(request).await) })
    });
    // A macro, because the connection types of HTTP/1.1 and HTTP/2 differ. Each is boxed at its own size.
    macro_rules! run {
        ($connection:expr) => {{
            let mut connection = Box::pin($connection);
            Box::pin(async move {
            let ended = match StopOnShutdown::new(&draining).run(|context| connection.as_mut().poll(context)).await {
                Some(ended) => ended,
                None => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended early");
            }
            })
        }};
    }
    if http2 {
        let service = service_fn(move |request| {
            let answered = service.call(request);
            async move { Ok::<_, Infallible>(answered.await?.map(TrackedBody::new)) }
        });
        let mut builder = http2::Builder::new(StreamExecutor { patience: ms(limits.write_idle_ms) });
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(128)
            .max_header_list_size(MAX_HEAD_BYTES as u32)
            .initial_stream_window_size(64 << 10)
            .initial_connection_window_size(1 << 20)
            .max_frame_size(16 << 10)
            .max_send_buf_size(64 << 10)
            .max_pending_accept_reset_streams(20)
            .max_local_error_reset_streams(1024)
            .keep_alive_interval(ms(limits.head_ms / 2))
            .keep_alive_timeout(ms(limits.head_ms / 2));
        run!(builder.serve_connection(io, service))
    } else {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(ms(limits.head_ms))
            .max_buf_size(MAX_HEAD_BYTES)
            .writev(false);
        run!(builder.serve_connection(io, service))
    }
}
