//! Stages joined by channels. Records stream through all of them at once; each stage's output is kept on the way and
//! written when the whole chain has ended well.

use std::sync::{Arc, Mutex, PoisonError};

use potstill_cot::executor::{Counts, Stage, Summary, run, tee};
use tokio::sync::mpsc;

use crate::run::RunFolder;

/// Stages joined by channels, each with its counts and a copy of what it gave.
pub(super) struct Chain {
    concurrency: usize,
    links: Vec<Link>,
}

type Written = Box<dyn FnOnce(&RunFolder, Summary) -> anyhow::Result<()> + Send>;

struct Link {
    name: &'static str,
    counts: Arc<Counts>,
    handle: tokio::task::JoinHandle<Result<(), potstill_cot::StageError>>,
    write: Written,
}

impl Chain {
    pub(super) fn new(concurrency: usize) -> Self {
        Self { concurrency, links: Vec::new() }
    }

    pub(super) fn link<S: Stage, K: Ord + 'static>(
        &mut self,
        stage: S,
        input: mpsc::Receiver<S::In>,
        key: impl Fn(&S::Out) -> K + Send + 'static,
    ) -> mpsc::Receiver<S::Out>
    where
        S::Out: serde::Serialize,
    {
        let (name, counts) = (stage.name(), Arc::new(Counts::default()));
        let (output, handle) = run(stage, input, self.concurrency, Arc::clone(&counts));
        let records: Arc<Mutex<Vec<S::Out>>> = Arc::default();
        let copied = tee(output, Arc::clone(&records));
        let write: Written = Box::new(move |folder, summary| {
            let mut records = std::mem::take(&mut *records.lock().unwrap_or_else(PoisonError::into_inner));
            records.sort_by_key(key);
            folder.write_stage(name, &records, summary)
        });
        self.links.push(Link { name, counts, handle, write });
        copied
    }

    pub(super) fn counts(&self) -> Vec<(&'static str, Arc<Counts>)> {
        self.links.iter().map(|link| (link.name, Arc::clone(&link.counts))).collect()
    }

    /// Ends with the first stage that failed; else writes all stage files.
    pub(super) async fn finish(self, folder: &RunFolder) -> anyhow::Result<()> {
        let mut done = Vec::new();
        let mut first_error = None;
        for link in self.links {
            match link.handle.await? {
                Ok(()) => done.push((link.counts, link.write)),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        if let Some(error) = first_error {
            return Err(error.into());
        }
        for (counts, write) in done {
            write(folder, counts.summary())?;
        }
        Ok(())
    }
}
