//! Exact normal form: a quotient of two polynomials in atoms, with rational coefficients and exponents.
//!
//! An atom is a variable, a constant, a prime under a root, or an opaque expression (a function call or a
//! power with variables). Forms are equal if cross multiplication gives equal polynomials. Without opaque
//! atoms, `e` and `pi`, unequal polynomials prove a difference: roots of different primes are linearly
//! independent over the rationals.
//!
//! Deliberately absent: identities of functions, except for powers and logarithms.

mod functions;
mod polynomial;

use std::collections::{BTreeMap, HashMap};

use num_bigint::BigInt;
use num_rational::{BigRational, Ratio};
use num_traits::{One, ToPrimitive, Zero};

pub use self::functions::replaced;
use self::polynomial::{constant, one, times, without_denominators};
use crate::effort::{spend, spend_on};
use crate::expr::{Constant, Expr, from_base, is_whole};

/// Largest number of terms in a polynomial.
const TERMS: usize = 600;
/// Largest size of an integer power in bits.
const BITS: u64 = 200_000;
/// Largest exponent for the expansion of a polynomial with several terms.
const EXPONENT: i64 = 40;
/// Largest trial divisor of factorizations.
const PRIMES: u64 = 20_000;

/// Rational exponent of an atom.
type Exponent = Ratio<i64>;
/// Atom numbers in ascending order, with their exponents.
type Monomial = Vec<(u32, Exponent)>;

/// Nonzero coefficients by monomial.
type Polynomial = BTreeMap<Monomial, BigRational>;

/// Quotient of two polynomials.
#[derive(Debug, Clone)]
pub struct Form {
    /// Numerator.
    top: Polynomial,
    /// Denominator, which is not zero.
    bottom: Polynomial,
}

/// Indivisible part of a form.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Atom {
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
pub struct Atoms {
    /// Atoms by number.
    list: Vec<Atom>,
    /// Numbers by atom.
    index: HashMap<Atom, u32>,
}

/// Result of comparing two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sameness {
    /// Proven equal.
    Same,
    /// Proven different.
    Different,
    /// Neither equal nor different by normal forms.
    Open,
}

impl Atoms {
    /// Returns the number of an atom; a new atom gets the next number.
    fn number(&mut self, atom: Atom) -> u32 {
        if let Some(known) = self.index.get(&atom) {
            return *known;
        }
        let number = self.list.len() as u32;
        self.list.push(atom.clone());
        self.index.insert(atom, number);
        number
    }

    /// Returns the form of a single atom.
    fn atom(&mut self, atom: Atom) -> Form {
        let number = self.number(atom);
        Form { top: BTreeMap::from([(vec![(number, Exponent::one())], BigRational::one())]), bottom: one() }
    }

    /// Returns the normal form. Returns `None` for containers, undefined values, and forms beyond a limit.
    pub fn form(&mut self, expr: &Expr) -> Option<Form> {
        spend(200)?;
        match expr {
            Expr::Number(number) => Some(constant(number.value.clone())),
            Expr::Symbol(name) => Some(self.atom(Atom::Symbol(name.clone()))),
            Expr::Constant(Constant::Pi) => Some(self.atom(Atom::Pi)),
            Expr::Constant(Constant::E) => Some(self.atom(Atom::E)),
            Expr::Constant(Constant::I) => Some(self.atom(Atom::I)),
            Expr::Constant(Constant::Infinity) => None,
            Expr::Percent(inner) => {
                self.form(inner)?.times(&constant(BigRational::new(1.into(), 100.into())), self)
            }
            Expr::Degrees(inner) => {
                let pi = self.atom(Atom::Pi);
                let inner = self.form(inner)?;
                inner.times(&pi, self)?.times(&constant(BigRational::new(1.into(), 180.into())), self)
            }
            Expr::Based(digits, base) => {
                let digits = &digits.number()?.value;
                spend_on(digits, digits)?;
                Some(constant(from_base(digits, *base)?))
            }
            Expr::Ratio(parts) => {
                let [a, b] = parts.as_slice() else { return None };
                let (a, b) = (self.form(a)?, self.form(b)?);
                a.times(&b.inverse()?, self)
            }
            Expr::Sum(terms) => {
                let mut sum = constant(BigRational::zero());
                for term in terms {
                    sum = sum.plus(&self.form(term)?, self)?;
                }
                Some(sum)
            }
            Expr::Product(factors) => {
                let mut product = constant(BigRational::one());
                for factor in factors {
                    product = product.times(&self.form(factor)?, self)?;
                }
                Some(product)
            }
            Expr::Power(base, exponent) => {
                let (base, exponent) = (self.form(base)?, self.form(exponent)?);
                self.power(&base, &exponent)
            }
            Expr::Call(function, arguments) => {
                let arguments: Option<Vec<Form>> =
                    arguments.iter().map(|argument| self.form(argument)).collect();
                self.call(*function, &arguments?)
            }
            Expr::Over(over, index, parts) => self.over(*over, index, parts),
            _ => None,
        }
    }

    /// Returns the form of a power.
    fn power(&mut self, base: &Form, exponent: &Form) -> Option<Form> {
        match exponent.value() {
            Some(exponent) if is_whole(&exponent) => {
                let exponent = exponent.to_i64()?;
                base.whole_power(exponent, self)
            }
            Some(exponent) => self.root(base, &exponent),
            None => self.symbolic_power(base, exponent),
        }
    }

    /// Returns an opaque atom for a function call.
    fn opaque(&mut self, name: &str, arguments: &[Form]) -> Option<Form> {
        let texts: Option<Vec<String>> = arguments.iter().map(Self::text).collect();
        Some(self.atom(Atom::Opaque(format!("{name}({})", texts?.join(", ")))))
    }

    /// Returns a monomial as text with atom numbers. Nested texts instead would grow with every function.
    fn monomial_text(monomial: &Monomial) -> String {
        let parts: Vec<String> = monomial.iter().map(|(atom, power)| format!("#{atom}^{power}")).collect();
        parts.join("*")
    }

    /// Returns a form as text; equal texts mean equal forms.
    fn text(form: &Form) -> Option<String> {
        let mut text = String::new();
        for side in [&form.top, &form.bottom] {
            for (monomial, coefficient) in side {
                spend_on(coefficient, coefficient)?;
                text.push_str(&format!("+{coefficient}*{}", Self::monomial_text(monomial)));
            }
            text.push('/');
        }
        Some(text)
    }

    /// Compares two forms.
    pub fn same(&mut self, a: &Form, b: &Form) -> Sameness {
        let products = times(&a.top, &b.bottom, self).zip(times(&b.top, &a.bottom, self));
        let Some((left, right)) = products else { return Sameness::Open };
        if left == right {
            return Sameness::Same;
        }
        let used = left.keys().chain(right.keys()).flatten();
        let mut open = false;
        for (atom, power) in used {
            open |= match &self.list[*atom as usize] {
                Atom::Opaque(_) | Atom::E | Atom::Pi => true,
                // A large factor without small divisors can be composite, and a root of a variable has
                // branches.
                Atom::Prime(prime) => prime > &BigInt::from(PRIMES * PRIMES),
                Atom::Symbol(_) => !power.is_integer(),
                Atom::I => false,
            };
        }
        if open { Sameness::Open } else { Sameness::Different }
    }

    /// Returns whether the equations `a = 0` and `b = 0` are multiples of each other.
    pub fn proportional(&mut self, a: &Form, b: &Form) -> bool {
        (a.top.is_empty() && b.top.is_empty()) || self.ratio(a, b).is_some()
    }

    /// Returns whether a multiple of `a` differs from `b` by a nonzero constant, so that both are never zero
    /// at once.
    pub fn shifted(&self, a: &Form, b: &Form) -> bool {
        let constant = Monomial::new();
        let (mut a, mut b) = (without_denominators(&a.top), without_denominators(&b.top));
        let (x, y) = (a.remove(&constant).unwrap_or_default(), b.remove(&constant).unwrap_or_default());
        let side = |top: Polynomial| Form { top, bottom: one() };
        match self.ratio(&side(a), &side(b)) {
            Some(ratio) => x != y * ratio,
            None => false,
        }
    }

    /// Returns the constant ratio of `a` and `b`, or `None` if the ratio is not constant.
    ///
    /// Denominators are cleared first, because `y / x = 3` and `y = 3 x` are one equation.
    pub fn ratio(&self, a: &Form, b: &Form) -> Option<BigRational> {
        let (a, b) = (without_denominators(&a.top), without_denominators(&b.top));
        let (at, of_a) = a.iter().next()?;
        let (other, of_b) = b.iter().next()?;
        if at != other || a.len() != b.len() {
            return None;
        }
        let ratio = of_a / of_b;
        let same = a.iter().zip(&b).all(|((m, x), (n, y))| m == n && *x == y * &ratio);
        same.then_some(ratio)
    }
}
