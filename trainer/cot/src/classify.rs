//! Classifier: which of the 32 tasks is a problem? An answer that names none of them is asked again, then the problem stays
//! unsorted; it counts among the others when tasks get their shares.

use potstill_data::records::Problem;
use potstill_data::tasks::read_task;

use crate::difficulty::Judge;
use crate::executor::{Outcome, Stage, StageError};
use crate::prompts::Role;

/// The stage.
pub struct Classify {
    /// Who sorts.
    pub judge: Judge,
}

impl Stage for Classify {
    type In = Problem;
    type Out = Problem;

    fn name(&self) -> &'static str {
        "classify"
    }

    async fn process(&self, mut problem: Problem) -> Result<Outcome<Problem>, StageError> {
        let task = self.judge.ask_about("classify", Role::Classify, &problem, "", read_task).await?;
        problem.task = task.map(str::to_owned);
        Ok(Outcome::keep(vec![problem]))
    }
}
