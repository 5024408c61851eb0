//! Normal forms of roots, powers with variables in the exponent, function calls, sums, products and
//! integrals.
//!
//! Deliberately absent: integrals of anything but polynomials.

use std::collections::BTreeMap;

use num_bigint::BigInt;
use num_integer::Integer;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

use super::form::{Atom, AtomTable, Exponent, MAX_TRIAL_DIVISOR, NormalForm};
use super::polynomial::{CheckedMulInt, checked_power, constant_form, one, to_big_rational};
use crate::effort::{spend, spend_bits, spend_fractions};
use crate::expr::{BigOperator, Expr, Function, is_integer};

impl AtomTable {
    /// Returns the form of a power with a fractional exponent.
    ///
    /// Numbers are factored into primes, and a single variable takes the exponent. Any other base gives an
    /// opaque atom.
    pub(super) fn fractional_power(
        &mut self,
        base: &NormalForm,
        exponent: &BigRational,
    ) -> Option<NormalForm> {
        let exponent = Exponent::new(exponent.numer().to_i64()?, exponent.denom().to_i64()?);
        if let Some(value) = base.as_rational() {
            if value.is_negative() {
                // Odd roots of negative numbers are real; square roots are imaginary.
                let positive = self.fractional_power(&constant_form(-value), &to_big_rational(exponent))?;
                if exponent.denom().is_odd() {
                    let sign = if exponent.numer().is_odd() { -1 } else { 1 };
                    return positive.times(&constant_form(BigRational::from_integer(sign.into())), self);
                }
                if *exponent.denom() == 2 {
                    let i = self.atom_form(Atom::I);
                    return positive.times(&i.integer_power(*exponent.numer(), self)?, self);
                }
                return None;
            }
            if value.is_zero() {
                return exponent.is_positive().then(|| constant_form(BigRational::zero()));
            }
            let top = self.prime_powers(value.numer(), exponent)?;
            let bottom = self.prime_powers(value.denom(), -exponent)?;
            return top.times(&bottom, self);
        }
        // A single variable takes the exponent, as does its positive coefficient.
        if base.bottom == one()
            && base.top.len() == 1
            && let Some((monomial, coefficient)) = base.top.iter().next()
            && let [(atom, power)] = monomial.as_slice()
            && power.is_one()
            && coefficient.is_positive()
        {
            let top = BTreeMap::from([(vec![(*atom, exponent)], BigRational::one())]);
            let variable = NormalForm { top, bottom: one() };
            let coefficient =
                self.fractional_power(&constant_form(coefficient.clone()), &to_big_rational(exponent))?;
            return variable.times(&coefficient, self);
        }
        let key = format!("root {exponent} {}", Self::canonical_text(base)?);
        Some(self.atom_form(Atom::Opaque(key)))
    }

    /// Returns `number^exponent` as a product of prime powers; `number` is positive.
    pub(super) fn prime_powers(&mut self, number: &BigInt, exponent: Exponent) -> Option<NormalForm> {
        let mut rest = number.clone();
        let mut product = constant_form(BigRational::one());
        let mut take = |atoms: &mut Self, prime: &BigInt, count: i64| -> Option<()> {
            let power = exponent * count;
            let whole = power.floor();
            let part = power - whole;
            let whole = checked_power(prime, whole.to_integer())?;
            product = product.times(&constant_form(whole), atoms)?;
            if !part.is_zero() {
                let atom = atoms.atom_id(Atom::Prime(prime.clone()));
                let top = BTreeMap::from([(vec![(atom, part)], BigRational::one())]);
                product = product.times(&NormalForm { top, bottom: one() }, atoms)?;
            }
            Some(())
        };
        let mut divisor = 2u64;
        while divisor <= MAX_TRIAL_DIVISOR && BigInt::from(divisor) * divisor <= rest {
            spend(rest.bits() / 64 * 4 + 60)?;
            let big = BigInt::from(divisor);
            let mut count = 0;
            while rest.is_multiple_of(&big) {
                rest /= &big;
                count += 1;
            }
            if count > 0 {
                take(self, &big, count)?;
            }
            divisor += if divisor == 2 { 1 } else { 2 };
        }
        if rest > BigInt::one() {
            // The rest without small divisors can be a perfect power.
            let degree = exponent.denom().to_u32()?;
            spend_bits(rest.bits())?;
            let root = rest.nth_root(degree);
            if degree > 1 && num_traits::pow(root.clone(), degree as usize) == rest {
                take(self, &root, i64::from(degree))?;
            } else {
                take(self, &rest, 1)?;
            }
        }
        Some(product)
    }

    /// Returns the form of a power with variables in the exponent.
    ///
    /// Rewrites `b^(c + k m)` as `b^c (b^m)^k`, where `b` is a prime of a number, `e` or a variable, and `m`
    /// a monomial.
    pub(super) fn symbolic_power(&mut self, base: &NormalForm, exponent: &NormalForm) -> Option<NormalForm> {
        if exponent.bottom.len() != 1 || exponent.bottom.keys().any(|monomial| !monomial.is_empty()) {
            return self.opaque_form("power", &[base.clone(), exponent.clone()]);
        }
        let scale = exponent.bottom.values().next()?.clone();
        let bases: Vec<(String, i64)> =
            if let Some(value) = base.as_rational().filter(BigRational::is_positive) {
                if value.is_one() {
                    return Some(constant_form(value));
                }
                let mut bases = prime_factors(value.numer(), 1)?;
                bases.extend(prime_factors(value.denom(), -1)?);
                bases
            } else {
                vec![(Self::canonical_text(base)?, 1)]
            };
        let mut product = constant_form(BigRational::one());
        for (monomial, coefficient) in exponent.top.clone() {
            let coefficient = coefficient / &scale;
            if monomial.is_empty() {
                let fixed = NormalForm { top: BTreeMap::from([(Vec::new(), coefficient)]), bottom: one() };
                product = product.times(&self.power_form(base, &fixed)?, self)?;
                continue;
            }
            let coefficient = Exponent::new(coefficient.numer().to_i64()?, coefficient.denom().to_i64()?);
            let shape = Self::monomial_text(&monomial);
            for (name, count) in &bases {
                let atom = self.atom_id(Atom::Opaque(format!("{name}^[{shape}]")));
                let power = coefficient.checked_mul_int(*count)?;
                let factor = NormalForm {
                    top: BTreeMap::from([(vec![(atom, power)], BigRational::one())]),
                    bottom: one(),
                };
                product = product.times(&factor, self)?;
            }
        }
        Some(product)
    }

    /// Returns the form of a function call, by evaluation, by an identity, or as an opaque atom.
    pub(super) fn call_form(&mut self, function: Function, arguments: &[NormalForm]) -> Option<NormalForm> {
        let values: Option<Vec<BigRational>> = arguments.iter().map(NormalForm::as_rational).collect();
        if let Some(values) = values
            && let Some(known) = evaluate_function(function, &values)
        {
            return Some(constant_form(known));
        }
        match (function, arguments) {
            // Logarithms of numbers become sums over primes, so that `log_2 8` is 3.
            (Function::Ln, [argument]) => {
                if let Some(value) = argument.as_rational().filter(BigRational::is_positive) {
                    let mut sum = constant_form(BigRational::zero());
                    for (number, sign) in [(value.numer(), 1), (value.denom(), -1)] {
                        for (prime, count) in prime_factors(number, sign)? {
                            let ln = self.atom_form(Atom::Opaque(format!("ln {prime}")));
                            let count = constant_form(BigRational::from_integer(count.into()));
                            sum = sum.plus(&ln.times(&count, self)?, self)?;
                        }
                    }
                    return Some(sum);
                }
                // The logarithm of a power of `e` is the exponent.
                if argument.bottom == one()
                    && argument.top.len() == 1
                    && let Some((monomial, coefficient)) = argument.top.iter().next()
                    && coefficient.is_one()
                    && let [(atom, power)] = monomial.as_slice()
                    && self.list[*atom as usize] == Atom::E
                {
                    return Some(constant_form(to_big_rational(*power)));
                }
                self.opaque_form("ln", arguments)
            }
            (Function::Binomial, [top, bottom]) => {
                let bottom =
                    bottom.as_rational().filter(is_integer)?.to_i64().filter(|k| (0..=12).contains(k));
                let Some(bottom) = bottom else { return self.opaque_form("binomial", arguments) };
                let mut product = constant_form(BigRational::one());
                for step in 0..bottom {
                    let less = constant_form(BigRational::from_integer((-step).into()));
                    let share = constant_form(BigRational::new(1.into(), (step + 1).into()));
                    product = product.times(&top.plus(&less, self)?, self)?.times(&share, self)?;
                }
                Some(product)
            }
            _ => self.opaque_form(&format!("{function:?}"), arguments),
        }
    }

    /// Returns the form of a sum or product with at most 501 terms, or of the integral of a polynomial.
    pub(super) fn big_operator_form(
        &mut self,
        over: BigOperator,
        index: &str,
        parts: &[Expr; 3],
    ) -> Option<NormalForm> {
        let [low, high, body] = parts;
        let (low, high) = (self.normal_form(low)?, self.normal_form(high)?);
        let ends = low
            .as_rational()
            .zip(high.as_rational())
            .filter(|(low, high)| is_integer(low) && is_integer(high));
        match (over, ends) {
            (BigOperator::Sum | BigOperator::Product, Some((low, high))) => {
                let (low, high) = (low.to_i64()?, high.to_i64()?);
                if high - low > 500 {
                    return None;
                }
                let mut all = constant_form(if over == BigOperator::Sum {
                    BigRational::zero()
                } else {
                    BigRational::one()
                });
                for at in low..=high {
                    let term = self.normal_form(&substitute(body, index, &Expr::integer(at)))?;
                    all = if over == BigOperator::Sum {
                        all.plus(&term, self)?
                    } else {
                        all.times(&term, self)?
                    };
                }
                Some(all)
            }
            // An integrand that is a polynomial in the variable has an antiderivative.
            (BigOperator::Integral, _) => {
                let body = self.normal_form(body)?;
                let variable = self.atom_id(Atom::Symbol(index.to_owned()));
                if body.bottom.keys().any(|monomial| monomial.iter().any(|(atom, _)| *atom == variable)) {
                    return None;
                }
                let mut sum = constant_form(BigRational::zero());
                for (monomial, coefficient) in &body.top {
                    let mut rest = monomial.clone();
                    let power = match rest.iter().position(|(atom, _)| *atom == variable) {
                        Some(at) => rest.remove(at).1,
                        None => Exponent::zero(),
                    };
                    if *power.denom() != 1 || *power.numer() < 0 {
                        return None;
                    }
                    let next = power.to_integer() + 1;
                    let share = coefficient / BigRational::from_integer(next.into());
                    let factor =
                        NormalForm { top: BTreeMap::from([(rest, share)]), bottom: body.bottom.clone() };
                    let (at_high, at_low) = (high.integer_power(next, self)?, low.integer_power(next, self)?);
                    let minus = constant_form(BigRational::from_integer((-1).into()));
                    let step = at_high.plus(&at_low.times(&minus, self)?, self)?;
                    sum = sum.plus(&factor.times(&step, self)?, self)?;
                }
                Some(sum)
            }
            _ => None,
        }
    }
}

/// Returns the prime factors of `number` as text, with their multiplicities times `sign`.
///
/// A rest without small divisors counts as one factor. Returns `None` beyond 4,096 bits.
fn prime_factors(number: &BigInt, sign: i64) -> Option<Vec<(String, i64)>> {
    let mut rest = number.clone();
    let mut primes = Vec::new();
    if rest.bits() > 4_096 {
        return None;
    }
    let mut divisor = 2u64;
    while divisor <= MAX_TRIAL_DIVISOR && BigInt::from(divisor) * divisor <= rest {
        spend(rest.bits() / 64 * 4 + 60)?;
        let big = BigInt::from(divisor);
        let mut count = 0;
        while rest.is_multiple_of(&big) {
            rest /= &big;
            count += 1;
        }
        if count > 0 {
            primes.push((divisor.to_string(), sign * count));
        }
        divisor += if divisor == 2 { 1 } else { 2 };
    }
    if rest > BigInt::one() {
        primes.push((rest.to_string(), sign));
    }
    Some(primes)
}

/// Returns the value of a function of rational numbers, if that value is rational and known.
fn evaluate_function(function: Function, values: &[BigRational]) -> Option<BigRational> {
    let whole = |value: &BigRational| is_integer(value).then(|| value.numer().clone());
    values.iter().try_for_each(|value| spend_fractions(value, value))?;
    match (function, values) {
        (Function::Abs, [value]) => Some(value.abs()),
        (Function::Floor, [value]) => Some(value.floor()),
        (Function::Ceil, [value]) => Some(value.ceil()),
        (Function::Max, values) => values.iter().max().cloned(),
        (Function::Min, values) => values.iter().min().cloned(),
        (Function::Factorial, [value]) => {
            let number = whole(value)?.to_u64().filter(|number| *number <= 2_000)?;
            spend(number * (number / 8 + 40))?;
            Some(BigRational::from_integer((1..=number).map(BigInt::from).product()))
        }
        (Function::Binomial, [top, bottom]) => {
            let (top, bottom) = (whole(top)?.to_u64()?, whole(bottom)?.to_u64()?);
            if top > 5_000 {
                return None;
            }
            // The computation takes one step per unit of the smaller lower index, on numbers of about two
            // bits per step.
            for step in 0..bottom.min(top.saturating_sub(bottom)) {
                spend_bits(step * 2)?;
            }
            Some(BigRational::from_integer(num_integer::binomial(BigInt::from(top), BigInt::from(bottom))))
        }
        (Function::Gcd | Function::Lcm, values) => {
            let mut all = values.iter().map(whole);
            let first = all.next()??;
            let fold = |a: BigInt, b: Option<BigInt>| {
                let b = b?;
                spend_bits(a.bits() + b.bits())?;
                Some(if function == Function::Gcd { a.gcd(&b) } else { a.lcm(&b) })
            };
            all.try_fold(first, fold).map(BigRational::from_integer)
        }
        (
            Function::Sin
            | Function::Tan
            | Function::Arcsin
            | Function::Arctan
            | Function::Sinh
            | Function::Tanh,
            [value],
        ) => value.is_zero().then(BigRational::zero),
        (Function::Cos | Function::Cosh, [value]) => value.is_zero().then(BigRational::one),
        (Function::Ln, [value]) => value.is_one().then(BigRational::zero),
        _ => None,
    }
}

/// Returns `body` with `value` in place of the free variable `name`.
pub fn substitute(body: &Expr, name: &str, value: &Expr) -> Expr {
    let again = |part: &Expr| substitute(part, name, value);
    let all = |parts: &[Expr]| parts.iter().map(again).collect::<Vec<_>>();
    match body {
        Expr::Symbol(found) if found == name => value.clone(),
        Expr::Sum(parts) => Expr::Sum(all(parts)),
        Expr::Product(parts) => Expr::Product(all(parts)),
        Expr::Power(a, b) => Expr::Power(Box::new(again(a)), Box::new(again(b))),
        Expr::Call(function, parts) => Expr::Call(*function, all(parts)),
        Expr::BigOperator(over, bound, parts) if bound != name => {
            let [a, b, c] = parts.as_ref();
            Expr::BigOperator(*over, bound.clone(), Box::new([again(a), again(b), again(c)]))
        }
        Expr::Percent(part) => Expr::Percent(Box::new(again(part))),
        Expr::Degrees(part) => Expr::Degrees(Box::new(again(part))),
        Expr::Ratio(parts) => Expr::Ratio(all(parts)),
        other => other.clone(),
    }
}
