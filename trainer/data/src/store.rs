//! Where the answers of a run are kept: in its folder, or in a PostgreSQL database that many workers share. Both keep the same
//! promise: an answer that was acknowledged is there after a crash, and stands there once.

use std::path::Path;
use std::sync::Arc;

use potstill_shared::durable::DurableError;
use potstill_shared::id::ContentId;

use crate::journal::{Entry, Journal, Totals};
use crate::postgres::{Database, DatabaseError};

/// Why an answer cannot be kept or found.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The disk.
    #[error(transparent)]
    Disk(#[from] Arc<DurableError>),
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<DurableError> for StoreError {
    fn from(error: DurableError) -> Self {
        Self::Disk(Arc::new(error))
    }
}

/// The answers of a run.
pub enum Store {
    /// A log in the run's folder.
    Folder(Journal),
    /// A database.
    Shared(Database),
}

impl Store {
    /// The log at `path`.
    pub fn folder(path: &Path) -> Result<Self, StoreError> {
        Ok(Self::Folder(Journal::open(path)?))
    }

    /// Answers that it holds.
    pub async fn answers(&self) -> Result<usize, StoreError> {
        match self {
            Self::Folder(journal) => Ok(journal.len()),
            Self::Shared(database) => Ok(database.answers().await?),
        }
    }

    /// What all its answers took.
    pub async fn totals(&self) -> Result<Totals, StoreError> {
        match self {
            Self::Folder(journal) => Ok(journal.totals()),
            Self::Shared(database) => Ok(database.totals().await?),
        }
    }

    /// The answer to a question, if it was bought before.
    pub async fn get(&self, id: &ContentId) -> Result<Option<Arc<Entry>>, StoreError> {
        match self {
            Self::Folder(journal) => Ok(journal.get(id)?),
            Self::Shared(database) => Ok(database.get(id).await?.map(Arc::new)),
        }
    }

    /// Records an answer and returns once it is safe.
    pub async fn commit(&self, entry: Entry) -> Result<Arc<Entry>, StoreError> {
        match self {
            Self::Folder(journal) => Ok(journal.commit(entry).await?),
            Self::Shared(database) => Ok(database.commit(entry).await?),
        }
    }
}
