//! A connection to a node, driven by the request that uses it: hyper's connection future is polled in the same task as the
//! client's connection, so a relayed chunk wakes one task and crosses no channel between tasks, and dropping the request
//! closes the socket at once. Between requests a connection lies in its node's [`Idle`] list, polled by nobody; whether it
//! is still open is looked at when it is taken out.

use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::connect::{Connector, Stream};
use super::pieces::Pieces;
use crate::pool::node::Node;

/// Connections that are kept for a node.
const KEEP: usize = 256;

/// An unused connection is closed after this.
const KEEP_FOR: Duration = Duration::from_secs(30);

/// Largest response head.
const HEAD_BYTES: usize = 64 << 10;

type Driver = http1::Connection<TokioIo<Stream>, Pieces>;

/// A connection.
pub struct Connection {
    sender: http1::SendRequest<Pieces>,
    driver: Driver,
    closed: bool,
    /// It has served a request: the node may have closed it meanwhile without our noticing.
    pub used: bool,
    idle_since: Instant,
}

impl Connection {
    /// Opens one.
    pub async fn open(connector: &Connector, node: &Node, limit: Duration) -> Result<Box<Self>, String> {
        let stream = connector
            .connect(&node.url, node.spec.policy, limit)
            .await
            .map_err(|error| format!("cannot connect: {error}"))?;
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(HEAD_BYTES)
            .writev(false)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        // Boxed once: it passes through many hands on its way from request to request.
        Ok(Box::new(Self { sender, driver, closed: false, used: false, idle_since: Instant::now() }))
    }

    /// Lets hyper read and write.
    pub fn drive(&mut self, context: &mut Context<'_>) {
        if !self.closed && Pin::new(&mut self.driver).poll(context).is_ready() {
            self.closed = true;
        }
    }

    /// Sends a request and waits for the response head.
    pub async fn send(&mut self, request: Request<Pieces>) -> Result<Response<Incoming>, hyper::Error> {
        std::future::poll_fn(|context| {
            self.drive(context);
            self.sender.poll_ready(context)
        })
        .await?;
        let answer = self.sender.send_request(request);
        let mut answer = std::pin::pin!(answer);
        let (driver, closed) = (&mut self.driver, &mut self.closed);
        std::future::poll_fn(|context| {
            if let Poll::Ready(answer) = answer.as_mut().poll(context) {
                return Poll::Ready(answer);
            }
            if !*closed && Pin::new(&mut *driver).poll(context).is_ready() {
                *closed = true;
            }
            answer.as_mut().poll(context)
        })
        .await
    }

    /// Whether another request can be sent.
    fn reusable(&self) -> bool {
        !self.closed && self.sender.is_ready()
    }
}

/// Connections of a node that wait for their next request, newest last.
#[derive(Default)]
#[expect(clippy::vec_box, reason = "a connection is boxed for its whole life, not for this list")]
pub struct Idle(Mutex<Vec<Box<Connection>>>);

impl Idle {
    #[expect(clippy::vec_box, reason = "as above")]
    fn locked(&self) -> MutexGuard<'_, Vec<Box<Connection>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the newest connection that is still open.
    pub fn take(&self, context: &mut Context<'_>, now: Instant) -> Option<Box<Connection>> {
        loop {
            let mut connection = self.locked().pop()?;
            if now.saturating_duration_since(connection.idle_since) < KEEP_FOR {
                connection.drive(context);
                if connection.reusable() {
                    return Some(connection);
                }
            }
        }
    }

    /// Keeps a connection whose answer has been read to the end.
    pub fn put(&self, mut connection: Box<Connection>, context: &mut Context<'_>) {
        // hyper gets ready for the next request.
        connection.drive(context);
        if connection.reusable() {
            connection.used = true;
            connection.idle_since = Instant::now();
            let mut kept = self.locked();
            if kept.len() < KEEP {
                kept.push(connection);
            }
        }
    }

    /// Closes connections that nobody has used for long.
    pub fn sweep(&self) {
        let mut kept = self.locked();
        let old: Vec<_> =
            kept.extract_if(.., |connection| connection.idle_since.elapsed() >= KEEP_FOR).collect();
        drop(kept);
        drop(old);
    }

    /// Connections kept.
    pub fn len(&self) -> usize {
        self.locked().len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
