//! Result of a comparison.

use crate::expr::Expr;

/// Result of comparing two answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// True for equal, false for different, `None` for unverifiable.
    pub equal: Option<bool>,
    /// Rule behind the result.
    pub why: String,
}

/// Returns a verdict.
pub(super) fn comparison(equal: impl Into<Option<bool>>, why: impl Into<String>) -> Comparison {
    Comparison { equal: equal.into(), why: why.into() }
}

/// Returns whether an expression is a set, tuple, interval or union.
pub(super) fn is_container(expr: &Expr) -> bool {
    matches!(expr, Expr::Set(_) | Expr::Tuple(_) | Expr::Interval(..) | Expr::Union(_))
}
