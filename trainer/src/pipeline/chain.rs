//! Stages joined by channels. Records stream through all of them at once; each stage's output goes to the disk on the way and
//! is published when the whole chain has ended well.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use potstill_cot::executor::{Counts, Stage, Summary, run};
use potstill_data::spool::Keyed;
use tokio::sync::mpsc;

use crate::run::RunFolder;

/// Stages joined by channels.
pub(super) struct Chain<'a> {
    folder: &'a RunFolder,
    window: usize,
    links: Vec<Link>,
}

type Publish = Box<dyn FnOnce(&RunFolder, Summary) -> anyhow::Result<()> + Send>;

struct Link {
    name: &'static str,
    counts: Arc<Counts>,
    ended: BoxFuture<'static, anyhow::Result<Publish>>,
}

impl<'a> Chain<'a> {
    /// Each stage works on at most `window` records at once.
    pub(super) fn new(folder: &'a RunFolder, window: usize) -> Self {
        Self { folder, window, links: Vec::new() }
    }

    /// Puts a stage behind `input`; gives what comes out of it.
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

    pub(super) fn counts(&self) -> Vec<(&'static str, Arc<Counts>)> {
        self.links.iter().map(|link| (link.name, Arc::clone(&link.counts))).collect()
    }

    /// Ends with the first stage that failed; else publishes all stage files.
    pub(super) async fn finish(self) -> anyhow::Result<()> {
        let folder = self.folder;
        let done = self.ended().await?;
        tokio::task::block_in_place(|| {
            done.into_iter().try_for_each(|(counts, publish)| publish(folder, counts.summary()))
        })
    }

    /// Ends with the first stage that failed; nothing is published.
    pub(super) async fn discard(self) -> anyhow::Result<()> {
        self.ended().await.map(drop)
    }

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
