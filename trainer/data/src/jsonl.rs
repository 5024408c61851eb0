//! JSONL in and out. A line that cannot be read is put aside with its number and the reason; the run goes on until more
//! than a bounded share of the lines is bad.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use potstill_shared::durable::{DurableError, write_with};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::records::Problem;

/// Longest line that is read.
const MAX_LINE: u64 = 16 << 20;

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
    /// Too many lines are bad.
    #[error(
        "`{path}`: {bad} of {lines} lines are bad, more than {limit} %; the first is line {line}: {reason}"
    )]
    TooManyBad {
        /// The file.
        path: PathBuf,
        /// Bad lines.
        bad: usize,
        /// Lines in all.
        lines: usize,
        /// The share allowed, in percent.
        limit: f64,
        /// Number of the first bad line.
        line: usize,
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

/// A line that was put aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// The file.
    pub file: String,
    /// Number of the line, from 1.
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
    /// JSONL file.
    pub path: PathBuf,
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

/// The share of bad lines that stops a run, in percent.
pub const MAX_BAD_PERCENT: f64 = 1.0;

/// Reads the problems of a source.
pub fn read_problems(source: &Source) -> Result<(Vec<Problem>, Vec<Quarantined>), ReadError> {
    let path = &source.path;
    let io = |error| ReadError::Io { path: path.clone(), source: error };
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let (mut problems, mut bad, mut lines) = (Vec::new(), Vec::new(), 0);
    let mut buffer = Vec::new();
    while source.limit == 0 || problems.len() < source.limit {
        buffer.clear();
        let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut buffer).map_err(io)?;
        if read == 0 {
            break;
        }
        lines += 1;
        if read as u64 == MAX_LINE && buffer.last() != Some(&b'\n') {
            skip_line(&mut reader).map_err(io)?;
        }
        if buffer.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match parse_problem(&buffer, source, lines) {
            Ok(problem) => problems.push(problem),
            Err(reason) => bad.push(Quarantined {
                file: path.display().to_string(),
                line: lines,
                reason,
                text: String::from_utf8_lossy(&buffer).chars().take(200).collect(),
            }),
        }
    }
    // A handful of rows must not stop a run by one bad line alone.
    let allowed = ((lines as f64 * MAX_BAD_PERCENT / 100.0).floor() as usize).max(1);
    match bad.first() {
        Some(first) if bad.len() > allowed => Err(ReadError::TooManyBad {
            path: path.clone(),
            bad: bad.len(),
            lines,
            limit: MAX_BAD_PERCENT,
            line: first.line,
            reason: first.reason.clone(),
        }),
        _ => Ok((problems, bad)),
    }
}

fn skip_line(reader: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let chunk = reader.fill_buf()?;
        let (used, done) = match chunk.iter().position(|&byte| byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (chunk.len(), chunk.is_empty()),
        };
        reader.consume(used);
        if done {
            return Ok(());
        }
    }
}

fn parse_problem(line: &[u8], source: &Source, number: usize) -> Result<Problem, String> {
    let text = std::str::from_utf8(line).map_err(|error| format!("not UTF-8: {error}"))?;
    let row: Value =
        serde_json::from_str(text.trim_start_matches('\u{feff}')).map_err(|error| error.to_string())?;
    let Value::Object(mut row) = row else { return Err("not a JSON object".to_owned()) };
    let problem = match row.remove(&source.problem) {
        Some(Value::String(text)) if !text.trim().is_empty() => text,
        Some(_) => return Err(format!("field `{}` is empty or not a string", source.problem)),
        None => return Err(format!("field `{}` is missing", source.problem)),
    };
    let answer = match row.remove(&source.answer) {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text),
        Some(Value::Number(number)) => Some(number.to_string()),
        Some(_) => return Err(format!("field `{}` is neither a string nor a number", source.answer)),
    };
    let mut record = Problem::new(problem, answer, format!("{}:{number}", source.path.display()));
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
        (folder, Source { path, problem: problem_field(), answer: answer_field(), limit: 0 })
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
        assert!(error.contains("3 of 4 lines are bad") && error.contains("line 2"), "{error}");
    }
}
