//! Stages connected by channels. Records stream through all stages concurrently. Each stage writes its output to disk
//! meanwhile; the files are published after the whole chain has succeeded. Restarting a failed stage is left to the
//! next run.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use potstill_cot::executor::{Counts, Stage, Summary, run};
use potstill_data::spool::Keyed;
use tokio::sync::mpsc;

use crate::run::RunFolder;

/// Stages connected by channels.
pub(super) struct Chain<'a> {
    folder: &'a RunFolder,
    window: usize,
    links: Vec<Link>,
}

/// Publishes the files of a finished stage.
type Publish = Box<dyn FnOnce(&RunFolder, Summary) -> anyhow::Result<()> + Send>;

/// One stage of the chain.
struct Link {
    name: &'static str,
    counts: Arc<Counts>,
    ended: BoxFuture<'static, anyhow::Result<Publish>>,
}

impl<'a> Chain<'a> {
    /// Creates an empty chain. Each stage processes at most `window` records at the same time.
    pub(super) fn new(folder: &'a RunFolder, window: usize) -> Self {
        Self { folder, window, links: Vec::new() }
    }

    /// Appends a stage that reads from `input`, and returns its output.
    pub(super) fn link<S: Stage>(
        &mut self,
        stage: S,
        input: mpsc::Receiver<S::In>,
    ) -> anyhow::Result<mpsc::Receiver<S::Out>>
    where
        S::Out: Keyed,
    {
        let (name, counts) = (stage.name(), Arc::new(Counts::default()));
        let (output, handle) = run(stage, input, self.window, Arc::clone(&counts), self.folder.files()?);
        let ended = async move {
            let files = handle.await??;
            let publish: Publish = Box::new(move |folder, summary| Ok(folder.publish(name, files, summary)?));
            Ok(publish)
        };
        self.links.push(Link { name, counts, ended: ended.boxed() });
        Ok(output)
    }

    /// Returns the counts of all stages, in order.
    pub(super) fn counts(&self) -> Vec<(&'static str, Arc<Counts>)> {
        self.links.iter().map(|link| (link.name, Arc::clone(&link.counts))).collect()
    }

    /// Waits for all stages and publishes their files. If a stage failed, returns the first error and publishes
    /// nothing.
    pub(super) async fn finish(self) -> anyhow::Result<()> {
        let folder = self.folder;
        let done = self.ended().await?;
        tokio::task::block_in_place(|| {
            done.into_iter().try_for_each(|(counts, publish)| publish(folder, counts.summary()))
        })
    }

    /// Waits for all stages and publishes nothing. Returns the first error, if any.
    pub(super) async fn discard(self) -> anyhow::Result<()> {
        self.ended().await.map(drop)
    }

    /// Waits for all stages.
    async fn ended(self) -> anyhow::Result<Vec<(Arc<Counts>, Publish)>> {
        let mut done = Vec::new();
        let mut first_error = None;
        for link in self.links {
            match link.ended.await {
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
