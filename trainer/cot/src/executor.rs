//! One executor for all stages: a bounded window of records, counts by outcome, records handed on as they are done.
//!
//! A stage owns no state about a run. What was paid for is in the journal, so running a stage again over the same input
//! gives the same output without asking again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use potstill_data::records::Dropped;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

/// What became of a record: what goes on, and what ends here.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome<T> {
    /// Records for the next stage.
    pub kept: Vec<T>,
    /// Records that end here, each with its reason.
    pub dropped: Vec<Dropped>,
}

impl<T> Outcome<T> {
    /// These go on.
    pub fn keep(kept: Vec<T>) -> Self {
        Self { kept, dropped: Vec::new() }
    }

    /// This one ends here.
    pub fn drop(dropped: Dropped) -> Self {
        Self { kept: Vec::new(), dropped: vec![dropped] }
    }
}

/// Why a stage, and with it the run, must stop. A single row that fails is [`Dropped`] instead.
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
    type Out: Send + 'static;

    /// For files, logs and counts.
    fn name(&self) -> &'static str;

    /// Processes one record.
    fn process(
        &self,
        record: Self::In,
    ) -> impl Future<Output = Result<Outcome<Self::Out>, StageError>> + Send;
}

/// Where the outcomes of a stage are written as they come.
pub trait Recorder<T>: Send + 'static {
    /// Takes one; an error stops the stage.
    fn record(&mut self, outcome: &Outcome<T>) -> Result<(), String>;
}

/// Nothing is written.
impl<T> Recorder<T> for () {
    fn record(&mut self, _: &Outcome<T>) -> Result<(), String> {
        Ok(())
    }
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
    dropped: Mutex<BTreeMap<String, usize>>,
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

impl Summary {
    /// One more was dropped.
    pub fn drop_one(&mut self, reason: &str) {
        match self.dropped.get_mut(reason) {
            Some(count) => *count += 1,
            None => drop(self.dropped.insert(reason.to_owned(), 1)),
        }
    }
}

impl Counts {
    /// The counts now.
    pub fn summary(&self) -> Summary {
        let dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        Summary {
            taken: self.taken.load(Ordering::Relaxed),
            kept: self.kept.load(Ordering::Relaxed),
            dropped: dropped.clone(),
        }
    }

    fn add<T>(&self, outcome: &Outcome<T>) {
        self.kept.fetch_add(outcome.kept.len(), Ordering::Relaxed);
        if !outcome.dropped.is_empty() {
            let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
            for record in &outcome.dropped {
                *dropped.entry(record.reason.clone()).or_default() += 1;
            }
        }
    }
}

/// Records between two stages; also the most that wait there.
const BETWEEN: usize = 256;

/// Runs `stage` over `input`, at most `window` records at once. The receiver gets what is kept, as it is done; the
/// handle gives the recorder back, or the error that stopped the stage.
pub fn run<S: Stage, R: Recorder<S::Out>>(
    stage: S,
    mut input: mpsc::Receiver<S::In>,
    window: usize,
    counts: Arc<Counts>,
    mut recorder: R,
) -> (mpsc::Receiver<S::Out>, JoinHandle<Result<R, StageError>>) {
    let (output, receiver) = mpsc::channel(BETWEEN);
    let handle = tokio::spawn(async move {
        let (stage, window) = (Arc::new(stage), window.max(1));
        let name = stage.name();
        let stop = |problem| StageError { stage: name, problem };
        // A task for each record: calls in flight go on while the next stage is behind and this one waits to hand over.
        // Tasks end with the set, so a stage that stops leaves none behind.
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
                    counts.add(&outcome);
                    for record in outcome.kept {
                        if output.send(record).await.is_err() {
                            // The next stage has stopped with an error of its own.
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

/// Feeds records into a pipeline.
pub fn feed<T: Send + 'static>(records: Vec<T>) -> mpsc::Receiver<T> {
    let (sender, receiver) = mpsc::channel(BETWEEN);
    tokio::spawn(async move {
        for record in records {
            if sender.send(record).await.is_err() {
                return;
            }
        }
    });
    receiver
}

/// Feeds records from a file, on a thread of its own. The handle gives the error that ended the reading.
pub fn feed_file<T: Send + 'static, E: Send + 'static>(
    records: impl Iterator<Item = Result<T, E>> + Send + 'static,
) -> (mpsc::Receiver<T>, JoinHandle<Result<(), E>>) {
    let (sender, receiver) = mpsc::channel(BETWEEN);
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

    /// Lets records pass one by one, keeps those with an answer.
    struct Answered {
        open: Arc<Semaphore>,
    }

    impl Stage for Answered {
        type In = Problem;
        type Out = Problem;

        fn name(&self) -> &'static str {
            "answered"
        }

        async fn process(&self, problem: Problem) -> Result<Outcome<Problem>, StageError> {
            self.open.acquire().await.unwrap().forget();
            Ok(match problem.answer {
                Some(_) => Outcome::keep(vec![problem]),
                None => Outcome::drop(Dropped::problem("no_answer", problem)),
            })
        }
    }

    #[tokio::test]
    async fn the_window_bounds_what_is_taken_and_everything_is_counted() {
        let problems: Vec<Problem> =
            (0..50).map(|n| Problem::new(format!("{n}"), (n % 5 > 0).then(|| "1".into()), "s")).collect();
        let open = Arc::new(Semaphore::new(0));
        let counts = Arc::new(Counts::default());
        let stage = Answered { open: Arc::clone(&open) };
        let (mut output, handle) = run(stage, feed(problems), 4, Arc::clone(&counts), ());
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
