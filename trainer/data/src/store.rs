//! Store of a run's completions: a journal file in the run's folder, or a PostgreSQL database that workers share.
//!
//! Both backends give the same guarantee: an acknowledged completion survives a crash and is found by its request's
//! id. Deliberately absent: the claims of workers, which are methods of the database.

use std::path::Path;
use std::sync::Arc;

use potstill_shared::durable::DurableError;
use potstill_shared::id::ContentId;

use crate::journal::{Entry, Journal, UsageTotals};
use crate::postgres::{DatabaseError, PostgresStore};

/// Error of a store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The journal file cannot be read or written.
    #[error(transparent)]
    Journal(#[from] Arc<DurableError>),
    /// The database reports an error or is unreachable.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<DurableError> for StoreError {
    fn from(error: DurableError) -> Self {
        Self::Journal(Arc::new(error))
    }
}

/// Completions of one run.
pub enum Store {
    /// Journal file in the run's folder.
    Journal(Journal),
    /// PostgreSQL database, shared by workers.
    Postgres(PostgresStore),
}

impl Store {
    /// Opens or creates the journal at `path`.
    pub fn open_journal(path: &Path) -> Result<Self, StoreError> {
        Ok(Self::Journal(Journal::open(path)?))
    }

    /// Returns the number of stored completions.
    pub async fn completion_count(&self) -> Result<usize, StoreError> {
        match self {
            Self::Journal(journal) => Ok(journal.len()),
            Self::Postgres(database) => Ok(database.completion_count().await?),
        }
    }

    /// Returns the usage of all stored completions.
    pub async fn totals(&self) -> Result<UsageTotals, StoreError> {
        match self {
            Self::Journal(journal) => Ok(journal.totals()),
            Self::Postgres(database) => Ok(database.totals().await?),
        }
    }

    /// Returns the completion of a request, if the store has one.
    pub async fn get(&self, id: &ContentId) -> Result<Option<Arc<Entry>>, StoreError> {
        match self {
            Self::Journal(journal) => Ok(journal.get(id)?),
            Self::Postgres(database) => Ok(database.get(id).await?.map(Arc::new)),
        }
    }

    /// Stores a completion. Returns after the completion is durable.
    pub async fn commit(&self, entry: Entry) -> Result<Arc<Entry>, StoreError> {
        match self {
            Self::Journal(journal) => Ok(journal.commit(entry).await?),
            Self::Postgres(database) => Ok(database.commit(entry).await?),
        }
    }
}
