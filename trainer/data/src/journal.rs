//! The journal: every answer that was paid for, by the id of what was asked. A run looks here first, so an answer is
//! bought once; a crash loses only what was in flight.
//!
//! Answers are committed in groups: one fsync for all that arrived within 50 ms or 64 answers, whichever comes first.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use potstill_shared::durable::{AppendLog, DurableError, Recovery};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};

const GROUP: usize = 64;
const GROUP_WAIT: Duration = Duration::from_millis(50);

/// An answer as it was bought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Id of the question: stage, model, messages and sampling parameters.
    pub id: ContentId,
    /// Text of the answer, thinking left in as it came.
    pub content: String,
    /// Thinking that came apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Why it ended.
    pub finish_reason: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
}

struct State {
    entries: HashMap<ContentId, Arc<Entry>>,
    pending: Vec<(String, u64)>,
    appended: u64,
    committed: u64,
    failure: Option<Arc<DurableError>>,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

fn locked(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The opened journal of a run.
pub struct Journal {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    recovery: Recovery,
}

impl Journal {
    /// Opens or creates the journal and reads what it holds.
    pub fn open(path: &Path) -> Result<Self, DurableError> {
        let mut entries = HashMap::new();
        let (log, recovery) = AppendLog::open(path, |line| {
            if let Ok(entry) = serde_json::from_str::<Entry>(line) {
                entries.insert(entry.id.clone(), Arc::new(entry));
            }
        })?;
        let state =
            State { entries, pending: Vec::new(), appended: 0, committed: 0, failure: None, closed: false };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), work: Condvar::new(), done: Condvar::new() });
        let writer = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || write_groups(&shared, log)
            })
            .map_err(|source| DurableError::Io {
                action: "start the writer of",
                path: path.to_owned(),
                source,
            })?;
        Ok(Self { shared, writer: Some(writer), recovery })
    }

    /// What opening it found.
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// Answers that it holds.
    pub fn len(&self) -> usize {
        locked(&self.shared).entries.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The answer to a question, if it was bought before.
    pub fn get(&self, id: &ContentId) -> Option<Arc<Entry>> {
        locked(&self.shared).entries.get(id).cloned()
    }

    /// Records an answer and returns once it is on the disk. Blocks up to a group's wait: call it off the async threads.
    pub fn commit(&self, entry: Entry) -> Result<Arc<Entry>, Arc<DurableError>> {
        let line = serde_json::to_string(&entry).unwrap_or_default();
        let mut state = locked(&self.shared);
        if let Some(known) = state.entries.get(&entry.id) {
            return Ok(Arc::clone(known));
        }
        state.appended += 1;
        let number = state.appended;
        state.pending.push((line, number));
        let entry = Arc::new(entry);
        self.shared.work.notify_one();
        while state.committed < number && state.failure.is_none() {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.failure {
            Some(failure) if state.committed < number => Err(Arc::clone(failure)),
            _ => {
                // Only what is on the disk is an answer.
                state.entries.insert(entry.id.clone(), Arc::clone(&entry));
                Ok(entry)
            }
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        locked(&self.shared).closed = true;
        self.shared.work.notify_one();
        if let Some(writer) = self.writer.take() {
            let _panicked = writer.join();
        }
    }
}

fn write_groups(shared: &Shared, mut log: AppendLog) {
    loop {
        let mut state = locked(shared);
        while state.pending.is_empty() && !state.closed {
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.pending.is_empty() {
            return;
        }
        let deadline = Instant::now() + GROUP_WAIT;
        while state.pending.len() < GROUP && !state.closed {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            state = shared.work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let group = std::mem::take(&mut state.pending);
        drop(state);
        let last = group.last().map_or(0, |(_, number)| *number);
        let written = group.iter().try_for_each(|(line, _)| log.append(line)).and_then(|()| log.sync());
        let mut state = locked(shared);
        match written {
            Ok(()) => state.committed = last,
            Err(error) => state.failure = Some(Arc::new(error)),
        }
        let failed = state.failure.is_some();
        drop(state);
        shared.done.notify_all();
        if failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: usize) -> Entry {
        Entry {
            id: ContentId::of(&["q", &n.to_string()]),
            content: format!("line\nbreak {n}"),
            reasoning: None,
            finish_reason: "stop".into(),
            prompt_tokens: 1,
            completion_tokens: 2,
        }
    }

    #[test]
    fn what_was_committed_is_there_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        {
            let journal = Journal::open(&path).unwrap();
            std::thread::scope(|scope| {
                for worker in 0..8 {
                    let journal = &journal;
                    scope.spawn(move || {
                        for n in 0..50 {
                            journal.commit(entry(worker * 50 + n)).unwrap();
                        }
                    });
                }
            });
            journal.commit(entry(3)).unwrap();
        }
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.len(), 400);
        assert_eq!(journal.recovery().lines, 400, "a question asked twice is written once");
        assert_eq!(journal.get(&entry(77).id).unwrap().content, "line\nbreak 77");
    }
}
