//! Tests of programs: by printed output or by calls of functions.
//!
//! Printed output is compared in this process. Functions are called from a second sandboxed process that runs
//! the tests. That process sends each call over a pipe and receives plain values. Expected values and
//! assertions are therefore out of reach of the program.

use std::process::Stdio;

use crate::process::ExitReason;
use crate::{Sandbox, SandboxError};

/// Input of a program with its expected output.
#[derive(Debug, Clone)]
pub struct Example {
    /// Standard input.
    pub input: String,
    /// Expected standard output.
    pub output: String,
}

/// Result of the tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestResult {
    /// True if all tests passed.
    pub passed: bool,
    /// First failure, or the number of passed tests.
    pub why: String,
}

/// Returns a failed verdict.
fn failed_result(why: impl Into<String>) -> TestResult {
    TestResult { passed: false, why: why.into() }
}

/// Python driver that holds the program and calls its functions.
const FUNCTION_DRIVER: &str = include_str!("answerer.py");
/// Python driver that runs the tests.
const TEST_DRIVER: &str = include_str!("tester.py");

impl Sandbox {
    /// Runs the program on each input and compares its output with the expected output.
    ///
    /// Lines are compared without trailing whitespace. Lines that differ are compared word by word, with
    /// numbers by value. Fails if the program cannot be isolated or started.
    pub fn check_output(&self, program: &str, examples: &[Example]) -> Result<TestResult, SandboxError> {
        for (index, example) in examples.iter().enumerate() {
            let number = index + 1;
            let output = self.run_program(program, example.input.as_bytes())?;
            match output.ended {
                ExitReason::Exit(0) => {}
                ExitReason::Refused => {
                    return Err(SandboxError::NoIsolation(last_line(&output.stderr)));
                }
                ExitReason::Exit(code) => {
                    return Ok(failed_result(format!(
                        "test {number}: ended with {code}: {}",
                        last_line(&output.stderr)
                    )));
                }
                other => return Ok(failed_result(format!("test {number}: {}", describe_exit(other)))),
            }
            let Ok(printed) = std::str::from_utf8(&output.stdout) else {
                return Ok(failed_result(format!("test {number}: printed something that is no text")));
            };
            if !outputs_match(printed, &example.output) {
                return Ok(failed_result(format!("test {number}: printed something else")));
            }
        }
        Ok(TestResult { passed: true, why: format!("{} tests passed", examples.len()) })
    }

    /// Runs test code against the functions of a program.
    ///
    /// The tests are assertions or a function `check(candidate)`. `entry` is the name of `candidate`, either
    /// `name` or `Class.method`. The tests reach other functions of the program by name. Fails if the tests
    /// cannot be isolated or started.
    pub fn check_functions(
        &self,
        program: &str,
        tests: &str,
        entry: &str,
    ) -> Result<TestResult, SandboxError> {
        let arguments =
            |driver: &str, code: &str| ["-I", "-c", driver, code, entry].map(str::to_owned).to_vec();
        let start = |source| SandboxError::Start { program: self.helper.clone(), source };
        let (ask_out, ask_in) = std::io::pipe().map_err(start)?;
        let (answer_out, answer_in) = std::io::pipe().map_err(start)?;
        let _answerer =
            self.spawn(arguments(FUNCTION_DRIVER, program), Stdio::from(ask_out), Stdio::from(answer_in))?;
        let tester =
            self.spawn(arguments(TEST_DRIVER, tests), Stdio::from(answer_out), Stdio::from(ask_in))?;
        let output = tester.wait_with_limits(self.limits.wall_time, self.limits.output_bytes);
        let said = last_line(&output.stderr);
        Ok(match output.ended {
            // Only the test process exits with this status, after the last test.
            ExitReason::Exit(TESTS_PASSED_STATUS) => {
                TestResult { passed: true, why: "the tests passed".to_owned() }
            }
            ExitReason::Refused => return Err(SandboxError::NoIsolation(said)),
            ExitReason::Exit(_) => {
                failed_result(if said.is_empty() { "the tests failed".to_owned() } else { said })
            }
            other => failed_result(describe_exit(other)),
        })
    }
}

/// Exit status of a test process whose tests all passed.
const TESTS_PASSED_STATUS: u8 = 42;

/// Returns the end of a program in words.
fn describe_exit(ended: ExitReason) -> String {
    match ended {
        ExitReason::Exit(code) => format!("ended with {code}"),
        // At the limit on processor time, the first process of a namespace ends by signal 9.
        ExitReason::Signal(9 | 24) => "used up its time".to_owned(),
        ExitReason::Signal(signal) => format!("was ended by signal {signal}"),
        ExitReason::TimedOut => "took too long".to_owned(),
        ExitReason::TooMuchOutput => "printed too much".to_owned(),
        ExitReason::Refused => "was not run".to_owned(),
    }
}

/// Returns the last line of `text`, cut to 300 characters.
fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.trim().lines().last().unwrap_or_default().chars().take(300).collect()
}

/// Returns whether two outputs have equal lines, or lines of equal words.
fn outputs_match(printed: &str, wanted: &str) -> bool {
    let lines = |text: &str| text.trim().lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>();
    let (printed, wanted) = (lines(printed), lines(wanted));
    if printed.len() != wanted.len() {
        return false;
    }
    printed.iter().zip(&wanted).all(|(a, b)| {
        a == b || {
            let (a, b): (Vec<&str>, Vec<&str>) =
                (a.split_whitespace().collect(), b.split_whitespace().collect());
            a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| words_match(a, b))
        }
    })
}

/// Returns whether two words are equal as text, or as decimal numbers below 9e15.
fn words_match(a: &str, b: &str) -> bool {
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
    fn compares_outputs_by_lines_and_numeric_value() {
        for (printed, wanted, same) in [
            ("1 2\n3 \n", "1 2\n3", true),
            ("1.0", "1", true),
            ("1 2 3", "1 2", false),
            ("YES", "yes", false),
            ("12345678901234567890", "12345678901234567891", false),
            ("", "", true),
            ("a\n\nb", "a\nb", false),
        ] {
            assert_eq!(outputs_match(printed, wanted), same, "{printed} {wanted}");
        }
    }
}
