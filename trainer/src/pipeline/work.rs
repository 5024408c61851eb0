//! `potstill work`: many processes do the asking of one run. Each claims shards of the problems in a shared store and sends them
//! through the stages; what they leave is answers in the store. `potstill run` with the same store then finds all of them there.

use std::time::Duration;

use anyhow::Context;
use potstill_cot::executor::feed_file;
use potstill_data::postgres::{Claim, Database};
use potstill_data::records::Problem;
use potstill_data::store::Store;
use potstill_shared::durable::Lines;

use super::Run;
use super::chain::Chain;

/// Longest pause before a worker that has nothing to do looks again. The end of a lease is no event that one could wait for.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What a shard goes through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Classify,
    Traces,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Classify => "classify",
            Self::Traces => "traces",
        }
    }
}

impl Run {
    /// Works until all shards are done, by this process or by others.
    pub async fn work(&self, lease: Duration) -> anyhow::Result<()> {
        let Store::Shared(database) = &**self.stages.calls.store() else {
            anyhow::bail!("workers share a database: give `--store postgres://user:password@host/database`");
        };
        anyhow::ensure!(
            self.recipe.generate.is_some(),
            "the recipe asks no teachers: there is nothing to share"
        );
        tokio::task::block_in_place(|| self.collect())?;
        if self.recipe.classify.is_some() {
            self.phase(database, Phase::Classify, "collect", lease).await?;
            // Every answer is in the store by now.
            self.alone(self.stages.classifier()?, "collect").await?;
        }
        if self.recipe.resample.is_some() {
            tokio::task::block_in_place(|| self.resample())?;
        }
        self.phase(database, Phase::Traces, self.problem_stage(), lease).await
    }

    async fn phase(
        &self,
        database: &Database,
        phase: Phase,
        input: &str,
        lease: Duration,
    ) -> anyhow::Result<()> {
        let name = phase.name();
        database.prepare(name).await?;
        let shards = database.shards().await?;
        let mut of_shard: Vec<Vec<u64>> = vec![Vec::new(); shards as usize];
        for (id, place) in tokio::task::block_in_place(|| self.places_longest_first(input))? {
            of_shard[(id % u64::from(shards)) as usize].push(place);
        }
        loop {
            let Some(claim) = database.claim(name, lease).await? else {
                let progress = database.progress(name).await?;
                if progress.done == progress.all {
                    self.progress.say(format!("{name}: all {} shards are done", progress.all));
                    return Ok(());
                }
                tokio::time::sleep(LOOK_AGAIN.min(lease / 3)).await;
                continue;
            };
            let places = of_shard.get(claim.shard as usize).cloned().unwrap_or_default();
            self.progress.say(format!(
                "{name}: shard {} of {shards}, {} problems",
                claim.shard,
                places.len()
            ));
            let lost = tokio::select! {
                done = self.shard(phase, input, places) => {
                    done?;
                    database.finish(&claim).await?;
                    false
                }
                held = hold(database, &claim, lease) => {
                    held?;
                    true
                }
            };
            if lost {
                self.progress.say(format!("{name}: shard {} went to another worker", claim.shard));
            }
        }
    }

    /// One shard through the stages; its answers stay in the store.
    async fn shard(&self, phase: Phase, input: &str, places: Vec<u64>) -> anyhow::Result<()> {
        let count = places.len();
        let lines = Lines::open(&self.folder.stage_file(input))?;
        let problems = places.into_iter().map(move |place| {
            let line = lines.read(place)?;
            serde_json::from_str::<Problem>(&line).with_context(|| format!("the line at {place} is damaged"))
        });
        let (problems, reading) = feed_file(problems);
        if phase == Phase::Traces {
            let chain = self.through_all_stages(problems, count).await?;
            reading.await??;
            return chain.discard().await;
        }
        let mut chain = Chain::new(&self.folder, self.recipe.concurrency);
        let mut output = chain.link(self.stages.classifier()?, problems)?;
        let drained = async { while output.recv().await.is_some() {} };
        self.watch(&chain.counts(), count as u64, drained).await;
        reading.await??;
        chain.discard().await
    }
}

/// Holds a claim; ends when it is lost.
async fn hold(database: &Database, claim: &Claim, lease: Duration) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(lease / 3);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        if !database.hold(claim, lease).await? {
            return Ok(());
        }
    }
}
