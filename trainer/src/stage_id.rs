//! Stages of a run. Each is declared here once; every list of stages is derived from this enum.

/// A stage that can run alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StageId {
    /// Reads problems and removes duplicates and test problems.
    Collect,
    /// Classifies problems by task.
    Classify,
    /// Balances the tasks.
    Resample,
    /// Teachers write traces.
    Generate,
    /// A judge grades the difficulty of traces.
    Difficulty,
    /// A teacher rewrites easy and hard traces.
    Rewrite,
    /// Verifies answers.
    Verify,
    /// A judge scores RV and CD.
    Score,
    /// Selects traces for training.
    Sample,
    /// Trains reward models.
    Reward,
    /// Trains the students.
    Train,
    /// Exports the students.
    Export,
    /// Evaluates the students.
    Evaluate,
    /// Quantizes the last student.
    Quantize,
    /// Writes the model cards.
    Card,
}

/// Records in the file that a stage writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// Problems.
    Problem,
    /// Traces.
    Trace,
}

impl StageId {
    /// All stages, in the order of a run.
    pub const ALL: [Self; 15] = [
        Self::Collect,
        Self::Classify,
        Self::Resample,
        Self::Generate,
        Self::Difficulty,
        Self::Rewrite,
        Self::Verify,
        Self::Score,
        Self::Sample,
        Self::Reward,
        Self::Train,
        Self::Export,
        Self::Evaluate,
        Self::Quantize,
        Self::Card,
    ];

    /// Name in commands, files and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Collect => "collect",
            Self::Classify => "classify",
            Self::Resample => "resample",
            Self::Generate => "generate",
            Self::Difficulty => "difficulty",
            Self::Rewrite => "rewrite",
            Self::Verify => "verify",
            Self::Score => "score",
            Self::Sample => "sample",
            Self::Reward => "reward",
            Self::Train => "train",
            Self::Export => "export",
            Self::Evaluate => "evaluate",
            Self::Quantize => "compress",
            Self::Card => "card",
        }
    }

    /// Records that the stage writes; `None` for stages that write models and reports.
    pub const fn records(self) -> Option<RecordKind> {
        match self {
            Self::Collect | Self::Classify | Self::Resample => Some(RecordKind::Problem),
            Self::Generate | Self::Difficulty | Self::Rewrite | Self::Verify | Self::Score | Self::Sample => {
                Some(RecordKind::Trace)
            }
            Self::Reward | Self::Train | Self::Export | Self::Evaluate | Self::Quantize | Self::Card => None,
        }
    }

    /// Returns whether the stage sends requests to models, so that a budget can limit it.
    pub const fn calls_models(self) -> bool {
        matches!(
            self,
            Self::Classify | Self::Generate | Self::Difficulty | Self::Rewrite | Self::Verify | Self::Score
        )
    }

    /// Stages whose files hold records of `kind`, in the order of a run.
    pub fn with_records(kind: RecordKind) -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.into_iter().filter(move |stage| stage.records() == Some(kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_stages_are_listed_once_in_order() {
        assert!(StageId::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        let names: std::collections::BTreeSet<_> = StageId::ALL.map(StageId::name).into();
        assert_eq!(names.len(), StageId::ALL.len());
        assert_eq!(StageId::with_records(RecordKind::Problem).count(), 3);
        assert_eq!(StageId::with_records(RecordKind::Trace).count(), 6);
    }
}
