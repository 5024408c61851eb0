//! Normal forms of roots, powers with variables in the exponent, function calls, sums, products and
//! integrals.
//!
//! Deliberately absent: integrals of anything but polynomials.

use std::collections::BTreeMap;

use num_bigint::BigInt;
use num_integer::Integer;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

use super::polynomial::{CheckedScale, big_power, constant, one, rational};
use super::{Atom, Atoms, Exponent, Form, PRIMES};
use crate::effort::{spend, spend_bits, spend_on};
use crate::expr::{Expr, Function, Over, is_whole};

impl Atoms {
    /// Returns the form of a power with a fractional exponent.
    ///
    /// Numbers are factored into primes, and a single variable takes the exponent. Any other base gives an
    /// opaque atom.
    pub(super) fn root(&mut self, base: &Form, exponent: &BigRational) -> Option<Form> {
        let exponent = Exponent::new(exponent.numer().to_i64()?, exponent.denom().to_i64()?);
        if let Some(value) = base.value() {
            if value.is_negative() {
                // Odd roots of negative numbers are real; square roots are imaginary.
                let positive = self.root(&constant(-value), &rational(exponent))?;
                if exponent.denom().is_odd() {
                    let sign = if exponent.numer().is_odd() { -1 } else { 1 };
                    return positive.times(&constant(BigRational::from_integer(sign.into())), self);
                }
                if *exponent.denom() == 2 {
                    let i = self.atom(Atom::I);
                    return positive.times(&i.whole_power(*exponent.numer(), self)?, self);
                }
                return None;
            }
            if value.is_zero() {
                return exponent.is_positive().then(|| constant(BigRational::zero()));
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
            let variable = Form { top, bottom: one() };
            let coefficient = self.root(&constant(coefficient.clone()), &rational(exponent))?;
            return variable.times(&coefficient, self);
        }
        let key = format!("root {exponent} {}", Self::text(base)?);
        Some(self.atom(Atom::Opaque(key)))
    }

    /// Returns `number^exponent` as a product of prime powers; `number` is positive.
    pub(super) fn prime_powers(&mut self, number: &BigInt, exponent: Exponent) -> Option<Form> {
        let mut rest = number.clone();
        let mut product = constant(BigRational::one());
        let mut take = |atoms: &mut Self, prime: &BigInt, count: i64| -> Option<()> {
            let power = exponent * count;
            let whole = power.floor();
            let part = power - whole;
            let whole = big_power(prime, whole.to_integer())?;
            product = product.times(&constant(whole), atoms)?;
            if !part.is_zero() {
                let atom = atoms.number(Atom::Prime(prime.clone()));
                let top = BTreeMap::from([(vec![(atom, part)], BigRational::one())]);
                product = product.times(&Form { top, bottom: one() }, atoms)?;
            }
            Some(())
        };
        let mut divisor = 2u64;
        while divisor <= PRIMES && BigInt::from(divisor) * divisor <= rest {
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
    pub(super) fn symbolic_power(&mut self, base: &Form, exponent: &Form) -> Option<Form> {
        if exponent.bottom.len() != 1 || exponent.bottom.keys().any(|monomial| !monomial.is_empty()) {
            return self.opaque("power", &[base.clone(), exponent.clone()]);
        }
        let scale = exponent.bottom.values().next()?.clone();
        let bases: Vec<(String, i64)> = if let Some(value) = base.value().filter(BigRational::is_positive) {
            if value.is_one() {
                return Some(constant(value));
            }
            let mut bases = small_primes(value.numer(), 1)?;
            bases.extend(small_primes(value.denom(), -1)?);
            bases
        } else {
            vec![(Self::text(base)?, 1)]
        };
        let mut product = constant(BigRational::one());
        for (monomial, coefficient) in exponent.top.clone() {
            let coefficient = coefficient / &scale;
            if monomial.is_empty() {
                let fixed = Form { top: BTreeMap::from([(Vec::new(), coefficient)]), bottom: one() };
                product = product.times(&self.power(base, &fixed)?, self)?;
                continue;
            }
            let coefficient = Exponent::new(coefficient.numer().to_i64()?, coefficient.denom().to_i64()?);
            let shape = Self::monomial_text(&monomial);
            for (name, count) in &bases {
                let atom = self.number(Atom::Opaque(format!("{name}^[{shape}]")));
                let power = coefficient.checked_mul_i(*count)?;
                let factor =
                    Form { top: BTreeMap::from([(vec![(atom, power)], BigRational::one())]), bottom: one() };
                product = product.times(&factor, self)?;
            }
        }
        Some(product)
    }

    /// Returns the form of a function call, by evaluation, by an identity, or as an opaque atom.
    pub(super) fn call(&mut self, function: Function, arguments: &[Form]) -> Option<Form> {
        let values: Option<Vec<BigRational>> = arguments.iter().map(Form::value).collect();
        if let Some(values) = values
            && let Some(known) = evaluated(function, &values)
        {
            return Some(constant(known));
        }
        match (function, arguments) {
            // Logarithms of numbers become sums over primes, so that `log_2 8` is 3.
            (Function::Ln, [argument]) => {
                if let Some(value) = argument.value().filter(BigRational::is_positive) {
                    let mut sum = constant(BigRational::zero());
                    for (number, sign) in [(value.numer(), 1), (value.denom(), -1)] {
                        for (prime, count) in small_primes(number, sign)? {
                            let ln = self.atom(Atom::Opaque(format!("ln {prime}")));
                            let count = constant(BigRational::from_integer(count.into()));
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
                    return Some(constant(rational(*power)));
                }
                self.opaque("ln", arguments)
            }
            (Function::Binomial, [top, bottom]) => {
                let bottom = bottom.value().filter(is_whole)?.to_i64().filter(|k| (0..=12).contains(k));
                let Some(bottom) = bottom else { return self.opaque("binomial", arguments) };
                let mut product = constant(BigRational::one());
                for step in 0..bottom {
                    let less = constant(BigRational::from_integer((-step).into()));
                    let share = constant(BigRational::new(1.into(), (step + 1).into()));
                    product = product.times(&top.plus(&less, self)?, self)?.times(&share, self)?;
                }
                Some(product)
            }
            _ => self.opaque(&format!("{function:?}"), arguments),
        }
    }

    /// Returns the form of a sum or product with at most 501 terms, or of the integral of a polynomial.
    pub(super) fn over(&mut self, over: Over, index: &str, parts: &[Expr; 3]) -> Option<Form> {
        let [low, high, body] = parts;
        let (low, high) = (self.form(low)?, self.form(high)?);
        let ends = low.value().zip(high.value()).filter(|(low, high)| is_whole(low) && is_whole(high));
        match (over, ends) {
            (Over::Sum | Over::Product, Some((low, high))) => {
                let (low, high) = (low.to_i64()?, high.to_i64()?);
                if high - low > 500 {
                    return None;
                }
                let mut all =
                    constant(if over == Over::Sum { BigRational::zero() } else { BigRational::one() });
                for at in low..=high {
                    let term = self.form(&replaced(body, index, &Expr::whole(at)))?;
                    all = if over == Over::Sum { all.plus(&term, self)? } else { all.times(&term, self)? };
                }
                Some(all)
            }
            // An integrand that is a polynomial in the variable has an antiderivative.
            (Over::Integral, _) => {
                let body = self.form(body)?;
                let variable = self.number(Atom::Symbol(index.to_owned()));
                if body.bottom.keys().any(|monomial| monomial.iter().any(|(atom, _)| *atom == variable)) {
                    return None;
                }
                let mut sum = constant(BigRational::zero());
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
                    let factor = Form { top: BTreeMap::from([(rest, share)]), bottom: body.bottom.clone() };
                    let (at_high, at_low) = (high.whole_power(next, self)?, low.whole_power(next, self)?);
                    let minus = constant(BigRational::from_integer((-1).into()));
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
fn small_primes(number: &BigInt, sign: i64) -> Option<Vec<(String, i64)>> {
    let mut rest = number.clone();
    let mut primes = Vec::new();
    if rest.bits() > 4_096 {
        return None;
    }
    let mut divisor = 2u64;
    while divisor <= PRIMES && BigInt::from(divisor) * divisor <= rest {
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
fn evaluated(function: Function, values: &[BigRational]) -> Option<BigRational> {
    let whole = |value: &BigRational| is_whole(value).then(|| value.numer().clone());
    values.iter().try_for_each(|value| spend_on(value, value))?;
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
pub fn replaced(body: &Expr, name: &str, value: &Expr) -> Expr {
    let again = |part: &Expr| replaced(part, name, value);
    let all = |parts: &[Expr]| parts.iter().map(again).collect::<Vec<_>>();
    match body {
        Expr::Symbol(found) if found == name => value.clone(),
        Expr::Sum(parts) => Expr::Sum(all(parts)),
        Expr::Product(parts) => Expr::Product(all(parts)),
        Expr::Power(a, b) => Expr::Power(Box::new(again(a)), Box::new(again(b))),
        Expr::Call(function, parts) => Expr::Call(*function, all(parts)),
        Expr::Over(over, bound, parts) if bound != name => {
            let [a, b, c] = parts.as_ref();
            Expr::Over(*over, bound.clone(), Box::new([again(a), again(b), again(c)]))
        }
        Expr::Percent(part) => Expr::Percent(Box::new(again(part))),
        Expr::Degrees(part) => Expr::Degrees(Box::new(again(part))),
        Expr::Ratio(parts) => Expr::Ratio(all(parts)),
        other => other.clone(),
    }
}
