//! Classify stage: assigns one of the 32 tasks to each problem, so that the resample stage can apply the tasks'
//! shares.
//!
//! A completion without a known task is requested again. A problem that stays unclassified counts as `Others`.
//! Deliberately absent: the list of tasks and their shares (`potstill_data::tasks`).

use potstill_data::records::Problem;
use potstill_data::tasks::parse_task;

use crate::difficulty::Judge;
use crate::executor::{Stage, StageError, StageOutcome};
use crate::prompts::PromptRole;

/// Stage that sets the task of a problem.
pub struct ClassifyStage {
    /// Model that names the task.
    pub judge: Judge,
}

impl Stage for ClassifyStage {
    type In = Problem;
    type Out = Problem;

    fn name(&self) -> &'static str {
        "classify"
    }

    async fn process(&self, mut problem: Problem) -> Result<StageOutcome<Problem>, StageError> {
        let task =
            self.judge.assess_completion("classify", PromptRole::Classify, &problem, "", parse_task).await?;
        problem.task = task.map(str::to_owned);
        Ok(StageOutcome::keep(vec![problem]))
    }
}
