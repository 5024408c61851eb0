//! Comparison of equations and inequalities for the strict profile.
//!
//! Deliberately absent: solving of equations. Only bounds on a single variable become solution sets.

use std::collections::BTreeSet;

use num_traits::Signed;

use super::comparison::{Comparison, comparison, is_container};
use crate::exact::AtomTable;
use crate::expr::{Constant, Expr, IntervalBound, Relation};

/// Returns name and value of an assignment: `x = 5`, `f(x) = 2x` or `a = b = 3`.
fn assignment(expr: &Expr) -> Option<(&Expr, &Expr)> {
    let Expr::Relation(sides, signs) = expr else { return None };
    let name = |side: &Expr| match side {
        Expr::Symbol(_) | Expr::Text(_) => true,
        Expr::Product(factors) => factors.iter().all(|factor| matches!(factor, Expr::Symbol(_))),
        _ => false,
    };
    let equations = signs.iter().all(|sign| *sign == Relation::Equal);
    (equations && name(&sides[0])).then(|| (&sides[0], &sides[sides.len() - 1]))
}

/// The comparisons that relations are reduced to.
#[derive(Clone, Copy)]
pub(super) struct Comparers {
    /// Compares any two expressions.
    pub(super) exprs: fn(&Expr, &Expr) -> Comparison,
    /// Compares two values that are no containers.
    pub(super) scalars: fn(&Expr, &Expr) -> Comparison,
}

/// Compares two values of which at least one is a relation.
pub(super) fn compare_relations(gold: &Expr, answer: &Expr, by: Comparers) -> Comparison {
    match (gold, answer) {
        (Expr::Relation(..), Expr::Relation(..)) => compare_two_relations(gold, answer, by),
        (relation @ Expr::Relation(..), other) | (other, relation @ Expr::Relation(..)) => {
            if let Some((_, value)) = assignment(relation) {
                return if std::ptr::eq(relation, gold) {
                    (by.exprs)(value, other)
                } else {
                    (by.exprs)(other, value)
                };
            }
            if is_container(other)
                && let Some(set) = solution_set(relation)
            {
                return if std::ptr::eq(relation, gold) {
                    (by.exprs)(&set, other)
                } else {
                    (by.exprs)(other, &set)
                };
            }
            // An equation that holds, such as `3 * 4 = 12`, counts as its last side.
            if let Expr::Relation(sides, signs) = relation
                && signs.iter().all(|sign| *sign == Relation::Equal)
                && sides.windows(2).all(|pair| (by.exprs)(&pair[0], &pair[1]).equal == Some(true))
            {
                return (by.exprs)(&sides[sides.len() - 1], other);
            }
            comparison(None, "a relation against a value")
        }
        _ => (by.scalars)(gold, answer),
    }
}

/// Returns the solution set of bounds on one variable, such as `x > 0` or `1 < x < 2`.
fn solution_set(relation: &Expr) -> Option<Expr> {
    let Expr::Relation(sides, signs) = relation else { return None };
    let end = |at: Expr, closed| IntervalBound { at: Box::new(at), closed };
    let infinity = || Expr::Constant(Constant::Infinity);
    match (sides.as_slice(), signs.as_slice()) {
        ([Expr::Symbol(_), set], [Relation::In]) => Some(set.clone()),
        ([a, b], [sign]) => {
            let (bound, sign) = match (a, b) {
                (Expr::Symbol(_), bound) => (bound.clone(), *sign),
                (bound, Expr::Symbol(_)) => (bound.clone(), sign.reversed()),
                _ => return None,
            };
            if bound.any_part(&|part| matches!(part, Expr::Symbol(_))) {
                return None;
            }
            match sign {
                Relation::Less | Relation::LessEqual => Some(Expr::Interval(
                    end(infinity().negate(), false),
                    end(bound, sign == Relation::LessEqual),
                )),
                Relation::Greater | Relation::GreaterEqual => {
                    Some(Expr::Interval(end(bound, sign == Relation::GreaterEqual), end(infinity(), false)))
                }
                _ => None,
            }
        }
        ([low, Expr::Symbol(_), high], [first, second]) => match (first, second) {
            (Relation::Less | Relation::LessEqual, Relation::Less | Relation::LessEqual) => {
                Some(Expr::Interval(
                    end(low.clone(), *first == Relation::LessEqual),
                    end(high.clone(), *second == Relation::LessEqual),
                ))
            }
            (Relation::Greater | Relation::GreaterEqual, Relation::Greater | Relation::GreaterEqual) => {
                Some(Expr::Interval(
                    end(high.clone(), *second == Relation::GreaterEqual),
                    end(low.clone(), *first == Relation::GreaterEqual),
                ))
            }
            _ => None,
        },
        _ => None,
    }
}

/// Compares two relations: as assignments, as solution sets, or by their normal forms.
fn compare_two_relations(gold: &Expr, answer: &Expr, by: Comparers) -> Comparison {
    if let (Some((name, a)), Some((other, b))) = (assignment(gold), assignment(answer)) {
        let same_name = name == other || (by.exprs)(name, other).equal == Some(true);
        if same_name {
            return (by.exprs)(a, b);
        }
        let simple = matches!((name, other), (Expr::Symbol(_), Expr::Symbol(_)));
        if simple && a.is_scalar() && b.is_scalar() {
            let mut names = BTreeSet::new();
            a.collect_free_variables(&mut names);
            b.collect_free_variables(&mut names);
            if names.is_empty() {
                return comparison(false, "another name is given a value");
            }
        }
    }
    if let (Some(a), Some(b)) = (solution_set(gold), solution_set(answer)) {
        let variable = |relation: &Expr| {
            let mut names = BTreeSet::new();
            relation.collect_free_variables(&mut names);
            names
        };
        if variable(gold) == variable(answer) {
            return (by.exprs)(&a, &b);
        }
    }
    let (Expr::Relation(a, s), Expr::Relation(b, t)) = (gold, answer) else {
        return comparison(None, "no relations");
    };
    let ([a, b], [c, d], [s], [t]) = (a.as_slice(), b.as_slice(), s.as_slice(), t.as_slice()) else {
        return comparison(None, "chains of relations");
    };
    let mut atoms = AtomTable::default();
    let left = atoms.normal_form(&a.clone().subtract(b.clone()));
    let right = atoms.normal_form(&c.clone().subtract(d.clone()));
    let (Some(left), Some(right)) = (left, right) else {
        return comparison(None, "relations without a normal form");
    };
    match (s, t) {
        (Relation::Equal, Relation::Equal) | (Relation::NotEqual, Relation::NotEqual) => {
            if atoms.are_proportional(&left, &right) {
                comparison(true, "multiples of the same equation")
            } else if atoms.differ_by_constant(&left, &right) {
                comparison(false, "the same formula set to another value")
            } else {
                comparison(None, "equations that are no multiples of each other")
            }
        }
        (s, t) => match atoms.constant_ratio(&left, &right) {
            Some(ratio) if ratio.is_positive() && s == t => {
                comparison(true, "multiples of the same inequality")
            }
            Some(ratio) if ratio.is_negative() && s.reversed() == *t => {
                comparison(true, "the same inequality, turned round")
            }
            _ => comparison(None, "inequalities that are no multiples of each other"),
        },
    }
}
