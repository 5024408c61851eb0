//! Constants of one optimizer step.

/// Constants of one step for one variable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepConstants {
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) clip: f32,
    pub(crate) rate: f32,
    pub(crate) inverse_correction2: f32,
    pub(crate) eps: f32,
    pub(crate) keep: f32,
}

impl StepConstants {
    /// Returns the new first moment: `m = β1 m + (1-β1) clip·g`.
    #[inline(always)]
    pub(crate) fn first_moment(&self, m: f32, gradient: f32) -> f32 {
        self.beta1 * m + (1.0 - self.beta1) * (gradient * self.clip)
    }

    /// Returns the new second moment: `v = β2 v + (1-β2) (clip·g)²`.
    #[inline(always)]
    pub(crate) fn second_moment(&self, v: f32, gradient: f32) -> f32 {
        let gradient = gradient * self.clip;
        self.beta2 * v + (1.0 - self.beta2) * (gradient * gradient)
    }

    /// Returns the new weight, after weight decay and update.
    #[inline(always)]
    pub(crate) fn updated_weight(&self, theta: f32, m: f32, v: f32) -> f32 {
        let root = (v * self.inverse_correction2).sqrt() + self.eps;
        self.keep * theta - self.rate * m / root
    }
}
