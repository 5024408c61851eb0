//! Problems in, records in and out as JSON lines. A row that cannot be read is put aside with its number and the reason; the
//! run goes on until more than a bounded share of the rows is bad.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use potstill_shared::durable::{DurableError, write_with};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::formats::{Format, tests_of, trace_of};
use crate::hub::{HubError, Located, locate};
use crate::records::{Given, Problem};
use crate::rows::{self, TableError};

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file itself.
    #[error("cannot read `{path}`: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The table of a source.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A file of the hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Too many rows are bad.
    #[error("`{path}`: {bad} of {rows} rows are bad, more than {limit} %; the first is row {row}: {reason}")]
    TooManyBad {
        /// The file.
        path: String,
        /// Bad rows.
        bad: usize,
        /// Rows in all.
        rows: usize,
        /// The share allowed, in percent.
        limit: f64,
        /// Number of the first bad row.
        row: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A line of a file that we wrote ourselves cannot be read.
    #[error("`{path}` line {line}: {reason}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// A row that was put aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// The file.
    pub file: String,
    /// Its line in files of lines, else its place; from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
    /// Its first characters.
    pub text: String,
}

/// One source of problems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// JSON lines, a JSON array, CSV or Parquet (`.gz` and `.zst` too), here or on the hub (`hf://datasets/…`).
    pub path: PathBuf,
    /// A published dataset whose fields are known; `problem` and `answer` are not looked at then.
    #[serde(default)]
    pub format: Option<Format>,
    /// Field that holds the problem.
    #[serde(default = "problem_field")]
    pub problem: String,
    /// Field that holds the answer.
    #[serde(default = "answer_field")]
    pub answer: String,
    /// At most so many rows; 0 for all.
    #[serde(default)]
    pub limit: usize,
    /// Take the chains of thought that the rows hold, instead of asking teachers for new ones.
    #[serde(default)]
    pub traces: bool,
    /// Field with thinking and answer in one text, for `traces` without a `format`.
    #[serde(default)]
    pub trace: Option<String>,
    /// Field with tests of a program (`inputs` and `outputs`); those of OpenThoughts-114k are read without it.
    #[serde(default)]
    pub tests: Option<String>,
    /// Who wrote those chains of thought, where the format does not tell.
    #[serde(default)]
    pub teacher: Option<String>,
    /// Licence of the rows (an SPDX id), for the cards. What a hub's card says is read without it.
    #[serde(default)]
    pub licence: Option<String>,
}

impl Source {
    /// Where tests of programs stand, if there are any.
    pub fn tests_field(&self) -> Option<&str> {
        let known = (self.format == Some(Format::OpenThoughts114k)).then_some("test_cases");
        self.tests.as_deref().or(known)
    }

    /// A table with the fields `problem` and `answer`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: None,
            problem: problem_field(),
            answer: answer_field(),
            limit: 0,
            traces: false,
            trace: None,
            tests: None,
            teacher: None,
            licence: None,
        }
    }
}

fn problem_field() -> String {
    "problem".to_owned()
}

fn answer_field() -> String {
    "answer".to_owned()
}

/// The share of bad rows that stops a run, in percent.
pub const MAX_BAD_PERCENT: f64 = 1.0;
/// Rows of one source that are put aside at most.
const MAX_QUARANTINED: usize = 100_000;

/// Longest text of a row that goes along as metadata, in bytes.
const MAX_METADATA: usize = 1024;

/// Hands every problem of a source to `take`, one after the other; gives the rows that could not be read.
pub fn each_problem<E: From<ReadError>>(
    source: &Source,
    mut take: impl FnMut(Problem) -> Result<(), E>,
) -> Result<Vec<Quarantined>, E> {
    let (mut good, mut bad, mut read) = (0, Vec::new(), 0usize);
    'files: for Located { shown, path } in locate(&source.path).map_err(ReadError::from)? {
        for row in rows::open(&path).map_err(ReadError::from)? {
            if source.limit > 0 && good >= source.limit {
                break 'files;
            }
            let row = row.map_err(ReadError::from)?;
            read += 1;
            let (reason, text) = match row.fields {
                Ok(fields) => match problem(fields, source, format!("{shown}:{}", row.number)) {
                    Ok(problem) => {
                        good += 1;
                        take(problem)?;
                        continue;
                    }
                    Err((reason, fields)) => {
                        (reason, Value::Object(fields).to_string().chars().take(200).collect())
                    }
                },
                Err(broken) => (broken.reason, broken.text),
            };
            bad.push(Quarantined { file: shown.clone(), line: row.number, reason, text });
            // So many that it cannot end well, whatever comes: a table of another kind.
            if bad.len() > MAX_QUARANTINED {
                break 'files;
            }
        }
    }
    // A handful of rows must not stop a run by one bad row alone.
    let allowed = ((read as f64 * MAX_BAD_PERCENT / 100.0).floor() as usize).max(1);
    match bad.first() {
        Some(first) if bad.len() > allowed => Err(ReadError::TooManyBad {
            path: first.file.clone(),
            bad: bad.len(),
            rows: read,
            limit: MAX_BAD_PERCENT,
            row: first.line,
            reason: first.reason.clone(),
        }
        .into()),
        _ => Ok(bad),
    }
}

/// All problems of a source that fits into memory.
pub fn read_problems(source: &Source) -> Result<(Vec<Problem>, Vec<Quarantined>), ReadError> {
    let mut problems = Vec::new();
    let bad = each_problem::<ReadError>(source, |problem| {
        problems.push(problem);
        Ok(())
    })?;
    Ok((problems, bad))
}

type Fields = Map<String, Value>;

fn problem(mut row: Fields, source: &Source, place: String) -> Result<Problem, (String, Fields)> {
    let (problem, answer) = match source.format {
        Some(format) => match format.read(&row) {
            Ok(read) => read,
            Err(reason) => return Err((reason, row)),
        },
        None => match mapped(&row, source) {
            Ok(read) => read,
            Err(reason) => return Err((reason, row)),
        },
    };
    let traces = if source.traces { traces(&row, source) } else { Vec::new() };
    if source.traces && traces.is_empty() {
        return Err(("the row holds no chain of thought with thinking and answer".to_owned(), row));
    }
    let tests = source.tests_field().and_then(|field| tests_of(&row.remove(field)?)).unwrap_or_default();
    if source.format.is_none() {
        row.remove(&source.problem);
        row.remove(&source.answer);
    }
    // What stands elsewhere in the record, and texts that would be carried through every stage for nothing.
    row.retain(|_, value| match value {
        Value::String(text) => *text != problem && text.len() <= MAX_METADATA,
        Value::Array(_) | Value::Object(_) => value.to_string().len() <= MAX_METADATA,
        _ => true,
    });
    let mut record = Problem::new(problem, answer, place);
    record.metadata = row;
    record.traces = traces;
    record.tests = tests;
    Ok(record)
}

/// Problem and answer where the recipe names their fields.
fn mapped(row: &Fields, source: &Source) -> Result<(String, Option<String>), String> {
    let problem = match row.get(&source.problem) {
        Some(Value::String(text)) if !text.trim().is_empty() => text.clone(),
        Some(_) => return Err(format!("field `{}` is empty or not a string", source.problem)),
        None => return Err(format!("field `{}` is missing", source.problem)),
    };
    let answer = match row.get(&source.answer) {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        Some(_) => return Err(format!("field `{}` is neither a string nor a number", source.answer)),
    };
    Ok((problem, answer))
}

fn traces(row: &Fields, source: &Source) -> Vec<Given> {
    let mut traces = match (source.format, &source.trace) {
        (Some(format), _) => format.traces(row),
        (None, Some(field)) => {
            let text = row.get(field).and_then(Value::as_str);
            text.and_then(|text| trace_of("unknown", text)).into_iter().collect()
        }
        (None, None) => Vec::new(),
    };
    for trace in &mut traces {
        if let Some(teacher) = source.teacher.as_ref().filter(|_| trace.teacher == "unknown") {
            trace.teacher.clone_from(teacher);
        }
    }
    traces
}

/// Writes records as JSONL, whole or not at all.
pub fn write_records<T: Serialize>(path: &Path, records: &[T]) -> Result<(), DurableError> {
    write_with(path, |file| {
        use std::io::Write;
        for record in records {
            serde_json::to_writer(&mut *file, record)?;
            file.write_all(b"\n")?;
        }
        Ok(())
    })
}

/// Reads records that [`write_records`] wrote; any bad line is an error.
pub fn read_records<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Vec<T>, ReadError> {
    each_record(path)?.map(|record| record.map(|(_, record)| record)).collect()
}

/// The records of such a file one by one, each with the offset of its line.
pub fn each_record<T: for<'de> Deserialize<'de>>(
    path: &Path,
) -> Result<impl Iterator<Item = Result<(u64, T), ReadError>> + use<T>, ReadError> {
    let path = path.to_owned();
    let io = |path: &Path, error| ReadError::Io { path: path.to_owned(), source: error };
    let mut reader = BufReader::with_capacity(1 << 18, File::open(&path).map_err(|error| io(&path, error))?);
    let (mut line, mut offset, mut number) = (String::new(), 0, 0);
    Ok(std::iter::from_fn(move || {
        line.clear();
        number += 1;
        match reader.read_line(&mut line) {
            Err(error) => Some(Err(io(&path, error))),
            Ok(0) => None,
            Ok(read) => {
                let begin = offset;
                offset += read as u64;
                let record = serde_json::from_str(line.trim_end()).map_err(|error| ReadError::Line {
                    path: path.clone(),
                    line: number,
                    reason: error.to_string(),
                });
                Some(record.map(|record| (begin, record)))
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &[u8]) -> (tempfile::TempDir, Source) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        potstill_shared::durable::write_file(&path, text).unwrap();
        (folder, Source::new(path))
    }

    #[test]
    fn one_bad_line_is_put_aside_with_its_number() {
        let mut text = "{\"problem\": \"p\", \"answer\": 3, \"level\": 2}\n".repeat(3);
        text.push_str("{\"problem\": \n\n");
        let (_folder, source) = source(text.as_bytes());
        let (problems, bad) = read_problems(&source).unwrap();
        assert_eq!(problems.len(), 3);
        assert_eq!(problems[0].answer.as_deref(), Some("3"));
        assert_eq!(problems[0].metadata["level"], 2);
        assert_eq!((bad.len(), bad[0].line), (1, 4));
    }

    #[test]
    fn many_bad_lines_stop_the_run() {
        let (_folder, source) = source(b"{\"problem\": \"p\"}\nnot json\n{\"answer\": 1}\n\xff\xfe\n");
        let error = read_problems(&source).unwrap_err().to_string();
        assert!(error.contains("3 of 4 rows are bad") && error.contains("row 2"), "{error}");
    }
}
