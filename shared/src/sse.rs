//! Server-sent events (WHATWG HTML, section 9.2), as OpenAI endpoints use them.
//!
//! The decoder gives the same events for every division of the bytes into chunks. The encoder writes one
//! `data:` line per event.
//!
//! Deliberately absent: event ids and reconnection times.

use bytes::Bytes;

/// Largest size of an event in bytes, all fields and comments together.
pub const MAX_EVENT_BYTES: usize = 4 << 20;

/// A comment that keeps a silent stream open. Between two events, clients ignore it.
pub const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// `event:` field; empty if absent.
    pub name: String,
    /// `data:` fields, joined by `\n`.
    pub data: String,
}

/// Error for an event longer than [`MAX_EVENT_BYTES`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an event of the stream is longer than {MAX_EVENT_BYTES} bytes")]
pub struct EventTooLong;

/// Incremental decoder. Comments and the fields `id` and `retry` are ignored; invalid UTF-8 is replaced by
/// U+FFFD.
#[derive(Debug, Default)]
pub struct SseDecoder {
    /// Bytes of the unfinished line.
    line: Vec<u8>,
    /// True if the last byte was a carriage return; a line feed then belongs to the same line break.
    after_cr: bool,
    /// True after the first line; only the first line can begin with a byte order mark.
    started: bool,
    /// Fields of the unfinished event.
    event: Event,
    /// True if the unfinished event has a `data:` field.
    has_data: bool,
    /// Bytes of the unfinished event.
    size: usize,
}

impl SseDecoder {
    /// Decodes `bytes` and returns the events that end in them.
    ///
    /// Fails if an event exceeds [`MAX_EVENT_BYTES`]; the decoder is unusable afterwards.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, EventTooLong> {
        let mut events = Vec::new();
        for &byte in bytes {
            if std::mem::take(&mut self.after_cr) && byte == b'\n' {
                continue;
            }
            if byte == b'\n' || byte == b'\r' {
                self.after_cr = byte == b'\r';
                events.extend(self.finish_line());
            } else {
                self.line.push(byte);
                self.size += 1;
                if self.size > MAX_EVENT_BYTES {
                    return Err(EventTooLong);
                }
            }
        }
        Ok(events)
    }

    /// Applies the finished line to the event; returns the event if the line is blank and there is data.
    fn finish_line(&mut self) -> Option<Event> {
        let line = std::mem::take(&mut self.line);
        let mut line = line.as_slice();
        if !std::mem::replace(&mut self.started, true) {
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        if line.is_empty() {
            self.size = 0;
            let event = std::mem::take(&mut self.event);
            return std::mem::take(&mut self.has_data).then_some(event);
        }
        let (field, value) = match line.iter().position(|&byte| byte == b':') {
            Some(at) => (&line[..at], line[at + 1..].strip_prefix(b" ").unwrap_or(&line[at + 1..])),
            None => (line, &[][..]),
        };
        let value = String::from_utf8_lossy(value);
        match field {
            b"data" => {
                if self.has_data {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(&value);
                self.has_data = true;
            }
            b"event" => self.event.name = value.into_owned(),
            _ => {}
        }
        None
    }
}

/// Returns the frame `data: <json>` with a blank line. `json` contains no line break, as in the output of
/// serde_json.
pub fn data_frame(json: &str) -> Bytes {
    debug_assert!(!json.contains(['\n', '\r']));
    let mut frame = Vec::with_capacity(json.len() + 8);
    frame.extend_from_slice(b"data: ");
    frame.extend_from_slice(json.as_bytes());
    frame.extend_from_slice(b"\n\n");
    frame.into()
}

/// Last frame of a complete stream.
pub const DONE_FRAME: &[u8] = b"data: [DONE]\n\n";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn decodes_fields_comments_and_all_line_breaks() {
        let mut decoder = SseDecoder::default();
        let events =
            decoder.push(b"\xef\xbb\xbf: hi\r\nevent: error\rdata:a\ndata: b\n\nid: 3\n\ndata\n\n").unwrap();
        assert_eq!(
            events,
            [
                Event { name: "error".into(), data: "a\nb".into() },
                Event { name: String::new(), data: String::new() }
            ]
        );
    }

    #[test]
    fn rejects_an_event_beyond_the_size_limit() {
        let mut decoder = SseDecoder::default();
        assert_eq!(decoder.push(&vec![b'x'; MAX_EVENT_BYTES + 1]), Err(EventTooLong));
    }

    proptest! {
        #[test]
        fn events_do_not_depend_on_chunk_boundaries(bytes in prop::collection::vec(prop::sample::select(b"data: x\n\r\xc3\xa9:e".to_vec()), 0..200), cut in 0usize..200) {
            let mut whole = SseDecoder::default();
            let expected = whole.push(&bytes).unwrap();
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            let mut halves = SseDecoder::default();
            let mut got = halves.push(head).unwrap();
            got.extend(halves.push(tail).unwrap());
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn decodes_its_own_frames(text in "\\PC*") {
            let json = serde_json::to_string(&text).unwrap();
            let events = SseDecoder::default().push(&data_frame(&json)).unwrap();
            prop_assert_eq!(events.len(), 1);
            prop_assert_eq!(&serde_json::from_str::<String>(&events[0].data).unwrap(), &text);
        }
    }
}
