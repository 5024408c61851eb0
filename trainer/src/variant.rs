//! Variants of the student that a run compares.

/// Student variants, by training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Base model, not trained.
    Raw,
    /// Fine-tuned on final answers only.
    AnswersOnly,
    /// Fine-tuned on chains of thought.
    Distilled,
    /// After fine-tuning, logit distillation.
    Kd,
    /// After these, DPO.
    Dpo,
    /// After these, GRPO.
    Grpo,
}

impl Variant {
    /// Returns the name used in reports and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::AnswersOnly => "answers_only",
            Self::Distilled => "distilled",
            Self::Kd => "kd",
            Self::Dpo => "dpo",
            Self::Grpo => "grpo",
        }
    }
}
