//! State that the front of the engine shares with its step loop: the queue of requests and the counters.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use crate::request::{Request, RequestUpdate};

/// Counters of the engine.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Sequences with blocks in the KV cache.
    pub running: AtomicUsize,
    /// Requests that wait for their start or, after a preemption, for their restart.
    pub waiting: AtomicUsize,
    /// Computed prompt tokens, including recomputation after a preemption.
    pub prompt_tokens: AtomicU64,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: AtomicU64,
    /// Generated tokens.
    pub completion_tokens: AtomicU64,
    /// Completed steps.
    pub steps: AtomicU64,
    /// Preemptions: sequences whose blocks were taken back.
    pub preempted: AtomicU64,
    /// KV cache blocks in use.
    pub blocks_used: AtomicUsize,
}

/// A submitted request that the step loop has not admitted yet.
pub(crate) struct QueuedRequest {
    pub(crate) request: Request,
    pub(crate) updates: mpsc::Sender<RequestUpdate>,
}

/// Queue between the clients and the step loop.
#[derive(Default)]
pub(crate) struct RequestQueue {
    pub(crate) arrived: VecDeque<QueuedRequest>,
    /// Sequences in the scheduler's waiting list.
    pub(crate) taken: usize,
    /// Asks the step loop to empty the prefix cache because the weights have changed.
    pub(crate) forget: bool,
    /// Reason for the end of the engine, once stopped.
    pub(crate) stopped: Option<String>,
}

/// State shared by the front and the step loop.
pub(crate) struct EngineShared {
    pub(crate) queue: Mutex<RequestQueue>,
    pub(crate) wake: Condvar,
    pub(crate) stats: EngineStats,
}

/// Locks the queue, also after a panic of another holder.
pub(crate) fn lock_queue(shared: &EngineShared) -> MutexGuard<'_, RequestQueue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}
