//! Arithmetic of polynomials and their quotients, bounded in terms, bits and work.
//!
//! Deliberately absent: common divisors of polynomials. Comparison by cross multiplication does not need
//! them.

use std::collections::{BTreeMap, HashMap};

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

use super::form::{
    Atom, AtomTable, Exponent, MAX_EXPANDED_EXPONENT, MAX_POWER_BITS, MAX_TERMS, Monomial, NormalForm,
    Polynomial,
};
use crate::effort::{spend, spend_bits, spend_fractions};

/// Returns the product of two monomials. Integer powers of primes and of `i` move into `coefficient`.
pub(super) fn multiply_monomials(
    a: &Monomial,
    b: &Monomial,
    coefficient: &mut BigRational,
    atoms: &AtomTable,
) -> Option<Monomial> {
    let mut product: Monomial = Vec::with_capacity(a.len() + b.len());
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        let (atom, power) = match (a.get(i), b.get(j)) {
            (Some(x), Some(y)) if x.0 == y.0 => {
                i += 1;
                j += 1;
                (x.0, x.1 + y.1)
            }
            (Some(x), Some(y)) if x.0 < y.0 => {
                i += 1;
                *x
            }
            (Some(x), None) => {
                i += 1;
                *x
            }
            (_, Some(y)) => {
                j += 1;
                *y
            }
            (None, None) => break,
        };
        let power = match &atoms.list[atom as usize] {
            Atom::Prime(prime) => {
                let whole = power.floor();
                if !whole.is_zero() {
                    *coefficient *= checked_power(prime, whole.to_integer())?;
                }
                power - whole
            }
            Atom::I if power.is_integer() => {
                let turns = power.to_integer().rem_euclid(4);
                if turns >= 2 {
                    *coefficient = -coefficient.clone();
                }
                Exponent::from_integer(turns % 2)
            }
            _ => power,
        };
        if !power.is_zero() {
            product.push((atom, power));
        }
    }
    Some(product)
}

/// Returns the product of two polynomials, or `None` beyond a limit.
pub(super) fn multiply(a: &Polynomial, b: &Polynomial, atoms: &AtomTable) -> Option<Polynomial> {
    if a.len().checked_mul(b.len())? > MAX_TERMS * 20 {
        return None;
    }
    let mut product = Polynomial::new();
    for (m, x) in a {
        for (n, y) in b {
            spend_fractions(x, y)?;
            spend((m.len() + n.len()) as u64 * 60)?;
            let mut coefficient = x * y;
            let monomial = multiply_monomials(m, n, &mut coefficient, atoms)?;
            add_term(&mut product, monomial, coefficient)?;
        }
    }
    (product.len() <= MAX_TERMS).then_some(product)
}

/// Adds a term to a polynomial; removes the term if its coefficient becomes zero.
pub(super) fn add_term(into: &mut Polynomial, monomial: Monomial, coefficient: BigRational) -> Option<()> {
    use std::collections::btree_map::Entry;
    match into.entry(monomial) {
        Entry::Vacant(free) => {
            free.insert(coefficient);
        }
        Entry::Occupied(mut known) => {
            spend_fractions(known.get(), &coefficient)?;
            *known.get_mut() += coefficient;
            if known.get().is_zero() {
                known.remove();
            }
        }
    }
    Some(())
}

/// Returns the polynomial times the smallest monomial that makes all exponents nonnegative.
pub(super) fn clear_denominators(polynomial: &Polynomial) -> Polynomial {
    let mut least: HashMap<u32, Exponent> = HashMap::new();
    for atom in polynomial.keys().flatten().map(|(atom, _)| *atom) {
        let of = |monomial: &Monomial| {
            monomial.iter().find(|(found, _)| *found == atom).map_or(Exponent::zero(), |(_, power)| *power)
        };
        least
            .entry(atom)
            .or_insert_with(|| polynomial.keys().map(of).min().unwrap_or_default().min(Exponent::zero()));
    }
    let shifted = |monomial: &Monomial| {
        let mut all: std::collections::BTreeMap<u32, Exponent> = monomial.iter().copied().collect();
        for (atom, power) in &least {
            *all.entry(*atom).or_default() -= power;
        }
        all.into_iter().filter(|(_, power)| !power.is_zero()).collect::<Monomial>()
    };
    polynomial.iter().map(|(monomial, coefficient)| (shifted(monomial), coefficient.clone())).collect()
}

/// Returns `base^exponent`, or `None` beyond `BITS` bits and for a negative power of zero.
pub(super) fn checked_power(base: &BigInt, exponent: i64) -> Option<BigRational> {
    let size = u32::try_from(exponent.unsigned_abs()).ok()?;
    let bits = base.bits().checked_mul(u64::from(size))?;
    if bits > MAX_POWER_BITS {
        return None;
    }
    spend_bits(bits)?;
    let power = base.pow(size);
    if exponent >= 0 {
        Some(BigRational::from_integer(power))
    } else if power.is_zero() {
        None
    } else {
        Some(BigRational::new(BigInt::one(), power))
    }
}

/// Returns the polynomial 1.
pub(super) fn one() -> Polynomial {
    BTreeMap::from([(Vec::new(), BigRational::one())])
}

/// Returns an exponent as a fraction of big integers.
pub(super) fn to_big_rational(value: Exponent) -> BigRational {
    BigRational::new((*value.numer()).into(), (*value.denom()).into())
}

/// Returns the form of a number.
pub(super) fn constant_form(value: BigRational) -> NormalForm {
    let top = if value.is_zero() { BTreeMap::new() } else { BTreeMap::from([(Vec::new(), value)]) };
    NormalForm { top, bottom: one() }
}

/// Multiplication of an exponent by an integer, checked for overflow.
pub(super) trait CheckedMulInt: Sized {
    /// Returns the product, or `None` on overflow.
    fn checked_mul_int(self, by: i64) -> Option<Self>;
}

impl CheckedMulInt for Exponent {
    fn checked_mul_int(self, by: i64) -> Option<Self> {
        Some(Self::new(self.numer().checked_mul(by)?, *self.denom()))
    }
}

impl NormalForm {
    /// Returns the value if the form is constant.
    pub fn as_rational(&self) -> Option<BigRational> {
        let plain = |polynomial: &Polynomial| match polynomial.len() {
            0 => Some(BigRational::zero()),
            1 => polynomial.get(&Vec::new()).cloned(),
            _ => None,
        };
        let (top, bottom) = (plain(&self.top)?, plain(&self.bottom)?);
        if bottom.is_one() {
            return Some(top);
        }
        spend_fractions(&top, &bottom)?;
        Some(top / bottom)
    }

    /// Returns the product of two forms.
    pub(super) fn times(&self, other: &Self, atoms: &AtomTable) -> Option<Self> {
        let top = multiply(&self.top, &other.top, atoms)?;
        let bottom = if self.bottom.len() == 1 && other.bottom.len() == 1 && self.bottom == one() {
            other.bottom.clone()
        } else {
            multiply(&self.bottom, &other.bottom, atoms)?
        };
        Some(Self { top, bottom }.reduce(atoms))
    }

    /// Returns the sum of two forms.
    pub(super) fn plus(&self, other: &Self, atoms: &AtomTable) -> Option<Self> {
        if self.bottom == other.bottom {
            let mut top = self.top.clone();
            for (monomial, coefficient) in &other.top {
                add_term(&mut top, monomial.clone(), coefficient.clone())?;
            }
            return (top.len() <= MAX_TERMS).then(|| Self { top, bottom: self.bottom.clone() });
        }
        let mut top = multiply(&self.top, &other.bottom, atoms)?;
        for (monomial, coefficient) in multiply(&other.top, &self.bottom, atoms)? {
            add_term(&mut top, monomial, coefficient)?;
        }
        Some(Self { top, bottom: multiply(&self.bottom, &other.bottom, atoms)? }.reduce(atoms))
    }

    /// Moves a denominator of one term into the numerator.
    pub(super) fn reduce(self, atoms: &AtomTable) -> Self {
        if self.bottom.len() != 1 || self.bottom == one() {
            return self;
        }
        let Some(inverse) = self.denominator_reciprocal() else { return self };
        match multiply(&self.top, &inverse, atoms) {
            Some(top) => Self { top, bottom: one() },
            None => self,
        }
    }

    /// Returns the reciprocal of the denominator, which has one term.
    pub(super) fn denominator_reciprocal(&self) -> Option<Polynomial> {
        let (monomial, coefficient) = self.bottom.iter().next()?;
        let negative: Monomial = monomial.iter().map(|(atom, power)| (*atom, -*power)).collect();
        Some(BTreeMap::from([(negative, coefficient.recip())]))
    }

    /// Returns the reciprocal, or `None` for zero.
    pub(super) fn reciprocal(&self) -> Option<Self> {
        (!self.top.is_empty()).then(|| Self { top: self.bottom.clone(), bottom: self.top.clone() })
    }

    /// Returns an integer power, or `None` beyond a limit and for a negative power of zero.
    pub(super) fn integer_power(&self, exponent: i64, atoms: &AtomTable) -> Option<Self> {
        if let Some(value) = self.as_rational() {
            let top = checked_power(value.numer(), exponent.abs())?;
            let bottom = checked_power(value.denom(), exponent.abs())?;
            spend_fractions(&top, &bottom)?;
            let power = top / bottom;
            return if exponent >= 0 {
                Some(constant_form(power))
            } else if power.is_zero() {
                None
            } else {
                Some(constant_form(power.recip()))
            };
        }
        let base = if exponent < 0 { self.reciprocal()?.reduce(atoms) } else { self.clone() };
        if base.top.len() == 1 && base.bottom == one() {
            // The power of a single term multiplies its exponents.
            let (monomial, coefficient) = base.top.iter().next()?;
            let size = exponent.abs();
            let mut coefficient = {
                let (top, bottom) =
                    (checked_power(coefficient.numer(), size)?, checked_power(coefficient.denom(), size)?);
                spend_fractions(&top, &bottom)?;
                top / bottom
            };
            let scaled: Option<Monomial> =
                monomial.iter().map(|(atom, power)| Some((*atom, power.checked_mul_int(size)?))).collect();
            let monomial = multiply_monomials(&scaled?, &Vec::new(), &mut coefficient, atoms)?;
            return Some(Self { top: BTreeMap::from([(monomial, coefficient)]), bottom: one() });
        }
        if exponent.abs() > MAX_EXPANDED_EXPONENT {
            return None;
        }
        let mut power = constant_form(BigRational::one());
        for _ in 0..exponent.abs() {
            power = power.times(&base, atoms)?;
        }
        Some(power)
    }
}
