//! Journal: append-only log of completions, keyed by the id of their request. A run looks up each request here first,
//! so a resumed run repeats only the requests that were in flight.
//!
//! A writer thread commits entries in groups: new entries collect while the previous group is synced to disk. Memory
//! holds the offset of each entry (16 bytes), not its text. Deliberately absent: sharing between workers
//! (`postgres`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use potstill_shared::durable::{AppendLog, DurableError, LineReader, LogScanSummary};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Completion with the usage of its request. The texts are the last fields, so that opening a journal skips them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Id of the request: hash of stage, model, prompt and sampling parameters.
    pub id: ContentId,
    /// Stage that sent the request.
    #[serde(default)]
    pub stage: String,
    /// Model that wrote the completion.
    #[serde(default)]
    pub model: String,
    /// OpenAI's `finish_reason`, or `loop` for a repetition loop.
    pub finish_reason: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the completion.
    pub completion_tokens: u64,
    /// Seconds from the request to the end of the response, for the successful attempt.
    #[serde(default)]
    pub seconds: f64,
    /// Text of the completion. Includes the reasoning unless the endpoint returned the reasoning separately.
    pub content: String,
    /// Reasoning that the endpoint returned separately (`reasoning_content`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
}

/// Usage of one model in one stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Number of completions.
    pub calls: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all completions.
    pub completion_tokens: u64,
    /// Sum of the request durations, in seconds.
    pub seconds: f64,
}

impl Usage {
    /// Adds one completion.
    pub fn add(&mut self, prompt_tokens: u64, completion_tokens: u64, seconds: f64) {
        self.calls += 1;
        self.prompt_tokens += prompt_tokens;
        self.completion_tokens += completion_tokens;
        self.seconds += seconds;
    }
}

/// Usage by (stage, model).
pub type UsageTotals = BTreeMap<(String, String), Usage>;

/// Fields of an [`Entry`] before its texts.
#[derive(Deserialize)]
struct EntryHeader {
    id: ContentId,
    #[serde(default)]
    stage: String,
    #[serde(default)]
    model: String,
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    #[serde(default)]
    seconds: f64,
}

impl EntryHeader {
    fn parse(line: &str) -> Option<Self> {
        // JSON escapes quotes inside strings, so this pattern only matches the field name.
        let short = line.find(",\"content\":").map(|end| format!("{}}}", &line[..end]));
        let head = short.and_then(|short| serde_json::from_str::<Self>(&short).ok());
        // Earlier versions wrote the token counts after the texts.
        head.filter(|head| head.prompt_tokens + head.completion_tokens > 0)
            .or_else(|| serde_json::from_str(line).ok())
    }
}

/// Byte offsets of entries, by the first 64 bits of their ids.
#[derive(Default)]
struct OffsetIndex {
    first: HashMap<u64, u64>,
    /// Entries whose first 64 bits were already present: the same id again, or a hash collision.
    others: HashMap<ContentId, u64>,
}

impl OffsetIndex {
    fn insert(&mut self, id: &ContentId, place: u64) {
        match self.first.entry(id.seed()) {
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(place);
            }
            std::collections::hash_map::Entry::Occupied(_) => {
                self.others.insert(id.clone(), place);
            }
        }
    }

    /// Returns the offset of the entry, or of another entry with the same first 64 bits.
    fn get(&self, id: &ContentId) -> Option<u64> {
        self.others.get(id).or_else(|| self.first.get(&id.seed())).copied()
    }

    fn len(&self) -> usize {
        self.first.len() + self.others.len()
    }
}

type ResultSender = oneshot::Sender<Result<(), Arc<DurableError>>>;

/// Entry that waits for the writer thread, with the channel for its result.
struct PendingEntry {
    id: ContentId,
    line: String,
    done: ResultSender,
}

/// State behind the lock of a [`Journal`].
#[derive(Default)]
struct JournalState {
    places: OffsetIndex,
    totals: UsageTotals,
    pending: Vec<PendingEntry>,
    failure: Option<Arc<DurableError>>,
    closed: bool,
}

impl JournalState {
    /// Indexes one entry that the log contains and adds its usage.
    fn index_entry(&mut self, place: u64, line: &str) {
        if let Some(head) = EntryHeader::parse(line) {
            self.places.insert(&head.id, place);
            let usage = self.totals.entry((head.stage, head.model)).or_default();
            usage.add(head.prompt_tokens, head.completion_tokens, head.seconds);
        }
    }
}

struct SharedJournal {
    state: Mutex<JournalState>,
    work: Condvar,
}

fn lock_state(shared: &SharedJournal) -> MutexGuard<'_, JournalState> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Open journal of a run. Dropping a journal waits for its writer thread.
pub struct Journal {
    shared: Arc<SharedJournal>,
    lines: LineReader,
    writer: Option<JoinHandle<()>>,
    recovery: LogScanSummary,
}

impl Journal {
    /// Opens or creates the journal and indexes its entries. The log is locked against other writers.
    pub fn open(path: &Path) -> Result<Self, DurableError> {
        let mut state = JournalState::default();
        let (log, recovery) = AppendLog::open(path, |place, line| state.index_entry(place, line))?;
        let lines = log.reader()?;
        let shared = Arc::new(SharedJournal { state: Mutex::new(state), work: Condvar::new() });
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
        Ok(Self { shared, lines, writer: Some(writer), recovery })
    }

    /// Opens a journal that another process may be writing. Committing is not possible.
    pub fn read_only(path: &Path) -> Result<Self, DurableError> {
        let mut state = JournalState { closed: true, ..JournalState::default() };
        let recovery = AppendLog::scan_log(path, |place, line| state.index_entry(place, line))?;
        let lines = LineReader::open(path)?;
        let shared = Arc::new(SharedJournal { state: Mutex::new(state), work: Condvar::new() });
        Ok(Self { shared, lines, writer: None, recovery })
    }

    /// Returns the number of lines read, and of bytes and lines lost to damage.
    pub fn recovery(&self) -> &LogScanSummary {
        &self.recovery
    }

    /// Returns the number of indexed entries.
    pub fn len(&self) -> usize {
        lock_state(&self.shared).places.len()
    }

    /// Returns whether the journal has no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the usage of all entries.
    pub fn totals(&self) -> UsageTotals {
        lock_state(&self.shared).totals.clone()
    }

    /// Returns the completion of a request, if the journal has one.
    pub fn get(&self, id: &ContentId) -> Result<Option<Arc<Entry>>, DurableError> {
        let Some(place) = lock_state(&self.shared).places.get(id) else { return Ok(None) };
        let line = self.lines.read_line_at(place)?;
        let entry = serde_json::from_str::<Entry>(&line).ok();
        Ok(entry.filter(|entry| entry.id == *id).map(Arc::new))
    }

    /// Appends an entry and returns after the entry is synced to disk. All commits fail after the first write error.
    pub async fn commit(&self, entry: Entry) -> Result<Arc<Entry>, Arc<DurableError>> {
        let line = serde_json::to_string(&entry).unwrap_or_default();
        let (done, written) = oneshot::channel();
        {
            let mut state = lock_state(&self.shared);
            if let Some(failure) = &state.failure {
                return Err(Arc::clone(failure));
            }
            debug_assert!(!state.closed, "a journal that is only read");
            let usage = state.totals.entry((entry.stage.clone(), entry.model.clone())).or_default();
            usage.add(entry.prompt_tokens, entry.completion_tokens, entry.seconds);
            state.pending.push(PendingEntry { id: entry.id.clone(), line, done });
        }
        self.shared.work.notify_one();
        match written.await {
            Ok(written) => written.map(|()| Arc::new(entry)),
            // The writer thread has ended. Its stored error is the cause.
            Err(_) => match &lock_state(&self.shared).failure {
                Some(failure) => Err(Arc::clone(failure)),
                None => Ok(Arc::new(entry)),
            },
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        lock_state(&self.shared).closed = true;
        self.shared.work.notify_one();
        if let Some(writer) = self.writer.take() {
            let _panicked = writer.join();
        }
    }
}

fn write_groups(shared: &SharedJournal, mut log: AppendLog) {
    loop {
        let mut state = lock_state(shared);
        while state.pending.is_empty() && !state.closed {
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut group = std::mem::take(&mut state.pending);
        drop(state);
        if group.is_empty() {
            return;
        }
        let written = group
            .iter()
            .map(|answer| log.append(&answer.line))
            .collect::<Result<Vec<u64>, _>>()
            .and_then(|places| log.sync().map(|()| places));
        let mut state = lock_state(shared);
        let outcome = match written {
            Ok(places) => {
                // Lookups must not find an entry that a crash could still lose.
                for (answer, place) in group.iter().zip(places) {
                    state.places.insert(&answer.id, place);
                }
                Ok(())
            }
            Err(error) => {
                let failure = Arc::new(error);
                state.failure = Some(Arc::clone(&failure));
                // The writer ends here, so entries that arrived meanwhile fail as well.
                group.append(&mut state.pending);
                Err(failure)
            }
        };
        drop(state);
        for answer in group {
            // The receiver is gone if its task was canceled. The entry stays in the journal.
            let _gone = answer.done.send(outcome.clone());
        }
        if outcome.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: usize) -> Entry {
        Entry {
            id: ContentId::from_parts(&["q", &n.to_string()]),
            stage: "generate".into(),
            model: "m".into(),
            content: format!("line\nbreak {n}, \"content\": no"),
            reasoning: None,
            finish_reason: "stop".into(),
            prompt_tokens: 1,
            completion_tokens: 2,
            seconds: 0.5,
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn committed_entries_survive_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        {
            let journal = Arc::new(Journal::open(&path).unwrap());
            let mut workers = tokio::task::JoinSet::new();
            for worker in 0..8 {
                let journal = Arc::clone(&journal);
                workers.spawn(async move {
                    for n in 0..50 {
                        journal.commit(entry(worker * 50 + n)).await.unwrap();
                    }
                });
            }
            workers.join_all().await;
            assert_eq!(journal.get(&entry(3).id).unwrap().unwrap().content, entry(3).content);
        }
        let journal = Journal::open(&path).unwrap();
        assert_eq!((journal.len(), journal.recovery().lines), (400, 400));
        assert_eq!(*journal.get(&entry(77).id).unwrap().unwrap(), entry(77));
        assert_eq!(journal.get(&entry(400).id).unwrap(), None);
        let usage = journal.totals()[&("generate".to_owned(), "m".to_owned())];
        assert_eq!((usage.calls, usage.prompt_tokens, usage.completion_tokens), (400, 400, 800));
    }

    #[test]
    fn opens_journals_of_earlier_versions() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let id = ContentId::from_parts(&["old"]);
        {
            let (mut log, _) = AppendLog::open(&path, |_, _| {}).unwrap();
            let line = format!(
                r#"{{"id":"{id}","content":"x","finish_reason":"stop","prompt_tokens":3,"completion_tokens":4}}"#
            );
            log.append(&line).unwrap();
            log.sync().unwrap();
        }
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.get(&id).unwrap().unwrap().content, "x");
        assert_eq!(journal.totals().values().map(|usage| usage.completion_tokens).sum::<u64>(), 4);
    }
}
