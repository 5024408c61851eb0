//! Equality of two values: by their exact normal forms, or else by evaluation at sample points.
//!
//! Deliberately absent: containers, relations and units, which the profiles handle.

use std::collections::BTreeSet;

use crate::exact::{AtomTable, FormComparison};
use crate::expr::{Constant, Expr, Function};
use crate::numeric::{ComplexInterval, SamplePoint, evaluate};

/// Result of comparing two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueComparison {
    /// Proven equal.
    Equal,
    /// Equal at several sample points and different at none.
    EqualAtSamples,
    /// Proven different, or different at one sample point by more than the rounding error.
    Different,
    /// Neither equal nor different by these methods.
    Open,
}

/// Sample points that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// Real points where both values are real.
    Real,
    /// Real points where the values can be complex, so that branches of roots and logarithms count.
    Complex,
}

/// Number of sample points.
const SAMPLE_POINTS: u32 = 24;
/// Smallest number of sample points with reliable and equal values.
const MIN_AGREEING_POINTS: u32 = 5;
/// Largest relative difference of equal values.
const RELATIVE_TOLERANCE: f64 = 1e-9;

/// Compares two values by their normal forms, or else at sample points.
pub fn compare_values(a: &Expr, b: &Expr, domain: Domain) -> ValueComparison {
    if a == b {
        return ValueComparison::Equal;
    }
    let infinite = |expr: &Expr| match expr {
        Expr::Constant(Constant::Infinity) => Some(1),
        Expr::Product(factors) => match factors.as_slice() {
            [sign, Expr::Constant(Constant::Infinity)] => sign.as_number().map(|_| -1),
            _ => None,
        },
        _ => None,
    };
    match (infinite(a), infinite(b)) {
        (Some(a), Some(b)) => {
            return if a == b { ValueComparison::Equal } else { ValueComparison::Different };
        }
        (Some(_), None) | (None, Some(_)) => return ValueComparison::Different,
        (None, None) => {}
    }
    let mut atoms = AtomTable::default();
    if let Some((form, other)) = atoms.normal_form(a).zip(atoms.normal_form(b)) {
        match atoms.compare(&form, &other) {
            FormComparison::Same => return ValueComparison::Equal,
            FormComparison::Different => return ValueComparison::Different,
            FormComparison::Open => {}
        }
    }
    compare_at_samples(a, b, domain)
}

/// Compares two values at sample points only. Tests check the normal form against this function.
pub fn compare_at_samples(a: &Expr, b: &Expr, domain: Domain) -> ValueComparison {
    let mut names = BTreeSet::new();
    a.collect_free_variables(&mut names);
    b.collect_free_variables(&mut names);
    // Indices of sums and arguments of binomials and factorials are integers, so the sample points are too.
    let discrete = |expr: &Expr| {
        expr.any_part(&|part| {
            matches!(
                part,
                Expr::BigOperator(..)
                    | Expr::Call(Function::Factorial | Function::Binomial | Function::Gcd, _)
            )
        })
    };
    let whole = discrete(a) || discrete(b);
    let mut agreed = 0;
    let mut random = SampleRng(0x9e37_79b9_7f4a_7c15);
    for number in 0..if names.is_empty() { 1 } else { SAMPLE_POINTS } {
        let place: SamplePoint =
            names.iter().map(|name| (name.clone(), random.sample_value(number, whole))).collect();
        let (Some(x), Some(y)) = (evaluate(a, &place), evaluate(b, &place)) else { continue };
        let (wide, apart) = (x.re.hypot(x.im).max(y.re.hypot(y.im)), (x.re - y.re).hypot(x.im - y.im));
        let bound = x.error + y.error;
        if domain == Domain::Real && !names.is_empty() && (x.im.abs() > x.error || y.im.abs() > y.error) {
            continue;
        }
        // If the rounding error exceeds a millionth of the values, agreement proves nothing.
        if bound > wide * 1e-6 {
            if apart > bound {
                return ValueComparison::Different;
            }
            if names.is_empty() && wide <= bound {
                return ValueComparison::EqualAtSamples;
            }
            continue;
        }
        if apart > bound * 4.0 && apart > wide * 1e-13 {
            return ValueComparison::Different;
        }
        if apart <= bound * 4.0 + wide * RELATIVE_TOLERANCE {
            agreed += 1;
        }
    }
    let enough = if names.is_empty() { 1 } else { MIN_AGREEING_POINTS };
    if agreed >= enough { ValueComparison::EqualAtSamples } else { ValueComparison::Open }
}

/// Random numbers by xorshift with a fixed seed, so that every run has the same sample points.
struct SampleRng(u64);

impl SampleRng {
    /// Returns the next number in [0, 1).
    fn next_unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns the value of a variable at sample point `number`: a positive integer if `whole` is true, else
    /// a real number.
    fn sample_value(&mut self, number: u32, whole: bool) -> ComplexInterval {
        let draw = self.next_unit();
        if whole {
            return ComplexInterval {
                re: (1.0 + (draw * 11.0).floor()) + f64::from(number % 3),
                im: 0.0,
                error: 0.0,
            };
        }
        let re = match number % 4 {
            0 => 0.1 + 0.8 * draw,
            1 => 1.1 + 2.0 * draw,
            2 => -0.1 - 2.5 * draw,
            _ => 3.0 + 5.0 * draw,
        };
        ComplexInterval { re, im: 0.0, error: 0.0 }
    }
}
