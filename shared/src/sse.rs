//! Server-sent events as OpenAI endpoints use them (WHATWG HTML, section 9.2): a decoder that gives the same events for
//! every way of cutting the bytes, and an encoder that writes one `data:` line per event.

use bytes::Bytes;

/// No event may grow beyond this.
pub const MAX_EVENT_BYTES: usize = 4 << 20;

/// A comment that keeps a silent stream open. Between two events, clients ignore it.
pub const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// One event: its name (empty for most) and its data lines joined by `\n`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// The `event:` field.
    pub name: String,
    /// The `data:` field.
    pub data: String,
}

/// An event grew beyond [`MAX_EVENT_BYTES`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an event of the stream is longer than {MAX_EVENT_BYTES} bytes")]
pub struct EventTooLong;

/// Incremental decoder. Comments, `id` and `retry` are read and dropped; invalid UTF-8 is replaced.
#[derive(Debug, Default)]
pub struct Decoder {
    line: Vec<u8>,
    after_cr: bool,
    started: bool,
    event: Event,
    has_data: bool,
    size: usize,
}

impl Decoder {
    /// Takes bytes and returns the events that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, EventTooLong> {
        let mut events = Vec::new();
        for &byte in bytes {
            if std::mem::take(&mut self.after_cr) && byte == b'\n' {
                continue;
            }
            if byte == b'\n' || byte == b'\r' {
                self.after_cr = byte == b'\r';
                events.extend(self.end_line());
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

    fn end_line(&mut self) -> Option<Event> {
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

/// `data: <json>` and a blank line. `json` must hold no line break, as serde_json writes it.
pub fn data(json: &str) -> Bytes {
    debug_assert!(!json.contains(['\n', '\r']));
    let mut frame = Vec::with_capacity(json.len() + 8);
    frame.extend_from_slice(b"data: ");
    frame.extend_from_slice(json.as_bytes());
    frame.extend_from_slice(b"\n\n");
    frame.into()
}

/// The last frame of a stream that ended well.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_comments_and_line_ends() {
        let mut decoder = Decoder::default();
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
    fn an_endless_event_is_refused() {
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(&vec![b'x'; MAX_EVENT_BYTES + 1]), Err(EventTooLong));
    }

    proptest! {
        #[test]
        fn cutting_does_not_matter(bytes in prop::collection::vec(prop::sample::select(b"data: x\n\r\xc3\xa9:e".to_vec()), 0..200), cut in 0usize..200) {
            let mut whole = Decoder::default();
            let expected = whole.push(&bytes).unwrap();
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            let mut halves = Decoder::default();
            let mut got = halves.push(head).unwrap();
            got.extend(halves.push(tail).unwrap());
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn what_we_write_we_read(text in "\\PC*") {
            let json = serde_json::to_string(&text).unwrap();
            let events = Decoder::default().push(&data(&json)).unwrap();
            prop_assert_eq!(events.len(), 1);
            prop_assert_eq!(&serde_json::from_str::<String>(&events[0].data).unwrap(), &text);
        }
    }
}
