//! Types of the normal form: quotients of polynomials over atoms.

use std::collections::{BTreeMap, HashMap};

use num_bigint::BigInt;
use num_rational::{BigRational, Ratio};

/// Largest number of terms in a polynomial.
pub(super) const MAX_TERMS: usize = 600;

/// Largest size of an integer power in bits.
pub(super) const MAX_POWER_BITS: u64 = 200_000;

/// Largest exponent for the expansion of a polynomial with several terms.
pub(super) const MAX_EXPANDED_EXPONENT: i64 = 40;

/// Largest trial divisor of factorizations.
pub(super) const MAX_TRIAL_DIVISOR: u64 = 20_000;

/// Rational exponent of an atom.
pub(super) type Exponent = Ratio<i64>;

/// Atom numbers in ascending order, with their exponents.
pub(super) type Monomial = Vec<(u32, Exponent)>;

/// Nonzero coefficients by monomial.
pub(super) type Polynomial = BTreeMap<Monomial, BigRational>;

/// Quotient of two polynomials.
#[derive(Debug, Clone)]
pub struct NormalForm {
    /// Numerator.
    pub(super) top: Polynomial,
    /// Denominator, which is not zero.
    pub(super) bottom: Polynomial,
}

/// Indivisible part of a form.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Atom {
    Symbol(String),
    Pi,
    E,
    I,
    /// Prime, or a factor without small prime divisors, with an exponent between 0 and 1.
    Prime(BigInt),
    /// Any other expression, identified by the text of its normal form.
    Opaque(String),
}

/// Numbering of the atoms. Forms are comparable only with the same numbering.
#[derive(Default)]
pub struct AtomTable {
    /// Atoms by number.
    pub(super) list: Vec<Atom>,
    /// Numbers by atom.
    pub(super) index: HashMap<Atom, u32>,
}

/// Result of comparing two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormComparison {
    /// Proven equal.
    Same,
    /// Proven different.
    Different,
    /// Neither equal nor different by normal forms.
    Open,
}
