//! Units of measure: their dimension and their size in base units.
//!
//! Deliberately absent: names with several meanings, such as `ton`, and general products of units.

use num_rational::BigRational;

/// Dimension of a unit, with its base unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dimension {
    /// Meters.
    Length,
    /// Square meters.
    Area,
    /// Cubic meters.
    Volume,
    /// Grams.
    Mass,
    /// Seconds.
    Time,
    /// Meters per second.
    Speed,
    /// Dollars.
    Money,
    /// Degrees.
    Angle,
}

/// Unit of measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Dimension.
    pub dimension: Dimension,
    /// Number of base units in one unit.
    pub scale: BigRational,
}

/// Returns whether a unit has a word that multiplies the preceding number, such as `dozen` or `million`.
pub fn has_multiplier(unit: &str) -> bool {
    const WORDS: [&str; 8] =
        ["dozen", "hundred", "thousand", "million", "billion", "trillion", "half", "score"];
    unit.to_lowercase().split_whitespace().any(|word| WORDS.iter().any(|known| word.starts_with(known)))
}

/// Returns a name in lower case with single spaces, without periods, dollar signs, braces and backslashes.
fn normalize_name(unit: &str) -> String {
    let unit = unit.to_lowercase().replace(['.', '$', '{', '}', '\\'], "");
    unit.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns whether two names are equal without regard to case, punctuation, whitespace and a plural `s`.
pub fn is_same_name(a: &str, b: &str) -> bool {
    let (a, b) = (normalize_name(a), normalize_name(b));
    a == b || a.trim_end_matches('s') == b.trim_end_matches('s')
}

/// Returns the unit with a name, or `None` for an unknown or ambiguous name.
pub fn find_unit(name: &str) -> Option<Unit> {
    use Dimension::{Angle, Area, Length, Mass, Money, Speed, Time, Volume};
    let name = normalize_name(name);
    let length = |name: &str| -> Option<(i64, i64)> {
        Some(match name {
            "m" | "meter" | "meters" | "metre" | "metres" => (1, 1),
            "cm" | "centimeter" | "centimeters" | "centimetre" | "centimetres" => (1, 100),
            "mm" | "millimeter" | "millimeters" => (1, 1000),
            "dm" | "decimeter" | "decimeters" => (1, 10),
            "km" | "kilometer" | "kilometers" | "kilometre" | "kilometres" => (1000, 1),
            "in" | "inch" | "inches" => (254, 10_000),
            "ft" | "foot" | "feet" => (3048, 10_000),
            "yd" | "yard" | "yards" => (9144, 10_000),
            "mi" | "mile" | "miles" => (1_609_344, 1000),
            _ => return None,
        })
    };
    let time = |name: &str| -> Option<(i64, i64)> {
        Some(match name {
            "s" | "sec" | "secs" | "second" | "seconds" => (1, 1),
            "ms" | "millisecond" | "milliseconds" => (1, 1000),
            "min" | "mins" | "minute" | "minutes" => (60, 1),
            "h" | "hr" | "hrs" | "hour" | "hours" => (3600, 1),
            "day" | "days" => (86_400, 1),
            "week" | "weeks" => (604_800, 1),
            _ => return None,
        })
    };
    let unit = |kind, (top, bottom): (i64, i64)| Unit {
        dimension: kind,
        scale: BigRational::new(top.into(), bottom.into()),
    };
    if let Some(scale) = length(&name) {
        return Some(unit(Length, scale));
    }
    if let Some(scale) = time(&name) {
        return Some(unit(Time, scale));
    }
    let powered = |base: &str, power: i32, kind| {
        length(base.trim()).map(|scale| {
            let one = unit(kind, scale);
            Unit { dimension: kind, scale: one.scale.pow(power) }
        })
    };
    for (suffix, power, kind) in
        [("^2", 2, Area), ("^3", 3, Volume), (" squared", 2, Area), (" cubed", 3, Volume)]
    {
        if let Some(base) = name.strip_suffix(suffix) {
            return powered(base, power, kind);
        }
    }
    for (prefix, power, kind) in
        [("square ", 2, Area), ("sq ", 2, Area), ("cubic ", 3, Volume), ("cu ", 3, Volume)]
    {
        if let Some(base) = name.strip_prefix(prefix) {
            return powered(base, power, kind);
        }
    }
    for divider in ["/", " per "] {
        if let Some((top, bottom)) = name.split_once(divider) {
            let (top, bottom) = (length(top.trim())?, time(bottom.trim())?);
            return Some(unit(Speed, (top.0 * bottom.1, top.1 * bottom.0)));
        }
    }
    Some(match name.as_str() {
        "mph" => unit(Speed, (1_609_344, 3_600_000)),
        "g" | "gram" | "grams" => unit(Mass, (1, 1)),
        "mg" | "milligram" | "milligrams" => unit(Mass, (1, 1000)),
        "kg" | "kilogram" | "kilograms" | "kilo" | "kilos" => unit(Mass, (1000, 1)),
        "t" | "ton" | "tons" | "tonne" | "tonnes" => return None,
        "lb" | "lbs" | "pound" | "pounds" => unit(Mass, (45_359_237, 100_000)),
        "oz" | "ounce" | "ounces" => unit(Mass, (45_359_237, 1_600_000)),
        "l" | "liter" | "liters" | "litre" | "litres" => unit(Volume, (1, 1000)),
        "ml" | "milliliter" | "milliliters" | "millilitre" | "millilitres" => unit(Volume, (1, 1_000_000)),
        "dollar" | "dollars" | "usd" => unit(Money, (1, 1)),
        "cent" | "cents" => unit(Money, (1, 100)),
        "deg" | "degree" | "degrees" => unit(Angle, (1, 1)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_between_units_of_one_dimension() {
        let scale = |name: &str| find_unit(name).unwrap().scale;
        assert_eq!(scale("hours") / scale("minutes"), BigRational::from_integer(60.into()));
        assert_eq!(scale("m^2") / scale("cm^2"), BigRational::from_integer(10_000.into()));
        assert_eq!(scale("square feet"), scale("ft^2"));
        assert_ne!(find_unit("kg").unwrap().dimension, find_unit("litres").unwrap().dimension);
        assert!(
            is_same_name("Apples", "apple")
                && has_multiplier("million dollars")
                && find_unit("apples").is_none()
        );
    }
}
