//! Stages connected by channels. Records stream through all stages concurrently. Each stage writes its output to disk
//! meanwhile; the files are published after the whole chain has succeeded. Restarting a failed stage is left to the
//! next run.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use potstill_cot::executor::{Stage, StageCounts, StageSummary, spawn_stage};
use potstill_data::spool::SortKey;
use tokio::sync::mpsc;

use crate::run::RunFolder;

/// Stages connected by channels.
pub(super) struct Chain<'a> {
    folder: &'a RunFolder,
    max_in_flight: usize,
    links: Vec<Link>,
}

/// Publishes the files of a finished stage.
type Publish = Box<dyn FnOnce(&RunFolder, StageSummary) -> anyhow::Result<()> + Send>;

/// One stage of the chain.
struct Link {
    name: &'static str,
    counts: Arc<StageCounts>,
    finished: BoxFuture<'static, anyhow::Result<Publish>>,
}

impl<'a> Chain<'a> {
    /// Creates an empty chain. Each stage processes at most `window` records at the same time.
    pub(super) fn new(folder: &'a RunFolder, window: usize) -> Self {
        Self { folder, max_in_flight: window, links: Vec::new() }
    }

    /// Appends a stage that reads from `input`, and returns its output.
    pub(super) fn append<S: Stage>(
        &mut self,
        stage: S,
        input: mpsc::Receiver<S::In>,
    ) -> anyhow::Result<mpsc::Receiver<S::Out>>
    where
        S::Out: SortKey,
    {
        let (name, counts) = (stage.name(), Arc::new(StageCounts::default()));
        let (output, handle) = spawn_stage(
            stage,
            input,
            self.max_in_flight,
            Arc::clone(&counts),
            self.folder.create_stage_files()?,
        );
        let ended = async move {
            let files = handle.await??;
            let publish: Publish =
                Box::new(move |folder, summary| Ok(folder.publish_stage(name, files, summary)?));
            Ok(publish)
        };
        self.links.push(Link { name, counts, finished: ended.boxed() });
        Ok(output)
    }

    /// Returns the counts of all stages, in order.
    pub(super) fn counts(&self) -> Vec<(&'static str, Arc<StageCounts>)> {
        self.links.iter().map(|link| (link.name, Arc::clone(&link.counts))).collect()
    }

    /// Waits for all stages and publishes their files. If a stage failed, returns the first error and publishes
    /// nothing.
    pub(super) async fn finish(self) -> anyhow::Result<()> {
        let folder = self.folder;
        let done = self.wait().await?;
        tokio::task::block_in_place(|| {
            done.into_iter().try_for_each(|(counts, publish)| publish(folder, counts.summary()))
        })
    }

    /// Waits for all stages and publishes nothing. Returns the first error, if any.
    pub(super) async fn discard(self) -> anyhow::Result<()> {
        self.wait().await.map(drop)
    }

    /// Waits for all stages.
    async fn wait(self) -> anyhow::Result<Vec<(Arc<StageCounts>, Publish)>> {
        let mut done = Vec::new();
        let mut first_error = None;
        for link in self.links {
            match link.finished.await {
                Ok(publish) => done.push((link.counts, publish)),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match first_error {
            Some(error) => Err(error),
            None => Ok(done),
        }
    }
}
