//! Rows of LiveCodeBench. A problem asks for a program with standard input and output, or for a function. Private tests
//! are packed as its loader expects: base64 of zlib of a pickled JSON string.

use std::io::Read;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use potstill_sandbox::Example;
use potstill_verify::verifier::Reference;
use serde_json::Value;

use super::{PYTHON_INSTRUCTION, text_field};

/// Maximum size of an unpacked list of tests, in bytes.
const MAX_TESTS_BYTES: u64 = 512 << 20;

/// Converts a row to prompt and tests. Public and private tests are JSON lists; private ones may be packed.
pub(super) fn parse_row(row: &Value) -> Result<(String, Reference), String> {
    let question = text_field(row, &["question_content", "problem"])?;
    let starter = text_field(row, &["starter_code"]).unwrap_or_default();
    let mut all: Vec<Value> = Vec::new();
    for name in ["public_test_cases", "private_test_cases"] {
        let cases = match row.get(name) {
            None => continue,
            Some(Value::String(text)) if text.trim().is_empty() => continue,
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(cases) => cases,
                Err(_) => {
                    let cases = unpack_string(text).map_err(|problem| format!("`{name}`: {problem}"))?;
                    serde_json::from_str(&cases).map_err(|error| format!("`{name}`: {error}"))?
                }
            },
            Some(other) => other.clone(),
        };
        all.extend(cases.as_array().ok_or_else(|| format!("`{name}` is no list"))?.iter().cloned());
    }
    if all.is_empty() {
        return Err("no test cases".to_owned());
    }
    let field =
        |case: &Value, name: &str| case.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let functional = all.iter().any(|case| field(case, "testtype") == "functional");
    if !functional {
        let examples = all
            .iter()
            .map(|case| Example { input: field(case, "input"), output: field(case, "output") })
            .collect();
        let asked = format!(
            "{question}\n\nRead from standard input and write to standard output. {PYTHON_INSTRUCTION}"
        );
        return Ok((asked, Reference::Prints(examples)));
    }
    let metadata = match row.get("metadata") {
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_default(),
        Some(other) => other.clone(),
        None => Value::Null,
    };
    let function =
        metadata.get("func_name").and_then(Value::as_str).ok_or("`metadata.func_name` is missing")?;
    let entry =
        if starter.contains("class Solution") { format!("Solution.{function}") } else { function.to_owned() };
    let tests: Vec<String> = all
        .iter()
        .map(|case| {
            let arguments: Vec<String> = field(case, "input").lines().map(python_literal).collect();
            format!(
                "assert candidate({}) == {}",
                arguments.join(", "),
                python_literal(&field(case, "output"))
            )
        })
        .collect();
    let asked =
        format!("{question}\n\nUse this beginning:\n\n```python\n{starter}\n```\n\n{PYTHON_INSTRUCTION}");
    let head =
        "from typing import *\nimport collections, itertools, functools, math, heapq, bisect, re, string\n"
            .to_owned();
    Ok((asked, Reference::Functions { head, tests: tests.join("\n"), entry }))
}

/// Returns a JSON value in Python's notation. Text that is not JSON is returned unchanged.
fn python_literal(json: &str) -> String {
    fn show(value: &Value) -> String {
        match value {
            Value::Null => "None".to_owned(),
            Value::Bool(true) => "True".to_owned(),
            Value::Bool(false) => "False".to_owned(),
            Value::Array(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(", ")),
            Value::Object(map) => {
                let pairs: Vec<String> = map
                    .iter()
                    .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), show(value)))
                    .collect();
                format!("{{{}}}", pairs.join(", "))
            }
            other => other.to_string(),
        }
    }
    serde_json::from_str::<Value>(json.trim()).map_or_else(|_| json.trim().to_owned(), |value| show(&value))
}

/// Unpacks a field and returns its string. Only the one pickled string is parsed; no pickle instruction is executed.
fn unpack_string(packed: &str) -> Result<String, String> {
    let bytes =
        STANDARD.decode(packed.trim()).map_err(|error| format!("neither JSON nor base64: {error}"))?;
    let mut pickle = Vec::new();
    let mut limited = flate2::read::ZlibDecoder::new(bytes.as_slice()).take(MAX_TESTS_BYTES + 1);
    limited.read_to_end(&mut pickle).map_err(|error| format!("not packed by zlib: {error}"))?;
    if pickle.len() as u64 > MAX_TESTS_BYTES {
        return Err(format!("unpacks to more than {} MiB", MAX_TESTS_BYTES >> 20));
    }
    read_pickled_string(&pickle)
        .and_then(|bytes| std::str::from_utf8(bytes).ok())
        .map(str::to_owned)
        .ok_or_else(|| "holds no pickled string".to_owned())
}

/// Returns the bytes of a pickled string: the protocol (`\x80 n`), an optional frame (`\x95`), then a string with a
/// length of one, four or eight bytes (`\x8c`, `X`, `\x8d`).
fn read_pickled_string(pickle: &[u8]) -> Option<&[u8]> {
    let mut rest = pickle.strip_prefix(&[0x80])?.get(1..)?;
    if let Some(framed) = rest.strip_prefix(&[0x95]) {
        rest = framed.get(8..)?;
    }
    let (kind, rest) = rest.split_first()?;
    let width = match kind {
        0x8c => 1,
        b'X' => 4,
        0x8d => 8,
        _ => return None,
    };
    let mut length = [0; 8];
    length[..width].copy_from_slice(rest.get(..width)?);
    rest.get(width..)?.get(..usize::try_from(u64::from_le_bytes(length)).ok()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Two tests, packed by Python with two pickle protocols:
    /// `base64.b64encode(zlib.compress(pickle.dumps(json.dumps(…), protocol)))`.
    const PACKED: [&str; 2] = [
        "eJxrYIooZWBgiK5WyswrKC1RslJQMlQwislT0lFQyi8tgQoZg7glqcUlJZUFqSCB4pKUzDylWh0FJH3GCjGlBgapluiazXBoji1k0AMACbAlCw==",
        "eJxrYJlayQABPaXR1UqZeQWlJUpWCkqGCkYxeUo6Ckr5pSVQIWMQtyS1uKSksiAVJFBckpKZp1Sro4Ckz1ghptTAINUSXbMZDs2xU/QAiAEmcg==",
    ];

    #[test]
    fn unpacks_tests_packed_by_python() {
        for packed in PACKED {
            let row = json!({"question_content": "q", "private_test_cases": packed});
            let Reference::Prints(examples) = parse_row(&row).unwrap().1 else { panic!() };
            assert_eq!(
                (examples.len(), examples[1].input.as_str(), examples[1].output.as_str()),
                (2, "3 é\n", "6")
            );
        }
    }

    #[test]
    fn rejects_malformed_packed_tests() {
        let zipped = |bytes: &[u8]| {
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut encoder, bytes).unwrap();
            STANDARD.encode(encoder.finish().unwrap())
        };
        for (packed, word) in [
            ("{broken".to_owned(), "base64"),
            ("aGVsbG8=".to_owned(), "zlib"),
            (zipped(b"cos\nsystem\n(S'true'\ntR."), "no pickled string"),
            (zipped(b"\x80\x04X\xff\xff\xff\xffshort"), "no pickled string"),
            (zipped(b"\x80\x04X\x01\0\0\0{."), "private_test_cases"),
        ] {
            let row = json!({"question_content": "q", "private_test_cases": packed});
            let problem = parse_row(&row).unwrap_err();
            assert!(problem.contains(word), "{problem}");
        }
    }
}
