//! Problems in, records in and out as JSON lines. A row that cannot be read is put aside with its number and the reason; the
//! run goes on until more than a bounded share of the rows is bad.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use potstill_shared::durable::{DurableError, write_with};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::formats::Format;
use crate::hub::{HubError, Located, locate};
use crate::records::Problem;
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
}

fn problem_field() -> String {
    "problem".to_owned()
}

fn answer_field() -> String {
    "answer".to_owned()
}

/// The share of bad rows that stops a run, in percent.
pub const MAX_BAD_PERCENT: f64 = 1.0;

/// Reads the problems of a source.
pub fn read_problems(source: &Source) -> Result<(Vec<Problem>, Vec<Quarantined>), ReadError> {
    let (mut problems, mut bad, mut read) = (Vec::new(), Vec::new(), 0);
    'files: for Located { shown, path } in locate(&source.path)? {
        for row in rows::open(&path)? {
            if source.limit > 0 && problems.len() >= source.limit {
                break 'files;
            }
            let row = row?;
            read += 1;
            let (reason, text) = match row.fields {
                Ok(fields) => match problem(fields, source, format!("{shown}:{}", row.number)) {
                    Ok(problem) => {
                        problems.push(problem);
                        continue;
                    }
                    Err((reason, fields)) => {
                        (reason, Value::Object(fields).to_string().chars().take(200).collect())
                    }
                },
                Err(broken) => (broken.reason, broken.text),
            };
            bad.push(Quarantined { file: shown.clone(), line: row.number, reason, text });
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
        }),
        _ => Ok((problems, bad)),
    }
}

type Fields = Map<String, Value>;

fn problem(mut row: Fields, source: &Source, place: String) -> Result<Problem, (String, Fields)> {
    if let Some(format) = source.format {
        return match format.read(&row) {
            Ok((problem, answer)) => {
                row.retain(|_, value| value.as_str() != Some(problem.as_str()));
                let mut record = Problem::new(problem, answer, place);
                record.metadata = row;
                Ok(record)
            }
            Err(reason) => Err((reason, row)),
        };
    }
    let problem = match row.get(&source.problem) {
        Some(Value::String(text)) if !text.trim().is_empty() => text.clone(),
        Some(_) => return Err((format!("field `{}` is empty or not a string", source.problem), row)),
        None => return Err((format!("field `{}` is missing", source.problem), row)),
    };
    let answer = match row.get(&source.answer) {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        Some(_) => return Err((format!("field `{}` is neither a string nor a number", source.answer), row)),
    };
    row.remove(&source.problem);
    row.remove(&source.answer);
    let mut record = Problem::new(problem, answer, place);
    record.metadata = row;
    Ok(record)
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
    let io = |error| ReadError::Io { path: path.to_owned(), source: error };
    let reader = BufReader::new(File::open(path).map_err(io)?);
    let mut records = Vec::new();
    for (number, line) in reader.lines().enumerate() {
        let line = line.map_err(io)?;
        records.push(serde_json::from_str(&line).map_err(|error| ReadError::Line {
            path: path.to_owned(),
            line: number + 1,
            reason: error.to_string(),
        })?);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &[u8]) -> (tempfile::TempDir, Source) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        potstill_shared::durable::write_file(&path, text).unwrap();
        (folder, Source { path, format: None, problem: problem_field(), answer: answer_field(), limit: 0 })
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
