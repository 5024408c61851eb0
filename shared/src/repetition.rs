//! Finds the endless loop of a model that has lost its thread: the same passage again and again at the end of what it wrote.

/// Bytes at the end that are looked at.
const WINDOW: usize = 8192;
/// Bytes that the repetitions take up together at least.
const SPAN: usize = 1024;
/// Times that the passage stands there at least.
const TIMES: usize = 4;

/// Bytes of the passage that a text repeats at its end, if it does.
pub fn loops(text: &str) -> Option<usize> {
    let end = &text.as_bytes()[text.len().saturating_sub(WINDOW)..];
    if end.len() < SPAN {
        return None;
    }
    // Read backwards, a loop at the end is a beginning with a period. The prefix function (Knuth, Morris, Pratt 1977) knows the
    // period of each beginning.
    let back: Vec<u8> = end.iter().rev().copied().collect();
    let mut borders = vec![0usize; back.len()];
    for at in 1..back.len() {
        let mut border = borders[at - 1];
        while border > 0 && back[at] != back[border] {
            border = borders[border - 1];
        }
        borders[at] = border + usize::from(back[at] == back[border]);
        let (length, period) = (at + 1, at + 1 - borders[at]);
        if length >= SPAN && length >= TIMES * period && is_a_passage(&back[..period]) {
            return Some(period);
        }
    }
    None
}

/// A row of blanks, dots or zeros may be a table or a number: it takes much more of them.
fn is_a_passage(period: &[u8]) -> bool {
    period.iter().any(u8::is_ascii_alphabetic) || !period.is_ascii()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn loops_are_found_and_texts_are_none() {
        let wait = "Wait, let me check this again. ".repeat(40);
        assert_eq!(loops(&format!("First I think. {wait}")), Some(31));
        let paragraph =
            "So x is 3. Then the sum is 7, and 7 times 3 is 21. Hmm, but 21 is odd.\n\n".repeat(30);
        assert!(loops(&paragraph).is_some());
        assert_eq!(loops(&"0".repeat(5000)), None);
        let counted: String = (0..400).map(|n| format!("Step {n}: add {n} to it. ")).collect();
        assert_eq!(loops(&counted), None);
        assert_eq!(loops("Wait. Wait. Wait. Wait. Wait."), None);
        assert_eq!(loops(""), None);
    }

    proptest! {
        #[test]
        fn the_end_is_made_of_the_passage(head in "[a-z ]{0,300}", passage in "[a-c]{1,400}", times in 1usize..40) {
            let text = format!("{head}{}", passage.repeat(times));
            if let Some(period) = loops(&text) {
                let bytes = text.as_bytes();
                let from = bytes.len() - TIMES * period;
                prop_assert!((from..bytes.len() - period).all(|at| bytes[at] == bytes[at + period]));
            } else {
                prop_assert!(passage.len() * times < SPAN || times < TIMES);
            }
        }
    }
}
