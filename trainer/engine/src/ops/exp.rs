//! A branch-free exponential that the compiler vectorizes; libm's `expf` is a call per element.

/// Computes `e^x` in f32 with a relative error below 3e-7. The result is 0 below -87 and saturates above
/// 88; NaN stays NaN.
///
/// Range reduction `x = n ln 2 + r`, a polynomial of degree 6 for `e^r` with `|r| <= ln 2 / 2`, and `2^n`
/// through its exponent bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 as a sum of two parts, so that `r` keeps its low bits (Cody and Waite).
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    // Adding 1.5 * 2^23 rounds to an integer, which then occupies the low bits of the sum. A conversion to
    // `i32` would not vectorize because of its range checks.
    const ROUNDING_SHIFT: f32 = 12_582_912.0;
    let shifted = clamped * LOG2_E + ROUNDING_SHIFT;
    let n = shifted - ROUNDING_SHIFT;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let mut p = 1.388_888_9e-3f32;
    p = p.mul_add(r, 8.333_334e-3);
    p = p.mul_add(r, 4.166_666_6e-2);
    p = p.mul_add(r, 1.666_666_7e-1);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()));
    let y = p * scale;
    if x < -87.0 { 0.0 } else { y }
}

/// Computes the logistic function `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn matches_libm(x in -87.0f32..88.0) {
            let expected = f64::from(x).exp();
            let error = (f64::from(super::exp(x)) - expected).abs() / expected;
            prop_assert!(error < 3e-7, "exp({x}) is off by {error}");
        }
    }

    #[test]
    fn underflow_is_zero_and_overflow_is_finite() {
        assert_eq!(super::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(super::exp(-100.0), 0.0);
        assert_eq!(super::exp(0.0), 1.0);
        assert!(super::exp(f32::NAN).is_nan() && super::exp(1e9).is_finite());
    }
}
