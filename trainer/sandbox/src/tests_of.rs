//! Tests of programs. Programs that read and print are compared by what they print. Functions are called from a second
//! process, where the tests run: it asks over a pipe for the value of each call and gets plain values back, so the
//! expected values and the asserts are out of the program's reach.

use std::process::Stdio;

use crate::process::Ended;
use crate::{Sandbox, SandboxError};

/// Input and the output that is expected.
#[derive(Debug, Clone)]
pub struct Example {
    /// What the program reads.
    pub input: String,
    /// What it should print.
    pub output: String,
}

/// Whether a program is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// All tests passed.
    pub passed: bool,
    /// What went wrong first, or how many tests passed.
    pub why: String,
}

fn failed(why: impl Into<String>) -> Verdict {
    Verdict { passed: false, why: why.into() }
}

const ANSWERER: &str = include_str!("answerer.py");
const TESTER: &str = include_str!("tester.py");

impl Sandbox {
    /// Runs the program on each input and compares what it prints: line by line without trailing white space, else word by
    /// word with numbers compared by value.
    pub fn prints(&self, program: &str, examples: &[Example]) -> Result<Verdict, SandboxError> {
        for (index, example) in examples.iter().enumerate() {
            let number = index + 1;
            let output = self.python_program(program, example.input.as_bytes())?;
            match output.ended {
                Ended::Exit(0) => {}
                Ended::Refused => {
                    return Err(SandboxError::NoIsolation(last_line(&output.stderr)));
                }
                Ended::Exit(code) => {
                    return Ok(failed(format!(
                        "test {number}: ended with {code}: {}",
                        last_line(&output.stderr)
                    )));
                }
                other => return Ok(failed(format!("test {number}: {}", describe(other)))),
            }
            let Ok(printed) = std::str::from_utf8(&output.stdout) else {
                return Ok(failed(format!("test {number}: printed something that is no text")));
            };
            if !same_output(printed, &example.output) {
                return Ok(failed(format!("test {number}: printed something else")));
            }
        }
        Ok(Verdict { passed: true, why: format!("{} tests passed", examples.len()) })
    }

    /// Runs test code (asserts, or a function `check(candidate)`) against the functions of a program. `entry` is what
    /// `candidate` stands for: `name` or `Class.method`. Other functions of the program are reached by their names.
    pub fn functions(&self, program: &str, tests: &str, entry: &str) -> Result<Verdict, SandboxError> {
        let arguments =
            |driver: &str, code: &str| ["-I", "-c", driver, code, entry].map(str::to_owned).to_vec();
        let start = |source| SandboxError::Start { program: self.helper.clone(), source };
        let (ask_out, ask_in) = std::io::pipe().map_err(start)?;
        let (answer_out, answer_in) = std::io::pipe().map_err(start)?;
        let _answerer =
            self.start(arguments(ANSWERER, program), Stdio::from(ask_out), Stdio::from(answer_in))?;
        let tester = self.start(arguments(TESTER, tests), Stdio::from(answer_out), Stdio::from(ask_in))?;
        let output = tester.finish(self.limits.wall, self.limits.output);
        let said = last_line(&output.stderr);
        Ok(match output.ended {
            // Only the tests end with this, and only after the last of them.
            Ended::Exit(PASSED) => Verdict { passed: true, why: "the tests passed".to_owned() },
            Ended::Refused => return Err(SandboxError::NoIsolation(said)),
            Ended::Exit(_) => failed(if said.is_empty() { "the tests failed".to_owned() } else { said }),
            other => failed(describe(other)),
        })
    }
}

/// Status of tests that have passed.
const PASSED: u8 = 42;

fn describe(ended: Ended) -> String {
    match ended {
        Ended::Exit(code) => format!("ended with {code}"),
        // The limit on processor time ends the first process of a namespace with 9.
        Ended::Signal(9 | 24) => "used up its time".to_owned(),
        Ended::Signal(signal) => format!("was ended by signal {signal}"),
        Ended::TimedOut => "took too long".to_owned(),
        Ended::TooMuchOutput => "printed too much".to_owned(),
        Ended::Refused => "was not run".to_owned(),
    }
}

fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.trim().lines().last().unwrap_or_default().chars().take(300).collect()
}

fn same_output(printed: &str, wanted: &str) -> bool {
    let lines = |text: &str| text.trim().lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>();
    let (printed, wanted) = (lines(printed), lines(wanted));
    if printed.len() != wanted.len() {
        return false;
    }
    printed.iter().zip(&wanted).all(|(a, b)| {
        a == b || {
            let (a, b): (Vec<&str>, Vec<&str>) =
                (a.split_whitespace().collect(), b.split_whitespace().collect());
            a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| same_word(a, b))
        }
    })
}

fn same_word(a: &str, b: &str) -> bool {
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
    a == b
        || (plain(a)
            && plain(b)
            && matches!((a.parse::<f64>(), b.parse::<f64>()), (Ok(a), Ok(b)) if a == b && a.abs() < 9e15))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_compared_by_lines_and_numbers() {
        for (printed, wanted, same) in [
            ("1 2\n3 \n", "1 2\n3", true),
            ("1.0", "1", true),
            ("1 2 3", "1 2", false),
            ("YES", "yes", false),
            ("12345678901234567890", "12345678901234567891", false),
            ("", "", true),
            ("a\n\nb", "a\nb", false),
        ] {
            assert_eq!(same_output(printed, wanted), same, "{printed} {wanted}");
        }
    }
}
