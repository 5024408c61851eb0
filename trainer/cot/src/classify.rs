//! Classify stage: assigns one of the 32 tasks to each problem, so that the resample stage can apply the tasks'
//! shares.
//!
//! A completion without a known task is requested again. A problem that stays unclassified counts as `Others`.
//! Deliberately absent: the list of tasks and their shares (`potstill_data::tasks`).

use potstill_data::records::Problem;
use potstill_data::tasks::read_task;

use crate::difficulty::Judge;
use crate::executor::{Outcome, Stage, StageError};
use crate::prompts::Role;

/// Stage that sets the task of a problem.
pub struct Classify {
    /// Model that names the task.
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
