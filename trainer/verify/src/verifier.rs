//! One verifier for the CoT stages, the rewards and the evaluation: what is right, whether an answer is, and who said so. A judge
//! model is asked by those who have one, and only where this says that nothing could decide.

pub use potstill_sandbox::Example;
use potstill_sandbox::{Sandbox, SandboxError};
use serde::{Deserialize, Serialize};

use crate::extract::final_answer;

/// What is right.
#[derive(Debug, Clone)]
pub enum Gold {
    /// This value, formula or word.
    Answer(String),
    /// This letter.
    Choice(char),
    /// A program whose functions pass these tests; `head` goes before what the model wrote.
    Functions {
        /// What the program begins with.
        head: String,
        /// Asserts, or a function `check(candidate)`.
        tests: String,
        /// What `candidate` is.
        entry: String,
    },
    /// A program that prints this.
    Prints(Vec<Example>),
}

/// Who decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// A rule compared the answers.
    Rule,
    /// Tests were run.
    Tests,
    /// A model was asked, because no rule could decide.
    Judge,
    /// Nothing could decide; it counts as wrong.
    Undecided,
}

/// A verdict with what it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Right, wrong or not decided.
    pub correct: Option<bool>,
    /// Who decided.
    pub method: Method,
    /// Why.
    pub evidence: String,
    /// The final answer as it was found.
    pub answer: Option<String>,
}

/// Decides whether completions are right. Thread-safe.
#[derive(Debug, Clone, Default)]
pub struct Verifier {
    sandbox: Option<Sandbox>,
}

impl Verifier {
    /// With a sandbox it decides about programs too.
    pub fn new(sandbox: Option<Sandbox>) -> Self {
        Self { sandbox }
    }

    /// The verdict on a completion (thinking and answer). An error means that no program can be judged on this machine.
    pub fn verify(&self, gold: &Gold, completion: &str) -> Result<Verdict, SandboxError> {
        match gold {
            Gold::Answer(gold) => Ok(by_rule(gold, completion)),
            Gold::Choice(letter) => Ok(by_rule(&letter.to_string(), completion)),
            Gold::Functions { head, tests, entry } => self.tested(completion, |sandbox, code| {
                let name = entry.rsplit('.').next().unwrap_or(entry);
                // A body alone belongs under the head that was asked for.
                let program = if head.is_empty() || code.contains(&format!("def {name}")) {
                    format!("{}\n{code}", imports(head))
                } else {
                    format!("{head}{code}")
                };
                sandbox.functions(&program, tests, entry)
            }),
            Gold::Prints(examples) => self.tested(completion, |sandbox, code| sandbox.prints(code, examples)),
        }
    }

    fn tested(
        &self,
        completion: &str,
        run: impl Fn(&Sandbox, &str) -> Result<potstill_sandbox::Verdict, SandboxError>,
    ) -> Result<Verdict, SandboxError> {
        let Some(sandbox) = &self.sandbox else {
            return Err(SandboxError::NoIsolation("no sandbox was set up".to_owned()));
        };
        let Some(code) = program_in(completion) else {
            let evidence = "no program found".to_owned();
            return Ok(Verdict { correct: Some(false), method: Method::Tests, evidence, answer: None });
        };
        match run(sandbox, &code) {
            Ok(verdict) => Ok(Verdict {
                correct: Some(verdict.passed),
                method: Method::Tests,
                evidence: verdict.why,
                answer: Some(code),
            }),
            Err(SandboxError::TooLong) => Ok(Verdict {
                correct: Some(false),
                method: Method::Tests,
                evidence: SandboxError::TooLong.to_string(),
                answer: None,
            }),
            Err(error) => Err(error),
        }
    }
}

fn by_rule(gold: &str, completion: &str) -> Verdict {
    let finding = crate::check(gold, completion);
    let method = if finding.correct.is_some() { Method::Rule } else { Method::Undecided };
    Verdict { correct: finding.correct, method, evidence: finding.evidence, answer: final_answer(completion) }
}

/// The imports and helpers that stand before the function that was asked for.
fn imports(head: &str) -> &str {
    match head.rfind("\ndef ") {
        Some(at) => &head[..=at],
        None if head.starts_with("def ") => "",
        None => head,
    }
}

/// The last block of code behind the thinking, else everything behind it.
fn program_in(completion: &str) -> Option<String> {
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
    fn programs_are_found_where_models_put_them() {
        for (text, program) in [
            ("<think>```python\nno\n```</think>Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
            ("```\nx = 1\n```", "x = 1\n"),
            ("first ```python\na\n``` then ```py\nb\n```", "b\n"),
            ("x = 1", "x = 1"),
            ("```python\nx = 1", "x = 1"),
        ] {
            assert_eq!(program_in(text).as_deref(), Some(program), "{text}");
        }
        assert_eq!(program_in("<think>x</think> "), None);
        assert_eq!(imports("import a\n\ndef f(x):\n    pass\n"), "import a\n\n");
    }

    #[test]
    fn rules_decide_or_say_that_they_cannot() {
        let verifier = Verifier::default();
        let verdict = |gold: Gold, text: &str| verifier.verify(&gold, text).unwrap();
        assert_eq!(verdict(Gold::Choice('B'), "\\boxed{(B)}").correct, Some(true));
        assert_eq!(verdict(Gold::Answer("7".into()), "\\boxed{8}").method, Method::Rule);
        assert_eq!(verdict(Gold::Answer("7".into()), "I do not know.").method, Method::Undecided);
        assert!(verifier.verify(&Gold::Prints(Vec::new()), "print(1)").is_err());
    }
}
