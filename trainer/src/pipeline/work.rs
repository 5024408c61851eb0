//! `potstill work`: several processes send the requests of one run. Each claims shards of the problems in a shared
//! store and runs them through the stages. Only the completions remain, in the store; `potstill run` with the same
//! store then reuses all of them.

use std::time::Duration;

use anyhow::Context;
use potstill_cot::executor::channel_from_iter;
use potstill_data::postgres::{PostgresStore, ShardClaim};
use potstill_data::records::Problem;
use potstill_data::store::Store;
use potstill_shared::durable::LineReader;

use super::Run;
use super::chain::Chain;

/// Maximum pause before an idle worker looks for a free shard again. The store sends no event when a lease expires.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Part of the pipeline that is divided into shards.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ShardPhase {
    Classify,
    Traces,
}

impl ShardPhase {
    /// Returns the name of the phase in the store.
    fn name(self) -> &'static str {
        match self {
            Self::Classify => "classify",
            Self::Traces => "traces",
        }
    }
}

impl Run {
    /// Processes shards until this and other workers have finished all of them. `lease` is the time after which a
    /// silent worker loses its shard. Fails without a shared store.
    pub async fn run_worker(&self, lease: Duration) -> anyhow::Result<()> {
        let Store::Postgres(database) = &**self.stages.calls.store() else {
            anyhow::bail!("workers share a database: give `--store postgres://user:password@host/database`");
        };
        anyhow::ensure!(
            self.recipe.generate.is_some(),
            "the recipe asks no teachers: there is nothing to share"
        );
        tokio::task::block_in_place(|| self.collect())?;
        if self.recipe.classify.is_some() {
            self.run_phase(database, ShardPhase::Classify, "collect", lease).await?;
            // All completions are in the store now, so this sends no requests.
            self.run_single_stage(self.stages.classifier()?, "collect").await?;
        }
        if self.recipe.resample.is_some() {
            tokio::task::block_in_place(|| self.resample())?;
        }
        self.run_phase(database, ShardPhase::Traces, self.problem_stage(), lease).await
    }

    /// Processes the shards of one phase until all are done.
    async fn run_phase(
        &self,
        database: &PostgresStore,
        phase: ShardPhase,
        input: &str,
        lease: Duration,
    ) -> anyhow::Result<()> {
        let name = phase.name();
        database.create_shards(name).await?;
        let shards = database.shard_count().await?;
        let mut of_shard: Vec<Vec<u64>> = vec![Vec::new(); shards as usize];
        for (id, place) in tokio::task::block_in_place(|| self.offsets_longest_first(input))? {
            of_shard[(id % u64::from(shards)) as usize].push(place);
        }
        loop {
            let Some(claim) = database.claim_shard(name, lease).await? else {
                let progress = database.progress(name).await?;
                if progress.done == progress.all {
                    self.progress.message(format!("{name}: all {} shards are done", progress.all));
                    return Ok(());
                }
                tokio::time::sleep(POLL_INTERVAL.min(lease / 3)).await;
                continue;
            };
            let places = of_shard.get(claim.shard as usize).cloned().unwrap_or_default();
            self.progress.message(format!(
                "{name}: shard {} of {shards}, {} problems",
                claim.shard,
                places.len()
            ));
            let lost = tokio::select! {
                done = self.run_shard(phase, input, places) => {
                    done?;
                    database.finish_shard(&claim).await?;
                    false
                }
                held = renew_lease(database, &claim, lease) => {
                    held?;
                    true
                }
            };
            if lost {
                self.progress.message(format!("{name}: shard {} went to another worker", claim.shard));
            }
        }
    }

    /// Runs the problems of one shard through the stages. Its completions stay in the store.
    async fn run_shard(&self, phase: ShardPhase, input: &str, places: Vec<u64>) -> anyhow::Result<()> {
        let count = places.len();
        let lines = LineReader::open(&self.folder.stage_file(input))?;
        let problems = places.into_iter().map(move |place| {
            let line = lines.read_line_at(place)?;
            serde_json::from_str::<Problem>(&line).with_context(|| format!("the line at {place} is damaged"))
        });
        let (problems, reading) = channel_from_iter(problems);
        if phase == ShardPhase::Traces {
            let chain = self.run_trace_stages(problems, count).await?;
            reading.await??;
            return chain.discard().await;
        }
        let mut chain = Chain::new(&self.folder, self.recipe.concurrency);
        let mut output = chain.append(self.stages.classifier()?, problems)?;
        let drained = async { while output.recv().await.is_some() {} };
        self.show_progress(&chain.counts(), count as u64, drained).await;
        reading.await??;
        chain.discard().await
    }
}

/// Renews the lease of a claim. Returns when the claim is lost.
async fn renew_lease(database: &PostgresStore, claim: &ShardClaim, lease: Duration) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(lease / 3);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        if !database.renew_claim(claim, lease).await? {
            return Ok(());
        }
    }
}
