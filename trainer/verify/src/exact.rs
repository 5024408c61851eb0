//! Exact normal form: a fraction of two polynomials over the rational numbers in atoms, where an atom is a variable, a
//! constant, a prime under a root, a power with a symbolic exponent, or a function of something (opaque). Two forms are equal
//! when cross multiplication gives the same polynomial; when no atom is opaque, different polynomials prove the
//! opposite, since roots of different primes are independent over the rationals.

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

/// Terms of a polynomial.
const TERMS: usize = 600;
/// Bits of a number.
const BITS: u64 = 200_000;
/// Exponent that is multiplied out.
const EXPONENT: i64 = 40;
/// Primes up to this are found under roots.
const PRIMES: u64 = 20_000;

type Exponent = Ratio<i64>;
/// Atoms by number, with their exponents.
type Monomial = Vec<(u32, Exponent)>;

/// Terms by monomial; no coefficient is zero.
type Polynomial = BTreeMap<Monomial, BigRational>;

/// A fraction of polynomials.
#[derive(Debug, Clone)]
pub struct Form {
    top: Polynomial,
    bottom: Polynomial,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Atom {
    Symbol(String),
    Pi,
    E,
    I,
    /// A prime, under roots only.
    Prime(BigInt),
    /// Anything else, by its own normal form as text.
    Opaque(String),
}

/// The atoms of forms that are compared with one another.
#[derive(Default)]
pub struct Atoms {
    list: Vec<Atom>,
    index: HashMap<Atom, u32>,
}

/// Whether a difference is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sameness {
    /// Proven equal.
    Same,
    /// Proven different.
    Different,
    /// Not decided here.
    Open,
}

impl Atoms {
    fn number(&mut self, atom: Atom) -> u32 {
        if let Some(known) = self.index.get(&atom) {
            return *known;
        }
        let number = self.list.len() as u32;
        self.list.push(atom.clone());
        self.index.insert(atom, number);
        number
    }

    fn atom(&mut self, atom: Atom) -> Form {
        let number = self.number(atom);
        Form { top: BTreeMap::from([(vec![(number, Exponent::one())], BigRational::one())]), bottom: one() }
    }

    /// The normal form; none for what is no number, too large, or undefined.
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

    fn opaque(&mut self, name: &str, arguments: &[Form]) -> Option<Form> {
        let texts: Option<Vec<String>> = arguments.iter().map(Self::text).collect();
        Some(self.atom(Atom::Opaque(format!("{name}({})", texts?.join(", ")))))
    }

    /// Atoms by their numbers: what is within an opaque one must not grow with every function around it.
    fn monomial_text(monomial: &Monomial) -> String {
        let parts: Vec<String> = monomial.iter().map(|(atom, power)| format!("#{atom}^{power}")).collect();
        parts.join("*")
    }

    /// The form as text: the same for the same form.
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

    /// Whether two forms are the same.
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
                // A rest that was not split into primes, or a variable under a root.
                Atom::Prime(prime) => prime > &BigInt::from(PRIMES * PRIMES),
                Atom::Symbol(_) => !power.is_integer(),
                Atom::I => false,
            };
        }
        if open { Sameness::Open } else { Sameness::Different }
    }

    /// Whether one polynomial equation `a = 0` is a multiple of another, `b = 0`.
    pub fn proportional(&mut self, a: &Form, b: &Form) -> bool {
        (a.top.is_empty() && b.top.is_empty()) || self.ratio(a, b).is_some()
    }

    /// Whether multiples of `a` and `b` differ by a number other than zero, so that both cannot be zero at once.
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

    /// `a / b`, where that is a number; denominators aside, as `y / x = 3` and `y = 3 x` say the same.
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
