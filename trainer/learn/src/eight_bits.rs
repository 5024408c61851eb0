//! Moments in eight bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): a block of 256 values shares its
//! largest magnitude; each is the nearest of numbers that lie denser the smaller they are (the paper's dynamic tree, section 2.2).
//! A quarter of the memory, and next to no difference to what is learnt. What differs: a second moment above zero never becomes
//! zero, so that no step is divided by next to nothing.

use std::collections::HashMap;
use std::sync::LazyLock;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::adamw::Rates;
use crate::error::LearnError;

/// Values that share a scale.
const BLOCK: usize = 256;
/// Blocks that one parallel task takes.
const BLOCKS_PER_TASK: usize = 64;
/// Bits of a number behind those that find its level: 8 of the exponent and 6 of the mantissa stay.
const SHIFT: u32 = 17;

/// Both moments of one variable.
pub(crate) struct EightBits {
    m: Quantised,
    v: Quantised,
}

/// Codes, and the largest magnitude of each block.
struct Quantised {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

/// Numbers from 0 to 1 in rising order, and where to look for the nearest.
struct Levels {
    values: Vec<f32>,
    /// Between a level and the next; beyond the last nothing is.
    middles: Vec<f32>,
    /// By the first bits of a number: the level of the smallest number that begins like this.
    first: Vec<u8>,
}

/// For the first moment: 128 levels, and a bit for the sign.
static SIGNED: LazyLock<Levels> = LazyLock::new(|| Levels::new(7));
/// For the second.
static UNSIGNED: LazyLock<Levels> = LazyLock::new(|| Levels::new(8));
const SIGN: u8 = 1 << 7;

impl Levels {
    /// `2^bits` levels: 0, 1 and, in each of seven decades, the middles of as many equal parts as there are bits for; each decade
    /// has twice as many as the one below.
    fn new(bits: u32) -> Self {
        let mut values = vec![0.0];
        for decade in 0..7 {
            let parts = 1usize << (decade + bits - 7);
            let width = 0.9 / parts as f64;
            let middle = |part: usize| 0.1 + (part as f64 + 0.5) * width;
            values.extend((0..parts).map(|part| (middle(part) * 10f64.powi(decade as i32 - 6)) as f32));
        }
        // The one too many is the smallest.
        let surplus = (values.len() + 1).saturating_sub(1 << bits);
        values.drain(1..1 + surplus);
        values.push(1.0);
        let mut middles: Vec<f32> = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        middles.push(f32::INFINITY);
        let level = |begin: u32| middles.partition_point(|middle| *middle < f32::from_bits(begin << SHIFT));
        let first = (0..=1f32.to_bits() >> SHIFT).map(|begin| level(begin) as u8).collect();
        Self { values, middles, first }
    }

    /// The level nearest to `x`, from 0 to 1.
    #[inline(always)]
    fn nearest(&self, x: f32) -> u8 {
        let mut level = self.first[(x.to_bits() >> SHIFT) as usize];
        // No more than two of the middles begin with the same bits.
        level += u8::from(x > self.middles[level as usize]);
        level + u8::from(x > self.middles[level as usize])
    }
}

impl Quantised {
    fn zeros(count: usize) -> Self {
        Self { codes: vec![0; count], scales: vec![0.0; count.div_ceil(BLOCK)] }
    }

    fn tensors(&self) -> Result<[Tensor; 2], LearnError> {
        let codes = Tensor::from_slice(&self.codes, self.codes.len(), &Device::Cpu)?;
        Ok([codes, Tensor::from_slice(&self.scales, self.scales.len(), &Device::Cpu)?])
    }
}

impl EightBits {
    pub(crate) fn zeros(count: usize) -> Self {
        Self { m: Quantised::zeros(count), v: Quantised::zeros(count) }
    }

    /// One step of AdamW over the values and gradients of the variable.
    pub(crate) fn step(&mut self, theta: &mut [f32], gradient: &[f32], rates: &Rates) {
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
                    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
                    let (mut m_most, mut v_most) = (0f32, 0f32);
                    for (i, gradient) in gradient.iter().enumerate() {
                        let old = signed.values[(m_codes[i] & !SIGN) as usize] * *m_scale;
                        let old = if m_codes[i] & SIGN == 0 { old } else { -old };
                        m[i] = rates.first(old, *gradient);
                        v[i] = rates.second(unsigned.values[v_codes[i] as usize] * *v_scale, *gradient);
                        m_most = m_most.max(m[i].abs());
                        v_most = v_most.max(v[i]);
                        theta[i] = rates.moved(theta[i], m[i], v[i]);
                    }
                    (*m_scale, *v_scale) = (m_most, v_most);
                    // Of a block of zeros every share is zero.
                    let share = |most: f32| if most > 0.0 { 1.0 / most } else { 0.0 };
                    let (m_share, v_share) = (share(m_most), share(v_most));
                    for i in 0..gradient.len() {
                        let sign = if m[i] < 0.0 { SIGN } else { 0 };
                        m_codes[i] = sign | signed.nearest((m[i].abs() * m_share).min(1.0));
                        v_codes[i] = unsigned.nearest((v[i] * v_share).min(1.0)).max(u8::from(v[i] > 0.0));
                    }
                }
            },
        );
    }

    /// As tensors `m.NAME`, `m_scale.NAME` and likewise for `v`.
    pub(crate) fn state(&self, name: &str, state: &mut HashMap<String, Tensor>) -> Result<(), LearnError> {
        for (moment, quantised) in [("m", &self.m), ("v", &self.v)] {
            let [codes, scales] = quantised.tensors()?;
            state.insert(format!("{moment}.{name}"), codes);
            state.insert(format!("{moment}_scale.{name}"), scales);
        }
        Ok(())
    }

    /// Puts back what [`EightBits::state`] gave.
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
            *quantised = Quantised { codes, scales };
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
            assert_eq!(levels.values.len(), count);
            assert!(levels.values.is_sorted_by(|a, b| a < b));
            assert_eq!((levels.values[0], levels.values[count - 1]), (0.0, 1.0));
            assert!(levels.values[1] < 1e-5);
        }
    }

    proptest! {
        #[test]
        fn the_nearest_level_is_found(mantissa in 0.0f32..=1.0, scale in 0i32..9) {
            let x = mantissa * 10f32.powi(-scale);
            for levels in [&*SIGNED, &*UNSIGNED] {
                let found = levels.values[levels.nearest(x) as usize];
                let best = levels.values.iter().map(|value| (value - x).abs()).fold(f32::INFINITY, f32::min);
                prop_assert!((found - x).abs() <= best * 1.000_01, "{x}: {found}, {best} away is nearer");
            }
        }
    }
}
