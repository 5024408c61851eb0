//! Equality of two values: by their exact normal forms, or else by evaluation at sample points.
//!
//! Deliberately absent: containers, relations and units, which the profiles handle.

use std::collections::BTreeSet;

use crate::exact::{Atoms, Sameness};
use crate::expr::{Constant, Expr, Function};
use crate::numeric::{Ball, Place, value};

/// Result of comparing two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
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
    Branches,
}

/// Number of sample points.
const PLACES: u32 = 24;
/// Smallest number of sample points with reliable and equal values.
const ENOUGH: u32 = 5;
/// Largest relative difference of equal values.
const CLOSE: f64 = 1e-9;

/// Compares two values by their normal forms, or else at sample points.
pub fn compare(a: &Expr, b: &Expr, domain: Domain) -> Found {
    if a == b {
        return Found::Equal;
    }
    let infinite = |expr: &Expr| match expr {
        Expr::Constant(Constant::Infinity) => Some(1),
        Expr::Product(factors) => match factors.as_slice() {
            [sign, Expr::Constant(Constant::Infinity)] => sign.number().map(|_| -1),
            _ => None,
        },
        _ => None,
    };
    match (infinite(a), infinite(b)) {
        (Some(a), Some(b)) => return if a == b { Found::Equal } else { Found::Different },
        (Some(_), None) | (None, Some(_)) => return Found::Different,
        (None, None) => {}
    }
    let mut atoms = Atoms::default();
    if let Some((form, other)) = atoms.form(a).zip(atoms.form(b)) {
        match atoms.same(&form, &other) {
            Sameness::Same => return Found::Equal,
            Sameness::Different => return Found::Different,
            Sameness::Open => {}
        }
    }
    sampled(a, b, domain)
}

/// Compares two values at sample points only. Tests check the normal form against this function.
pub fn sampled(a: &Expr, b: &Expr, domain: Domain) -> Found {
    let mut names = BTreeSet::new();
    a.symbols(&mut names);
    b.symbols(&mut names);
    // Indices of sums and arguments of binomials and factorials are integers, so the sample points are too.
    let discrete = |expr: &Expr| {
        expr.any(&|part| {
            matches!(
                part,
                Expr::Over(..) | Expr::Call(Function::Factorial | Function::Binomial | Function::Gcd, _)
            )
        })
    };
    let whole = discrete(a) || discrete(b);
    let mut agreed = 0;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for number in 0..if names.is_empty() { 1 } else { PLACES } {
        let place: Place = names.iter().map(|name| (name.clone(), random.place(number, whole))).collect();
        let (Some(x), Some(y)) = (value(a, &place), value(b, &place)) else { continue };
        let (wide, apart) = (x.re.hypot(x.im).max(y.re.hypot(y.im)), (x.re - y.re).hypot(x.im - y.im));
        let bound = x.error + y.error;
        if domain == Domain::Real && !names.is_empty() && (x.im.abs() > x.error || y.im.abs() > y.error) {
            continue;
        }
        // If the rounding error exceeds a millionth of the values, agreement proves nothing.
        if bound > wide * 1e-6 {
            if apart > bound {
                return Found::Different;
            }
            if names.is_empty() && wide <= bound {
                return Found::EqualAtSamples;
            }
            continue;
        }
        if apart > bound * 4.0 && apart > wide * 1e-13 {
            return Found::Different;
        }
        if apart <= bound * 4.0 + wide * CLOSE {
            agreed += 1;
        }
    }
    let enough = if names.is_empty() { 1 } else { ENOUGH };
    if agreed >= enough { Found::EqualAtSamples } else { Found::Open }
}

/// Random numbers by xorshift with a fixed seed, so that every run has the same sample points.
struct Random(u64);

impl Random {
    /// Returns the next number in [0, 1).
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns the value of a variable at sample point `number`: a positive integer if `whole` is true, else
    /// a real number.
    fn place(&mut self, number: u32, whole: bool) -> Ball {
        let draw = self.next();
        if whole {
            return Ball { re: (1.0 + (draw * 11.0).floor()) + f64::from(number % 3), im: 0.0, error: 0.0 };
        }
        let re = match number % 4 {
            0 => 0.1 + 0.8 * draw,
            1 => 1.1 + 2.0 * draw,
            2 => -0.1 - 2.5 * draw,
            _ => 3.0 + 5.0 * draw,
        };
        Ball { re, im: 0.0, error: 0.0 }
    }
}
