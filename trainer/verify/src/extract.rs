//! Finds the final answer in a completion and strips its spelling.

/// The final answer of a completion: the last box after the thinking; else what stands behind the last `####` or
/// `answer is`; else the whole text when it is one short line. `None` when the thinking never ended.
pub fn final_answer(completion: &str) -> Option<String> {
    let text = match completion.rfind("</think>") {
        Some(at) => &completion[at + "</think>".len()..],
        None if completion.trim_start().starts_with("<think>") => return None,
        None => completion,
    };
    if let Some(inside) = last_box(text) {
        return Some(inside.trim().to_owned()).filter(|answer| !answer.is_empty());
    }
    let lower = text.to_ascii_lowercase();
    let anchored = ["####", "answer is", "answer:"]
        .iter()
        .filter_map(|anchor| lower.rfind(anchor).map(|at| at + anchor.len()))
        .max()
        .map(|at| text[at..].trim_start_matches([':', ' ', '*']).lines().next().unwrap_or_default());
    let line = anchored.unwrap_or_else(|| text.trim());
    let line = line.trim().trim_end_matches(['.', '*']).trim();
    (!line.is_empty() && line.len() <= 200 && !line.contains('\n')).then(|| line.to_owned())
}

/// Content of the last `\boxed{…}` whose braces are balanced.
fn last_box(text: &str) -> Option<&str> {
    const OPEN: &str = "\\boxed{";
    let mut end = text.len();
    while let Some(at) = text[..end].rfind(OPEN) {
        let inside = &text[at + OPEN.len()..];
        let mut depth = 1usize;
        for (offset, c) in inside.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Some(&inside[..offset]);
            }
        }
        end = at;
    }
    None
}

/// Strips LaTeX and spelling that do not change the value: dollars, `\text{}`, spaces, `\left`, trailing dots.
pub fn plain(text: &str) -> String {
    let mut text = text.trim().trim_end_matches('.').to_owned();
    for (from, to) in [
        ("\\$", ""),
        ("$", ""),
        ("\\%", "%"),
        ("\\left", ""),
        ("\\right", ""),
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\,", ""),
        ("\\!", ""),
        ("\\ ", " "),
        ("{,}", ","),
        ("−", "-"),
    ] {
        text = text.replace(from, to);
    }
    for command in ["\\text{", "\\mathrm{", "\\textbf{", "\\mathbf{"] {
        if let Some(inside) = text.strip_prefix(command).and_then(|rest| rest.strip_suffix('}')) {
            text = inside.to_owned();
        }
    }
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_and_broken_boxes() {
        assert_eq!(final_answer("so \\boxed{\\frac{1}{2}} done").as_deref(), Some("\\frac{1}{2}"));
        assert_eq!(final_answer("\\boxed{3} and \\boxed{4").as_deref(), Some("3"));
        assert_eq!(final_answer("\\boxed{}"), None);
        let deep = format!("\\boxed{{{}{}}}", "{".repeat(10_000), "}".repeat(10_000));
        assert!(final_answer(&deep).is_some());
    }
}
