//! Idle connections of a node. They are not polled; a connection is checked when it is taken.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::Duration;

use tokio::time::Instant;

use super::connection::Connection;

/// Largest number of idle connections of a node.
const KEEP: usize = 256;

/// Time after which an idle connection is closed.
const KEEP_FOR: Duration = Duration::from_secs(30);

/// An idle connection, and the time since which it is idle.
type Kept = (Box<Connection>, Instant);

/// Idle connections, the newest last.
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

    /// Stores a connection, if another request may be sent on it.
    pub fn put(&self, connection: Box<Connection>) {
        if connection.reusable() {
            let mut kept = self.locked();
            if kept.len() < KEEP {
                kept.push((connection, Instant::now()));
            }
        }
    }

    /// Closes connections that have been idle for too long.
    pub fn sweep(&self) {
        let old: Vec<_> = self.locked().extract_if(.., |(_, since)| since.elapsed() >= KEEP_FOR).collect();
        drop(old);
    }

    /// Number of idle connections.
    pub fn len(&self) -> usize {
        self.locked().len()
    }

    /// Returns whether there is no idle connection.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
