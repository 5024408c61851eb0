//! Exact normal form: a quotient of two polynomials in atoms, with rational coefficients and exponents.
//!
//! An atom is a variable, a constant, a prime under a root, or an opaque expression (a function call or a
//! power with variables). Forms are equal if cross multiplication gives equal polynomials. Without opaque
//! atoms, `e` and `pi`, unequal polynomials prove a difference: roots of different primes are linearly
//! independent over the rationals.
//!
//! Deliberately absent: identities of functions, except for powers and logarithms.

mod form;
mod functions;
mod polynomial;

use std::collections::BTreeMap;

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, ToPrimitive, Zero};

use self::form::{Atom, Exponent, MAX_TRIAL_DIVISOR, Monomial, Polynomial};
pub use self::form::{AtomTable, FormComparison, NormalForm};
pub use self::functions::substitute;
use self::polynomial::{clear_denominators, constant_form, multiply, one};
use crate::effort::{spend, spend_fractions};
use crate::expr::{Constant, Expr, is_integer, parse_in_base};

impl AtomTable {
    /// Returns the number of an atom; a new atom gets the next number.
    fn atom_id(&mut self, atom: Atom) -> u32 {
        if let Some(known) = self.index.get(&atom) {
            return *known;
        }
        let number = self.list.len() as u32;
        self.list.push(atom.clone());
        self.index.insert(atom, number);
        number
    }

    /// Returns the form of a single atom.
    fn atom_form(&mut self, atom: Atom) -> NormalForm {
        let number = self.atom_id(atom);
        NormalForm {
            top: BTreeMap::from([(vec![(number, Exponent::one())], BigRational::one())]),
            bottom: one(),
        }
    }

    /// Returns the normal form. Returns `None` for containers, undefined values, and forms beyond a limit.
    pub fn normal_form(&mut self, expr: &Expr) -> Option<NormalForm> {
        spend(200)?;
        match expr {
            Expr::Number(number) => Some(constant_form(number.value.clone())),
            Expr::Symbol(name) => Some(self.atom_form(Atom::Symbol(name.clone()))),
            Expr::Constant(Constant::Pi) => Some(self.atom_form(Atom::Pi)),
            Expr::Constant(Constant::E) => Some(self.atom_form(Atom::E)),
            Expr::Constant(Constant::I) => Some(self.atom_form(Atom::I)),
            Expr::Constant(Constant::Infinity) => None,
            Expr::Percent(inner) => {
                self.normal_form(inner)?.times(&constant_form(BigRational::new(1.into(), 100.into())), self)
            }
            Expr::Degrees(inner) => {
                let pi = self.atom_form(Atom::Pi);
                let inner = self.normal_form(inner)?;
                inner.times(&pi, self)?.times(&constant_form(BigRational::new(1.into(), 180.into())), self)
            }
            Expr::InBase(digits, base) => {
                let digits = &digits.as_number()?.value;
                spend_fractions(digits, digits)?;
                Some(constant_form(parse_in_base(digits, *base)?))
            }
            Expr::Ratio(parts) => {
                let [a, b] = parts.as_slice() else { return None };
                let (a, b) = (self.normal_form(a)?, self.normal_form(b)?);
                a.times(&b.reciprocal()?, self)
            }
            Expr::Sum(terms) => {
                let mut sum = constant_form(BigRational::zero());
                for term in terms {
                    sum = sum.plus(&self.normal_form(term)?, self)?;
                }
                Some(sum)
            }
            Expr::Product(factors) => {
                let mut product = constant_form(BigRational::one());
                for factor in factors {
                    product = product.times(&self.normal_form(factor)?, self)?;
                }
                Some(product)
            }
            Expr::Power(base, exponent) => {
                let (base, exponent) = (self.normal_form(base)?, self.normal_form(exponent)?);
                self.power_form(&base, &exponent)
            }
            Expr::Call(function, arguments) => {
                let arguments: Option<Vec<NormalForm>> =
                    arguments.iter().map(|argument| self.normal_form(argument)).collect();
                self.call_form(*function, &arguments?)
            }
            Expr::BigOperator(over, index, parts) => self.big_operator_form(*over, index, parts),
            _ => None,
        }
    }

    /// Returns the form of a power.
    fn power_form(&mut self, base: &NormalForm, exponent: &NormalForm) -> Option<NormalForm> {
        match exponent.as_rational() {
            Some(exponent) if is_integer(&exponent) => {
                let exponent = exponent.to_i64()?;
                base.integer_power(exponent, self)
            }
            Some(exponent) => self.fractional_power(base, &exponent),
            None => self.symbolic_power(base, exponent),
        }
    }

    /// Returns an opaque atom for a function call.
    fn opaque_form(&mut self, name: &str, arguments: &[NormalForm]) -> Option<NormalForm> {
        let texts: Option<Vec<String>> = arguments.iter().map(Self::canonical_text).collect();
        Some(self.atom_form(Atom::Opaque(format!("{name}({})", texts?.join(", ")))))
    }

    /// Returns a monomial as text with atom numbers. Nested texts instead would grow with every function.
    fn monomial_text(monomial: &Monomial) -> String {
        let parts: Vec<String> = monomial.iter().map(|(atom, power)| format!("#{atom}^{power}")).collect();
        parts.join("*")
    }

    /// Returns a form as text; equal texts mean equal forms.
    fn canonical_text(form: &NormalForm) -> Option<String> {
        let mut text = String::new();
        for side in [&form.top, &form.bottom] {
            for (monomial, coefficient) in side {
                spend_fractions(coefficient, coefficient)?;
                text.push_str(&format!("+{coefficient}*{}", Self::monomial_text(monomial)));
            }
            text.push('/');
        }
        Some(text)
    }

    /// Compares two forms.
    pub fn compare(&mut self, a: &NormalForm, b: &NormalForm) -> FormComparison {
        let products = multiply(&a.top, &b.bottom, self).zip(multiply(&b.top, &a.bottom, self));
        let Some((left, right)) = products else { return FormComparison::Open };
        if left == right {
            return FormComparison::Same;
        }
        let used = left.keys().chain(right.keys()).flatten();
        let mut open = false;
        for (atom, power) in used {
            open |= match &self.list[*atom as usize] {
                Atom::Opaque(_) | Atom::E | Atom::Pi => true,
                // A large factor without small divisors can be composite, and a root of a variable has
                // branches.
                Atom::Prime(prime) => prime > &BigInt::from(MAX_TRIAL_DIVISOR * MAX_TRIAL_DIVISOR),
                Atom::Symbol(_) => !power.is_integer(),
                Atom::I => false,
            };
        }
        if open { FormComparison::Open } else { FormComparison::Different }
    }

    /// Returns whether the equations `a = 0` and `b = 0` are multiples of each other.
    pub fn are_proportional(&mut self, a: &NormalForm, b: &NormalForm) -> bool {
        (a.top.is_empty() && b.top.is_empty()) || self.constant_ratio(a, b).is_some()
    }

    /// Returns whether a multiple of `a` differs from `b` by a nonzero constant, so that both are never zero
    /// at once.
    pub fn differ_by_constant(&self, a: &NormalForm, b: &NormalForm) -> bool {
        let constant = Monomial::new();
        let (mut a, mut b) = (clear_denominators(&a.top), clear_denominators(&b.top));
        let (x, y) = (a.remove(&constant).unwrap_or_default(), b.remove(&constant).unwrap_or_default());
        let side = |top: Polynomial| NormalForm { top, bottom: one() };
        match self.constant_ratio(&side(a), &side(b)) {
            Some(ratio) => x != y * ratio,
            None => false,
        }
    }

    /// Returns the constant ratio of `a` and `b`, or `None` if the ratio is not constant.
    ///
    /// Denominators are cleared first, because `y / x = 3` and `y = 3 x` are one equation.
    pub fn constant_ratio(&self, a: &NormalForm, b: &NormalForm) -> Option<BigRational> {
        let (a, b) = (clear_denominators(&a.top), clear_denominators(&b.top));
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
