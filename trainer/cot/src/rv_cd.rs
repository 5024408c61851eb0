//! Reasoning Verbosity and Cognitive Difficulty, one question each, an integer from 0 to 9 between score tags. An answer
//! that is not readable, or lies outside the scale, never becomes a number.

use potstill_data::records::{Cot, Scores};

use crate::difficulty::Judge;
use crate::executor::{Outcome, Stage, StageError};
use crate::prompts::Role;

/// The stage.
pub struct Score {
    /// Who scores.
    pub judge: Judge,
}

/// The score of an answer: between the last score tags, or the whole answer when it is one digit.
pub fn read_score(answer: &str) -> Option<u8> {
    let inside = match answer.rfind("<score>") {
        Some(at) => answer[at + "<score>".len()..].split_once("</score>")?.0,
        None => answer,
    };
    inside.trim().parse().ok().filter(|score| *score <= 9)
}

impl Stage for Score {
    type In = Cot;
    type Out = Cot;

    fn name(&self) -> &'static str {
        "score"
    }

    async fn process(&self, mut cot: Cot) -> Result<Outcome<Cot>, StageError> {
        // What a dataset brought along is not asked again.
        let given = cot.scores.unwrap_or_default();
        let ask = |role| self.judge.ask("score", role, &cot, read_score);
        let rv = async { if given.rv.is_some() { Ok(given.rv) } else { ask(Role::Rv).await } };
        let cd = async { if given.cd.is_some() { Ok(given.cd) } else { ask(Role::Cd).await } };
        let (rv, cd) = futures_util::future::try_join(rv, cd).await?;
        cot.scores = Some(Scores { rv, cd });
        Ok(Outcome::keep(vec![cot]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_scale_counts() {
        for (answer, score) in [
            ("<score>7</score>", Some(7)),
            ("I think <score>3</score>, no: <score> 4 </score>", Some(4)),
            ("5", Some(5)),
            ("10", None),
            ("<score>95</score>", None),
            ("about 4 of 9", None),
            ("<score>4", None),
            ("-1", None),
        ] {
            assert_eq!(read_score(answer), score, "{answer}");
        }
    }
}
