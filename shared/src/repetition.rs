//! Detection of repetition loops: a model repeats one passage at the end of its completion until the token
//! limit.
//!
//! Deliberately absent: loops of digits, punctuation or whitespace alone, because tables and long numbers
//! look the same.

/// Bytes at the end of the text that are searched.
const SEARCH_WINDOW_BYTES: usize = 8192;
/// Smallest total length of the repetitions, in bytes.
const MIN_LOOP_BYTES: usize = 1024;
/// Smallest number of repetitions.
const MIN_REPETITIONS: usize = 4;

/// Returns the length in bytes of the passage that `text` repeats at its end, or `None` if the text does not
/// loop.
///
/// A loop covers at least `SPAN` bytes with at least `TIMES` repetitions of its passage.
pub fn repeated_passage_bytes(text: &str) -> Option<usize> {
    let end = &text.as_bytes()[text.len().saturating_sub(SEARCH_WINDOW_BYTES)..];
    if end.len() < MIN_LOOP_BYTES {
        return None;
    }
    // A loop at the end is a periodic prefix of the reversed text. The prefix function (Knuth, Morris, Pratt
    // 1977) gives the smallest period of each prefix.
    let back: Vec<u8> = end.iter().rev().copied().collect();
    let mut borders = vec![0usize; back.len()];
    for at in 1..back.len() {
        let mut border = borders[at - 1];
        while border > 0 && back[at] != back[border] {
            border = borders[border - 1];
        }
        borders[at] = border + usize::from(back[at] == back[border]);
        let (length, period) = (at + 1, at + 1 - borders[at]);
        if length >= MIN_LOOP_BYTES && length >= MIN_REPETITIONS * period && is_passage(&back[..period]) {
            return Some(period);
        }
    }
    None
}

/// Returns whether a period contains a letter or a character outside ASCII.
fn is_passage(period: &[u8]) -> bool {
    period.iter().any(u8::is_ascii_alphabetic) || !period.is_ascii()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn finds_repeated_passages_and_ignores_numbers_and_counted_steps() {
        let wait = "Wait, let me check this again. ".repeat(40);
        assert_eq!(repeated_passage_bytes(&format!("First I think. {wait}")), Some(31));
        let paragraph =
            "So x is 3. Then the sum is 7, and 7 times 3 is 21. Hmm, but 21 is odd.\n\n".repeat(30);
        assert!(repeated_passage_bytes(&paragraph).is_some());
        assert_eq!(repeated_passage_bytes(&"0".repeat(5000)), None);
        let counted: String = (0..400).map(|n| format!("Step {n}: add {n} to it. ")).collect();
        assert_eq!(repeated_passage_bytes(&counted), None);
        assert_eq!(repeated_passage_bytes("Wait. Wait. Wait. Wait. Wait."), None);
        assert_eq!(repeated_passage_bytes(""), None);
    }

    proptest! {
        #[test]
        fn reported_period_repeats_at_the_end_of_the_text(head in "[a-z ]{0,300}", passage in "[a-c]{1,400}", times in 1usize..40) {
            let text = format!("{head}{}", passage.repeat(times));
            if let Some(period) = repeated_passage_bytes(&text) {
                let bytes = text.as_bytes();
                let from = bytes.len() - MIN_REPETITIONS * period;
                prop_assert!((from..bytes.len() - period).all(|at| bytes[at] == bytes[at + period]));
            } else {
                prop_assert!(passage.len() * times < MIN_LOOP_BYTES || times < MIN_REPETITIONS);
            }
        }
    }
}
