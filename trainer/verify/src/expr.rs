//! What an answer is once it is read: numbers with the way they were written, symbols, operations, and the containers that
//! answers come in.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

/// A number as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Number {
    /// Its exact value.
    pub value: BigRational,
    /// Whether it was written with a decimal point (and is therefore perhaps rounded).
    pub is_decimal: bool,
}

impl Number {
    /// An exact number.
    pub fn exact(value: BigRational) -> Self {
        Self { value, is_decimal: false }
    }

    /// A whole number.
    pub fn whole(value: i64) -> Self {
        Self::exact(BigRational::from_integer(BigInt::from(value)))
    }
}

/// Numbers with a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Constant {
    /// Circumference over diameter.
    Pi,
    /// Euler's number.
    E,
    /// The imaginary unit.
    I,
    /// Positive infinity.
    Infinity,
}

/// Functions of one argument, if not said otherwise.
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
    /// Of two arguments.
    Binomial,
    /// Of any number of arguments.
    Gcd,
    /// Of any number of arguments.
    Lcm,
    /// Of any number of arguments.
    Max,
    /// Of any number of arguments.
    Min,
}

/// What runs over an index or a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Over {
    Sum,
    Product,
    Integral,
}

/// Between the sides of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Relation {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    /// `x \in S`.
    In,
}

impl Relation {
    /// The relation read from right to left.
    pub fn flipped(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessEqual => Self::GreaterEqual,
            Self::Greater => Self::Less,
            Self::GreaterEqual => Self::LessEqual,
            other => other,
        }
    }
}

/// An end of an interval.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// Where it is.
    pub at: Box<Expr>,
    /// Whether it belongs to the interval.
    pub closed: bool,
}

/// An answer, or a part of one.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// A number.
    Number(Number),
    /// A variable, with its subscript.
    Symbol(String),
    /// A number with a name.
    Constant(Constant),
    /// Terms.
    Sum(Vec<Expr>),
    /// Factors.
    Product(Vec<Expr>),
    /// Base and exponent.
    Power(Box<Expr>, Box<Expr>),
    /// A function of its arguments.
    Call(Function, Vec<Expr>),
    /// Over a variable from here to there.
    Over(Over, String, Box<[Expr; 3]>),
    /// Hundredths.
    Percent(Box<Expr>),
    /// Degrees of angle.
    Degrees(Box<Expr>),
    /// A number to a base other than ten: the digits as written, and the base.
    Based(Box<Expr>, u32),
    /// `a : b`.
    Ratio(Vec<Expr>),
    /// In order.
    Tuple(Vec<Expr>),
    /// In no order. Lists that were written without braces are sets too.
    Set(Vec<Expr>),
    /// `(a, b)` is an open interval and also a pair; who compares decides.
    Interval(End, End),
    /// Of sets.
    Union(Vec<Expr>),
    /// Rows.
    Matrix(Vec<Vec<Expr>>),
    /// Sides and what stands between them.
    Relation(Vec<Expr>, Vec<Relation>),
    /// Words.
    Text(String),
    /// With a unit behind it.
    Quantity(Box<Expr>, String),
}

impl Expr {
    /// A whole number.
    pub fn whole(value: i64) -> Self {
        Self::Number(Number::whole(value))
    }

    /// The negative; of a number, a number.
    pub fn negated(self) -> Self {
        match self {
            Self::Number(number) => Self::Number(Number { value: -number.value, ..number }),
            Self::Product(mut factors) => {
                factors.insert(0, Self::whole(-1));
                Self::Product(factors)
            }
            other => Self::Product(vec![Self::whole(-1), other]),
        }
    }

    /// `self / other`.
    pub fn over(self, other: Self) -> Self {
        Self::Product(vec![self, Self::Power(Box::new(other), Box::new(Self::whole(-1)))])
    }

    /// `self - other`.
    pub fn minus(self, other: Self) -> Self {
        Self::Sum(vec![self, other.negated()])
    }

    /// The value, if it is a number as it stands.
    pub fn number(&self) -> Option<&Number> {
        match self {
            Self::Number(number) => Some(number),
            _ => None,
        }
    }

    /// Whether a decimal stands anywhere in it.
    pub fn has_decimal(&self) -> bool {
        self.any(&|part| matches!(part, Self::Number(number) if number.is_decimal))
    }

    /// Whether any part of it is so.
    pub fn any(&self, is: &dyn Fn(&Self) -> bool) -> bool {
        is(self) || self.parts().into_iter().any(|part| part.any(is))
    }

    /// How many parts it has, all levels together.
    pub fn size(&self) -> u64 {
        1 + self.parts().into_iter().map(Self::size).sum::<u64>()
    }

    /// Its direct parts.
    pub fn parts(&self) -> Vec<&Self> {
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
            Self::Over(_, _, parts) => parts.iter().collect(),
            Self::Percent(part) | Self::Degrees(part) | Self::Based(part, _) | Self::Quantity(part, _) => {
                vec![part]
            }
            Self::Interval(low, high) => vec![&low.at, &high.at],
            Self::Matrix(rows) => rows.iter().flatten().collect(),
        }
    }

    /// The names of its variables, those that are bound by a sum or an integral left out.
    pub fn symbols(&self, into: &mut std::collections::BTreeSet<String>) {
        match self {
            Self::Symbol(name) => {
                into.insert(name.clone());
            }
            Self::Over(_, bound, parts) => {
                let mut inner = std::collections::BTreeSet::new();
                parts[2].symbols(&mut inner);
                inner.remove(bound);
                into.extend(inner);
                parts[0].symbols(into);
                parts[1].symbols(into);
            }
            other => other.parts().into_iter().for_each(|part| part.symbols(into)),
        }
    }

    /// Whether it is a value that can be added and multiplied, and not a container, a relation or a word.
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
        !self.any(&other)
    }
}

/// Whether a rational number is whole.
pub fn is_whole(value: &BigRational) -> bool {
    value.denom().is_one()
}

/// The digits of a number to a base, read as that base; none when a digit does not belong to it.
pub fn from_base(digits: &BigRational, base: u32) -> Option<BigRational> {
    if !is_whole(digits) || digits < &BigRational::zero() || !(2..=36).contains(&base) {
        return None;
    }
    BigInt::parse_bytes(digits.numer().to_string().as_bytes(), base).map(BigRational::from_integer)
}
