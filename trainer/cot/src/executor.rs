//! One executor for all stages: bounded concurrency, counts by outcome, records handed on as they are done.
//!
//! A stage owns no state about a run. What was paid for is in the journal, so running a stage again over the same input
//! gives the same output without asking again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

/// What became of a record.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome<T> {
    /// It goes on, as one record or several.
    Keep(Vec<T>),
    /// It ends here.
    Drop(&'static str),
}

/// Why a stage, and with it the run, must stop. A single row that fails is an [`Outcome::Drop`] instead.
#[derive(Debug, thiserror::Error)]
#[error("stage `{stage}`: {problem}")]
pub struct StageError {
    /// Which stage.
    pub stage: &'static str,
    /// What happened and what to do.
    pub problem: String,
}

/// One step of the pipeline.
pub trait Stage: Send + Sync + 'static {
    /// What it takes.
    type In: Send + 'static;
    /// What it gives.
    type Out: Send + Clone + 'static;

    /// For files, logs and counts.
    fn name(&self) -> &'static str;

    /// Processes one record.
    fn process(
        &self,
        record: Self::In,
    ) -> impl Future<Output = Result<Outcome<Self::Out>, StageError>> + Send;
}

/// Counts of a stage while it runs.
#[derive(Debug, Default)]
pub struct Counts {
    /// Records taken.
    pub taken: AtomicUsize,
    /// Records done.
    pub done: AtomicUsize,
    /// Records given.
    pub kept: AtomicUsize,
    dropped: Mutex<BTreeMap<&'static str, usize>>,
}

/// Counts of a stage when it has ended, for its manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Records taken.
    pub taken: usize,
    /// Records given.
    pub kept: usize,
    /// Records dropped, by reason.
    pub dropped: BTreeMap<String, usize>,
}

impl Counts {
    /// The counts now.
    pub fn summary(&self) -> Summary {
        let dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        Summary {
            taken: self.taken.load(Ordering::Relaxed),
            kept: self.kept.load(Ordering::Relaxed),
            dropped: dropped.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
        }
    }

    fn drop_one(&self, reason: &'static str) {
        *self.dropped.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }
}

/// Records between two stages; also the most that wait there.
const BETWEEN: usize = 256;

/// Runs `stage` over `input`, at most `concurrency` records at once. The receiver gets what is kept, as it is done; the
/// handle gives the error that stopped the stage, if any.
pub fn run<S: Stage>(
    stage: S,
    input: mpsc::Receiver<S::In>,
    concurrency: usize,
    counts: Arc<Counts>,
) -> (mpsc::Receiver<S::Out>, tokio::task::JoinHandle<Result<(), StageError>>) {
    let (output, receiver) = mpsc::channel(BETWEEN);
    let handle = tokio::spawn(async move {
        let stage = Arc::new(stage);
        // A task for each record: calls in flight go on while the next stage is behind and this one waits to hand over.
        let work = ReceiverStream::new(input).map(|record| {
            counts.taken.fetch_add(1, Ordering::Relaxed);
            let stage = Arc::clone(&stage);
            AbortOnDropHandle::new(tokio::spawn(async move { stage.process(record).await }))
        });
        let mut results = std::pin::pin!(work.buffer_unordered(concurrency.max(1)));
        while let Some(result) = results.next().await {
            let name = stage.name();
            let ended = result.map_err(|error| StageError { stage: name, problem: error.to_string() })?;
            match ended? {
                Outcome::Keep(records) => {
                    counts.kept.fetch_add(records.len(), Ordering::Relaxed);
                    for record in records {
                        if output.send(record).await.is_err() {
                            // The next stage has stopped with an error of its own.
                            return Ok(());
                        }
                    }
                }
                Outcome::Drop(reason) => counts.drop_one(reason),
            }
            counts.done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    });
    (receiver, handle)
}

/// Feeds records into a pipeline.
pub fn feed<T: Send + 'static>(records: Vec<T>) -> mpsc::Receiver<T> {
    let (sender, receiver) = mpsc::channel(BETWEEN);
    tokio::spawn(async move {
        let mut records = stream::iter(records);
        while let Some(record) = records.next().await {
            if sender.send(record).await.is_err() {
                return;
            }
        }
    });
    receiver
}

/// Copies a stream of records into a list on the way.
pub fn tee<T: Clone + Send + 'static>(
    mut input: mpsc::Receiver<T>,
    list: Arc<Mutex<Vec<T>>>,
) -> mpsc::Receiver<T> {
    let (sender, receiver) = mpsc::channel(BETWEEN);
    tokio::spawn(async move {
        while let Some(record) = input.recv().await {
            list.lock().unwrap_or_else(PoisonError::into_inner).push(record.clone());
            if sender.send(record).await.is_err() {
                return;
            }
        }
    });
    receiver
}
