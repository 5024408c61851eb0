//! Settings of AdamW.

/// Constants of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Constant added to `√v̂`, so that the quotient stays finite.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Maximum global norm of the gradients; larger gradients are scaled down to it.
    pub max_grad_norm: f64,
    /// Stores the moments in 8 instead of 32 bits. CPU only.
    pub quantize_moments: bool,
}
