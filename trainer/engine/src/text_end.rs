//! Incremental detokenization of a completion: emits whole characters only and ends at the first stop
//! string.

use crate::error::EngineError;
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// Detokenizes a completion and cuts the text before the first stop string. A stop string may span tokens,
/// so text that could begin one is held back.
#[derive(Debug)]
pub(crate) struct IncrementalDetokenizer {
    decoder: StreamDecoder,
    stop: Vec<String>,
    held: String,
}

impl IncrementalDetokenizer {
    pub(crate) fn new(mut stop: Vec<String>) -> Self {
        stop.retain(|text| !text.is_empty());
        Self { decoder: StreamDecoder::default(), stop, held: String::new() }
    }

    /// Adds `token` and returns the text that is now final, with whether a stop string was found. `last`
    /// flushes the held text. A `quiet` token (end token) adds no text.
    pub(crate) fn push_token(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        quiet: bool,
        last: bool,
    ) -> Result<(String, bool), EngineError> {
        let mut piece = if quiet { String::new() } else { self.decoder.push(tokenizer, token)? };
        if last {
            piece.push_str(&self.decoder.finish(tokenizer)?);
        }
        Ok(self.push_text(&piece, last))
    }

    fn push_text(&mut self, piece: &str, last: bool) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = if last {
            0
        } else {
            self.stop.iter().map(|stop| partial_stop_len(&self.held, stop)).max().unwrap_or(0)
        };
        let ready = self.held.len() - keep;
        (self.held.drain(..ready).collect(), false)
    }
}

/// Returns the length in bytes of the longest suffix of `text` that is a proper prefix of `stop`.
fn partial_stop_len(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .skip(1)
        .filter(|&at| text.ends_with(&stop[..at]))
        .last()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn stop_strings_cut_text_independently_of_chunking(text in "[ab é]{0,30}", stop in "[ab é]{1,4}", cuts in prop::collection::vec(1usize..4, 1..30)) {
            let mut ends = IncrementalDetokenizer::new(vec![stop.clone()]);
            let (mut got, mut over) = (String::new(), false);
            let mut characters = text.chars().peekable();
            for cut in cuts {
                let piece: String = characters.by_ref().take(cut).collect();
                if !over {
                    let (more, stopped) = ends.push_text(&piece, false);
                    got.push_str(&more);
                    over = stopped;
                }
            }
            if !over {
                let rest: String = characters.collect();
                let (more, _) = ends.push_text(&rest, true);
                got.push_str(&more);
            }
            prop_assert_eq!(got, text.split(&stop).next().unwrap());
        }
    }
}
