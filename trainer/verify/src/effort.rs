//! How much work one comparison may take. Answers come from models, and a short text can ask for a long computation (sums within
//! sums, towers of powers, plus-minus within plus-minus), so whatever is not linear in the text pays before it works, in
//! units of roughly a nanosecond. What cannot pay is given up, and the comparison stays open. Counted, not timed: the same
//! answers get the same verdict on any machine.

use std::cell::Cell;

use num_rational::BigRational;

/// What one comparison may spend: some tenths of a second.
pub(crate) const ALLOWED: u64 = 200_000_000;

thread_local! {
    /// What the comparison that runs on this thread has left; without one nothing is bounded.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs a comparison with `allowed` to spend; none when that was not enough.
pub(crate) fn bounded<T>(allowed: u64, compare: impl FnOnce() -> T) -> Option<T> {
    /// Puts back what was there before, also when a comparison panics.
    struct Before(Option<u64>);
    impl Drop for Before {
        fn drop(&mut self) {
            LEFT.set(self.0);
        }
    }
    let _before = Before(LEFT.replace(Some(allowed)));
    let found = compare();
    (LEFT.get() != Some(0)).then_some(found)
}

/// Pays; none when nothing is left, from then on for ever.
pub(crate) fn spend(units: u64) -> Option<()> {
    let Some(left) = LEFT.get() else { return Some(()) };
    let left = left.saturating_sub(units);
    LEFT.set(Some(left));
    (left > 0).then_some(())
}

/// Pays for an operation on numbers of so many bits together. The dearest is a common divisor: it is found bit by bit, in as many
/// steps as there are bits, of as many words each.
pub(crate) fn spend_bits(bits: u64) -> Option<()> {
    spend((bits / 64 + 2).pow(2) * 16 + 100)
}

/// Pays for an operation on two fractions.
pub(crate) fn spend_on(a: &BigRational, b: &BigRational) -> Option<()> {
    spend_bits([a.numer(), a.denom(), b.numer(), b.denom()].iter().map(|number| number.bits()).sum())
}
