//! 8-bit moments for AdamW (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").
//!
//! A block of 256 values shares its largest magnitude as scale. Each value is stored as the nearest of up to 256
//! levels, which lie denser towards zero (dynamic tree quantization, section 2.2). Moments need about a quarter of the
//! memory.
//!
//! One difference from the paper: a positive second moment is never rounded to zero. Otherwise a step would be divided
//! by almost zero. GPUs are not supported.

use std::collections::HashMap;
use std::sync::LazyLock;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::error::LearnError;
use crate::step_constants::StepConstants;

/// Values that share a scale.
const BLOCK: usize = 256;
/// Blocks per parallel task.
const BLOCKS_PER_TASK: usize = 64;
/// Low bits of an f32 that the lookup of levels ignores. Sign, 8 bits of the exponent and 6 of the mantissa remain.
const SHIFT: u32 = 17;

/// Both moments of one variable, quantized.
pub(crate) struct QuantizedMoments {
    m: BlockQuantized,
    v: BlockQuantized,
}

/// One quantized moment: a code per value, and the largest magnitude of each block as scale.
struct BlockQuantized {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

/// Levels from 0 to 1 in rising order, with tables to find the nearest. Arrays cover the whole range of their index
/// type, which removes bounds checks.
struct QuantizationLevels {
    /// Value of each code. Signed levels repeat as negative values from code 128 on.
    values: [f32; 256],
    /// Midpoint between each level and the next; infinity after the last.
    middles: [f32; 256],
    /// Indexed by the high bits of a number in 0 to 1: level nearest to the smallest number with these bits.
    first: Box<[u8; 1 << (u32::BITS - SHIFT)]>,
}

/// Levels of the first moment: 128 magnitudes and a sign bit.
static SIGNED: LazyLock<QuantizationLevels> = LazyLock::new(|| QuantizationLevels::new(7));
/// Levels of the second moment: 256 values without sign.
static UNSIGNED: LazyLock<QuantizationLevels> = LazyLock::new(|| QuantizationLevels::new(8));

impl QuantizationLevels {
    /// Returns `2^bits` levels: 0, 1, and the levels of seven decades. A decade is divided into equal parts, whose
    /// midpoints are its levels. Each decade has twice as many parts as the decade below.
    fn new(bits: u32) -> Self {
        let mut rising = vec![0.0];
        for decade in 0..7 {
            let parts = 1usize << (decade + bits - 7);
            let width = 0.9 / parts as f64;
            let middle = |part: usize| 0.1 + (part as f64 + 0.5) * width;
            rising.extend((0..parts).map(|part| (middle(part) * 10f64.powi(decade as i32 - 6)) as f32));
        }
        // With 7 bits there is one level too many; the smallest is dropped.
        let surplus = (rising.len() + 1).saturating_sub(1 << bits);
        rising.drain(1..1 + surplus);
        rising.push(1.0);
        let (mut values, mut middles) = ([0.0; 256], [f32::INFINITY; 256]);
        for (level, value) in rising.iter().enumerate() {
            // Signed levels also fill the upper half of the codes, as negative values.
            values[level + (256 - (1 << bits))] = -value;
            values[level] = *value;
        }
        for (middle, pair) in middles.iter_mut().zip(rising.windows(2)) {
            *middle = (pair[0] + pair[1]) / 2.0;
        }
        let mut first = Box::new([0; 1 << (u32::BITS - SHIFT)]);
        for (begin, first) in (0u32..=1f32.to_bits() >> SHIFT).zip(first.iter_mut()) {
            let number = f32::from_bits(begin << SHIFT);
            *first = middles.partition_point(|middle| *middle < number) as u8;
        }
        Self { values, middles, first }
    }

    /// Returns the level nearest to `x`, which lies in 0 to 1.
    #[inline(always)]
    fn nearest(&self, x: f32) -> u8 {
        let mut level = self.first[(x.to_bits() >> SHIFT) as usize];
        // At most two midpoints share the same high bits, so two comparisons suffice.
        level += u8::from(x > self.middles[level as usize]);
        level + u8::from(x > self.middles[level as usize])
    }
}

/// Returns the largest of some non-negative numbers, or 0.
#[inline(always)]
fn max_non_negative(numbers: impl Iterator<Item = f32>) -> f32 {
    numbers.fold(0.0, |most, number| if number > most { number } else { most })
}

impl BlockQuantized {
    /// Returns `count` zeros.
    fn zeros(count: usize) -> Self {
        Self { codes: vec![0; count], scales: vec![0.0; count.div_ceil(BLOCK)] }
    }

    /// Returns codes and scales as tensors on the CPU.
    fn tensors(&self) -> Result<[Tensor; 2], LearnError> {
        let codes = Tensor::from_slice(&self.codes, self.codes.len(), &Device::Cpu)?;
        Ok([codes, Tensor::from_slice(&self.scales, self.scales.len(), &Device::Cpu)?])
    }
}

impl QuantizedMoments {
    /// Returns zero moments for a variable of `count` values.
    pub(crate) fn zeros(count: usize) -> Self {
        Self { m: BlockQuantized::zeros(count), v: BlockQuantized::zeros(count) }
    }

    /// Applies one AdamW step to the values `theta` of a variable, given its gradient.
    pub(crate) fn step(&mut self, theta: &mut [f32], gradient: &[f32], rates: &StepConstants) {
        let (signed, unsigned) = (&*SIGNED, &*UNSIGNED);
        const TASK: usize = BLOCK * BLOCKS_PER_TASK;
        let moments = (self.m.codes.par_chunks_mut(TASK).zip(self.m.scales.par_chunks_mut(BLOCKS_PER_TASK)))
            .zip(self.v.codes.par_chunks_mut(TASK).zip(self.v.scales.par_chunks_mut(BLOCKS_PER_TASK)));
        theta.par_chunks_mut(TASK).zip(gradient.par_chunks(TASK)).zip(moments).for_each(
            |((theta, gradient), ((m_codes, m_scales), (v_codes, v_scales)))| {
                let blocks = theta.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
                let m_blocks = m_codes.chunks_mut(BLOCK).zip(m_scales);
                let v_blocks = v_codes.chunks_mut(BLOCK).zip(v_scales);
                for (((theta, gradient), (m_codes, m_scale)), (v_codes, v_scale)) in
                    blocks.zip(m_blocks).zip(v_blocks)
                {
                    let count = theta.len();
                    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
                    // Separate loops, so that the compiler can vectorize each.
                    for (m, code) in m.iter_mut().zip(&*m_codes) {
                        *m = signed.values[*code as usize] * *m_scale;
                    }
                    for (v, code) in v.iter_mut().zip(&*v_codes) {
                        *v = unsigned.values[*code as usize] * *v_scale;
                    }
                    for (((theta, gradient), m), v) in theta.iter_mut().zip(gradient).zip(&mut m).zip(&mut v)
                    {
                        *m = rates.first_moment(*m, *gradient);
                        *v = rates.second_moment(*v, *gradient);
                        *theta = rates.updated_weight(*theta, *m, *v);
                    }
                    *m_scale = max_non_negative(m[..count].iter().map(|m| m.abs()));
                    *v_scale = max_non_negative(v[..count].iter().copied());
                    // In a block of zeros every quotient is zero.
                    let share = |most: f32| if most > 0.0 { 1.0 / most } else { 0.0 };
                    let (m_share, v_share) = (share(*m_scale), share(*v_scale));
                    for (code, m) in m_codes.iter_mut().zip(&m) {
                        let sign = ((m.to_bits() >> 31) as u8) << 7;
                        *code = sign | signed.nearest((m.abs() * m_share).min(1.0));
                    }
                    for (code, v) in v_codes.iter_mut().zip(&v) {
                        *code = unsigned.nearest((v * v_share).min(1.0)).max(u8::from(*v > 0.0));
                    }
                }
            },
        );
    }

    /// Inserts the tensors `m.NAME`, `m_scale.NAME`, `v.NAME` and `v_scale.NAME` into `state`.
    pub(crate) fn state(&self, name: &str, state: &mut HashMap<String, Tensor>) -> Result<(), LearnError> {
        for (moment, quantised) in [("m", &self.m), ("v", &self.v)] {
            let [codes, scales] = quantised.tensors()?;
            state.insert(format!("{moment}.{name}"), codes);
            state.insert(format!("{moment}_scale.{name}"), scales);
        }
        Ok(())
    }

    /// Restores the moments that [`EightBits::state`] inserted. Fails if a tensor is missing or has another length.
    pub(crate) fn restore(&mut self, name: &str, state: &HashMap<String, Tensor>) -> Result<(), LearnError> {
        for (moment, quantised) in [("m", &mut self.m), ("v", &mut self.v)] {
            let missing =
                |key: &str| LearnError::Data(format!("optimiser state `{key}` is missing or misshapen"));
            let (key, scale_key) = (format!("{moment}.{name}"), format!("{moment}_scale.{name}"));
            let read = |key: &str| state.get(key).ok_or_else(|| missing(key));
            let codes = read(&key)?.to_vec1::<u8>().map_err(|_| missing(&key))?;
            let scales = read(&scale_key)?.to_vec1::<f32>().map_err(|_| missing(&scale_key))?;
            if codes.len() != quantised.codes.len() || scales.len() != quantised.scales.len() {
                return Err(missing(&key));
            }
            *quantised = BlockQuantized { codes, scales };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn levels_rise_from_zero_to_one() {
        for (levels, count) in [(&*SIGNED, 128), (&*UNSIGNED, 256)] {
            let rising = &levels.values[..count];
            assert!(rising.is_sorted_by(|a, b| a < b));
            assert_eq!((rising[0], rising[count - 1]), (0.0, 1.0));
            assert!(rising[1] < 1e-5);
            assert!(count == 256 || (0..128).all(|code| levels.values[code + 128] == -levels.values[code]));
        }
    }

    proptest! {
        #[test]
        fn nearest_returns_the_closest_level(mantissa in 0.0f32..=1.0, scale in 0i32..9) {
            let x = mantissa * 10f32.powi(-scale);
            for (levels, count) in [(&*SIGNED, 128), (&*UNSIGNED, 256)] {
                let found = levels.values[levels.nearest(x) as usize];
                let best = levels.values[..count].iter().map(|value| (value - x).abs()).fold(f32::INFINITY, f32::min);
                prop_assert!((found - x).abs() <= best * 1.000_01, "{x}: {found}, {best} away is nearer");
            }
        }
    }
}
