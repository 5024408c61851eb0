//! Benchmarks: their files, the parsing of rows, the prompts, and the reference answers or tests. Verifying completions
//! is left to `potstill-verify`.

mod livecodebench;

use std::path::{Path, PathBuf};

use anyhow::Context;
use potstill_data::hub::{self, LocatedFile};
use potstill_data::rows;
use potstill_shared::id::ContentId;
use potstill_verify::verifier::Reference;
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::SmallRng};
use serde_json::Value;

/// Definition of a benchmark.
#[derive(Debug, Clone, Copy)]
pub struct Benchmark {
    /// Name on the command line.
    pub name: &'static str,
    /// Names of its file in the benchmark folder, without extension.
    files: &'static [&'static str],
    /// Hub files as (repository, path).
    hub: &'static [(&'static str, &'static str)],
    kind: RowFormat,
    /// Samples per problem in the profiles `paper` and `quick`.
    samples: (u32, u32),
}

/// How rows of a benchmark are parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RowFormat {
    Math,
    Choice,
    HumanEval,
    Mbpp,
    LiveCodeBench,
}

/// Extensions of table files.
const EXTENSIONS: [&str; 8] =
    ["jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst", "json.gz", "csv.gz"];

const BENCHMARKS: [Benchmark; 10] = [
    benchmark(
        "gsm8k",
        &["gsm8k_test", "gsm8k"],
        &[("openai/gsm8k", "main/test-*.parquet")],
        RowFormat::Math,
        (1, 1),
    ),
    benchmark(
        "math500",
        &["math500", "math_500"],
        &[("HuggingFaceH4/MATH-500", "test.jsonl")],
        RowFormat::Math,
        (4, 1),
    ),
    benchmark(
        "aime24",
        &["aime24", "aime2024", "aime_2024"],
        &[("HuggingFaceH4/aime_2024", "data/train-*.parquet")],
        RowFormat::Math,
        (64, 4),
    ),
    benchmark(
        "aime25",
        &["aime25", "aime2025", "aime_2025"],
        &[("opencompass/AIME2025", "aime2025-*.jsonl")],
        RowFormat::Math,
        (64, 4),
    ),
    benchmark("amc23", &["amc23"], &[("math-ai/amc23", "*test*")], RowFormat::Math, (16, 1)),
    benchmark(
        "gpqa",
        &["gpqa_diamond", "gpqa"],
        &[("Idavidrein/gpqa", "gpqa_diamond.csv")],
        RowFormat::Choice,
        (8, 1),
    ),
    benchmark(
        "humaneval",
        &["humaneval", "HumanEval"],
        &[("openai/openai_humaneval", "openai_humaneval/test-*.parquet")],
        RowFormat::HumanEval,
        (8, 1),
    ),
    benchmark(
        "mbpp",
        &["mbpp_test", "mbpp"],
        &[("google-research-datasets/mbpp", "full/test-*.parquet")],
        RowFormat::Mbpp,
        (8, 1),
    ),
    // Release 2 consists of the first two files.
    benchmark(
        "lcb",
        &["livecodebench_v2", "livecodebench", "lcb"],
        &[
            ("livecodebench/code_generation_lite", "test.jsonl"),
            ("livecodebench/code_generation_lite", "test2.jsonl"),
        ],
        RowFormat::LiveCodeBench,
        (8, 1),
    ),
    // The user's own tables, with the columns `problem` and `answer`.
    benchmark("own", &[], &[], RowFormat::Math, (4, 1)),
];

/// Shorthand for a benchmark definition.
const fn benchmark(
    name: &'static str,
    files: &'static [&'static str],
    hub: &'static [(&'static str, &'static str)],
    kind: RowFormat,
    samples: (u32, u32),
) -> Benchmark {
    Benchmark { name, files, hub, kind, samples }
}

/// Profile that determines the number of samples and tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvalProfile {
    /// As many samples as published results use.
    Paper,
    /// One or a few samples per problem.
    Quick,
}

/// One problem of a benchmark.
#[derive(Debug, Clone)]
pub struct EvalProblem {
    /// Name of the benchmark or of the user's table.
    pub bench: String,
    /// Id of the problem in the benchmark.
    pub name: String,
    /// Hash of the prompt.
    pub id: ContentId,
    /// Prompt for the model.
    pub prompt: String,
    /// Reference answer or tests.
    pub gold: Reference,
    /// Level of the problem, if its source has one.
    pub level: Option<String>,
}

/// A row that could not be read.
#[derive(Debug, Clone)]
pub struct BadRow {
    /// Name of the file.
    pub file: String,
    /// Line or row number, from 1.
    pub line: usize,
    /// Reason.
    pub problem: String,
}

/// A benchmark that was loaded.
pub struct LoadedBenchmark {
    /// Name of the benchmark or of the user's table.
    pub name: String,
    /// Default number of samples per problem.
    pub samples: u32,
    /// The problems.
    pub items: Vec<EvalProblem>,
    /// Rows that could not be read.
    pub bad: Vec<BadRow>,
    /// Whether its verification runs programs.
    pub code: bool,
    /// Files from which the benchmark was read; hub files include the commit.
    pub files: Vec<String>,
}

/// Loads a benchmark by name, from `folder` or else from the hub, or the user's own table by path.
///
/// `seed` determines the order of choices. Unreadable rows are collected in `bad`. Fails if no row can be read.
pub fn load_benchmark(
    name: &str,
    folder: &Path,
    profile: EvalProfile,
    seed: u64,
) -> anyhow::Result<LoadedBenchmark> {
    let (benchmark, files) = locate_benchmark(name, folder)?;
    let shown = if benchmark.name == "own" {
        let stem = Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned();
        stem.split(['.', '*']).next().filter(|stem| !stem.is_empty()).unwrap_or("own").to_owned()
    } else {
        benchmark.name.to_owned()
    };
    let (mut items, mut bad) = (Vec::new(), Vec::new());
    for file in &files {
        for row in rows::open_table(&file.path)? {
            let row = row?;
            // The row index seeds the order of choices. It continues over the files of a benchmark, so each problem has
            // its own.
            let read = row.fields.map_err(|broken| broken.reason).and_then(|fields| {
                parse_row(&benchmark, &shown, items.len() + bad.len(), &Value::Object(fields), seed)
            });
            match read {
                Ok(item) => items.push(item),
                Err(problem) => bad.push(BadRow { file: file.shown.clone(), line: row.number, problem }),
            }
        }
    }
    let files: Vec<String> = files.into_iter().map(|file| file.shown).collect();
    anyhow::ensure!(
        !items.is_empty(),
        "`{}` holds no row of `{shown}` that can be read{}",
        files.join("`, `"),
        bad.first().map_or(String::new(), |bad| format!("; row {}: {}", bad.line, bad.problem))
    );
    let samples = if profile == EvalProfile::Paper { benchmark.samples.0 } else { benchmark.samples.1 };
    let code = matches!(benchmark.kind, RowFormat::HumanEval | RowFormat::Mbpp | RowFormat::LiveCodeBench);
    Ok(LoadedBenchmark { name: shown, samples, items, bad, code, files })
}

/// Finds the files of `NAME`, `NAME@REVISION` (always from the hub), or of a table's path or address.
fn locate_benchmark(name: &str, folder: &Path) -> anyhow::Result<(Benchmark, Vec<LocatedFile>)> {
    let own = BENCHMARKS[BENCHMARKS.len() - 1];
    if hub::is_hub_address(Path::new(name)) {
        return Ok((own, hub::resolve(Path::new(name))?));
    }
    if EXTENSIONS.iter().any(|extension| name.ends_with(&format!(".{extension}"))) {
        let path = if Path::new(name).exists() { PathBuf::from(name) } else { folder.join(name) };
        return Ok((own, hub::resolve(&path)?));
    }
    let (lower, revision) = match name.split_once('@') {
        Some((name, revision)) => (name.to_lowercase(), Some(revision)),
        None => (name.to_lowercase(), None),
    };
    let known = BENCHMARKS.iter().find(|benchmark| {
        benchmark.name == lower || benchmark.files.iter().any(|file| file.eq_ignore_ascii_case(&lower))
    });
    let names = || {
        BENCHMARKS.iter().filter(|one| one.name != "own").map(|one| one.name).collect::<Vec<_>>().join(", ")
    };
    let benchmark = known.ok_or_else(|| {
        anyhow::anyhow!(
            "no benchmark `{name}`; known are {}, and files that end in .{}",
            names(),
            EXTENSIONS.join(", .")
        )
    })?;
    let here = benchmark
        .files
        .iter()
        .flat_map(|file| EXTENSIONS.map(|extension| folder.join(format!("{file}.{extension}"))))
        .find(|path| path.exists());
    if let (Some(path), None) = (here, revision) {
        return Ok((*benchmark, hub::resolve(&path)?));
    }
    let mut located = Vec::new();
    for (repository, file) in benchmark.hub {
        let at = revision.map_or(String::new(), |revision| format!("@{revision}"));
        let address = format!("hf://datasets/{repository}{at}/{file}");
        let found = hub::resolve(Path::new(&address)).with_context(|| {
            format!(
                "`{name}` is not at hand: `{}` has no `{}.jsonl`, and the hub did not give it; put the rows there as JSON \
                 lines, or point --data at the folder that has them",
                folder.display(),
                benchmark.files[0]
            )
        })?;
        located.extend(found);
    }
    Ok((*benchmark, located))
}

/// Returns the first existing field of `names` as text. Fails if there is none, or if it is neither text nor a number.
fn text_field(row: &Value, names: &[&str]) -> Result<String, String> {
    let found =
        names.iter().find_map(|name| row.get(*name)).ok_or_else(|| format!("no field `{}`", names[0]))?;
    match found {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(format!("`{}` is neither text nor a number", names[0])),
    }
}

/// Converts a row to a problem.
fn parse_row(
    benchmark: &Benchmark,
    bench: &str,
    index: usize,
    row: &Value,
    seed: u64,
) -> Result<EvalProblem, String> {
    let name = text_field(row, &["id", "task_id", "unique_id", "question_id", "Record ID", "problem_idx"])
        .unwrap_or_else(|_| index.to_string());
    let (prompt, gold) = match benchmark.kind {
        RowFormat::Math => parse_math(row)?,
        RowFormat::Choice => parse_choice(row, seed, index)?,
        RowFormat::HumanEval => parse_humaneval(row)?,
        RowFormat::Mbpp => parse_mbpp(row)?,
        RowFormat::LiveCodeBench => livecodebench::parse_row(row)?,
    };
    let level = row.get("level").or_else(|| row.get("difficulty")).and_then(|level| match level {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(format!("level {number}")),
        _ => None,
    });
    Ok(EvalProblem {
        bench: bench.to_owned(),
        name,
        id: ContentId::from_parts(&["eval", bench, &prompt]),
        prompt,
        gold,
        level,
    })
}

const MATH_INSTRUCTION: &str = "Please reason step by step, and put your final answer within \\boxed{}.";

fn parse_math(row: &Value) -> Result<(String, Reference), String> {
    let problem = text_field(row, &["problem", "question", "Problem"])?;
    let answer = text_field(row, &["answer", "Answer", "expected_answer"])?;
    // GSM8K publishes the solution steps, followed by `#### 72`.
    let answer = answer.rsplit("####").next().unwrap_or_default().trim().replace(',', "");
    let answer = if text_field(row, &["answer", "Answer", "expected_answer"])?.contains("####") {
        answer
    } else {
        text_field(row, &["answer", "Answer", "expected_answer"])?.trim().to_owned()
    };
    if answer.is_empty() {
        return Err("the known answer is empty".to_owned());
    }
    Ok((format!("{problem}\n\n{MATH_INSTRUCTION}"), Reference::Answer(answer)))
}

/// Returns a prompt with four choices in random order. The order depends on the seed, the index and the question, so it
/// is equal for all models.
fn parse_choice(row: &Value, seed: u64, index: usize) -> Result<(String, Reference), String> {
    let question = text_field(row, &["Question", "question", "problem"])?;
    let right = text_field(row, &["Correct Answer", "correct_answer", "answer"])?;
    let mut choices = vec![right.trim().to_owned()];
    for number in 1..=3 {
        let names = [format!("Incorrect Answer {number}"), format!("incorrect_answer_{number}")];
        choices.push(text_field(row, &[names[0].as_str(), names[1].as_str()])?.trim().to_owned());
    }
    let mut random = SmallRng::seed_from_u64(
        ContentId::from_parts(&[&seed.to_string(), &index.to_string(), &question]).seed(),
    );
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.shuffle(&mut random);
    let letters = ['A', 'B', 'C', 'D'];
    let listed: Vec<String> =
        order.iter().zip(letters).map(|(at, letter)| format!("{letter}) {}", choices[*at])).collect();
    let right = order.iter().zip(letters).find(|(at, _)| **at == 0).map_or('A', |(_, letter)| letter);
    let prompt = format!(
        "{question}\n\n{}\n\nPlease reason step by step, and put the letter of your choice within \\boxed{{}}.",
        listed.join("\n")
    );
    Ok((prompt, Reference::Choice(right)))
}

const PYTHON_INSTRUCTION: &str = "Give the whole program in one ```python block at the end.";

fn parse_humaneval(row: &Value) -> Result<(String, Reference), String> {
    let prompt = text_field(row, &["prompt", "problem"])?;
    let (tests, entry) = (text_field(row, &["test"])?, text_field(row, &["entry_point"])?);
    let asked = format!("Complete this Python function.\n\n```python\n{prompt}```\n\n{PYTHON_INSTRUCTION}");
    Ok((asked, Reference::Functions { head: prompt, tests, entry }))
}

fn parse_mbpp(row: &Value) -> Result<(String, Reference), String> {
    let problem = text_field(row, &["text", "prompt", "problem"])?;
    let list = row
        .get("test_list")
        .or_else(|| row.get("tests"))
        .and_then(Value::as_array)
        .ok_or("no field `test_list`")?;
    let tests: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
    let first = tests.first().ok_or("`test_list` is empty")?;
    let setup = text_field(row, &["test_setup_code", "test_setup"]).unwrap_or_default();
    let entry: String = first
        .split_once("assert")
        .map_or(*first, |(_, call)| call)
        .trim_start_matches(|c: char| !c.is_alphabetic() && c != '_')
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    // For `assert set(f(x)) == …` or `assert math.isclose(f(x), …)`, take the first called name that is not a builtin.
    let entry = first_called_name(first).unwrap_or(entry);
    let asked = format!(
        "{problem}\n\nYour code should pass these tests:\n\n{}\n\n{PYTHON_INSTRUCTION}",
        tests.join("\n")
    );
    let gold =
        Reference::Functions { head: String::new(), tests: format!("{setup}\n{}", tests.join("\n")), entry };
    Ok((asked, gold))
}

/// Returns the first name in `test` that is called and is not a builtin.
fn first_called_name(test: &str) -> Option<String> {
    const BUILTINS: [&str; 15] = [
        "set", "list", "sorted", "tuple", "dict", "str", "int", "float", "abs", "len", "round", "sum",
        "isclose", "assert", "not",
    ];
    let mut name = String::new();
    for c in test.chars() {
        if c.is_alphanumeric() || c == '_' {
            name.push(c);
        } else {
            if c == '('
                && !name.is_empty()
                && !BUILTINS.contains(&name.as_str())
                && !name.starts_with(char::is_numeric)
            {
                return Some(name);
            }
            name.clear();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Parses a row of the named benchmark.
    fn parse_as(kind: &str, row: &Value) -> Result<EvalProblem, String> {
        let benchmark = BENCHMARKS.iter().find(|benchmark| benchmark.name == kind).unwrap();
        parse_row(benchmark, kind, 0, row, 7)
    }

    #[test]
    fn parses_rows_in_their_published_format() {
        let gsm8k = parse_as("gsm8k", &json!({"question": "q", "answer": "2+2=4\n#### 1,234"})).unwrap();
        assert!(matches!(gsm8k.gold, Reference::Answer(answer) if answer == "1234"));
        let math =
            parse_as("math500", &json!({"problem": "q", "answer": "\\frac12", "level": 3, "unique_id": "u"}))
                .unwrap();
        assert_eq!((math.name.as_str(), math.level.as_deref()), ("u", Some("level 3")));
        let mbpp =
            parse_as("mbpp", &json!({"text": "q", "test_list": ["assert set(f_x(1)) == {1}"]})).unwrap();
        assert!(matches!(mbpp.gold, Reference::Functions { entry, .. } if entry == "f_x"));
        let row = json!({"question_content": "q", "starter_code": "class Solution:", "metadata": "{\"func_name\": \"add\"}",
            "public_test_cases": "[{\"input\": \"[1, null]\\n\\\"a\\\"\", \"output\": \"true\", \"testtype\": \"functional\"}]"});
        match parse_as("lcb", &row).unwrap().gold {
            Reference::Functions { tests, entry, .. } => {
                assert_eq!(
                    (tests.as_str(), entry.as_str()),
                    ("assert candidate([1, None], \"a\") == True", "Solution.add")
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn order_of_choices_is_deterministic_and_covers_all_letters() {
        let row = json!({"Question": "q", "Correct Answer": "right", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c"});
        let (one, two) = (parse_as("gpqa", &row).unwrap(), parse_as("gpqa", &row).unwrap());
        assert_eq!(one.prompt, two.prompt);
        let Reference::Choice(letter) = one.gold else { panic!() };
        assert!(one.prompt.contains(&format!("{letter}) right")));
        let letters: std::collections::BTreeSet<char> = (0..40)
            .filter_map(|index| match parse_choice(&row, 7, index).unwrap().1 {
                Reference::Choice(letter) => Some(letter),
                _ => None,
            })
            .collect();
        assert_eq!(letters.len(), 4);
    }

    #[test]
    fn errors_of_invalid_rows_name_the_field() {
        for (kind, row, word) in [
            ("gsm8k", json!({"question": "q"}), "answer"),
            ("gsm8k", json!({"question": "q", "answer": ""}), "empty"),
            ("mbpp", json!({"text": "q", "test_list": []}), "empty"),
            ("gpqa", json!({"Question": "q", "Correct Answer": "x"}), "Incorrect Answer 1"),
        ] {
            assert!(parse_as(kind, &row).unwrap_err().contains(word));
        }
    }
}
