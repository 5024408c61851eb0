//! The journal: every answer that was paid for, by the id of what was asked. A run looks here first, so an answer is
//! bought once; a crash loses only what was in flight.
//!
//! Answers are committed in groups: while one group is being brought to the disk, the next one gathers. In memory stands
//! where each answer lies, not the answer: 16 bytes each.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use potstill_shared::durable::{AppendLog, DurableError, Lines, Recovery};
use potstill_shared::id::ContentId;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// An answer as it was bought. What is short stands first, so that opening a journal need not read the texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Id of the question: stage, model, messages and sampling parameters.
    pub id: ContentId,
    /// Which stage asked.
    #[serde(default)]
    pub stage: String,
    /// Who answered.
    #[serde(default)]
    pub model: String,
    /// Why it ended.
    pub finish_reason: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
    /// Seconds from the call to the whole answer.
    #[serde(default)]
    pub seconds: f64,
    /// Text of the answer, thinking left in as it came.
    pub content: String,
    /// Thinking that came apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
}

/// What the answers of one model to one stage took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Answers.
    pub calls: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Tokens written.
    pub completion_tokens: u64,
    /// Seconds of all calls.
    pub seconds: f64,
}

impl Usage {
    /// Adds an answer.
    pub fn add(&mut self, prompt_tokens: u64, completion_tokens: u64, seconds: f64) {
        self.calls += 1;
        self.prompt_tokens += prompt_tokens;
        self.completion_tokens += completion_tokens;
        self.seconds += seconds;
    }
}

/// Usage by stage and model.
pub type Totals = BTreeMap<(String, String), Usage>;

/// The beginning of an [`Entry`], up to its texts.
#[derive(Deserialize)]
struct Head {
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

impl Head {
    fn of(line: &str) -> Option<Self> {
        // Quotes inside strings are escaped, so this can only be the field's name.
        let short = line.find(",\"content\":").map(|end| format!("{}}}", &line[..end]));
        let head = short.and_then(|short| serde_json::from_str::<Self>(&short).ok());
        // Journals of earlier versions have their counts behind the texts.
        head.filter(|head| head.prompt_tokens + head.completion_tokens > 0)
            .or_else(|| serde_json::from_str(line).ok())
    }
}

/// Where answers lie, by the first 64 bits of their ids.
#[derive(Default)]
struct Places {
    first: HashMap<u64, u64>,
    /// Those whose first bits were taken: none, unless there are thousands of millions.
    others: HashMap<ContentId, u64>,
}

impl Places {
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

    /// Where the answer lies, or another one with the same first bits.
    fn get(&self, id: &ContentId) -> Option<u64> {
        self.others.get(id).or_else(|| self.first.get(&id.seed())).copied()
    }

    fn len(&self) -> usize {
        self.first.len() + self.others.len()
    }
}

type Done = oneshot::Sender<Result<(), Arc<DurableError>>>;

struct Pending {
    id: ContentId,
    line: String,
    done: Done,
}

#[derive(Default)]
struct State {
    places: Places,
    totals: Totals,
    pending: Vec<Pending>,
    failure: Option<Arc<DurableError>>,
    closed: bool,
}

impl State {
    /// An answer that the journal holds.
    fn note(&mut self, place: u64, line: &str) {
        if let Some(head) = Head::of(line) {
            self.places.insert(&head.id, place);
            let usage = self.totals.entry((head.stage, head.model)).or_default();
            usage.add(head.prompt_tokens, head.completion_tokens, head.seconds);
        }
    }
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

fn locked(shared: &Shared) -> MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The opened journal of a run.
pub struct Journal {
    shared: Arc<Shared>,
    lines: Lines,
    writer: Option<JoinHandle<()>>,
    recovery: Recovery,
}

impl Journal {
    /// Opens or creates the journal and reads what it holds.
    pub fn open(path: &Path) -> Result<Self, DurableError> {
        let mut state = State::default();
        let (log, recovery) = AppendLog::open(path, |place, line| state.note(place, line))?;
        let lines = log.lines()?;
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() });
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

    /// Reads a journal that another process may be writing; nothing can be committed to it.
    pub fn read_only(path: &Path) -> Result<Self, DurableError> {
        let mut state = State { closed: true, ..State::default() };
        let recovery = AppendLog::scan(path, |place, line| state.note(place, line))?;
        let lines = Lines::open(path)?;
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() });
        Ok(Self { shared, lines, writer: None, recovery })
    }

    /// What opening it found.
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// Answers that it holds.
    pub fn len(&self) -> usize {
        locked(&self.shared).places.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What all its answers took.
    pub fn totals(&self) -> Totals {
        locked(&self.shared).totals.clone()
    }

    /// The answer to a question, if it was bought before.
    pub fn get(&self, id: &ContentId) -> Result<Option<Arc<Entry>>, DurableError> {
        let Some(place) = locked(&self.shared).places.get(id) else { return Ok(None) };
        let line = self.lines.read(place)?;
        let entry = serde_json::from_str::<Entry>(&line).ok();
        Ok(entry.filter(|entry| entry.id == *id).map(Arc::new))
    }

    /// Records an answer and returns once it is on the disk.
    pub async fn commit(&self, entry: Entry) -> Result<Arc<Entry>, Arc<DurableError>> {
        let line = serde_json::to_string(&entry).unwrap_or_default();
        let (done, written) = oneshot::channel();
        {
            let mut state = locked(&self.shared);
            if let Some(failure) = &state.failure {
                return Err(Arc::clone(failure));
            }
            debug_assert!(!state.closed, "a journal that is only read");
            let usage = state.totals.entry((entry.stage.clone(), entry.model.clone())).or_default();
            usage.add(entry.prompt_tokens, entry.completion_tokens, entry.seconds);
            state.pending.push(Pending { id: entry.id.clone(), line, done });
        }
        self.shared.work.notify_one();
        match written.await {
            Ok(written) => written.map(|()| Arc::new(entry)),
            // The writer has ended: by a failure, which is there to be read.
            Err(_) => match &locked(&self.shared).failure {
                Some(failure) => Err(Arc::clone(failure)),
                None => Ok(Arc::new(entry)),
            },
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
        let mut state = locked(shared);
        let outcome = match written {
            Ok(places) => {
                // Only what is on the disk is an answer.
                for (answer, place) in group.iter().zip(places) {
                    state.places.insert(&answer.id, place);
                }
                Ok(())
            }
            Err(error) => {
                let failure = Arc::new(error);
                state.failure = Some(Arc::clone(&failure));
                // Nobody will write those that came meanwhile.
                group.append(&mut state.pending);
                Err(failure)
            }
        };
        drop(state);
        for answer in group {
            // Who asked may have been cancelled meanwhile; the answer is kept all the same.
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
            id: ContentId::of(&["q", &n.to_string()]),
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
    async fn what_was_committed_is_there_again() {
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
    fn journals_of_earlier_versions_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let id = ContentId::of(&["old"]);
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
