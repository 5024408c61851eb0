//! Reads along while an answer passes through: token usage, and whether a stream really ended. Looks only at complete
//! lines and keeps at most one of bounded length, so a relayed byte is never held back or changed.

use potstill_shared::openai::Usage;
use serde::Deserialize;

/// Longest line or tail that is kept; usage chunks are far shorter.
const KEEP: usize = 16 << 10;

/// What was seen of an answer so far.
#[derive(Debug, Default)]
pub struct Watch {
    streamed: bool,
    line: Vec<u8>,
    too_long: bool,
    /// `data: [DONE]` has passed.
    pub done: bool,
    /// The last usage that passed.
    pub usage: Option<Usage>,
    /// Bytes that passed.
    pub bytes: u64,
}

#[derive(Deserialize)]
struct WithUsage {
    usage: Option<Usage>,
}

impl Watch {
    /// For an event stream, or for one JSON document.
    pub fn new(streamed: bool) -> Self {
        Self { streamed, ..Self::default() }
    }

    /// The next bytes of the answer.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        if !self.streamed {
            self.keep_tail(bytes);
            return;
        }
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|&byte| byte == b'\n') {
            self.keep_line(&rest[..at]);
            self.end_line();
            rest = &rest[at + 1..];
        }
        self.keep_line(rest);
    }

    /// Ends a JSON document: its usage stands near its end.
    pub fn finish(&mut self) {
        if !self.streamed && !self.too_long {
            self.usage = parse_usage(&self.line);
        } else if !self.streamed {
            let text = String::from_utf8_lossy(&self.line);
            self.usage = text.rfind("\"usage\":").and_then(|at| {
                let object = text[at + "\"usage\":".len()..].trim_start();
                let mut values = serde_json::Deserializer::from_str(object).into_iter::<Usage>();
                values.next()?.ok()
            });
        }
    }

    fn keep_line(&mut self, bytes: &[u8]) {
        if self.line.len() + bytes.len() > KEEP {
            self.too_long = true;
            self.line.clear();
        } else if !self.too_long {
            self.line.extend_from_slice(bytes);
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if !std::mem::take(&mut self.too_long)
            && let Some(data) = line.strip_prefix(b"data:")
        {
            let data = data.trim_ascii();
            if data == b"[DONE]" {
                self.done = true;
            } else if data.windows(8).any(|window| window == b"\"usage\":") {
                self.usage = parse_usage(data).or(self.usage);
            }
        }
        self.line = line;
        self.line.clear();
    }

    fn keep_tail(&mut self, bytes: &[u8]) {
        self.line.extend_from_slice(bytes);
        if self.line.len() > KEEP {
            self.too_long = true;
            self.line.drain(..self.line.len() - KEEP / 2);
        }
    }
}

fn parse_usage(json: &[u8]) -> Option<Usage> {
    serde_json::from_slice::<WithUsage>(json).ok()?.usage
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":null}\n\n: ping\n\n\
                          data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7}}\n\n\
                          data: [DONE]\n\n";

    proptest! {
        #[test]
        fn any_cutting_gives_the_same(cuts in prop::collection::vec(0usize..300, 0..8)) {
            let mut watch = Watch::new(true);
            let mut rest = STREAM.as_bytes();
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                watch.push(head);
                rest = tail;
            }
            watch.push(rest);
            prop_assert!(watch.done);
            prop_assert_eq!(watch.usage, Some(Usage::new(3, 4)));
        }
    }

    #[test]
    fn usage_of_a_long_document_is_found_in_its_tail() {
        let mut watch = Watch::new(false);
        let text = "x".repeat(3 * KEEP);
        watch.push(format!("{{\"choices\":[{{\"text\":\"{text}").as_bytes());
        watch.push(
            b"\"}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2,\"total_tokens\":3},\"x\":1}",
        );
        watch.finish();
        assert_eq!(watch.usage, Some(Usage::new(1, 2)));
    }

    #[test]
    fn a_line_without_end_costs_bounded_memory() {
        let mut watch = Watch::new(true);
        for _ in 0..1000 {
            watch.push(&[b'x'; 1000]);
        }
        assert!(watch.line.capacity() <= 2 * KEEP);
        watch.push(b"\ndata: [DONE]\n");
        assert!(watch.done);
    }
}
