//! AdamW (Loshchilov and Hutter 2019) with f32 moments, updated in place: `m = β1 m + (1-β1) g`, `v = β2 v + (1-β2)
//! g²`, `θ -= lr (m̂ / (√v̂ + ε) + decay θ)`.
//!
//! Weight decay applies to matrices only, not to norms and biases. Gradients are clipped by their global norm, like
//! PyTorch's `clip_grad_norm_`. On the CPU, moments may be stored in 8 bits ([`crate::eight_bits`]).
//!
//! Learning rates come from the caller. Deliberately absent: parameter groups and AMSGrad.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor, Var};
use potstill_engine::ops::{has_fused_kernel, with_values};
use rayon::prelude::*;

pub use crate::adamw_config::AdamWConfig;
use crate::eight_bits::QuantizedMoments;
use crate::error::LearnError;
use crate::step_constants::StepConstants;

/// Values per parallel task.
const VALUES_PER_TASK: usize = 1 << 14;

/// A variable with its moments.
struct ParameterState {
    variable: Var,
    moments: Moments,
    decays: bool,
}

/// First and second moments of one variable.
enum Moments {
    F32 { m: Tensor, v: Tensor },
    Quantized(QuantizedMoments),
}

impl Moments {
    /// Returns zero moments for `variable`. Fails for 8-bit moments on a GPU.
    fn zeros(variable: &Var, eight_bits: bool) -> Result<Self, LearnError> {
        if !eight_bits {
            return Ok(Self::F32 { m: variable.zeros_like()?, v: variable.zeros_like()? });
        }
        if !has_fused_kernel(variable.as_tensor()) {
            let problem = "moments of eight bits are computed on the CPU only: leave `eight_bit_moments` out";
            return Err(LearnError::Data(problem.to_owned()));
        }
        Ok(Self::Quantized(QuantizedMoments::zeros(variable.elem_count())))
    }
}

/// AdamW optimizer with its moments.
pub struct AdamW {
    config: AdamWConfig,
    slots: BTreeMap<String, ParameterState>,
    step: usize,
}

impl AdamW {
    /// Creates an optimizer with zero moments for `variables`.
    pub fn new(variables: BTreeMap<String, Var>, config: AdamWConfig) -> Result<Self, LearnError> {
        let slots = variables
            .into_iter()
            .map(|(name, variable)| {
                let moments = Moments::zeros(&variable, config.quantize_moments)?;
                let decays = variable.rank() > 1;
                Ok((name, ParameterState { variable, moments, decays }))
            })
            .collect::<Result<_, LearnError>>()?;
        Ok(Self { config, slots, step: 0 })
    }

    /// Resets moments and step count to zero, for the start of a curriculum phase.
    pub fn reset(&mut self) -> Result<(), LearnError> {
        for slot in self.slots.values_mut() {
            slot.moments = Moments::zeros(&slot.variable, self.config.quantize_moments)?;
        }
        self.step = 0;
        Ok(())
    }

    /// Returns the Euclidean norm over all gradients. Fails with [`LearnError::NoGradient`] if a variable has none.
    pub fn gradient_norm(&self, gradients: &BTreeMap<String, Tensor>) -> Result<f64, LearnError> {
        let mut total = 0f64;
        for name in self.slots.keys() {
            let gradient = gradients.get(name).ok_or_else(|| LearnError::NoGradient(name.clone()))?;
            total += if has_fused_kernel(gradient) {
                with_values([gradient], |[values]| {
                    let parts: Vec<f64> = values
                        .par_chunks(VALUES_PER_TASK)
                        .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
                        .collect();
                    parts.iter().sum::<f64>()
                })?
            } else {
                f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?)
            };
        }
        Ok(total.sqrt())
    }

    /// Applies one step at learning rate `lr`. `norm` is the result of [`AdamW::gradient_norm`] and determines the
    /// clipping.
    pub fn step(
        &mut self,
        gradients: &BTreeMap<String, Tensor>,
        norm: f64,
        lr: f64,
    ) -> Result<(), LearnError> {
        self.step += 1;
        let clip = (self.config.max_grad_norm / (norm + 1e-6)).min(1.0);
        let (beta1, beta2) = (self.config.beta1, self.config.beta2);
        let correction1 = 1.0 - beta1.powi(self.step as i32);
        let correction2 = 1.0 - beta2.powi(self.step as i32);
        for (name, slot) in &mut self.slots {
            let gradient = gradients.get(name).ok_or_else(|| LearnError::NoGradient(name.clone()))?;
            let decay = if slot.decays { lr * self.config.weight_decay } else { 0.0 };
            let rates = StepConstants {
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                clip: clip as f32,
                rate: (lr / correction1) as f32,
                inverse_correction2: (1.0 / correction2) as f32,
                eps: self.config.eps as f32,
                keep: (1.0 - decay) as f32,
            };
            match &mut slot.moments {
                Moments::F32 { m, v } if has_fused_kernel(gradient) => {
                    let gradient = gradient.contiguous()?;
                    m.inplace_op2(&gradient, &MomentUpdate { rates, squared: false })?;
                    v.inplace_op2(&gradient, &MomentUpdate { rates, squared: true })?;
                    slot.variable.as_tensor().inplace_op3(m, v, &WeightUpdate(rates))?;
                }
                Moments::F32 { m, v } => {
                    let gradient = (gradient * clip)?;
                    *m = ((&*m * beta1)? + (&gradient * (1.0 - beta1))?)?;
                    *v = ((&*v * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
                    let root = ((&*v / correction2)?.sqrt()? + self.config.eps)?;
                    let update = ((&*m / root)? * (lr / correction1))?;
                    slot.variable.set(&((slot.variable.as_tensor() * (1.0 - decay))? - update)?)?;
                }
                Moments::Quantized(moments) => {
                    let step = QuantizedUpdate { moments: RefCell::new(moments), rates };
                    slot.variable.as_tensor().inplace_op2(&gradient.contiguous()?, &step)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the moments as tensors `m.NAME` and `v.NAME`. 8-bit moments add `m_scale.NAME` and `v_scale.NAME`.
    pub fn state(&self) -> Result<HashMap<String, Tensor>, LearnError> {
        let mut state = HashMap::new();
        for (name, slot) in &self.slots {
            match &slot.moments {
                Moments::F32 { m, v } => {
                    state.insert(format!("m.{name}"), m.clone());
                    state.insert(format!("v.{name}"), v.clone());
                }
                Moments::Quantized(moments) => moments.state(name, &mut state)?,
            }
        }
        Ok(state)
    }

    /// Returns the number of steps since the moments were zero.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// Restores the moments that [`AdamW::state`] returned, and the step count. Fails if a tensor is missing or has
    /// another shape.
    pub fn restore(&mut self, mut state: HashMap<String, Tensor>, step: usize) -> Result<(), LearnError> {
        for (name, slot) in &mut self.slots {
            let (m, v) = match &mut slot.moments {
                Moments::F32 { m, v } => (m, v),
                Moments::Quantized(moments) => {
                    moments.restore(name, &state)?;
                    continue;
                }
            };
            for (prefix, moment) in [("m", m), ("v", v)] {
                let key = format!("{prefix}.{name}");
                let tensor =
                    state.remove(&key).filter(|tensor| tensor.dims() == moment.dims()).ok_or_else(|| {
                        LearnError::Data(format!("optimiser state `{key}` is missing or misshapen"))
                    })?;
                *moment = tensor.to_device(moment.device())?;
            }
        }
        self.step = step;
        Ok(())
    }
}

/// In-place update of the first moment, or of the second with `squared`.
struct MomentUpdate {
    rates: StepConstants,
    squared: bool,
}

/// Returns both storages as f32 slices of equal length, or an error.
fn f32_slices<'a>(
    s1: &'a mut CpuStorage,
    s2: &'a CpuStorage,
) -> candle_core::Result<(&'a mut [f32], &'a [f32])> {
    match (s1, s2) {
        (CpuStorage::F32(a), CpuStorage::F32(b)) if a.len() == b.len() => Ok((a, b)),
        _ => candle_core::bail!("the optimiser needs f32 tensors of equal size"),
    }
}

impl InplaceOp2 for MomentUpdate {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        _: &Layout,
        s2: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<()> {
        let (moment, gradient) = f32_slices(s1, s2)?;
        let rates = self.rates;
        moment.par_chunks_mut(VALUES_PER_TASK).zip(gradient.par_chunks(VALUES_PER_TASK)).for_each(
            |(moment, gradient)| {
                let each = moment.iter_mut().zip(gradient);
                if self.squared {
                    each.for_each(|(v, g)| *v = rates.second_moment(*v, *g));
                } else {
                    each.for_each(|(m, g)| *m = rates.first_moment(*m, *g));
                }
            },
        );
        Ok(())
    }
}

/// In-place update of weights and 8-bit moments in one pass.
struct QuantizedUpdate<'a> {
    moments: RefCell<&'a mut QuantizedMoments>,
    rates: StepConstants,
}

impl InplaceOp2 for QuantizedUpdate<'_> {
    fn name(&self) -> &'static str {
        "adamw-eight-bits"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        _: &Layout,
        s2: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<()> {
        let (theta, gradient) = f32_slices(s1, s2)?;
        self.moments.borrow_mut().step(theta, gradient, &self.rates);
        Ok(())
    }
}

/// In-place update of the weights from f32 moments.
struct WeightUpdate(StepConstants);

impl InplaceOp3 for WeightUpdate {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        _: &Layout,
        s2: &CpuStorage,
        _: &Layout,
        s3: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<()> {
        let v = s3.as_slice::<f32>()?;
        let (theta, m) = f32_slices(s1, s2)?;
        theta
            .par_chunks_mut(VALUES_PER_TASK)
            .zip(m.par_chunks(VALUES_PER_TASK))
            .zip(v.par_chunks(VALUES_PER_TASK))
            .for_each(|((theta, m), v)| {
                for ((theta, m), v) in theta.iter_mut().zip(m).zip(v) {
                    *theta = self.0.updated_weight(*theta, *m, *v);
                }
            });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Compares the optimizer with the update formula for one scalar in f64.
    #[test]
    fn update_matches_the_formula_for_a_scalar() {
        for eight_bits in [false, true] {
            check_against_formula(eight_bits);
        }
    }

    /// Runs five steps. A block of one value stores 8-bit moments exactly, so both variants meet the same tolerance.
    fn check_against_formula(eight_bits: bool) {
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 0.5,
            quantize_moments: eight_bits,
        };
        let variable = Var::from_tensor(&Tensor::new(&[[2.0f32]], &Device::Cpu).unwrap()).unwrap();
        let mut optimiser = AdamW::new(BTreeMap::from([("w".to_owned(), variable.clone())]), config).unwrap();
        let (mut theta, mut m, mut v) = (2.0f64, 0.0f64, 0.0f64);
        for step in 1..=5 {
            let loss = (variable.as_tensor().sqr().unwrap() * 1.5).unwrap().sum_all().unwrap();
            let store = loss.backward().unwrap();
            let gradients = BTreeMap::from([("w".to_owned(), store.get(&variable).unwrap().clone())]);
            let norm = optimiser.gradient_norm(&gradients).unwrap();
            assert!((norm - 3.0 * theta.abs()).abs() < 1e-4);
            optimiser.step(&gradients, norm, 0.1).unwrap();
            let g = 3.0 * theta * (0.5 / (norm + 1e-6)).min(1.0);
            m = 0.9 * m + 0.1 * g;
            v = 0.99 * v + 0.01 * g * g;
            let (mh, vh) = (m / (1.0 - 0.9f64.powi(step)), v / (1.0 - 0.99f64.powi(step)));
            theta = theta * (1.0 - 0.1 * 0.1) - 0.1 * mh / (vh.sqrt() + 1e-8);
            let got = f64::from(variable.to_vec2::<f32>().unwrap()[0][0]);
            assert!((got - theta).abs() < 1e-5, "step {step}: {got} against {theta}");
        }
    }
}
