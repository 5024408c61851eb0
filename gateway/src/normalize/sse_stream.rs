//! Normalizes an SSE stream: finds events in the received bytes, normalizes each, and writes `data: <json>` and a blank
//! line. Comments and `event:`, `id:` and `retry:` lines are dropped. Bytes whose events are all correct are forwarded
//! without a copy.

use bytes::{Bytes, BytesMut};
use memchr::memmem;
use potstill_shared::sse::{self, SseDecoder};

use super::stream_chunk::ChunkNormalizer;
use super::verdict::NormalizedEvent;

/// Largest size of an event in bytes.
const MAX_EVENT_BYTES: usize = sse::MAX_EVENT_BYTES;

/// Result of processing received bytes.
#[derive(Debug, PartialEq)]
pub enum StreamStep {
    /// Events for the client; empty if no event is complete yet.
    Forward(Bytes),
    /// Last events for the client; the stream is complete.
    Done(Bytes),
    /// Last events for the client; the node ended the stream with an error event.
    Error(Bytes),
    /// Events before a violation of the protocol, and its description.
    Invalid(Bytes, &'static str),
}

/// Normalizer of one stream.
pub struct SseNormalizer {
    normalizer: ChunkNormalizer,
    /// Beginning of an event that is not complete.
    tail: BytesMut,
    /// Decoder for all line ends of SSE. Used from the first carriage return on.
    decoder: Option<SseDecoder>,
    /// Whether `[DONE]` is valid only after a finish reason.
    strict: bool,
}

impl SseNormalizer {
    /// Creates a normalizer. `strict`: the stream is complete only with a finish reason.
    pub fn new(normalizer: ChunkNormalizer, strict: bool) -> Self {
        Self { normalizer, tail: BytesMut::new(), decoder: None, strict }
    }

    /// Returns the state of the events so far.
    pub fn normalizer(&self) -> &ChunkNormalizer {
        &self.normalizer
    }

    /// Processes received bytes.
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
        if self.tail.len() + bytes.len() > MAX_EVENT_BYTES {
            return StreamStep::Invalid(Bytes::new(), "an event is too long");
        }
        self.tail.extend_from_slice(&bytes);
        let whole = std::mem::take(&mut self.tail).freeze();
        self.scan(whole)
    }

    /// Processes events that end with two line feeds.
    fn scan(&mut self, bytes: Bytes) -> StreamStep {
        // Allocated when an event changes. Until then a slice of the received bytes is the output.
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
                owned = join_data_lines(line);
                match &owned {
                    Some(data) => data.as_slice(),
                    // The block has no data, such as a comment.
                    None => {
                        out.get_or_insert_with(|| BytesMut::from(&bytes[..at]));
                        at += length + 2;
                        continue;
                    }
                }
            };
            let verdict = self.normalizer.normalize_event(data);
            let end = at + length + 2;
            match verdict {
                NormalizedEvent::Unchanged if simple => {
                    if let Some(out) = &mut out {
                        out.extend_from_slice(block);
                    }
                }
                other => {
                    let mut written = out.take().unwrap_or_else(|| BytesMut::from(&bytes[..at]));
                    if let Err(step) = self.write_verdict(&mut written, other, data) {
                        return step;
                    }
                    out = Some(written);
                }
            }
            at = end;
        }
        if bytes.len() - at > MAX_EVENT_BYTES {
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
            let verdict = self.normalizer.normalize_event(event.data.as_bytes());
            if let Err(step) = self.write_verdict(&mut out, verdict, event.data.as_bytes()) {
                return step;
            }
        }
        StreamStep::Forward(out.freeze())
    }

    /// Writes the normalized event. `Err` ends the stream.
    fn write_verdict(
        &mut self,
        out: &mut BytesMut,
        verdict: NormalizedEvent,
        data: &[u8],
    ) -> Result<(), StreamStep> {
        match verdict {
            NormalizedEvent::Unchanged => write_event(out, data),
            NormalizedEvent::Changed(lines) => lines.iter().for_each(|line| write_event(out, line)),
            NormalizedEvent::Done if self.strict && !self.normalizer.has_finish_reason => {
                let out = std::mem::take(out).freeze();
                return Err(StreamStep::Invalid(out, "the node ended the stream without a finish reason"));
            }
            NormalizedEvent::Done => {
                out.extend_from_slice(sse::DONE_FRAME);
                return Err(StreamStep::Done(std::mem::take(out).freeze()));
            }
            NormalizedEvent::Error(line) => {
                write_event(out, &line);
                return Err(StreamStep::Error(std::mem::take(out).freeze()));
            }
            NormalizedEvent::Invalid(reason) => {
                return Err(StreamStep::Invalid(std::mem::take(out).freeze(), reason));
            }
        }
        Ok(())
    }
}

/// Writes an event on one line. A line break in `data` can only be whitespace between JSON tokens, because JSON strings
/// cannot contain one.
fn write_event(out: &mut BytesMut, data: &[u8]) {
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

/// Joins the `data` lines of an event (HTML standard, server-sent events). Returns `None` without data.
fn join_data_lines(block: &[u8]) -> Option<Vec<u8>> {
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

    use super::super::EndpointKind;
    use super::*;
    use crate::config::Reasoning;

    fn events(model: &str) -> SseNormalizer {
        SseNormalizer::new(
            ChunkNormalizer::new(EndpointKind::Chat, model.into(), false, Reasoning::Pass),
            true,
        )
    }

    fn chunk(text: &str, reason: &str) -> String {
        format!(
            r#"{{"id":"a","object":"chat.completion.chunk","created":5,"model":"x","choices":[{{"index":0,"delta":{{"role":"assistant","content":"{text}"}},"finish_reason":{reason}}}]}}"#
        )
    }

    fn run(events: &mut SseNormalizer, bytes: &[u8], cuts: &[usize]) -> (Vec<u8>, &'static str) {
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
    fn forwards_correct_bytes_without_a_copy() {
        let text = format!("data: {}\n\n", chunk("a", "null"));
        let bytes = Bytes::from(text);
        let StreamStep::Forward(out) = events("x").push(bytes.clone()) else { panic!() };
        assert_eq!(out.as_ptr(), bytes.as_ptr());
    }

    #[test]
    fn drops_other_fields_and_events_after_done() {
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
    fn rejects_done_without_a_finish_reason() {
        let text = format!("data: {}\n\ndata: [DONE]\n\n", chunk("a", "null"));
        let (out, end) = run(&mut events("x"), text.as_bytes(), &[]);
        assert!(end == "broken" && !String::from_utf8(out).unwrap().contains("[DONE]"));
    }

    #[test]
    fn line_break_in_data_does_not_start_an_event() {
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
        fn output_does_not_depend_on_chunk_boundaries(
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
        fn does_not_panic_on_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 0usize..400) {
            let _any = run(&mut events("x"), &bytes, &[cut]);
        }
    }
}
