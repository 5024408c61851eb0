//! Extraction of the final answer from a completion, for the strict profile.
//!
//! Deliberately absent: parsing, and the extraction rules of Math-Verify (see `compat/extract.rs`).

/// Largest length of an answer outside a box, in bytes.
const MAX_UNBOXED_BYTES: usize = 200;

/// Returns the final answer of a completion from the first source that has one. Text before `</think>` is
/// ignored.
///
/// 1. The last boxes.
/// 2. The last `<answer>` tag.
/// 3. The text behind the last `####`, `answer is` or `answer:`.
/// 4. The last formula in math delimiters, if the text is long or has several lines.
/// 5. The whole text.
///
/// Returns `None` for an answer that is empty, too long or of several lines, and for reasoning without end.
pub fn final_answer(completion: &str) -> Option<String> {
    let text = match completion.rfind("</think>") {
        Some(at) => &completion[at + "</think>".len()..],
        None if completion.trim_start().starts_with("<think>") => return None,
        None => completion,
    };
    let answer = last_boxes(text)
        .or_else(|| tagged_answer(text))
        .or_else(|| anchored_answer(text))
        .or_else(|| {
            (text.trim().len() > MAX_UNBOXED_BYTES || text.trim().contains('\n'))
                .then(|| last_formula(text))
                .flatten()
        })
        .unwrap_or_else(|| text.trim().to_owned());
    let answer = trim_delimiters(&answer);
    (!answer.is_empty() && answer.len() <= crate::lexer::MAX_ANSWER_BYTES && !answer.contains('\n'))
        .then(|| answer.to_owned())
}

/// Removes math delimiters, asterisks, backticks and final punctuation around an answer.
fn trim_delimiters(text: &str) -> &str {
    let mut text = text.trim();
    loop {
        let before = text;
        text = text.trim_matches('*').trim().trim_end_matches([',', ';']).trim();
        // A decimal point precedes a digit, so a final point ends the sentence.
        text = text.strip_suffix('.').unwrap_or(text).trim();
        for (open, close) in [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("`", "`")] {
            if let Some(inside) = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close))
                && !inside.contains(open)
                && !inside.is_empty()
            {
                text = inside.trim();
            }
        }
        if text == before {
            return text;
        }
    }
}

/// Returns the content of the last `<answer>…</answer>`.
fn tagged_answer(text: &str) -> Option<String> {
    let end = text.rfind("</answer>")?;
    let begin = text[..end].rfind("<answer>")? + "<answer>".len();
    Some(text[begin..end].trim().to_owned()).filter(|answer| !answer.is_empty())
}

/// Returns the text behind the last anchor, up to the end of its sentence.
fn anchored_answer(text: &str) -> Option<String> {
    let lower = text.to_ascii_lowercase();
    let at = ["####", "answer is", "answer:", "answer**:", "answer:**"]
        .iter()
        .filter_map(|anchor| lower.rfind(anchor).map(|at| at + anchor.len()))
        .max()?;
    let rest = text[at..].trim_start_matches([':', ' ', '*', '\n']);
    let line = rest.lines().next().unwrap_or_default();
    let sentence = match line.find(". ") {
        Some(end) if end > 0 => &line[..end],
        _ => line,
    };
    Some(sentence.trim().to_owned()).filter(|answer| !answer.is_empty() && answer.len() <= MAX_UNBOXED_BYTES)
}

/// Returns the last formula in `$…$`, `\(…\)` or `\[…\]`.
fn last_formula(text: &str) -> Option<String> {
    let dollars = || {
        let end = text.rfind('$')?;
        let begin = text[..end].trim_end_matches('$').rfind('$')?;
        Some((begin, text[begin + 1..end].trim_matches('$')))
    };
    let brackets = |open: &str, close: &str| {
        let end = text.rfind(close)?;
        let begin = text[..end].rfind(open)?;
        Some((begin, &text[begin + open.len()..end]))
    };
    let found = [dollars(), brackets("\\(", "\\)"), brackets("\\[", "\\]")];
    let (_, formula) = found.into_iter().flatten().max_by_key(|(begin, _)| *begin)?;
    Some(formula.trim().to_owned())
        .filter(|formula| !formula.is_empty() && formula.len() <= MAX_UNBOXED_BYTES)
}

/// Returns the content of the last `\boxed{…}` or `\fbox{…}` with balanced braces.
///
/// Boxes form one answer if only whitespace, `$`, commas, `and` or `or` separate them; at most 16 are joined.
fn last_boxes(text: &str) -> Option<String> {
    let mut found: Vec<(usize, usize, &str)> = Vec::new();
    let mut end = text.len();
    while let Some((begin, inside, stop)) = last_box(text, end) {
        if let Some((next, ..)) = found.last() {
            let between = text[stop..*next].replace(['$', ' ', '\n', ','], "");
            if text[stop..*next].is_empty() || !matches!(between.as_str(), "" | "and" | "or") {
                break;
            }
        }
        found.push((begin, stop, inside));
        if found.len() == 16 {
            break;
        }
        end = begin;
    }
    let boxes: Vec<&str> =
        found.iter().rev().map(|(_, _, inside)| inside.trim()).filter(|inside| !inside.is_empty()).collect();
    // Repetitions of one box are one answer.
    let all_same = boxes.windows(2).all(|pair| pair[0] == pair[1]);
    match boxes.as_slice() {
        [] if found.is_empty() => None,
        // An empty box means that the completion has no answer.
        [] => Some(String::new()),
        [.., last] if all_same => Some((*last).to_owned()),
        boxes => Some(boxes.join(", ")),
    }
}

/// Returns start, content and end of the last balanced box in the first `before` bytes.
fn last_box(text: &str, before: usize) -> Option<(usize, &str, usize)> {
    let mut end = before;
    let mut tries = 0;
    loop {
        let (at, open) = ["\\boxed{", "\\fbox{"]
            .iter()
            .filter_map(|open| text[..end].rfind(open).map(|at| (at, open.len())))
            .max()?;
        let inside = &text[at + open..before];
        let mut depth = 1usize;
        for (offset, c) in inside.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                // The last opening comes first in this search, so the innermost of nested boxes is found.
                return Some((at, &inside[..offset], at + open + offset + 1));
            }
        }
        end = at;
        tries += 1;
        if tries > 64 {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_answers_in_boxes_tags_anchors_and_formulas() {
        for (text, answer) in [
            ("so \\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
            ("\\boxed{3} and so \\boxed{4", "3"),
            ("\\boxed{2}, \\boxed{3}", "2, 3"),
            ("$\\boxed{2}$ and $\\boxed{3}$", "2, 3"),
            ("\\boxed{4} wait, no: \\boxed{7}", "7"),
            ("\\boxed{7}\n\\boxed{7}", "7"),
            ("\\boxed{\\boxed{9}}", "9"),
            ("<think>\\boxed{1}</think>It is **Answer: 4**. Check: 2+2=4, 5 is wrong", "4"),
            ("<answer> 5 </answer> I hope.", "5"),
            ("The answer is $3.50.", "$3.50"),
            ("The final answer is: $\\frac12$.", "\\frac12"),
            ("First we see this.\nThen $x=4$ and so $y = 5$ follows.", "y = 5"),
            ("**5**", "5"),
            ("#### 42", "42"),
        ] {
            assert_eq!(final_answer(text).as_deref(), Some(answer), "{text}");
        }
        for text in ["\\boxed{}", "", "<think>\\boxed{7}", "one line\nand another"] {
            assert_eq!(final_answer(text), None, "{text}");
        }
    }

    #[test]
    fn deeply_nested_or_unclosed_delimiters_end_quickly() {
        for deep in [
            format!("\\boxed{{{}{}}}", "{".repeat(10_000), "}".repeat(10_000)),
            "\\boxed{".repeat(10_000),
            "{".repeat(10_000),
            "$".repeat(10_000),
        ] {
            let _found = final_answer(&deep);
        }
    }
}
