//! Idle connections of a node. They are not polled; a connection is checked when it is taken.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use super::connection::Connection;

/// Largest number of idle connections of a node.
const MAX_IDLE: usize = 256;

/// Time after which an idle connection is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// An idle connection, and the time since which it is idle.
type IdleConnection = (Box<Connection>, Instant);

/// Idle connections, the newest last.
#[derive(Default)]
pub struct IdleConnections(Mutex<Vec<IdleConnection>>);

impl IdleConnections {
    fn lock(&self) -> MutexGuard<'_, Vec<IdleConnection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the newest connection that is still open.
    pub fn take(&self, context: &mut Context<'_>, now: Instant) -> Option<Box<Connection>> {
        loop {
            let (mut connection, since) = self.lock().pop()?;
            if now.saturating_duration_since(since) < IDLE_TIMEOUT && connection.is_open(context) {
                return Some(connection);
            }
        }
    }

    /// Stores a connection, if another request may be sent on it.
    pub fn put(&self, connection: Box<Connection>) {
        if connection.is_reusable() {
            let mut kept = self.lock();
            if kept.len() < MAX_IDLE {
                kept.push((connection, Instant::now()));
            }
        }
    }

    /// Closes connections that have been idle for too long.
    pub fn close_expired(&self) {
        let old: Vec<_> = self.lock().extract_if(.., |(_, since)| since.elapsed() >= IDLE_TIMEOUT).collect();
        drop(old);
    }

    /// Number of idle connections.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Returns whether there is no idle connection.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
