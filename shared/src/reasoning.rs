//! Splits a reasoning model's raw text into thinking and answer.
//!
//! Teachers write `<think> … </think> answer`; the templates of R1 and QwQ open the tag in the prompt already, so the
//! text may start inside the thinking. The splitter is incremental: it gives the same result for every way of cutting
//! the text into chunks, and holds back at most one tag's length.

/// The tag that opens the thinking.
pub const OPEN: &str = "<think>";
/// The tag that closes the thinking.
pub const CLOSE: &str = "</think>";

/// A piece of text that belongs to the thinking or to the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Text between the tags.
    Thinking(String),
    /// Text after the closing tag, or all text when no tag was opened.
    Answer(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Thinking,
    Answer,
}

/// Incremental splitter; feed it chunks with [`Splitter::push`] and end with [`Splitter::finish`].
#[derive(Debug)]
pub struct Splitter {
    state: State,
    held: String,
    opened: bool,
}

impl Splitter {
    /// `inside`: the prompt has opened the thinking already.
    pub fn new(inside: bool) -> Self {
        Self {
            state: if inside { State::Thinking } else { State::Start },
            held: String::new(),
            opened: inside,
        }
    }

    /// Takes the next chunk and returns what is certain by now.
    pub fn push(&mut self, chunk: &str) -> Vec<Piece> {
        self.held.push_str(chunk);
        let mut pieces = Vec::new();
        loop {
            match self.state {
                State::Start => {
                    let trimmed = self.held.trim_start();
                    if let Some(rest) = trimmed.strip_prefix(OPEN) {
                        self.held = rest.to_owned();
                        self.state = State::Thinking;
                        self.opened = true;
                    } else if OPEN.starts_with(trimmed) {
                        return pieces;
                    } else {
                        self.state = State::Answer;
                    }
                }
                State::Thinking => {
                    if let Some(at) = self.held.find(CLOSE) {
                        if at > 0 {
                            pieces.push(Piece::Thinking(self.held[..at].to_owned()));
                        }
                        self.held.drain(..at + CLOSE.len());
                        self.state = State::Answer;
                    } else {
                        let keep = longest_suffix_that_starts(&self.held, CLOSE);
                        let ready = self.held.len() - keep;
                        if ready > 0 {
                            pieces.push(Piece::Thinking(self.held.drain(..ready).collect()));
                        }
                        return pieces;
                    }
                }
                State::Answer => {
                    if !self.held.is_empty() {
                        pieces.push(Piece::Answer(std::mem::take(&mut self.held)));
                    }
                    return pieces;
                }
            }
        }
    }

    /// Ends the text and returns what was held back.
    pub fn finish(&mut self) -> Option<Piece> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            _ if held.is_empty() => None,
            State::Thinking => Some(Piece::Thinking(held)),
            State::Start | State::Answer => Some(Piece::Answer(held)),
        }
    }

    /// Whether the thinking was opened but never closed: such a completion is truncated, whatever its finish reason.
    pub fn unclosed(&self) -> bool {
        self.opened && self.state == State::Thinking
    }
}

/// Length of the longest suffix of `text` that is a proper prefix of `tag`.
fn longest_suffix_that_starts(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|&n| text.ends_with(&tag[..n])).unwrap_or(0)
}

/// Thinking and answer of a whole text; `None` for the thinking when no tag was opened, or when it was never closed: such
/// a text is truncated, whatever its finish reason.
pub fn split(text: &str, inside: bool) -> (Option<String>, String) {
    let mut splitter = Splitter::new(inside);
    let mut pieces = splitter.push(text);
    pieces.extend(splitter.finish());
    let (mut thinking, mut answer) = (String::new(), String::new());
    for piece in pieces {
        match piece {
            Piece::Thinking(text) => thinking.push_str(&text),
            Piece::Answer(text) => answer.push_str(&text),
        }
    }
    let closed = splitter.opened && !splitter.unclosed();
    (closed.then(|| thinking.trim().to_owned()), answer.trim().to_owned())
}

/// Thinking and answer of a text in any of the forms that teachers and published datasets write: think tags (opened here or in the
/// prompt), or OpenThoughts' two sections.
pub fn read(text: &str) -> (Option<String>, String) {
    if let Some((_, rest)) = text.split_once("<|begin_of_thought|>") {
        let Some((thinking, rest)) = rest.split_once("<|end_of_thought|>") else {
            return (None, rest.trim().to_owned());
        };
        let answer = rest.split_once("<|begin_of_solution|>").map_or(rest, |(_, answer)| answer);
        let answer = answer.split_once("<|end_of_solution|>").map_or(answer, |(answer, _)| answer);
        return (Some(thinking.trim().to_owned()), answer.trim().to_owned());
    }
    // A text that closes the tag without opening it began inside: the template had opened it.
    split(text, !text.trim_start().starts_with(OPEN) && text.contains(CLOSE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(chunks: &[&str], inside: bool) -> (String, String, bool) {
        let mut splitter = Splitter::new(inside);
        let mut pieces: Vec<_> = chunks.iter().flat_map(|chunk| splitter.push(chunk)).collect();
        pieces.extend(splitter.finish());
        let (mut thinking, mut answer) = (String::new(), String::new());
        for piece in pieces {
            match piece {
                Piece::Thinking(text) => thinking.push_str(&text),
                Piece::Answer(text) => answer.push_str(&text),
            }
        }
        (thinking, answer, splitter.unclosed())
    }

    #[test]
    fn the_usual_forms() {
        assert_eq!(split("<think> a </think> b", false), (Some("a".into()), "b".into()));
        assert_eq!(split("a </think> b", true), (Some("a".into()), "b".into()));
        assert_eq!(split("no tags", false), (None, "no tags".into()));
        assert_eq!(split("\n<think>x</think>y", false), (Some("x".into()), "y".into()));
        assert_eq!(split("<think>x", false).0, None);
        assert!(joined(&["<think> a </thi"], false).2);
    }

    #[test]
    fn every_form_is_read() {
        let sections =
            "<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n<|begin_of_solution|>b<|end_of_solution|>";
        for text in [sections, "<think>a</think>b", "a</think>b", "<|begin_of_thought|>a<|end_of_thought|>b"]
        {
            assert_eq!(read(text), (Some("a".into()), "b".into()), "{text}");
        }
        assert_eq!(read("<|begin_of_thought|>a").0, None, "cut off");
        assert_eq!(read("a b"), (None, "a b".into()));
    }

    proptest! {
        #[test]
        fn cutting_does_not_matter(text in "(<think>|</think>|<|thi|nk>|[a-c \n])*", cuts in prop::collection::vec(0usize..40, 0..6), inside: bool) {
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
