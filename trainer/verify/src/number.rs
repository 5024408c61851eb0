//! Exact numbers: fractions of integers of any size, held as decimal digits where they do not fit 128 bits.

/// A number as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Number {
    /// Numerator and denominator, reduced; `None` when they do not fit.
    ratio: Option<(i128, i128)>,
    /// Canonical digits of integers and decimals that do not fit.
    digits: String,
    /// Decimals after the point, when written as a decimal.
    decimals: Option<u32>,
    percent: bool,
}

/// Reads an integer, decimal, fraction (`a/b`, `\frac{a}{b}`), mixed number or percentage.
pub fn parse(text: &str) -> Option<Number> {
    let text = text.trim();
    let (text, percent) = text.strip_suffix('%').map_or((text, false), |rest| (rest.trim_end(), true));
    let (negative, body) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest.trim()),
        None => (false, text),
    };
    let number = Number { percent, ..unsigned(body)? };
    Some(if negative { number.negated() } else { number })
}

fn unsigned(text: &str) -> Option<Number> {
    if let Some((whole, fraction)) = text.split_once("\\frac") {
        let (top, bottom) = fraction.strip_prefix('{')?.strip_suffix('}')?.split_once("}{")?;
        return mixed(whole, top, bottom);
    }
    if let Some((top, bottom)) = text.split_once('/') {
        let (whole, top) = top.trim().split_once(' ').unwrap_or(("", top));
        return mixed(whole, top, bottom);
    }
    decimal(text)
}

fn mixed(whole: &str, top: &str, bottom: &str) -> Option<Number> {
    let integer = |text: &str| -> Option<i128> {
        let text = text.trim();
        let (sign, digits) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
        let number = decimal(digits)?;
        match (number.decimals, number.ratio) {
            (None, Some((value, 1))) => Some(sign * value),
            _ => None,
        }
    };
    let (top, bottom) = (integer(top)?, integer(bottom)?);
    let whole = if whole.trim().is_empty() { 0 } else { integer(whole)? };
    let ratio = reduced(whole.checked_mul(bottom)?.checked_add(top)?, bottom)?;
    Some(Number { ratio: Some(ratio), digits: String::new(), decimals: None, percent: false })
}

fn decimal(text: &str) -> Option<Number> {
    let (whole, fraction) = match text.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (text, None),
    };
    let whole = without_separators(whole)?;
    let fraction_digits = fraction.unwrap_or_default();
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(&whole) || !is_digits(fraction_digits) || (whole.is_empty() && fraction_digits.is_empty()) {
        return None;
    }
    let significant = fraction_digits.trim_end_matches('0');
    let all = format!("{whole}{significant}");
    let digits = all.trim_start_matches('0').to_owned();
    let ratio = all
        .parse::<i128>()
        .ok()
        .or_else(|| all.is_empty().then_some(0))
        .and_then(|value| reduced(value, 10i128.checked_pow(u32::try_from(significant.len()).ok()?)?));
    Some(Number {
        ratio,
        digits: format!("{digits}e-{}", significant.len()),
        decimals: fraction.map(|fraction| fraction.len() as u32),
        percent: false,
    })
}

/// Drops commas that stand before groups of three digits; any other comma makes it no number.
fn without_separators(text: &str) -> Option<String> {
    if !text.contains(',') {
        return Some(text.to_owned());
    }
    let mut groups = text.split(',');
    let first = groups.next()?;
    let rest: Vec<&str> = groups.collect();
    let fits = (1..=3).contains(&first.len()) && rest.iter().all(|group| group.len() == 3);
    fits.then(|| format!("{first}{}", rest.concat()))
}

fn reduced(top: i128, bottom: i128) -> Option<(i128, i128)> {
    if bottom == 0 {
        return None;
    }
    let (mut a, mut b) = (top.checked_abs()?, bottom.checked_abs()?);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let divisor = a.max(1) * bottom.signum();
    Some((top / divisor, bottom / divisor))
}

impl Number {
    fn negated(mut self) -> Self {
        self.ratio = self.ratio.map(|(top, bottom)| (-top, bottom));
        self.digits.insert(0, '-');
        self
    }

    /// Equal in value. A decimal with six places or more may round a fraction; a percentage equals its hundredth, and
    /// its own digits without the sign.
    pub fn equals(&self, other: &Self) -> bool {
        if self.percent != other.percent {
            let (percent, bare) = if self.percent { (self, other) } else { (other, self) };
            let stripped = Self { percent: false, ..percent.clone() };
            let hundredth = percent.ratio.and_then(|(top, bottom)| reduced(top, bottom.checked_mul(100)?));
            return stripped.equals(bare) || (hundredth.is_some() && hundredth == bare.ratio);
        }
        match (self.ratio, other.ratio) {
            (Some(a), Some(b)) => a == b || self.rounds(other) || other.rounds(self),
            (None, None) => self.digits == other.digits,
            _ => false,
        }
    }

    /// Whether this decimal is `exact` rounded to its own places (six or more).
    fn rounds(&self, exact: &Self) -> bool {
        let (Some(places @ 6..=12), None) = (self.decimals, exact.decimals) else { return false };
        let (Some((a, b)), Some((c, d))) = (self.ratio, exact.ratio) else { return false };
        // |a/b - c/d| <= 1 / 10^places, by cross multiplication.
        let scale = 10i128.pow(places);
        let difference = a.checked_mul(d).zip(c.checked_mul(b)).and_then(|(x, y)| x.checked_sub(y));
        match (difference.and_then(|value| value.checked_mul(scale)), b.checked_mul(d)) {
            (Some(scaled), Some(bound)) => scaled.abs() <= bound.abs(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn spellings_of_one_fraction_are_equal(top in -10_000i64..10_000, bottom in 1i64..500, factor in 1i64..50) {
            let a = parse(&format!("{top}/{bottom}")).unwrap();
            let sign = if top < 0 { "-" } else { "" };
            let b = parse(&format!("{sign}\\frac{{{}}}{{{}}}", top.abs() * factor, bottom * factor)).unwrap();
            prop_assert!(a.equals(&b) && b.equals(&a));
            let next = parse(&format!("{}/{bottom}", top + 1)).unwrap();
            prop_assert!(!a.equals(&next));
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in "[-+0-9.,/%\\\\frac{} ]{0,60}") {
            if let (Some(a), Some(b)) = (parse(&text), parse(&text)) {
                prop_assert!(a.equals(&b));
            }
        }
    }

    #[test]
    fn a_million_digits_are_compared() {
        let long = "7".repeat(1_000_000);
        assert!(parse(&long).unwrap().equals(&parse(&long).unwrap()));
    }
}
