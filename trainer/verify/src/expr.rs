//! Syntax tree of an answer: numbers with their notation, symbols, operations, and the containers that
//! answers come in.
//!
//! Deliberately absent: simplification and comparison.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

/// Number with its notation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Number {
    /// Exact value.
    pub value: BigRational,
    /// True if the number has a decimal point and can therefore be rounded.
    pub is_decimal: bool,
}

impl Number {
    /// Returns an exact number.
    pub fn exact(value: BigRational) -> Self {
        Self { value, is_decimal: false }
    }

    /// Returns an integer.
    pub fn integer(value: i64) -> Self {
        Self::exact(BigRational::from_integer(BigInt::from(value)))
    }
}

/// Named constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Constant {
    /// Pi, the ratio of a circle's circumference to its diameter.
    Pi,
    /// Euler's number.
    E,
    /// Imaginary unit.
    I,
    /// Positive infinity.
    Infinity,
}

/// Functions; of one argument unless documented otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Function {
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Arcsin,
    Arccos,
    Arctan,
    Sinh,
    Cosh,
    Tanh,
    Ln,
    Abs,
    Floor,
    Ceil,
    Factorial,
    /// Binomial coefficient of two arguments.
    Binomial,
    /// Greatest common divisor of one or more arguments.
    Gcd,
    /// Least common multiple of one or more arguments.
    Lcm,
    /// Largest of one or more arguments.
    Max,
    /// Smallest of one or more arguments.
    Min,
}

/// Operators with a bound variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum BigOperator {
    Sum,
    Product,
    Integral,
}

/// Sign between two sides of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Relation {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    /// Membership, `x \in S`.
    In,
}

impl Relation {
    /// Returns the relation with its sides exchanged.
    pub fn reversed(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessEqual => Self::GreaterEqual,
            Self::Greater => Self::Less,
            Self::GreaterEqual => Self::LessEqual,
            other => other,
        }
    }
}

/// Endpoint of an interval.
#[derive(Debug, Clone, PartialEq)]
pub struct IntervalBound {
    /// Position.
    pub at: Box<Expr>,
    /// True if the endpoint belongs to the interval.
    pub closed: bool,
}

/// Answer or a part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// Number.
    Number(Number),
    /// Variable with its subscript.
    Symbol(String),
    /// Named constant.
    Constant(Constant),
    /// Sum of terms.
    Sum(Vec<Expr>),
    /// Product of factors.
    Product(Vec<Expr>),
    /// Power of a base and an exponent.
    Power(Box<Expr>, Box<Expr>),
    /// Function call.
    Call(Function, Vec<Expr>),
    /// Operator, its bound variable, and the lower limit, upper limit and body.
    BigOperator(BigOperator, String, Box<[Expr; 3]>),
    /// Percentage, a hundredth of the value.
    Percent(Box<Expr>),
    /// Angle in degrees.
    Degrees(Box<Expr>),
    /// Number in another base: its digits read as decimal, and the base.
    InBase(Box<Expr>, u32),
    /// Ratio `a : b`, with two or more parts.
    Ratio(Vec<Expr>),
    /// Ordered elements.
    Tuple(Vec<Expr>),
    /// Unordered elements. Lists without braces are sets too.
    Set(Vec<Expr>),
    /// Interval. `(a, b)` is an open interval and also a pair; the comparison decides.
    Interval(IntervalBound, IntervalBound),
    /// Union of sets.
    Union(Vec<Expr>),
    /// Matrix as a list of rows.
    Matrix(Vec<Vec<Expr>>),
    /// Chain of relations: n + 1 sides and n signs.
    Relation(Vec<Expr>, Vec<Relation>),
    /// Words.
    Text(String),
    /// Value with the name of its unit.
    Quantity(Box<Expr>, String),
}

impl Expr {
    /// Returns an integer.
    pub fn integer(value: i64) -> Self {
        Self::Number(Number::integer(value))
    }

    /// Returns the negated expression; a number stays a number.
    pub fn negate(self) -> Self {
        match self {
            Self::Number(number) => Self::Number(Number { value: -number.value, ..number }),
            Self::Product(mut factors) => {
                factors.insert(0, Self::integer(-1));
                Self::Product(factors)
            }
            other => Self::Product(vec![Self::integer(-1), other]),
        }
    }

    /// Returns the quotient `self / other`.
    pub fn divided_by(self, other: Self) -> Self {
        Self::Product(vec![self, Self::Power(Box::new(other), Box::new(Self::integer(-1)))])
    }

    /// Returns the difference `self - other`.
    pub fn subtract(self, other: Self) -> Self {
        Self::Sum(vec![self, other.negate()])
    }

    /// Returns the number if the expression is a literal.
    pub fn as_number(&self) -> Option<&Number> {
        match self {
            Self::Number(number) => Some(number),
            _ => None,
        }
    }

    /// Returns whether a part is a decimal.
    pub fn has_decimal(&self) -> bool {
        self.any_part(&|part| matches!(part, Self::Number(number) if number.is_decimal))
    }

    /// Returns whether `is` holds for the expression or one of its parts at any level.
    pub fn any_part(&self, is: &dyn Fn(&Self) -> bool) -> bool {
        is(self) || self.children().into_iter().any(|part| part.any_part(is))
    }

    /// Returns the number of parts at all levels.
    pub fn node_count(&self) -> u64 {
        1 + self.children().into_iter().map(Self::node_count).sum::<u64>()
    }

    /// Returns the direct parts.
    pub fn children(&self) -> Vec<&Self> {
        match self {
            Self::Number(_) | Self::Symbol(_) | Self::Constant(_) | Self::Text(_) => Vec::new(),
            Self::Sum(parts)
            | Self::Product(parts)
            | Self::Call(_, parts)
            | Self::Tuple(parts)
            | Self::Set(parts)
            | Self::Union(parts)
            | Self::Ratio(parts)
            | Self::Relation(parts, _) => parts.iter().collect(),
            Self::Power(a, b) => vec![a, b],
            Self::BigOperator(_, _, parts) => parts.iter().collect(),
            Self::Percent(part) | Self::Degrees(part) | Self::InBase(part, _) | Self::Quantity(part, _) => {
                vec![part]
            }
            Self::Interval(low, high) => vec![&low.at, &high.at],
            Self::Matrix(rows) => rows.iter().flatten().collect(),
        }
    }

    /// Adds the names of the free variables to `into`.
    pub fn collect_free_variables(&self, into: &mut std::collections::BTreeSet<String>) {
        match self {
            Self::Symbol(name) => {
                into.insert(name.clone());
            }
            Self::BigOperator(_, bound, parts) => {
                let mut inner = std::collections::BTreeSet::new();
                parts[2].collect_free_variables(&mut inner);
                inner.remove(bound);
                into.extend(inner);
                parts[0].collect_free_variables(into);
                parts[1].collect_free_variables(into);
            }
            other => other.children().into_iter().for_each(|part| part.collect_free_variables(into)),
        }
    }

    /// Returns whether the expression is a value for arithmetic: no container, relation, unit or words at any
    /// level.
    pub fn is_scalar(&self) -> bool {
        let other = |part: &Self| {
            matches!(
                part,
                Self::Tuple(_)
                    | Self::Set(_)
                    | Self::Interval(..)
                    | Self::Union(_)
                    | Self::Matrix(_)
                    | Self::Relation(..)
                    | Self::Text(_)
                    | Self::Quantity(..)
            )
        };
        !self.any_part(&other)
    }
}

/// Returns whether a fraction is an integer.
pub fn is_integer(value: &BigRational) -> bool {
    value.denom().is_one()
}

/// Returns the value of digits in another base.
///
/// Returns `None` for negative numbers and fractions, digits beyond the base, and bases outside 2 to 36.
pub fn parse_in_base(digits: &BigRational, base: u32) -> Option<BigRational> {
    if !is_integer(digits) || digits < &BigRational::zero() || !(2..=36).contains(&base) {
        return None;
    }
    BigInt::parse_bytes(digits.numer().to_string().as_bytes(), base).map(BigRational::from_integer)
}
