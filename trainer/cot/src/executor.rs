//! Executor of all stages: processes a bounded number of records at once and counts their outcomes. Each kept record
//! goes to the next stage as soon as its processing ends.
//!
//! A stage has no state about a run. The journal holds all completions, so a stage that runs again over the same
//! input gives the same output without new requests. Deliberately absent: files; a [`Recorder`] writes the outcomes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use potstill_data::records::Dropped;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

/// Result of processing one record.
#[derive(Debug, Clone, PartialEq)]
pub struct StageOutcome<T> {
    /// Records that go to the next stage.
    pub kept: Vec<T>,
    /// Records that this stage drops, each with its reason.
    pub dropped: Vec<Dropped>,
}

impl<T> StageOutcome<T> {
    /// Creates an outcome that keeps records.
    pub fn keep(kept: Vec<T>) -> Self {
        Self { kept, dropped: Vec::new() }
    }

    /// Creates an outcome that drops one record.
    pub fn drop(dropped: Dropped) -> Self {
        Self { kept: Vec::new(), dropped: vec![dropped] }
    }
}

/// Error that stops a stage and the run. A single record that fails becomes [`Dropped`] instead.
#[derive(Debug, thiserror::Error)]
#[error("stage `{stage}`: {reason}")]
pub struct StageError {
    /// Name of the stage.
    pub stage: &'static str,
    /// Cause and next step.
    pub reason: String,
}

/// Step of the pipeline that processes records independently of each other.
pub trait Stage: Send + Sync + 'static {
    /// Type of the input records.
    type In: Send + 'static;
    /// Type of the output records.
    type Out: Send + 'static;

    /// Returns the name for files, logs and counts.
    fn name(&self) -> &'static str;

    /// Processes one record. An error stops the run.
    fn process(
        &self,
        record: Self::In,
    ) -> impl Future<Output = Result<StageOutcome<Self::Out>, StageError>> + Send;
}

/// Receiver of a stage's outcomes, in the order of completion.
pub trait Recorder<T>: Send + 'static {
    /// Records one outcome. An error stops the stage.
    fn record(&mut self, outcome: &StageOutcome<T>) -> Result<(), String>;
}

/// Discards all outcomes.
impl<T> Recorder<T> for () {
    fn record(&mut self, _: &StageOutcome<T>) -> Result<(), String> {
        Ok(())
    }
}

/// Live counters of a running stage.
#[derive(Debug, Default)]
pub struct StageCounts {
    /// Records that entered the stage.
    pub taken: AtomicUsize,
    /// Records whose outcome was recorded and passed on.
    pub done: AtomicUsize,
    /// Records kept; one input record may yield several.
    pub kept: AtomicUsize,
    dropped: Mutex<BTreeMap<String, usize>>,
}

/// Counts of a finished stage, for the run's manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageSummary {
    /// Records that entered the stage.
    pub taken: usize,
    /// Records kept.
    pub kept: usize,
    /// Dropped records, by reason.
    pub dropped: BTreeMap<String, usize>,
}

impl StageSummary {
    /// Counts one dropped record.
    pub fn count_dropped(&mut self, reason: &str) {
        match self.dropped.get_mut(reason) {
            Some(count) => *count += 1,
            None => drop(self.dropped.insert(reason.to_owned(), 1)),
        }
    }
}

impl StageCounts {
    /// Returns a snapshot of the counts.
    pub fn summary(&self) -> StageSummary {
        let dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        StageSummary {
            taken: self.taken.load(Ordering::Relaxed),
            kept: self.kept.load(Ordering::Relaxed),
            dropped: dropped.clone(),
        }
    }

    fn count_outcome<T>(&self, outcome: &StageOutcome<T>) {
        self.kept.fetch_add(outcome.kept.len(), Ordering::Relaxed);
        if !outcome.dropped.is_empty() {
            let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
            for record in &outcome.dropped {
                *dropped.entry(record.reason.clone()).or_default() += 1;
            }
        }
    }
}

/// Capacity of the channel between two stages, in records.
const CHANNEL_CAPACITY: usize = 256;

/// Spawns `stage` over `input` and processes at most `window` records at once. The receiver yields kept records in
/// the order of completion. The handle yields the recorder, or the error that stopped the stage.
pub fn spawn_stage<S: Stage, R: Recorder<S::Out>>(
    stage: S,
    mut input: mpsc::Receiver<S::In>,
    window: usize,
    counts: Arc<StageCounts>,
    mut recorder: R,
) -> (mpsc::Receiver<S::Out>, JoinHandle<Result<R, StageError>>) {
    let (output, receiver) = mpsc::channel(CHANNEL_CAPACITY);
    let handle = tokio::spawn(async move {
        let (stage, window) = (Arc::new(stage), window.max(1));
        let name = stage.name();
        let stop = |problem| StageError { stage: name, reason: problem };
        // Each record has its own task, so requests in flight proceed while this loop waits for a slow next stage.
        // Dropping the set cancels its tasks, so a stopped stage leaves none behind.
        let mut tasks = JoinSet::new();
        let mut more = true;
        while more || !tasks.is_empty() {
            tokio::select! {
                record = input.recv(), if more && tasks.len() < window => match record {
                    None => more = false,
                    Some(record) => {
                        counts.taken.fetch_add(1, Ordering::Relaxed);
                        let stage = Arc::clone(&stage);
                        tasks.spawn(async move { stage.process(record).await });
                    }
                },
                Some(ended) = tasks.join_next(), if !tasks.is_empty() => {
                    let outcome = ended.map_err(|error| stop(error.to_string()))??;
                    recorder.record(&outcome).map_err(stop)?;
                    counts.count_outcome(&outcome);
                    for record in outcome.kept {
                        if output.send(record).await.is_err() {
                            // The next stage stopped and reports its own error.
                            return Ok(recorder);
                        }
                    }
                    counts.done.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(recorder)
    });
    (receiver, handle)
}

/// Spawns a task that sends the records to a channel.
pub fn channel_from_records<T: Send + 'static>(records: Vec<T>) -> mpsc::Receiver<T> {
    let (sender, receiver) = mpsc::channel(CHANNEL_CAPACITY);
    tokio::spawn(async move {
        for record in records {
            if sender.send(record).await.is_err() {
                return;
            }
        }
    });
    receiver
}

/// Sends records from a blocking iterator on a separate thread. The handle yields the error that ended the iteration.
pub fn channel_from_iter<T: Send + 'static, E: Send + 'static>(
    records: impl Iterator<Item = Result<T, E>> + Send + 'static,
) -> (mpsc::Receiver<T>, JoinHandle<Result<(), E>>) {
    let (sender, receiver) = mpsc::channel(CHANNEL_CAPACITY);
    let handle = tokio::task::spawn_blocking(move || {
        for record in records {
            if sender.blocking_send(record?).is_err() {
                break;
            }
        }
        Ok(())
    });
    (receiver, handle)
}

#[cfg(test)]
mod tests {
    use potstill_data::records::Problem;
    use tokio::sync::Semaphore;

    use super::*;

    /// Test stage: processes one record per permit and keeps problems with an answer.
    struct Answered {
        open: Arc<Semaphore>,
    }

    impl Stage for Answered {
        type In = Problem;
        type Out = Problem;

        fn name(&self) -> &'static str {
            "answered"
        }

        async fn process(&self, problem: Problem) -> Result<StageOutcome<Problem>, StageError> {
            self.open.acquire().await.unwrap().forget();
            Ok(match problem.answer {
                Some(_) => StageOutcome::keep(vec![problem]),
                None => StageOutcome::drop(Dropped::problem("no_answer", problem)),
            })
        }
    }

    #[tokio::test]
    async fn window_bounds_records_in_flight_and_all_are_counted() {
        let problems: Vec<Problem> =
            (0..50).map(|n| Problem::new(format!("{n}"), (n % 5 > 0).then(|| "1".into()), "s")).collect();
        let open = Arc::new(Semaphore::new(0));
        let counts = Arc::new(StageCounts::default());
        let stage = Answered { open: Arc::clone(&open) };
        let (mut output, handle) =
            spawn_stage(stage, channel_from_records(problems), 4, Arc::clone(&counts), ());
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(counts.summary().taken, 4, "no more than the window before one is done");
        open.add_permits(50);
        let mut kept = 0;
        while output.recv().await.is_some() {
            kept += 1;
        }
        handle.await.unwrap().unwrap();
        let summary = counts.summary();
        assert_eq!((summary.taken, summary.kept, kept), (50, 40, 40));
        assert_eq!(summary.dropped, BTreeMap::from([("no_answer".to_owned(), 10)]));
    }
}
