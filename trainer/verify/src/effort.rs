//! Work budget of a comparison. A short answer can require a long computation: nested sums, towers of powers,
//! nested plus-minus signs.
//!
//! Every operation whose cost is not linear in the text first spends units of roughly one nanosecond. An
//! operation beyond the budget fails, and the comparison is unverifiable.
//!
//! Deliberately absent: clocks. Counted units give the same verdict on every machine.

use std::cell::Cell;

use num_rational::BigRational;

/// Work budget of a comparison in units, some tenths of a second.
pub(crate) const WORK_BUDGET_UNITS: u64 = 200_000_000;

thread_local! {
    /// Remaining units of the comparison on this thread; `None` outside a comparison, where work is
    /// unbounded.
    static REMAINING_UNITS: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs `compare` with a budget of `allowed` units. Returns `None` if the budget was exhausted.
pub(crate) fn with_work_budget<T>(allowed: u64, compare: impl FnOnce() -> T) -> Option<T> {
    /// Guard that restores the previous budget, also after a panic.
    struct BudgetGuard(Option<u64>);
    impl Drop for BudgetGuard {
        fn drop(&mut self) {
            REMAINING_UNITS.set(self.0);
        }
    }
    let _before = BudgetGuard(REMAINING_UNITS.replace(Some(allowed)));
    let found = compare();
    (REMAINING_UNITS.get() != Some(0)).then_some(found)
}

/// Spends `units`. Returns `None` if the budget is exhausted; every later call then fails too.
pub(crate) fn spend(units: u64) -> Option<()> {
    let Some(left) = REMAINING_UNITS.get() else { return Some(()) };
    let left = left.saturating_sub(units);
    REMAINING_UNITS.set(Some(left));
    (left > 0).then_some(())
}

/// Spends the cost of an operation on integers with `bits` bits in total.
///
/// The greatest common divisor is the most expensive operation: one step per bit, each linear in the number
/// of words.
pub(crate) fn spend_bits(bits: u64) -> Option<()> {
    spend((bits / 64 + 2).pow(2) * 16 + 100)
}

/// Spends the cost of an operation on two fractions.
pub(crate) fn spend_fractions(a: &BigRational, b: &BigRational) -> Option<()> {
    spend_bits([a.numer(), a.denom(), b.numer(), b.denom()].iter().map(|number| number.bits()).sum())
}
