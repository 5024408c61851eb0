//! Separates the reasoning of a model from its answer.
//!
//! Models write `<think> … </think> answer`. The chat templates of DeepSeek-R1 and QwQ open the tag in the
//! prompt, so a completion can begin inside the reasoning. The splitter is incremental: its result does not
//! depend on chunk boundaries. At most an incomplete tag and the whitespace before an opening tag are held
//! back.

/// Tag that opens the reasoning.
pub const OPEN_TAG: &str = "<think>";
/// Tag that closes the reasoning.
pub const CLOSE_TAG: &str = "</think>";

/// Part of a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Text between the tags.
    Reasoning(String),
    /// Text after the closing tag, or all text if there is no opening tag.
    Answer(String),
}

/// Position of the splitter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SplitterState {
    /// Before an opening tag or the first text of an answer.
    Start,
    /// Between the tags.
    Thinking,
    /// Behind the closing tag, or in a completion without tags.
    Answer,
}

/// Incremental splitter: chunks go to [`Splitter::push`]; [`Splitter::finish`] ends the completion.
#[derive(Debug)]
pub struct ReasoningSplitter {
    /// Current position.
    state: SplitterState,
    /// Text whose kind is still open.
    held: String,
    /// True if the prompt or the completion has opened the reasoning.
    opened: bool,
}

impl ReasoningSplitter {
    /// Returns a splitter. `inside` is true if the prompt has already opened the reasoning.
    pub fn new(inside: bool) -> Self {
        Self {
            state: if inside { SplitterState::Thinking } else { SplitterState::Start },
            held: String::new(),
            opened: inside,
        }
    }

    /// Appends a chunk and returns the pieces whose kind is certain.
    pub fn push(&mut self, chunk: &str) -> Vec<Piece> {
        self.held.push_str(chunk);
        let mut pieces = Vec::new();
        loop {
            match self.state {
                SplitterState::Start => {
                    let trimmed = self.held.trim_start();
                    if let Some(rest) = trimmed.strip_prefix(OPEN_TAG) {
                        self.held = rest.to_owned();
                        self.state = SplitterState::Thinking;
                        self.opened = true;
                    } else if OPEN_TAG.starts_with(trimmed) {
                        return pieces;
                    } else {
                        self.state = SplitterState::Answer;
                    }
                }
                SplitterState::Thinking => {
                    if let Some(at) = self.held.find(CLOSE_TAG) {
                        if at > 0 {
                            pieces.push(Piece::Reasoning(self.held[..at].to_owned()));
                        }
                        self.held.drain(..at + CLOSE_TAG.len());
                        self.state = SplitterState::Answer;
                    } else {
                        let keep = partial_tag_len(&self.held, CLOSE_TAG);
                        let ready = self.held.len() - keep;
                        if ready > 0 {
                            pieces.push(Piece::Reasoning(self.held.drain(..ready).collect()));
                        }
                        return pieces;
                    }
                }
                SplitterState::Answer => {
                    if !self.held.is_empty() {
                        pieces.push(Piece::Answer(std::mem::take(&mut self.held)));
                    }
                    return pieces;
                }
            }
        }
    }

    /// Ends the completion and returns the text that was held back.
    pub fn finish(&mut self) -> Option<Piece> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            _ if held.is_empty() => None,
            SplitterState::Thinking => Some(Piece::Reasoning(held)),
            SplitterState::Start | SplitterState::Answer => Some(Piece::Answer(held)),
        }
    }

    /// Returns whether the reasoning was opened but not closed. The completion is then truncated, regardless
    /// of its finish reason.
    pub fn is_unclosed(&self) -> bool {
        self.opened && self.state == SplitterState::Thinking
    }
}

/// Returns the length of the longest suffix of `text` that is a proper prefix of `tag`.
fn partial_tag_len(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|&n| text.ends_with(&tag[..n])).unwrap_or(0)
}

/// Splits a whole completion into reasoning and answer, both trimmed.
///
/// The reasoning is `None` if no tag was opened. The reasoning is also `None` if the tag was not closed,
/// because the completion is then truncated.
pub fn split_reasoning(text: &str, inside: bool) -> (Option<String>, String) {
    let mut splitter = ReasoningSplitter::new(inside);
    let mut pieces = splitter.push(text);
    pieces.extend(splitter.finish());
    let (mut thinking, mut answer) = (String::new(), String::new());
    for piece in pieces {
        match piece {
            Piece::Reasoning(text) => thinking.push_str(&text),
            Piece::Answer(text) => answer.push_str(&text),
        }
    }
    let closed = splitter.opened && !splitter.is_unclosed();
    (closed.then(|| thinking.trim().to_owned()), answer.trim().to_owned())
}

/// Splits a completion of a teacher or of a published dataset into reasoning and answer, both trimmed.
///
/// Accepts think tags, opened in the completion or in the prompt, and the two sections of OpenThoughts. A
/// truncated completion has no reasoning.
pub fn split_any_format(text: &str) -> (Option<String>, String) {
    if let Some((_, rest)) = text.split_once("<|begin_of_thought|>") {
        let Some((thinking, rest)) = rest.split_once("<|end_of_thought|>") else {
            return (None, rest.trim().to_owned());
        };
        let answer = rest.split_once("<|begin_of_solution|>").map_or(rest, |(_, answer)| answer);
        let answer = answer.split_once("<|end_of_solution|>").map_or(answer, |(answer, _)| answer);
        return (Some(thinking.trim().to_owned()), answer.trim().to_owned());
    }
    // A closing tag without an opening tag means that the chat template has opened the reasoning.
    split_reasoning(text, !text.trim_start().starts_with(OPEN_TAG) && text.contains(CLOSE_TAG))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(chunks: &[&str], inside: bool) -> (String, String, bool) {
        let mut splitter = ReasoningSplitter::new(inside);
        let mut pieces: Vec<_> = chunks.iter().flat_map(|chunk| splitter.push(chunk)).collect();
        pieces.extend(splitter.finish());
        let (mut thinking, mut answer) = (String::new(), String::new());
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => thinking.push_str(&text),
                Piece::Answer(text) => answer.push_str(&text),
            }
        }
        (thinking, answer, splitter.is_unclosed())
    }

    #[test]
    fn splits_think_tags_opened_in_completion_or_prompt() {
        assert_eq!(split_reasoning("<think> a </think> b", false), (Some("a".into()), "b".into()));
        assert_eq!(split_reasoning("a </think> b", true), (Some("a".into()), "b".into()));
        assert_eq!(split_reasoning("no tags", false), (None, "no tags".into()));
        assert_eq!(split_reasoning("\n<think>x</think>y", false), (Some("x".into()), "y".into()));
        assert_eq!(split_reasoning("<think>x", false).0, None);
        assert!(joined(&["<think> a </thi"], false).2);
    }

    #[test]
    fn reads_think_tags_and_openthoughts_sections() {
        let sections =
            "<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n<|begin_of_solution|>b<|end_of_solution|>";
        for text in [sections, "<think>a</think>b", "a</think>b", "<|begin_of_thought|>a<|end_of_thought|>b"]
        {
            assert_eq!(split_any_format(text), (Some("a".into()), "b".into()), "{text}");
        }
        assert_eq!(split_any_format("<|begin_of_thought|>a").0, None, "cut off");
        assert_eq!(split_any_format("a b"), (None, "a b".into()));
    }

    proptest! {
        #[test]
        fn pieces_do_not_depend_on_chunk_boundaries(text in "(<think>|</think>|<|thi|nk>|[a-c \n])*", cuts in prop::collection::vec(0usize..40, 0..6), inside: bool) {
            let whole = joined(&[&text], inside);
            let mut chunks = Vec::new();
            let mut rest = text.as_str();
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                chunks.push(head);
                rest = tail;
            }
            chunks.push(rest);
            prop_assert_eq!(joined(&chunks, inside), whole);
        }
    }
}
