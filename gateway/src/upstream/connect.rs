//! Opens connections to nodes: resolves the name, checks every address against the policy, connects to the addresses in
//! order, and performs the TLS handshake.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::address::{AddressPolicy, NodeUrl, is_allowed};

/// A connection to a node.
pub enum NodeStream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
    /// Connection of a custom dialer.
    Other(Box<dyn Socket>),
}

/// Requirements on the connection of a custom dialer.
pub trait Socket: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> Socket for S {}

/// Custom dialer. Tests use one for nodes without sockets on simulated time.
pub type DialFn = dyn Fn(SocketAddr) -> DialFuture + Send + Sync;

/// Future of a custom dialer.
pub type DialFuture = Pin<Box<dyn Future<Output = io::Result<Box<dyn Socket>>> + Send>>;

/// Custom resolver; `None` falls back to the system. Tests use one for names that change their address.
pub type ResolveFn = dyn Fn(&str, u16) -> Option<Vec<SocketAddr>> + Send + Sync;

/// Opens connections. Cheap to clone.
#[derive(Clone, Default)]
pub struct Connector {
    tls: Arc<std::sync::OnceLock<TlsConnector>>,
    resolve: Option<Arc<ResolveFn>>,
    dial: Option<Arc<DialFn>>,
}

impl Connector {
    /// Creates a connector with a custom resolver.
    pub fn with_resolver(resolve: Arc<ResolveFn>) -> Self {
        Self { resolve: Some(resolve), ..Self::default() }
    }

    /// Creates a connector with a custom dialer. TLS is not supported.
    pub fn with_dialer(dial: Arc<DialFn>) -> Self {
        Self { dial: Some(dial), ..Self::default() }
    }

    /// Opens a connection within `limit`. Errors: [`io::ErrorKind::TimedOut`]; [`io::ErrorKind::PermissionDenied`] if
    /// the policy permits no address; the error of the last address otherwise.
    pub async fn connect(
        &self,
        url: &NodeUrl,
        policy: AddressPolicy,
        limit: Duration,
    ) -> io::Result<NodeStream> {
        tokio::time::timeout(limit, self.connect_in_order(url, policy))
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no connection in time")))
    }

    async fn connect_in_order(&self, url: &NodeUrl, policy: AddressPolicy) -> io::Result<NodeStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("`{}` has no address", url.host));
        for address in self.resolve_addresses(url).await? {
            if !is_allowed(address.ip(), policy) {
                last = io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    format!("`{}` is at {}, where no node may be", url.host, address.ip()),
                );
                continue;
            }
            if let Some(dial) = &self.dial {
                match dial(address).await {
                    Ok(_) if url.tls => {
                        last = io::Error::other("another network than the machine's has no TLS")
                    }
                    Ok(stream) => return Ok(NodeStream::Other(stream)),
                    Err(error) => last = error,
                }
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return self.start_tls(stream, url).await;
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn resolve_addresses(&self, url: &NodeUrl) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = url.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, url.port)]);
        }
        if let Some(found) = self.resolve.as_ref().and_then(|resolve| resolve(&url.host, url.port)) {
            return Ok(found);
        }
        Ok(tokio::net::lookup_host((url.host.as_str(), url.port)).await?.collect())
    }

    async fn start_tls(&self, stream: TcpStream, url: &NodeUrl) -> io::Result<NodeStream> {
        if !url.tls {
            return Ok(NodeStream::Plain(stream));
        }
        let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
        let tls = self.tls.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            let found = rustls_native_certs::load_native_certs();
            for problem in &found.errors {
                tracing::warn!(%problem, "a system certificate cannot be read");
            }
            let (_added, _ignored) = roots.add_parsable_certificates(found.certs);
            let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
            TlsConnector::from(Arc::new(config))
        });
        Ok(NodeStream::Tls(Box::new(tls.connect(name, stream).await?)))
    }
}

impl AsyncRead for NodeStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Other(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for NodeStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Other(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Self::Other(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
            Self::Other(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Other(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::address::parse_url;

    #[tokio::test]
    async fn checks_the_address_at_every_connection() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let answers = std::sync::Mutex::new(vec!["169.254.169.254", "127.0.0.1", "127.0.0.1"]);
        let resolve = move |_: &str, port| {
            let address = answers.lock().unwrap().pop()?;
            Some(vec![SocketAddr::new(address.parse().unwrap(), port)])
        };
        let connector = Connector::with_resolver(Arc::new(resolve));
        let url = parse_url(&format!("http://node:{port}")).unwrap();
        let limit = Duration::from_secs(5);
        let added = |allow_private| AddressPolicy::Restricted { allow_private };
        let refused = |outcome: io::Result<NodeStream>| outcome.err().map(|error| error.kind());
        assert!(connector.connect(&url, added(true), limit).await.is_ok());
        let private = connector.connect(&url, added(false), limit).await;
        assert_eq!(refused(private), Some(io::ErrorKind::PermissionDenied));
        let rebound = connector.connect(&url, added(true), limit).await;
        assert_eq!(refused(rebound), Some(io::ErrorKind::PermissionDenied), "checked at every connection");
    }
}
