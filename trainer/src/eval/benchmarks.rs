//! The benchmarks: which files hold them, how their rows are read, how models are asked, how answers are judged.

use std::path::{Path, PathBuf};

use potstill_sandbox::Example;
use potstill_shared::id::ContentId;
use potstill_verify::verifier::Gold;
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::SmallRng};
use serde_json::Value;

/// A benchmark.
#[derive(Debug, Clone, Copy)]
pub struct Benchmark {
    /// Its name on the command line.
    pub name: &'static str,
    /// Names of its file, without `.jsonl`.
    files: &'static [&'static str],
    /// Where it is published.
    source: &'static str,
    kind: Kind,
    /// Samples per problem of the paper's profile and of the quick one.
    samples: (u32, u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Math,
    Choice,
    HumanEval,
    Mbpp,
    LiveCodeBench,
}

const ALL: [Benchmark; 10] = [
    bench("gsm8k", &["gsm8k_test", "gsm8k"], "openai/gsm8k", Kind::Math, (1, 1)),
    bench("math500", &["math500", "math_500"], "HuggingFaceH4/MATH-500", Kind::Math, (4, 1)),
    bench("aime24", &["aime24", "aime2024", "aime_2024"], "HuggingFaceH4/aime_2024", Kind::Math, (64, 4)),
    bench("aime25", &["aime25", "aime2025", "aime_2025"], "opencompass/AIME2025", Kind::Math, (64, 4)),
    bench("amc23", &["amc23"], "AI-MO/aimo-validation-amc", Kind::Math, (16, 1)),
    bench("gpqa", &["gpqa_diamond", "gpqa"], "Idavidrein/gpqa", Kind::Choice, (8, 1)),
    bench("humaneval", &["humaneval", "HumanEval"], "openai/openai_humaneval", Kind::HumanEval, (8, 1)),
    bench("mbpp", &["mbpp_test", "mbpp"], "google-research-datasets/mbpp", Kind::Mbpp, (8, 1)),
    bench(
        "lcb",
        &["livecodebench_v2", "livecodebench", "lcb"],
        "livecodebench/code_generation_lite",
        Kind::LiveCodeBench,
        (8, 1),
    ),
    // Rows of the user's own: `problem` and `answer`.
    bench("own", &[], "your own file", Kind::Math, (4, 1)),
];

const fn bench(
    name: &'static str,
    files: &'static [&'static str],
    source: &'static str,
    kind: Kind,
    samples: (u32, u32),
) -> Benchmark {
    Benchmark { name, files, source, kind, samples }
}

/// How many samples, and of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvalProfile {
    /// As published figures are made.
    Paper,
    /// One sample or a few.
    Quick,
}

/// One problem as it is asked.
#[derive(Debug, Clone)]
pub struct Item {
    /// Benchmark, as shown.
    pub bench: String,
    /// Its id in the benchmark.
    pub name: String,
    /// Hash of what is asked.
    pub id: ContentId,
    /// What is asked.
    pub prompt: String,
    /// What is right.
    pub gold: Gold,
    /// Level, where the source says.
    pub level: Option<String>,
}

/// A row that could not be read.
#[derive(Debug, Clone)]
pub struct BadRow {
    /// Line in the file.
    pub line: usize,
    /// Why.
    pub problem: String,
}

/// A benchmark that was read.
pub struct Loaded {
    /// Its name: that of the benchmark or of the user's file.
    pub name: String,
    /// Samples per problem, if not said otherwise.
    pub samples: u32,
    /// The problems.
    pub items: Vec<Item>,
    /// Rows that could not be read.
    pub bad: Vec<BadRow>,
    /// Whether programs are run.
    pub code: bool,
}

/// Reads a benchmark by its name from a folder, or the user's own file by its path.
pub fn load(name: &str, folder: &Path, profile: EvalProfile, seed: u64) -> anyhow::Result<Loaded> {
    let (benchmark, path) = find(name, folder)?;
    let text =
        std::fs::read_to_string(&path).map_err(|error| anyhow::anyhow!("`{}`: {error}", path.display()))?;
    let shown = if benchmark.name == "own" {
        path.file_stem().map_or(name.to_owned(), |stem| stem.to_string_lossy().into_owned())
    } else {
        benchmark.name.to_owned()
    };
    let (mut items, mut bad) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let read = serde_json::from_str::<Value>(line)
            .map_err(|error| error.to_string())
            .and_then(|row| item(&benchmark, &shown, index, &row, seed));
        match read {
            Ok(item) => items.push(item),
            Err(problem) => bad.push(BadRow { line: index + 1, problem }),
        }
    }
    anyhow::ensure!(
        !items.is_empty(),
        "`{}` holds no row of `{shown}` that can be read{}",
        path.display(),
        bad.first().map_or(String::new(), |bad| format!("; line {}: {}", bad.line, bad.problem))
    );
    let samples = if profile == EvalProfile::Paper { benchmark.samples.0 } else { benchmark.samples.1 };
    let code = matches!(benchmark.kind, Kind::HumanEval | Kind::Mbpp | Kind::LiveCodeBench);
    Ok(Loaded { name: shown, samples, items, bad, code })
}

fn find(name: &str, folder: &Path) -> anyhow::Result<(Benchmark, PathBuf)> {
    if name.ends_with(".jsonl") {
        let path = if Path::new(name).exists() { PathBuf::from(name) } else { folder.join(name) };
        return Ok((ALL[ALL.len() - 1], path));
    }
    let lower = name.to_lowercase();
    let known = ALL.iter().find(|benchmark| {
        benchmark.name == lower || benchmark.files.iter().any(|file| file.eq_ignore_ascii_case(&lower))
    });
    let names =
        || ALL.iter().filter(|one| one.name != "own").map(|one| one.name).collect::<Vec<_>>().join(", ");
    let benchmark = known.ok_or_else(|| {
        anyhow::anyhow!("no benchmark `{name}`; known are {}, and files that end in .jsonl", names())
    })?;
    let path =
        benchmark.files.iter().map(|file| folder.join(format!("{file}.jsonl"))).find(|path| path.exists());
    let path = path.ok_or_else(|| {
        anyhow::anyhow!(
            "`{}.jsonl` is not in `{}`; export the rows of `{}` as JSON lines there, or point --data at the folder that has them",
            benchmark.files[0],
            folder.display(),
            benchmark.source
        )
    })?;
    Ok((*benchmark, path))
}

fn text(row: &Value, names: &[&str]) -> Result<String, String> {
    let found =
        names.iter().find_map(|name| row.get(*name)).ok_or_else(|| format!("no field `{}`", names[0]))?;
    match found {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(format!("`{}` is neither text nor a number", names[0])),
    }
}

fn item(benchmark: &Benchmark, bench: &str, index: usize, row: &Value, seed: u64) -> Result<Item, String> {
    let name = text(row, &["id", "task_id", "unique_id", "question_id", "Record ID", "problem_idx"])
        .unwrap_or_else(|_| index.to_string());
    let (prompt, gold) = match benchmark.kind {
        Kind::Math => math(row)?,
        Kind::Choice => choice(row, seed, index)?,
        Kind::HumanEval => humaneval(row)?,
        Kind::Mbpp => mbpp(row)?,
        Kind::LiveCodeBench => livecodebench(row)?,
    };
    let level = row.get("level").or_else(|| row.get("difficulty")).and_then(|level| match level {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(format!("level {number}")),
        _ => None,
    });
    Ok(Item {
        bench: bench.to_owned(),
        name,
        id: ContentId::of(&["eval", bench, &prompt]),
        prompt,
        gold,
        level,
    })
}

const BOXED: &str = "Please reason step by step, and put your final answer within \\boxed{}.";

fn math(row: &Value) -> Result<(String, Gold), String> {
    let problem = text(row, &["problem", "question", "Problem"])?;
    let answer = text(row, &["answer", "Answer", "expected_answer"])?;
    // GSM8K as it is published: the steps, then `#### 72`.
    let answer = answer.rsplit("####").next().unwrap_or_default().trim().replace(',', "");
    let answer = if text(row, &["answer", "Answer", "expected_answer"])?.contains("####") {
        answer
    } else {
        text(row, &["answer", "Answer", "expected_answer"])?.trim().to_owned()
    };
    if answer.is_empty() {
        return Err("the known answer is empty".to_owned());
    }
    Ok((format!("{problem}\n\n{BOXED}"), Gold::Answer(answer)))
}

/// Four choices in an order that the seed decides, the same for every model.
fn choice(row: &Value, seed: u64, index: usize) -> Result<(String, Gold), String> {
    let question = text(row, &["Question", "question", "problem"])?;
    let right = text(row, &["Correct Answer", "correct_answer", "answer"])?;
    let mut choices = vec![right.trim().to_owned()];
    for number in 1..=3 {
        let names = [format!("Incorrect Answer {number}"), format!("incorrect_answer_{number}")];
        choices.push(text(row, &[names[0].as_str(), names[1].as_str()])?.trim().to_owned());
    }
    let mut random =
        SmallRng::seed_from_u64(ContentId::of(&[&seed.to_string(), &index.to_string(), &question]).seed());
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
    Ok((prompt, Gold::Choice(right)))
}

const PYTHON: &str = "Give the whole program in one ```python block at the end.";

fn humaneval(row: &Value) -> Result<(String, Gold), String> {
    let prompt = text(row, &["prompt", "problem"])?;
    let (tests, entry) = (text(row, &["test"])?, text(row, &["entry_point"])?);
    let asked = format!("Complete this Python function.\n\n```python\n{prompt}```\n\n{PYTHON}");
    Ok((asked, Gold::Functions { head: prompt, tests, entry }))
}

fn mbpp(row: &Value) -> Result<(String, Gold), String> {
    let problem = text(row, &["text", "prompt", "problem"])?;
    let list = row
        .get("test_list")
        .or_else(|| row.get("tests"))
        .and_then(Value::as_array)
        .ok_or("no field `test_list`")?;
    let tests: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
    let first = tests.first().ok_or("`test_list` is empty")?;
    let setup = text(row, &["test_setup_code", "test_setup"]).unwrap_or_default();
    let entry: String = first
        .split_once("assert")
        .map_or(*first, |(_, call)| call)
        .trim_start_matches(|c: char| !c.is_alphabetic() && c != '_')
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    // `assert set(f(x)) == …`, `assert math.isclose(f(x), …)`: the first name that is called and is no builtin.
    let entry = called(first).unwrap_or(entry);
    let asked =
        format!("{problem}\n\nYour code should pass these tests:\n\n{}\n\n{PYTHON}", tests.join("\n"));
    let gold =
        Gold::Functions { head: String::new(), tests: format!("{setup}\n{}", tests.join("\n")), entry };
    Ok((asked, gold))
}

fn called(test: &str) -> Option<String> {
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

/// Tests as JSON lists, public and private; private ones that are packed cannot be read and are an error.
fn livecodebench(row: &Value) -> Result<(String, Gold), String> {
    let question = text(row, &["question_content", "problem"])?;
    let starter = text(row, &["starter_code"]).unwrap_or_default();
    let mut all: Vec<Value> = Vec::new();
    for name in ["public_test_cases", "private_test_cases"] {
        let cases = match row.get(name) {
            None => continue,
            Some(Value::String(text)) if text.trim().is_empty() => continue,
            Some(Value::String(text)) => serde_json::from_str(text).map_err(|_| {
                format!("`{name}` is packed; unpack the tests to JSON before (the dataset's own loader does)")
            })?,
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
        let asked = format!("{question}\n\nRead from standard input and write to standard output. {PYTHON}");
        return Ok((asked, Gold::Prints(examples)));
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
            let arguments: Vec<String> = field(case, "input").lines().map(python_of).collect();
            format!("assert candidate({}) == {}", arguments.join(", "), python_of(&field(case, "output")))
        })
        .collect();
    let asked = format!("{question}\n\nUse this beginning:\n\n```python\n{starter}\n```\n\n{PYTHON}");
    let head =
        "from typing import *\nimport collections, itertools, functools, math, heapq, bisect, re, string\n"
            .to_owned();
    Ok((asked, Gold::Functions { head, tests: tests.join("\n"), entry }))
}

/// A JSON value as Python writes it.
fn python_of(json: &str) -> String {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(kind: &str, row: &Value) -> Result<Item, String> {
        let benchmark = ALL.iter().find(|benchmark| benchmark.name == kind).unwrap();
        item(benchmark, kind, 0, row, 7)
    }

    #[test]
    fn rows_are_read_as_they_are_published() {
        let gsm8k = of("gsm8k", &json!({"question": "q", "answer": "2+2=4\n#### 1,234"})).unwrap();
        assert!(matches!(gsm8k.gold, Gold::Answer(answer) if answer == "1234"));
        let math =
            of("math500", &json!({"problem": "q", "answer": "\\frac12", "level": 3, "unique_id": "u"}))
                .unwrap();
        assert_eq!((math.name.as_str(), math.level.as_deref()), ("u", Some("level 3")));
        let mbpp = of("mbpp", &json!({"text": "q", "test_list": ["assert set(f_x(1)) == {1}"]})).unwrap();
        assert!(matches!(mbpp.gold, Gold::Functions { entry, .. } if entry == "f_x"));
        let row = json!({"question_content": "q", "starter_code": "class Solution:", "metadata": "{\"func_name\": \"add\"}",
            "public_test_cases": "[{\"input\": \"[1, null]\\n\\\"a\\\"\", \"output\": \"true\", \"testtype\": \"functional\"}]"});
        match of("lcb", &row).unwrap().gold {
            Gold::Functions { tests, entry, .. } => {
                assert_eq!(
                    (tests.as_str(), entry.as_str()),
                    ("assert candidate([1, None], \"a\") == True", "Solution.add")
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn choices_are_shuffled_the_same_way_for_everyone() {
        let row = json!({"Question": "q", "Correct Answer": "right", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c"});
        let (one, two) = (of("gpqa", &row).unwrap(), of("gpqa", &row).unwrap());
        assert_eq!(one.prompt, two.prompt);
        let Gold::Choice(letter) = one.gold else { panic!() };
        assert!(one.prompt.contains(&format!("{letter}) right")));
        let letters: std::collections::BTreeSet<char> = (0..40)
            .filter_map(|index| match choice(&row, 7, index).unwrap().1 {
                Gold::Choice(letter) => Some(letter),
                _ => None,
            })
            .collect();
        assert_eq!(letters.len(), 4);
    }

    #[test]
    fn what_is_wrong_with_a_row_is_said() {
        for (kind, row, word) in [
            ("gsm8k", json!({"question": "q"}), "answer"),
            ("gsm8k", json!({"question": "q", "answer": ""}), "empty"),
            ("mbpp", json!({"text": "q", "test_list": []}), "empty"),
            ("lcb", json!({"question_content": "q", "private_test_cases": "eJx"}), "packed"),
            ("gpqa", json!({"Question": "q", "Correct Answer": "x"}), "Incorrect Answer 1"),
        ] {
            assert!(of(kind, &row).unwrap_err().contains(word));
        }
    }
}
