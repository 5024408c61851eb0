//! Score stage: requests reasoning verbosity (RV) and cognitive difficulty (CD) of a trace, in one request each
//! (OmniThought).
//!
//! A score is an integer from 0 to 9 between score tags. A completion without a valid integer gives no score.
//! Deliberately absent: the use of the scores (`potstill_data::sampler`).

use potstill_data::records::{Scores, Trace};

use crate::difficulty::Judge;
use crate::executor::{Stage, StageError, StageOutcome};
use crate::prompts::PromptRole;

/// Stage that sets RV and CD of a trace.
pub struct ScoreStage {
    /// Model that scores the traces.
    pub judge: Judge,
}

/// Parses a score from 0 to 9: the integer in the last score tags, or the whole completion as an integer.
pub fn parse_score(answer: &str) -> Option<u8> {
    let inside = match answer.rfind("<score>") {
        Some(at) => answer[at + "<score>".len()..].split_once("</score>")?.0,
        None => answer,
    };
    inside.trim().parse().ok().filter(|score| *score <= 9)
}

impl Stage for ScoreStage {
    type In = Trace;
    type Out = Trace;

    fn name(&self) -> &'static str {
        "score"
    }

    async fn process(&self, mut cot: Trace) -> Result<StageOutcome<Trace>, StageError> {
        // Scores from the source dataset are kept without a request.
        let given = cot.scores.unwrap_or_default();
        let ask = |role| self.judge.assess_trace("score", role, &cot, parse_score);
        let rv = async { if given.rv.is_some() { Ok(given.rv) } else { ask(PromptRole::Rv).await } };
        let cd = async { if given.cd.is_some() { Ok(given.cd) } else { ask(PromptRole::Cd).await } };
        let (rv, cd) = futures_util::future::try_join(rv, cd).await?;
        cot.scores = Some(Scores { rv, cd });
        Ok(StageOutcome::keep(vec![cot]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_only_integers_from_0_to_9() {
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
            assert_eq!(parse_score(answer), score, "{answer}");
        }
    }
}
