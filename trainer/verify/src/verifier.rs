//! Verifier of completions for the pipeline, the rewards and the evaluation. Answers are compared by rules;
//! programs run against tests in the sandbox.
//!
//! Deliberately absent: judge models. Callers with a judge consult the judge only for unverifiable answers.

pub use potstill_sandbox::Example;
use potstill_sandbox::{Sandbox, SandboxError};
use serde::{Deserialize, Serialize};

use crate::extract::final_answer;

/// Reference that a completion is compared with.
#[derive(Debug, Clone)]
pub enum Reference {
    /// Reference answer: value, formula or words.
    Answer(String),
    /// Letter of the correct choice.
    Choice(char),
    /// Tests of functions in a program.
    Functions {
        /// Code before the completion: imports, helpers and the signature of the function.
        head: String,
        /// Assertions, or a function `check(candidate)`.
        tests: String,
        /// Function behind the name `candidate`: `name` or `Class.method`.
        entry: String,
    },
    /// Inputs of a program with their expected output.
    Prints(Vec<Example>),
}

/// Source of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerdictSource {
    /// Comparison by rules.
    Rule,
    /// Tests in the sandbox.
    Tests,
    /// A judge model, because the rules could not decide.
    Judge,
    /// None: the answer is unverifiable.
    Undecided,
}

/// Verdict on a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Correct, incorrect, or `None` for unverifiable.
    pub correct: Option<bool>,
    /// Source of the verdict.
    pub source: VerdictSource,
    /// Explanation of the verdict.
    pub evidence: String,
    /// Extracted final answer or program, if there is one.
    pub answer: Option<String>,
}

/// Verifier of completions. All methods can run on several threads at once.
#[derive(Debug, Clone, Default)]
pub struct Verifier {
    sandbox: Option<Sandbox>,
}

impl Verifier {
    /// Returns a verifier. Without a sandbox, [`Verifier::verify`] fails for programs.
    pub fn new(sandbox: Option<Sandbox>) -> Self {
        Self { sandbox }
    }

    /// Compares a completion, with or without reasoning, with the reference.
    ///
    /// Fails only if this machine cannot run programs in the sandbox. A missing or oversized program is
    /// incorrect.
    pub fn verify(&self, gold: &Reference, completion: &str) -> Result<Verdict, SandboxError> {
        match gold {
            Reference::Answer(gold) => Ok(compare_by_rule(gold, completion)),
            Reference::Choice(letter) => Ok(compare_by_rule(&letter.to_string(), completion)),
            Reference::Functions { head, tests, entry } => self.run_tests(completion, |sandbox, code| {
                let name = entry.rsplit('.').next().unwrap_or(entry);
                // The completion can be the body of the function alone; the signature then comes from the
                // head.
                let program = if head.is_empty() || code.contains(&format!("def {name}")) {
                    format!("{}\n{code}", leading_imports(head))
                } else {
                    format!("{head}{code}")
                };
                sandbox.check_functions(&program, tests, entry)
            }),
            Reference::Prints(examples) => {
                self.run_tests(completion, |sandbox, code| sandbox.check_output(code, examples))
            }
        }
    }

    /// Runs the tests on the program in a completion.
    fn run_tests(
        &self,
        completion: &str,
        run: impl Fn(&Sandbox, &str) -> Result<potstill_sandbox::TestResult, SandboxError>,
    ) -> Result<Verdict, SandboxError> {
        let Some(sandbox) = &self.sandbox else {
            return Err(SandboxError::NoIsolation("no sandbox was set up".to_owned()));
        };
        let Some(code) = extract_program(completion) else {
            let evidence = "no program found".to_owned();
            return Ok(Verdict {
                correct: Some(false),
                source: VerdictSource::Tests,
                evidence,
                answer: None,
            });
        };
        match run(sandbox, &code) {
            Ok(verdict) => Ok(Verdict {
                correct: Some(verdict.passed),
                source: VerdictSource::Tests,
                evidence: verdict.why,
                answer: Some(code),
            }),
            Err(SandboxError::TooLong) => Ok(Verdict {
                correct: Some(false),
                source: VerdictSource::Tests,
                evidence: SandboxError::TooLong.to_string(),
                answer: None,
            }),
            Err(error) => Err(error),
        }
    }
}

/// Compares a completion with a reference answer by rules.
fn compare_by_rule(gold: &str, completion: &str) -> Verdict {
    let finding = crate::check_completion(gold, completion);
    let method = if finding.correct.is_some() { VerdictSource::Rule } else { VerdictSource::Undecided };
    Verdict {
        correct: finding.correct,
        source: method,
        evidence: finding.evidence,
        answer: final_answer(completion),
    }
}

/// Returns the part of the head before its last function: imports and helpers.
fn leading_imports(head: &str) -> &str {
    match head.rfind("\ndef ") {
        Some(at) => &head[..=at],
        None if head.starts_with("def ") => "",
        None => head,
    }
}

/// Returns the last code block behind the reasoning, or all text behind the reasoning if there is no block.
fn extract_program(completion: &str) -> Option<String> {
    let text = completion.rsplit("</think>").next().unwrap_or_default();
    let blocks = text.split("```").skip(1).step_by(2).filter(|block| !block.trim().is_empty());
    let code = match blocks.last() {
        Some(block) => {
            let (first, rest) = block.split_once('\n').unwrap_or(("", block));
            let is_language = first.trim().chars().all(char::is_alphanumeric) && first.trim().len() < 12;
            if is_language { rest } else { block }
        }
        None => text,
    };
    (!code.trim().is_empty()).then(|| code.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_code_block_behind_the_reasoning() {
        for (text, program) in [
            ("<think>```python\nno\n```</think>Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
            ("```\nx = 1\n```", "x = 1\n"),
            ("first ```python\na\n``` then ```py\nb\n```", "b\n"),
            ("x = 1", "x = 1"),
            ("```python\nx = 1", "x = 1"),
        ] {
            assert_eq!(extract_program(text).as_deref(), Some(program), "{text}");
        }
        assert_eq!(extract_program("<think>x</think> "), None);
        assert_eq!(leading_imports("import a\n\ndef f(x):\n    pass\n"), "import a\n\n");
    }

    #[test]
    fn reports_rule_verdicts_and_unverifiable_answers() {
        let verifier = Verifier::default();
        let verdict = |gold: Reference, text: &str| verifier.verify(&gold, text).unwrap();
        assert_eq!(verdict(Reference::Choice('B'), "\\boxed{(B)}").correct, Some(true));
        assert_eq!(verdict(Reference::Answer("7".into()), "\\boxed{8}").source, VerdictSource::Rule);
        assert_eq!(verdict(Reference::Answer("7".into()), "I do not know.").source, VerdictSource::Undecided);
        assert!(verifier.verify(&Reference::Prints(Vec::new()), "print(1)").is_err());
    }
}
