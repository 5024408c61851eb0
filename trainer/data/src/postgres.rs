//! PostgreSQL store: completions and shards of a run, so that several workers share the run.
//!
//! A worker claims a shard for a lease of some seconds and renews the lease. The shard of a dead worker becomes free
//! when its lease expires. Completions are committed in groups; each is stored once per request, from whichever
//! worker commits first. Deliberately absent: the processing of a shard, and a shared budget.

use std::sync::Arc;
use std::time::Duration;

use potstill_shared::id::{ContentId, unique_id};
use tokio::sync::{mpsc, oneshot};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, Config, NoTls};
use tokio_rustls::rustls;
use tokio_util::task::AbortOnDropHandle;

use crate::journal::{Entry, Usage, UsageTotals};

/// Capacity of the queue of uncommitted completions. Further commits wait.
const QUEUE_CAPACITY: usize = 1024;
/// Largest number of completions per statement.
const MAX_GROUP_SIZE: usize = 256;

/// Schema, created by the first worker. The advisory lock serializes workers: concurrent `if not exists` statements
/// can fail. Ids and names are text, so that people can read them.
const SCHEMA: &str = "
begin;
select pg_advisory_xact_lock(5070767871);
create table if not exists potstill_runs (
    run text primary key, recipe_hash text not null, shards int not null, begun timestamptz not null default now());
create table if not exists potstill_answers (
    run text not null, id text not null, stage text not null, model text not null, worker text not null,
    prompt_tokens bigint not null, completion_tokens bigint not null, seconds float8 not null,
    entry text not null, written timestamptz not null default now(), primary key (run, id));
create table if not exists potstill_shards (
    run text not null, phase text not null, shard int not null, owner text, until timestamptz, done boolean not null default false,
    claims int not null default 0, primary key (run, phase, shard));
commit;
";

/// Error of the database, with the next step.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the store: {0}")]
pub struct DatabaseError(String);

impl From<tokio_postgres::Error> for DatabaseError {
    fn from(error: tokio_postgres::Error) -> Self {
        let said = match error.as_db_error() {
            Some(said) => said.to_string(),
            None => {
                let mut text = error.to_string();
                let mut cause: &dyn std::error::Error = &error;
                while let Some(inner) = cause.source() {
                    text = format!("{text}: {inner}");
                    cause = inner;
                }
                text
            }
        };
        Self(format!("{said}; nothing is lost, the same command goes on where it stopped"))
    }
}

/// Completion that waits for the writer task, with the channel for its result.
struct PendingEntry {
    entry: Entry,
    done: oneshot::Sender<Result<(), DatabaseError>>,
}

/// Connection to one run in a database.
pub struct PostgresStore {
    client: Arc<Client>,
    run: String,
    worker: String,
    pending: mpsc::Sender<PendingEntry>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// Shard that this worker has claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardClaim {
    /// Phase of the run, for example `classify` or `traces`.
    pub phase: String,
    /// Number of the shard, from 0.
    pub shard: u32,
}

/// Progress of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardProgress {
    /// Number of shards.
    pub all: u32,
    /// Number of finished shards.
    pub done: u32,
}

impl PostgresStore {
    /// Connects to `url` (`postgres://user:password@host/database`) and opens a run. A new run is split into `shards`
    /// shards; an existing run keeps its number.
    ///
    /// With `sslmode=require`, the connection uses TLS and the server's certificate is checked against the system's
    /// root certificates. Otherwise, the connection is not encrypted.
    ///
    /// # Errors
    ///
    /// Returns an error for an invalid URL, a failed connection, or a run of this name with another recipe hash.
    pub async fn open(url: &str, run: &str, recipe_hash: &str, shards: u32) -> Result<Self, DatabaseError> {
        let config: Config = url.parse().map_err(|error: tokio_postgres::Error| {
            // The URL contains a password and must not appear in the message.
            DatabaseError(format!(
                "the address is not of the form postgres://user:password@host/database: {error}"
            ))
        })?;
        let (client, connected) = connect(&config).await?;
        client.batch_execute(SCHEMA).await?;
        let client = Arc::new(client);
        let worker = unique_id("worker");
        let (pending, receiver) = mpsc::channel(QUEUE_CAPACITY);
        let writer =
            tokio::spawn(write_groups(Arc::clone(&client), run.to_owned(), worker.clone(), receiver));
        let database = Self {
            client,
            run: run.to_owned(),
            worker,
            pending,
            _tasks: [connected, AbortOnDropHandle::new(writer)],
        };
        database.register_run(recipe_hash, shards).await?;
        Ok(database)
    }

    async fn register_run(&self, recipe_hash: &str, shards: u32) -> Result<(), DatabaseError> {
        self.client
            .execute(
                "insert into potstill_runs (run, recipe_hash, shards) values ($1, $2, $3) on conflict do nothing",
                &[&self.run, &recipe_hash, &(shards as i32)],
            )
            .await?;
        let row = self
            .client
            .query_one("select recipe_hash from potstill_runs where run = $1", &[&self.run])
            .await?;
        let begun: String = row.get(0);
        if begun != recipe_hash {
            return Err(DatabaseError(format!(
                "it holds a run `{}` of another recipe (hash {begun}, this one has {recipe_hash}); give the recipe another `name`",
                self.run
            )));
        }
        Ok(())
    }

    /// Returns the number of shards of the run.
    pub async fn shard_count(&self) -> Result<u32, DatabaseError> {
        let row =
            self.client.query_one("select shards from potstill_runs where run = $1", &[&self.run]).await?;
        Ok(row.get::<_, i32>(0).max(1) as u32)
    }

    /// Creates the shards of a phase, unless they exist.
    pub async fn create_shards(&self, phase: &str) -> Result<(), DatabaseError> {
        let statement = "insert into potstill_shards (run, phase, shard) \
                         select $1, $2, generate_series(0, shards - 1) from potstill_runs where run = $1 on conflict do nothing";
        self.client.execute(statement, &[&self.run, &phase]).await?;
        Ok(())
    }

    /// Claims a shard for the duration of `lease`: one without an owner, or one whose lease has expired. Returns
    /// `None` if there is none.
    pub async fn claim_shard(
        &self,
        phase: &str,
        lease: Duration,
    ) -> Result<Option<ShardClaim>, DatabaseError> {
        let statement = "update potstill_shards set owner = $3, until = now() + $4 * interval '1 second', claims = claims + 1 \
                         where (run, phase, shard) = (select run, phase, shard from potstill_shards \
                         where run = $1 and phase = $2 and not done and (owner is null or until < now()) \
                         order by shard limit 1 for update skip locked) returning shard";
        let row = self
            .client
            .query_opt(statement, &[&self.run, &phase, &self.worker, &lease.as_secs_f64()])
            .await?;
        Ok(row.map(|row| ShardClaim { phase: phase.to_owned(), shard: row.get::<_, i32>(0) as u32 }))
    }

    /// Renews a claim for another `lease`. Returns false if the shard is finished or has another owner.
    pub async fn renew_claim(&self, claim: &ShardClaim, lease: Duration) -> Result<bool, DatabaseError> {
        let statement = "update potstill_shards set until = now() + $5 * interval '1 second' \
                         where run = $1 and phase = $2 and shard = $3 and owner = $4 and not done";
        let shard = claim.shard as i32;
        let held = self
            .client
            .execute(statement, &[&self.run, &claim.phase, &shard, &self.worker, &lease.as_secs_f64()])
            .await?;
        Ok(held == 1)
    }

    /// Marks a shard as finished. If another worker processed the shard too, the store still has one completion per
    /// request.
    pub async fn finish_shard(&self, claim: &ShardClaim) -> Result<(), DatabaseError> {
        let statement = "update potstill_shards set done = true where run = $1 and phase = $2 and shard = $3";
        self.client.execute(statement, &[&self.run, &claim.phase, &(claim.shard as i32)]).await?;
        Ok(())
    }

    /// Returns the progress of a phase.
    pub async fn progress(&self, phase: &str) -> Result<ShardProgress, DatabaseError> {
        let statement = "select count(*), count(*) filter (where done) from potstill_shards where run = $1 and phase = $2";
        let row = self.client.query_one(statement, &[&self.run, &phase]).await?;
        let count = |at: usize| row.get::<_, i64>(at) as u32;
        Ok(ShardProgress { all: count(0), done: count(1) })
    }

    /// Returns the number of stored completions of the run.
    pub async fn completion_count(&self) -> Result<usize, DatabaseError> {
        let row = self
            .client
            .query_one("select count(*) from potstill_answers where run = $1", &[&self.run])
            .await?;
        Ok(row.get::<_, i64>(0) as usize)
    }

    /// Returns the usage of all stored completions of the run.
    pub async fn totals(&self) -> Result<UsageTotals, DatabaseError> {
        let statement = "select stage, model, count(*), sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint, sum(seconds) \
                         from potstill_answers where run = $1 group by stage, model";
        let rows = self.client.query(statement, &[&self.run]).await?;
        let usage = |row: &tokio_postgres::Row| Usage {
            calls: row.get::<_, i64>(2) as u64,
            prompt_tokens: row.get::<_, i64>(3) as u64,
            completion_tokens: row.get::<_, i64>(4) as u64,
            seconds: row.get(5),
        };
        Ok(rows.iter().map(|row| ((row.get(0), row.get(1)), usage(row))).collect())
    }

    /// Returns the completion of a request, if the run has one.
    pub async fn get(&self, id: &ContentId) -> Result<Option<Entry>, DatabaseError> {
        let statement = "select entry from potstill_answers where run = $1 and id = $2";
        let row = self.client.query_opt(statement, &[&self.run, &id.as_str()]).await?;
        row.map(|row| {
            let text: String = row.get(0);
            serde_json::from_str(&text)
                .map_err(|error| DatabaseError(format!("the answer `{id}` is damaged: {error}")))
        })
        .transpose()
    }

    /// Stores a completion and returns after the transaction is committed.
    pub async fn commit(&self, entry: Entry) -> Result<Arc<Entry>, DatabaseError> {
        let (done, written) = oneshot::channel();
        let gone = || DatabaseError("its writer has stopped; run the same command again".to_owned());
        let kept = Arc::new(entry.clone());
        self.pending.send(PendingEntry { entry, done }).await.map_err(|_| gone())?;
        written.await.map_err(|_| gone())??;
        Ok(kept)
    }
}

async fn connect(config: &Config) -> Result<(Client, AbortOnDropHandle<()>), DatabaseError> {
    fn spawn_connection<S, T>(connection: tokio_postgres::Connection<S, T>) -> AbortOnDropHandle<()>
    where
        tokio_postgres::Connection<S, T>: Future<Output = Result<(), tokio_postgres::Error>> + Send + 'static,
    {
        AbortOnDropHandle::new(tokio::spawn(async move {
            // Pending queries fail with the same error.
            if let Err(error) = connection.await {
                tracing::warn!(%error, "the connection to the store has ended");
            }
        }))
    }
    if config.get_ssl_mode() == SslMode::Require {
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| DatabaseError(format!("TLS: {error}")))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (client, connection) = config.connect(tokio_postgres_rustls::MakeRustlsConnect::new(tls)).await?;
        return Ok((client, spawn_connection(connection)));
    }
    let (client, connection) = config.connect(NoTls).await?;
    Ok((client, spawn_connection(connection)))
}

/// Writes completions in groups. While one group is written, the next one collects.
async fn write_groups(
    client: Arc<Client>,
    run: String,
    worker: String,
    mut pending: mpsc::Receiver<PendingEntry>,
) {
    let mut group = Vec::new();
    while pending.recv_many(&mut group, MAX_GROUP_SIZE).await > 0 {
        let written = insert_group(&client, &run, &worker, &group).await;
        for answer in group.drain(..) {
            let _gone = answer.done.send(written.clone());
        }
    }
}

async fn insert_group(
    client: &Client,
    run: &str,
    worker: &str,
    group: &[PendingEntry],
) -> Result<(), DatabaseError> {
    let statement = "insert into potstill_answers \
                     (run, id, stage, model, worker, prompt_tokens, completion_tokens, seconds, entry) \
                     select $1, id, stage, model, $2, prompt_tokens, completion_tokens, seconds, entry \
                     from unnest($3::text[], $4::text[], $5::text[], $6::bigint[], $7::bigint[], $8::float8[], $9::text[]) \
                     as new (id, stage, model, prompt_tokens, completion_tokens, seconds, entry) \
                     on conflict do nothing";
    let texts = |of: fn(&Entry) -> &str| group.iter().map(|answer| of(&answer.entry)).collect::<Vec<_>>();
    let numbers =
        |of: fn(&Entry) -> u64| group.iter().map(|answer| of(&answer.entry) as i64).collect::<Vec<_>>();
    let seconds: Vec<f64> = group.iter().map(|answer| answer.entry.seconds).collect();
    // PostgreSQL's `text` cannot store a zero byte; JSON escapes it.
    let entries: Vec<String> =
        group.iter().map(|answer| serde_json::to_string(&answer.entry).unwrap_or_default()).collect();
    client
        .execute(
            statement,
            &[
                &run,
                &worker,
                &texts(|entry| entry.id.as_str()),
                &texts(|entry| &entry.stage),
                &texts(|entry| &entry.model),
                &numbers(|entry| entry.prompt_tokens),
                &numbers(|entry| entry.completion_tokens),
                &seconds,
                &entries,
            ],
        )
        .await?;
    Ok(())
}
