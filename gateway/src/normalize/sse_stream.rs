//! The events of a stream on their way through: found in the bytes, looked at one by one, written again as `data: <json>` and a
//! blank line. Comments, `event:`, `id:` and `retry:` lines go; a frame that is right as it came passes without a copy.

use bytes::{Bytes, BytesMut};
use memchr::memmem;
use potstill_shared::sse::{self, SseDecoder};

use super::stream_chunk::ChunkNormalizer;
use super::verdict::Verdict;

/// No event may grow beyond this.
const MAX_EVENT: usize = sse::MAX_EVENT_BYTES;

/// What a piece of a stream comes to.
#[derive(Debug, PartialEq)]
pub enum StreamStep {
    /// Completion events for the client; none yet when it is empty.
    Forward(Bytes),
    /// The same, and the stream is whole with them.
    Done(Bytes),
    /// The same, and the node has ended its stream with an error event.
    Error(Bytes),
    /// The same, and then something that no stream should hold.
    Invalid(Bytes, &'static str),
}

/// The reader of one stream.
pub struct SseStream {
    normalizer: ChunkNormalizer,
    /// Bytes of an event that is not whole yet.
    tail: BytesMut,
    /// Once a carriage return was seen, lines are told apart by the full rules.
    decoder: Option<SseDecoder>,
    /// An end needs a finish reason before it.
    strict: bool,
}

impl SseStream {
    /// For a stream; `strict`: it is whole only with a finish reason.
    pub fn new(normalizer: ChunkNormalizer, strict: bool) -> Self {
        Self { normalizer, tail: BytesMut::new(), decoder: None, strict }
    }

    /// What was seen so far.
    pub fn seen(&self) -> &ChunkNormalizer {
        &self.normalizer
    }

    /// Takes the next bytes.
    pub fn push(&mut self, bytes: Bytes) -> StreamStep {
        if self.decoder.is_none() && memchr::memchr(b'\r', &bytes).is_some() {
            self.decoder = Some(SseDecoder::default());
            let tail = std::mem::take(&mut self.tail);
            let before = self.decode(&tail);
            debug_assert_eq!(before, StreamStep::Forward(Bytes::new()), "a tail holds no whole event");
        }
        if self.decoder.is_some() {
            return self.decode(&bytes);
        }
        if self.tail.is_empty() {
            return self.scan(bytes);
        }
        if self.tail.len() + bytes.len() > MAX_EVENT {
            return StreamStep::Invalid(Bytes::new(), "an event is too long");
        }
        self.tail.extend_from_slice(&bytes);
        let whole = std::mem::take(&mut self.tail).freeze();
        self.scan(whole)
    }

    /// Finds events that end in a line feed, twice.
    fn scan(&mut self, bytes: Bytes) -> StreamStep {
        // Written only when something changes; until then the frame itself is what passes.
        let mut out: Option<BytesMut> = None;
        let mut at = 0;
        while let Some(length) = memmem::find(&bytes[at..], b"\n\n") {
            let block = &bytes[at..at + length + 2];
            let line = &block[..length];
            let simple = line.starts_with(b"data: ") && memchr::memchr(b'\n', line).is_none();
            let owned;
            let data = if simple {
                &line[6..]
            } else {
                owned = joined(line);
                match &owned {
                    Some(data) => data.as_slice(),
                    // Comments and the like.
                    None => {
                        out.get_or_insert_with(|| BytesMut::from(&bytes[..at]));
                        at += length + 2;
                        continue;
                    }
                }
            };
            let verdict = self.normalizer.event(data);
            let end = at + length + 2;
            match verdict {
                Verdict::Unchanged if simple => {
                    if let Some(out) = &mut out {
                        out.extend_from_slice(block);
                    }
                }
                other => {
                    let mut written = out.take().unwrap_or_else(|| BytesMut::from(&bytes[..at]));
                    if let Err(step) = self.write(&mut written, other, data) {
                        return step;
                    }
                    out = Some(written);
                }
            }
            at = end;
        }
        if bytes.len() - at > MAX_EVENT {
            return StreamStep::Invalid(
                out.map_or_else(|| bytes.slice(..at), BytesMut::freeze),
                "an event is too long",
            );
        }
        self.tail.extend_from_slice(&bytes[at..]);
        StreamStep::Forward(match out {
            Some(out) => out.freeze(),
            None => bytes.slice(..at),
        })
    }

    fn decode(&mut self, bytes: &[u8]) -> StreamStep {
        let mut out = BytesMut::new();
        let events = match self.decoder.get_or_insert_default().push(bytes) {
            Ok(events) => events,
            Err(_) => return StreamStep::Invalid(Bytes::new(), "an event is too long"),
        };
        for event in events {
            let verdict = self.normalizer.event(event.data.as_bytes());
            if let Err(step) = self.write(&mut out, verdict, event.data.as_bytes()) {
                return step;
            }
        }
        StreamStep::Forward(out.freeze())
    }

    /// Writes what becomes of an event; `Err` ends the stream.
    fn write(&mut self, out: &mut BytesMut, verdict: Verdict, data: &[u8]) -> Result<(), StreamStep> {
        match verdict {
            Verdict::Unchanged => frame(out, data),
            Verdict::Changed(lines) => lines.iter().for_each(|line| frame(out, line)),
            Verdict::Done if self.strict && !self.normalizer.finished => {
                let out = std::mem::take(out).freeze();
                return Err(StreamStep::Invalid(out, "the node ended the stream without a finish reason"));
            }
            Verdict::Done => {
                out.extend_from_slice(sse::DONE_FRAME);
                return Err(StreamStep::Done(std::mem::take(out).freeze()));
            }
            Verdict::Error(line) => {
                frame(out, &line);
                return Err(StreamStep::Error(std::mem::take(out).freeze()));
            }
            Verdict::Invalid(reason) => {
                return Err(StreamStep::Invalid(std::mem::take(out).freeze(), reason));
            }
        }
        Ok(())
    }
}

/// One event on one line. A line break in `data` is white space between JSON tokens: within strings JSON has none.
fn frame(out: &mut BytesMut, data: &[u8]) {
    out.reserve(data.len() + 8);
    out.extend_from_slice(b"data: ");
    let start = out.len();
    out.extend_from_slice(data);
    for byte in &mut out[start..] {
        if *byte == b'\n' || *byte == b'\r' {
            *byte = b' ';
        }
    }
    out.extend_from_slice(b"\n\n");
}

/// The data of an event of several lines, or of a line without the usual space.
fn joined(block: &[u8]) -> Option<Vec<u8>> {
    let mut data: Option<Vec<u8>> = None;
    let block = block.strip_prefix(b"\xef\xbb\xbf").unwrap_or(block);
    for line in block.split(|byte| *byte == b'\n') {
        let Some(value) = line.strip_prefix(b"data:") else { continue };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &mut data {
            None => data = Some(value.to_vec()),
            Some(data) => {
                data.push(b'\n');
                data.extend_from_slice(value);
            }
        }
    }
    data
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Kind;
    use super::*;
    use crate::config::Reasoning;

    fn events(model: &str) -> SseStream {
        SseStream::new(ChunkNormalizer::new(Kind::Chat, model.into(), false, Reasoning::Pass), true)
    }

    fn chunk(text: &str, reason: &str) -> String {
        format!(
            r#"{{"id":"a","object":"chat.completion.chunk","created":5,"model":"x","choices":[{{"index":0,"delta":{{"role":"assistant","content":"{text}"}},"finish_reason":{reason}}}]}}"#
        )
    }

    fn run(events: &mut SseStream, bytes: &[u8], cuts: &[usize]) -> (Vec<u8>, &'static str) {
        let (mut out, mut rest) = (Vec::new(), bytes);
        let mut parts = Vec::new();
        for cut in cuts {
            let (head, tail) = rest.split_at((*cut).min(rest.len()));
            parts.push(head);
            rest = tail;
        }
        parts.push(rest);
        for part in parts {
            match events.push(Bytes::copy_from_slice(part)) {
                StreamStep::Forward(bytes) => out.extend_from_slice(&bytes),
                StreamStep::Done(bytes) => return ([out, bytes.to_vec()].concat(), "done"),
                StreamStep::Error(bytes) => return ([out, bytes.to_vec()].concat(), "failed"),
                StreamStep::Invalid(bytes, _) => return ([out, bytes.to_vec()].concat(), "broken"),
            }
        }
        (out, "open")
    }

    #[test]
    fn a_frame_that_is_right_passes_without_a_copy() {
        let text = format!("data: {}\n\n", chunk("a", "null"));
        let bytes = Bytes::from(text);
        let StreamStep::Forward(out) = events("x").push(bytes.clone()) else { panic!() };
        assert_eq!(out.as_ptr(), bytes.as_ptr());
    }

    #[test]
    fn nothing_but_data_lines_passes_and_nothing_after_the_end() {
        let text = format!(
            ": ping\n\nevent: x\nid: 3\ndata: {}\n\nretry: 5\n\ndata:{}\n\ndata: [DONE]\n\ndata: more\n\n",
            chunk("a", "null"),
            chunk("b", "\"stop\"")
        );
        let expected =
            format!("data: {}\n\ndata: {}\n\ndata: [DONE]\n\n", chunk("a", "null"), chunk("b", "\"stop\""));
        let (out, end) = run(&mut events("x"), text.as_bytes(), &[]);
        assert_eq!((String::from_utf8(out).unwrap(), end), (expected, "done"));
    }

    #[test]
    fn an_end_without_a_reason_is_no_end() {
        let text = format!("data: {}\n\ndata: [DONE]\n\n", chunk("a", "null"));
        let (out, end) = run(&mut events("x"), text.as_bytes(), &[]);
        assert!(end == "broken" && !String::from_utf8(out).unwrap().contains("[DONE]"));
    }

    #[test]
    fn a_line_break_inside_an_event_makes_no_second_event() {
        for text in [
            "data: {\"a\":\ndata: 1}\n\n",
            "data: {\"a\":\r\ndata: 1}\r\n\r\n",
            "data: {\"a\":\rdata: 1}\r\r",
        ] {
            let (out, _) = run(&mut events("x"), text.as_bytes(), &[]);
            let out = String::from_utf8(out).unwrap();
            assert_eq!(out.matches("\n").count(), 2, "{out:?}");
        }
    }

    proptest! {
        #[test]
        fn cutting_does_not_matter(
            parts in prop::collection::vec(0usize..6, 0..12),
            cuts in prop::collection::vec(0usize..200, 0..10),
            ends in prop::sample::select(vec!["\n", "\r\n", "\r"]),
            model in prop::sample::select(vec!["x", "y"]),
        ) {
            let mut text = String::new();
            for part in parts {
                let block = match part {
                    0 => format!("data: {}", chunk("a", "null")),
                    1 => format!("data: {}", chunk("é…", "\"stop\"")),
                    2 => ": ping".to_owned(),
                    3 => "data: {\"error\":{\"message\":\"x\"}}".to_owned(),
                    4 => format!("event: m\ndata:{}", chunk("b", "null")),
                    _ => "data: [DONE]".to_owned(),
                };
                text += &block.replace('\n', ends);
                text += ends;
                text += ends;
            }
            let whole = run(&mut events(model), text.as_bytes(), &[]);
            let cut = run(&mut events(model), text.as_bytes(), &cuts);
            prop_assert_eq!(String::from_utf8_lossy(&cut.0), String::from_utf8_lossy(&whole.0));
            prop_assert_eq!(cut.1, whole.1);
        }

        #[test]
        fn bytes_of_any_kind_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 0usize..400) {
            let _any = run(&mut events("x"), &bytes, &[cut]);
        }
    }
}
