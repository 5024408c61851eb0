//! Connections of a node that wait for their next request, polled by nobody. Whether one is still open is looked at when it is
//! taken out.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use super::connection::Connection;

/// Connections that are kept for a node.
const KEEP: usize = 256;

/// An unused connection is closed after this.
const KEEP_FOR: Duration = Duration::from_secs(30);

/// A connection, and since when it lies here.
type Kept = (Box<Connection>, Instant);

/// The connections, newest last.
#[derive(Default)]
pub struct IdleConnections(Mutex<Vec<Kept>>);

impl IdleConnections {
    fn locked(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the newest connection that is still open.
    pub fn take(&self, context: &mut Context<'_>, now: Instant) -> Option<Box<Connection>> {
        loop {
            let (mut connection, since) = self.locked().pop()?;
            if now.saturating_duration_since(since) < KEEP_FOR && connection.is_open(context) {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection if another request may follow on it.
    pub fn put(&self, connection: Box<Connection>) {
        if connection.reusable() {
            let mut kept = self.locked();
            if kept.len() < KEEP {
                kept.push((connection, Instant::now()));
            }
        }
    }

    /// Closes connections that nobody has used for long.
    pub fn sweep(&self) {
        let old: Vec<_> = self.locked().extract_if(.., |(_, since)| since.elapsed() >= KEEP_FOR).collect();
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
