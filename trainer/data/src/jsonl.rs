//! JSON Lines: reads problems from sources of any table format, and reads and writes the records of stage files.
//!
//! A row that cannot be read goes to the quarantine with its number and the reason. Reading fails once more than
//! [`MAX_BAD_PERCENT`] of the rows are bad. Deliberately absent: deduplication and decontamination.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use potstill_shared::durable::{DurableError, write_file_with};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::formats::{DatasetFormat, parse_program_tests, parse_trace};
use crate::hub::{HubError, LocatedFile, resolve};
use crate::records::{Problem, SourceTrace};
use crate::rows::{self, TableError};

/// Error while reading a source or a stage file.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be opened or read.
    #[error("cannot read `{path}`: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The file of a source is not a valid table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A hub address is invalid or its files cannot be fetched.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// More rows than the limit cannot be read.
    #[error("`{path}`: {bad} of {rows} rows are bad, more than {limit} %; the first is row {row}: {reason}")]
    TooManyBadRows {
        /// File of the first bad row.
        path: String,
        /// Number of bad rows.
        bad: usize,
        /// Number of rows read.
        rows: usize,
        /// Limit in percent of the rows.
        limit: f64,
        /// Number of the first bad row, from 1.
        row: usize,
        /// Reason why the first bad row cannot be read.
        reason: String,
    },
    /// A line of a stage file is not a valid record.
    #[error("`{path}` line {line}: {reason}")]
    InvalidLine {
        /// Path of the file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// Message of the JSON parser.
        reason: String,
    },
}

/// Row of a source that cannot be read: one record of the quarantine file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantinedRow {
    /// File path, or hub address with its commit.
    pub file: String,
    /// Line number in JSON Lines, row number in other formats; from 1.
    pub line: usize,
    /// Reason why the row cannot be read.
    pub reason: String,
    /// First 200 characters of the row.
    pub text: String,
}

/// Source of problems: one entry of `collect.sources` in a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// File path or hub address (`hf://datasets/…`, `ms://datasets/…`). Formats: JSON Lines, JSON array, CSV, TSV,
    /// Parquet. All but Parquet may be compressed (`.gz`, `.zst`).
    pub path: PathBuf,
    /// Known dataset format. If set, `problem` and `answer` are ignored.
    #[serde(default)]
    pub format: Option<DatasetFormat>,
    /// Name of the field with the problem text.
    #[serde(default = "problem_field")]
    pub problem: String,
    /// Name of the field with the reference answer.
    #[serde(default = "answer_field")]
    pub answer: String,
    /// Largest number of problems; 0 for all rows.
    #[serde(default)]
    pub limit: usize,
    /// Whether to take the traces of the rows, so that no teacher generates new ones.
    #[serde(default)]
    pub traces: bool,
    /// Field with reasoning and answer in one text. Applies only with `traces` and without `format`.
    #[serde(default)]
    pub trace: Option<String>,
    /// Field with the tests of a program (`inputs` and `outputs`). The default for OpenThoughts-114k is `test_cases`.
    #[serde(default)]
    pub tests: Option<String>,
    /// Model that wrote the traces, where the format does not name one.
    #[serde(default)]
    pub teacher: Option<String>,
    /// License of the rows (SPDX id), for dataset and model cards. The default is the license in the hub's card.
    #[serde(default)]
    pub licence: Option<String>,
}

impl Source {
    /// Returns the field that holds program tests, if there is one.
    pub fn tests_field(&self) -> Option<&str> {
        let known = (self.format == Some(DatasetFormat::OpenThoughts114k)).then_some("test_cases");
        self.tests.as_deref().or(known)
    }

    /// Creates a source with the fields `problem` and `answer` and no limit.
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

/// Largest tolerated share of bad rows, in percent. One bad row is always tolerated.
pub const MAX_BAD_PERCENT: f64 = 1.0;
/// Largest number of quarantined rows of one source; reading stops beyond.
const MAX_QUARANTINED_ROWS: usize = 100_000;

/// Largest metadata value, in bytes; longer ones are discarded.
const MAX_METADATA_BYTES: usize = 1024;

/// Calls `take` for each problem of a source, in order, and returns the quarantined rows.
///
/// # Errors
///
/// Returns [`ReadError`] for unreadable files or too many bad rows, and any error of `take`.
pub fn for_each_problem<E: From<ReadError>>(
    source: &Source,
    mut take: impl FnMut(Problem) -> Result<(), E>,
) -> Result<Vec<QuarantinedRow>, E> {
    let (mut good, mut bad, mut read) = (0, Vec::new(), 0usize);
    'files: for LocatedFile { shown, path } in resolve(&source.path).map_err(ReadError::from)? {
        for row in rows::open_table(&path).map_err(ReadError::from)? {
            if source.limit > 0 && good >= source.limit {
                break 'files;
            }
            let row = row.map_err(ReadError::from)?;
            read += 1;
            let (reason, text) = match row.fields {
                Ok(fields) => match parse_problem(fields, source, format!("{shown}:{}", row.number)) {
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
            bad.push(QuarantinedRow { file: shown.clone(), line: row.number, reason, text });
            // Bounds the memory of the quarantine. A source with more bad rows most likely has another format.
            if bad.len() > MAX_QUARANTINED_ROWS {
                break 'files;
            }
        }
    }
    // In a source with fewer than 100 rows, one bad row would already exceed the share.
    let allowed = ((read as f64 * MAX_BAD_PERCENT / 100.0).floor() as usize).max(1);
    match bad.first() {
        Some(first) if bad.len() > allowed => Err(ReadError::TooManyBadRows {
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

/// Reads all problems of a source into memory, with the quarantined rows.
pub fn read_problems(source: &Source) -> Result<(Vec<Problem>, Vec<QuarantinedRow>), ReadError> {
    let mut problems = Vec::new();
    let bad = for_each_problem::<ReadError>(source, |problem| {
        problems.push(problem);
        Ok(())
    })?;
    Ok((problems, bad))
}

type Fields = Map<String, Value>;

fn parse_problem(mut row: Fields, source: &Source, place: String) -> Result<Problem, (String, Fields)> {
    let (problem, answer) = match source.format {
        Some(format) => match format.parse_problem(&row) {
            Ok(read) => read,
            Err(reason) => return Err((reason, row)),
        },
        None => match parse_mapped_fields(&row, source) {
            Ok(read) => read,
            Err(reason) => return Err((reason, row)),
        },
    };
    let traces = if source.traces { parse_traces(&row, source) } else { Vec::new() };
    if source.traces && traces.is_empty() {
        return Err(("the row holds no chain of thought with thinking and answer".to_owned(), row));
    }
    let tests =
        source.tests_field().and_then(|field| parse_program_tests(&row.remove(field)?)).unwrap_or_default();
    if source.format.is_none() {
        row.remove(&source.problem);
        row.remove(&source.answer);
    }
    // Every stage copies the metadata, so the repeated problem text and long values stay out.
    row.retain(|_, value| match value {
        Value::String(text) => *text != problem && text.len() <= MAX_METADATA_BYTES,
        Value::Array(_) | Value::Object(_) => value.to_string().len() <= MAX_METADATA_BYTES,
        _ => true,
    });
    let mut record = Problem::new(problem, answer, place);
    record.metadata = row;
    record.traces = traces;
    record.tests = tests;
    Ok(record)
}

/// Returns problem and answer from the fields that the recipe names. The error states which field is missing or of
/// the wrong type.
fn parse_mapped_fields(row: &Fields, source: &Source) -> Result<(String, Option<String>), String> {
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

fn parse_traces(row: &Fields, source: &Source) -> Vec<SourceTrace> {
    let mut traces = match (source.format, &source.trace) {
        (Some(format), _) => format.parse_traces(row),
        (None, Some(field)) => {
            let text = row.get(field).and_then(Value::as_str);
            text.and_then(|text| parse_trace("unknown", text)).into_iter().collect()
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

/// Writes records as JSON Lines, atomically: a crash leaves the old file or the complete new one.
pub fn write_records<T: Serialize>(path: &Path, records: &[T]) -> Result<(), DurableError> {
    write_file_with(path, |file| {
        use std::io::Write;
        for record in records {
            serde_json::to_writer(&mut *file, record)?;
            file.write_all(b"\n")?;
        }
        Ok(())
    })
}

/// Reads a file of [`write_records`] into memory. Any invalid line is an error.
pub fn read_records<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Vec<T>, ReadError> {
    iter_records(path)?.map(|record| record.map(|(_, record)| record)).collect()
}

/// Iterates over the records of a JSON Lines file, each with the byte offset of its line.
pub fn iter_records<T: for<'de> Deserialize<'de>>(
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
                let record = serde_json::from_str(line.trim_end()).map_err(|error| ReadError::InvalidLine {
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
    fn quarantines_one_bad_line_with_its_number() {
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
    fn fails_when_too_many_lines_are_bad() {
        let (_folder, source) = source(b"{\"problem\": \"p\"}\nnot json\n{\"answer\": 1}\n\xff\xfe\n");
        let error = read_problems(&source).unwrap_err().to_string();
        assert!(error.contains("3 of 4 rows are bad") && error.contains("row 2"), "{error}");
    }
}
