//! `potstill verify --pairs`: compares pairs of a reference answer and an answer, and prints one JSON verdict per pair,
//! in order. No model is called.

use std::io::{BufRead, Read, Write};
use std::path::PathBuf;

use anyhow::Context;
use potstill_verify::{Profile, compare_with_profile};
use serde::{Deserialize, Serialize};

/// Maximum length of a line in bytes.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Arguments of `potstill verify --pairs`.
#[derive(clap::Args)]
pub struct PairArguments {
    /// JSON lines of `{"gold": …, "answer": …}`, `-` for standard input. Prints `{"equal": true|false|null, "why": …}`
    /// for each.
    #[arg(long, value_name = "FILE.jsonl")]
    pub pairs: Option<PathBuf>,
    /// `strict` (undecidable pairs are null) or `compat` (verdicts of the Math-Verify package).
    #[arg(long, default_value = "strict", value_parser = parse_profile, requires = "pairs")]
    pub profile: Profile,
}

/// Parses the name of a profile.
fn parse_profile(text: &str) -> Result<Profile, String> {
    match text {
        "strict" => Ok(Profile::Strict),
        "compat" => Ok(Profile::Compat),
        _ => Err("one of strict, compat".to_owned()),
    }
}

#[derive(Deserialize)]
struct AnswerPair {
    gold: String,
    answer: String,
}

#[derive(Serialize)]
struct VerdictLine<'a> {
    equal: Option<bool>,
    why: &'a str,
}

/// Prints the verdicts on the pairs of a file, or of standard input for `-`.
pub fn print_verdicts(path: &std::path::Path, profile: Profile) -> anyhow::Result<()> {
    let stdout = std::io::stdout().lock();
    if path.as_os_str() == "-" {
        return write_verdicts(std::io::stdin().lock(), stdout, profile);
    }
    let file = std::fs::File::open(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    write_verdicts(std::io::BufReader::new(file), stdout, profile)
}

/// Writes one verdict per line of input. A malformed line gets the verdict null with the error; blank lines are
/// skipped.
fn write_verdicts(mut input: impl BufRead, output: impl Write, profile: Profile) -> anyhow::Result<()> {
    let mut output = std::io::BufWriter::new(output);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if input.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let (equal, why) = match serde_json::from_slice::<AnswerPair>(&line) {
            Ok(pair) => {
                let verdict = compare_with_profile(&pair.gold, &pair.answer, profile);
                (verdict.equal, verdict.why)
            }
            Err(error) => (None, format!("line {number} is no pair of `gold` and `answer`: {error}")),
        };
        serde_json::to_writer(&mut output, &VerdictLine { equal, why: &why })?;
        output.write_all(b"\n")?;
    }
    output.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_one_verdict_per_line_in_order() {
        let input = "{\"gold\": \"7\", \"answer\": \"7.0\"}\n\nno pair\n{\"gold\": \"7\", \"answer\": \"8\", \"more\": 1}\n";
        let mut output = Vec::new();
        write_verdicts(input.as_bytes(), &mut output, Profile::Strict).unwrap();
        let lines: Vec<serde_json::Value> = String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let equal: Vec<_> = lines.iter().map(|line| line["equal"].as_bool()).collect();
        assert_eq!(equal, [Some(true), None, Some(false)]);
        assert!(lines[1]["why"].as_str().unwrap().contains("line 3"));
    }
}
