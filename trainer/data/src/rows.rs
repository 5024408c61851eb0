//! Table reader: yields one JSON object per row from JSON Lines, a JSON array, CSV, TSV or Parquet. All but Parquet
//! may be compressed with gzip or Zstandard.
//!
//! Files of any size are readable, because one row is in memory at a time (Parquet: one page per column).
//! Deliberately absent: the meaning of fields (`formats`, `jsonl`).

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Longest row in bytes. Longer lines are broken rows; a longer array element is an error.
const MAX_ROW_BYTES: u64 = 16 << 20;

/// Error that ends the reading of a file.
#[derive(Debug, thiserror::Error)]
#[error("cannot read `{path}`: {reason}")]
pub struct TableError {
    /// Path of the file.
    pub path: PathBuf,
    /// Cause of the error.
    pub reason: String,
}

/// Row of a table.
#[derive(Debug)]
pub struct Row {
    /// Line number in JSON Lines, row number in other formats; from 1.
    pub number: usize,
    /// Fields by name, or the reason why this row cannot be read.
    pub fields: Result<Map<String, Value>, BrokenRow>,
}

/// Row that cannot be read. Reading continues with the next row.
#[derive(Debug)]
pub struct BrokenRow {
    /// Reason why the row cannot be read.
    pub reason: String,
    /// First 200 characters of the row; empty for CSV.
    pub text: String,
}

/// Iterator over the rows of a file, in order. The first error ends the iteration.
pub type Rows = Box<dyn Iterator<Item = Result<Row, TableError>> + Send>;

/// Opens a table. The file extension determines the format; an unknown extension means JSON Lines.
///
/// # Errors
///
/// Returns [`TableError`] if the file cannot be opened or its header cannot be read.
pub fn open_table(path: &Path) -> Result<Rows, TableError> {
    let failed = {
        let path = path.to_owned();
        move |error: &dyn std::fmt::Display| TableError { path: path.clone(), reason: error.to_string() }
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let file = File::open(path).map_err(|error| failed(&error))?;
    if name.ends_with(".parquet") {
        let reader = SerializedFileReader::new(file).map_err(|error| failed(&error))?;
        let rows = RowIter::from_file_into(Box::new(reader)).zip(1..);
        return Ok(Box::new(rows.map(move |(row, number)| {
            let row = row.map_err(|error| failed(&error))?;
            let Value::Object(fields) = row.to_json_value() else { return Err(failed(&"no table")) };
            Ok(Row { number, fields: Ok(fields) })
        })));
    }
    let (mut input, name): (Box<dyn BufRead + Send>, &str) =
        match (name.strip_suffix(".gz"), name.strip_suffix(".zst").or_else(|| name.strip_suffix(".zstd"))) {
            (Some(inner), _) => (Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file))), inner),
            (None, Some(inner)) => {
                let decoder = zstd::Decoder::new(file).map_err(|error| failed(&error))?;
                (Box::new(BufReader::new(decoder)), inner)
            }
            (None, None) => (Box::new(BufReader::new(file)), &name),
        };
    if name.ends_with(".csv") || name.ends_with(".tsv") {
        let delimiter = if name.ends_with(".tsv") { b'\t' } else { b',' };
        return Ok(csv_rows(input, delimiter, failed));
    }
    // Published `.json` files contain either one array or JSON Lines; the first character decides.
    let first = input.fill_buf().map_err(|error| failed(&error))?;
    let first = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first);
    let array =
        name.ends_with(".json") && first.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    if array {
        Ok(Box::new(JsonArrayRows::new(input, failed)))
    } else {
        Ok(Box::new(JsonLinesRows::new(input, failed)))
    }
}

fn csv_rows(
    input: Box<dyn BufRead + Send>,
    delimiter: u8,
    failed: impl Fn(&dyn std::fmt::Display) -> TableError + Send + 'static,
) -> Rows {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(input);
    let header = match reader.headers() {
        Ok(header) => header.clone(),
        Err(error) => return Box::new(std::iter::once(Err(failed(&error)))),
    };
    let rows = reader.into_records().zip(1..);
    Box::new(rows.map(move |(record, number)| {
        let fields = match record {
            Ok(record) => {
                let cells = header.iter().zip(&record).map(|(name, cell)| (name.to_owned(), cell.into()));
                Ok(cells.collect())
            }
            Err(error) if error.is_io_error() => return Err(failed(&error)),
            Err(error) => Err(BrokenRow { reason: error.to_string(), text: String::new() }),
        };
        Ok(Row { number, fields })
    }))
}

/// Iterator over the rows of JSON Lines.
struct JsonLinesRows<F> {
    input: Box<dyn BufRead + Send>,
    buffer: Vec<u8>,
    number: usize,
    failed: F,
    over: bool,
}

impl<F> JsonLinesRows<F> {
    fn new(input: Box<dyn BufRead + Send>, failed: F) -> Self {
        Self { input, buffer: Vec::new(), number: 0, failed, over: false }
    }

    /// Fills the buffer with the next line that is not blank. Returns false at the end of the file. Cuts lines longer
    /// than [`MAX_ROW`].
    fn next_line(&mut self) -> std::io::Result<bool> {
        loop {
            self.buffer.clear();
            let read = self.input.by_ref().take(MAX_ROW_BYTES).read_until(b'\n', &mut self.buffer)?;
            if read == 0 {
                return Ok(false);
            }
            self.number += 1;
            if read as u64 == MAX_ROW_BYTES && self.buffer.last() != Some(&b'\n') {
                self.input.skip_until(b'\n')?;
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                return Ok(true);
            }
        }
    }
}

impl<F: Fn(&dyn std::fmt::Display) -> TableError> Iterator for JsonLinesRows<F> {
    type Item = Result<Row, TableError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        match self.next_line() {
            Ok(true) => {
                let fields = parse_object(&self.buffer).map_err(|reason| BrokenRow {
                    reason,
                    text: String::from_utf8_lossy(&self.buffer).chars().take(200).collect(),
                });
                Some(Ok(Row { number: self.number, fields }))
            }
            Ok(false) => None,
            Err(error) => {
                self.over = true;
                Some(Err((self.failed)(&error)))
            }
        }
    }
}

fn parse_object(line: &[u8]) -> Result<Map<String, Value>, String> {
    let text = std::str::from_utf8(line).map_err(|error| format!("not UTF-8: {error}"))?;
    match serde_json::from_str(text.trim_start_matches('\u{feff}')) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err("not a JSON object".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Iterator over the objects of one JSON array. An invalid element ends the iteration, because the start of the next
/// element is unknown.
struct JsonArrayRows<F> {
    input: Box<dyn BufRead + Send>,
    number: usize,
    failed: F,
    over: bool,
}

impl<F> JsonArrayRows<F> {
    fn new(input: Box<dyn BufRead + Send>, failed: F) -> Self {
        Self { input, number: 0, failed, over: false }
    }

    /// Skips white space, a byte-order mark, and the bracket or comma before an element. Returns false at the closing
    /// bracket.
    fn advance_to_element(&mut self) -> Result<bool, String> {
        let mut separated = false;
        loop {
            let byte = match self.input.fill_buf().map_err(|error| error.to_string())?.first() {
                None => return Err("the array has no end".to_owned()),
                Some(byte) => *byte,
            };
            let expected = if self.number == 0 { b'[' } else { b',' };
            match byte {
                b']' => return Ok(false),
                _ if byte.is_ascii_whitespace() || matches!(byte, 0xef | 0xbb | 0xbf) => {
                    self.input.consume(1)
                }
                _ if byte == expected && !separated => {
                    separated = true;
                    self.input.consume(1);
                }
                b'{' if separated => return Ok(true),
                _ => return Err(format!("`{}` where an object should begin", char::from(byte))),
            }
        }
    }
}

impl<F: Fn(&dyn std::fmt::Display) -> TableError> Iterator for JsonArrayRows<F> {
    type Item = Result<Row, TableError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let element = match self.advance_to_element() {
            Ok(false) => {
                self.over = true;
                return None;
            }
            Ok(true) => {
                let mut input =
                    serde_json::Deserializer::from_reader(self.input.by_ref().take(MAX_ROW_BYTES));
                Map::deserialize(&mut input).map_err(|error| error.to_string())
            }
            Err(problem) => Err(problem),
        };
        self.number += 1;
        match element {
            Ok(fields) => Some(Ok(Row { number: self.number, fields: Ok(fields) })),
            Err(problem) => {
                self.over = true;
                Some(Err((self.failed)(&format!("element {}: {problem}", self.number))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(name: &str, bytes: &[u8]) -> Vec<Result<Row, TableError>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        potstill_shared::durable::write_file(&path, bytes).unwrap();
        match open_table(&path) {
            Ok(rows) => rows.collect(),
            Err(error) => vec![Err(error)],
        }
    }

    fn fields(rows: Vec<Result<Row, TableError>>) -> Vec<Value> {
        rows.into_iter().map(|row| Value::Object(row.unwrap().fields.unwrap())).collect()
    }

    #[test]
    fn reads_equal_rows_from_every_format() {
        let expected =
            [serde_json::json!({"a": "x, \"y\"", "b": "1"}), serde_json::json!({"a": "é\n", "b": "2"})];
        let lines = expected.iter().map(|row| format!("{row}\n")).collect::<String>();
        let array = format!("\u{feff} [{} ,\n{}]\n", expected[0], expected[1]);
        let csv = "a,b\n\"x, \"\"y\"\"\",1\n\"é\n\",2\n";
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(csv.as_bytes()).unwrap();
        for (name, bytes) in [
            ("t.jsonl", lines.clone().into_bytes()),
            ("t.json", lines.clone().into_bytes()),
            ("t.json", array.into_bytes()),
            ("t.csv", csv.as_bytes().to_vec()),
            ("t.csv.gz", gz.finish().unwrap()),
            ("t.JSONL.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap()),
        ] {
            assert_eq!(fields(read(name, &bytes)), expected, "{name}");
        }
    }

    /// Reads a file that `tests/fixtures/make_tables.py` wrote with the `datasets` library.
    #[test]
    fn reads_parquet_files_of_the_datasets_library() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gsm8k.parquet");
        let rows = fields(open_table(&path).unwrap().collect());
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0]["answer"], "2 + 2 = 4\n#### 4");
        assert_eq!(rows[2]["tags"], serde_json::json!(["a", "b"]));
        assert_eq!(rows[1]["level"], Value::Null);
    }

    #[test]
    fn reports_broken_rows_and_bounds_their_length() {
        let rows = read("t.jsonl", b"{\"a\": 1}\n[1]\nnot json\n\xff\n{\"a\": 2}");
        let broken: Vec<usize> = rows
            .iter()
            .map(|row| row.as_ref().unwrap())
            .filter(|row| row.fields.is_err())
            .map(|row| row.number)
            .collect();
        assert_eq!((rows.len(), broken), (5, vec![2, 3, 4]));
        for (name, bytes, word) in [
            ("t.json", b"[{\"a\": 1}, 2]".as_slice(), "element 2: `2`"),
            ("t.json", b"[{\"a\": 1}", "no end"),
            ("t.json", b"[{\"a\": 1} {\"a\": 2}]", "element 2"),
            ("t.parquet", b"PAR1 nothing", "t.parquet"),
            ("t.jsonl.gz", b"no gzip", "t.jsonl.gz"),
            ("t.jsonl.zst", b"no zstd at all", "t.jsonl.zst"),
        ] {
            let rows = read(name, bytes);
            let error = rows.last().unwrap().as_ref().unwrap_err().to_string();
            assert!(error.contains(word), "{name}: {error}");
        }
        let long =
            [b"{\"a\": \"".as_slice(), &vec![b'x'; MAX_ROW_BYTES as usize], b"\"}\n{\"a\": 1}\n"].concat();
        let rows = read("t.jsonl", &long);
        assert!(rows[0].as_ref().unwrap().fields.is_err() && rows[1].as_ref().unwrap().fields.is_ok());
    }
}
