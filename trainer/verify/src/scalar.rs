//! Whether two values are equal: by their exact normal forms, else by evaluation at random places.

use std::collections::BTreeSet;

use crate::exact::{Atoms, Sameness};
use crate::expr::{Constant, Expr, Function};
use crate::numeric::{Ball, Place, value};

/// What was found out, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Equal: proven.
    Equal,
    /// Equal at every place that was tried.
    EqualAtSamples,
    /// Different: proven, or at one place by more than rounding.
    Different,
    /// Not decided.
    Open,
}

/// Where variables are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// At real places where both sides are real.
    Real,
    /// At real places also where a side is not real, so that branches of roots and logarithms matter.
    Branches,
}

/// Places that are tried.
const PLACES: u32 = 24;
/// Places at which both sides must have a value that can be trusted.
const ENOUGH: u32 = 5;
/// Agreement that is asked for, relative to the values.
const CLOSE: f64 = 1e-9;

/// Compares two values.
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

/// Compares two values at random places only; the slow twin of the normal form.
pub fn sampled(a: &Expr, b: &Expr, domain: Domain) -> Found {
    let mut names = BTreeSet::new();
    a.symbols(&mut names);
    b.symbols(&mut names);
    // Indices of sums and arguments of binomials and factorials are whole numbers.
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
        // Places where rounding has eaten the digits say nothing.
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

/// A small generator (xorshift): the same places every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

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
