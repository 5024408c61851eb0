//! Parses HTTP/1.1 response heads of nodes. Only fields that the gateway uses are kept, without a header map. No other
//! header of a node reaches a client.

use std::mem::MaybeUninit;

use http::{HeaderValue, Method, StatusCode};

use super::error::TransportError;
use super::framing::BodyFraming;

/// Largest response head in bytes.
pub const MAX_HEAD_BYTES: usize = 64 << 10;

/// Largest number of fields in a response head.
const MAX_FIELDS: usize = 100;

/// The parsed head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// Status code.
    pub status: StatusCode,
    /// Value of `content-type`.
    pub content_type: Option<HeaderValue>,
    /// Value of `retry-after` in seconds. Dates are ignored.
    pub retry_after_s: Option<u64>,
    /// Framing of the body.
    pub framing: BodyFraming,
    /// Whether another request may be sent on the connection.
    pub keep_alive: bool,
}

/// Parses the response head at the beginning of `bytes`. `method` is that of the request. Returns the head and its
/// length, or `None` if the head is not complete. Interim responses (1xx) are skipped.
///
/// Returns [`TransportError::Protocol`] for a malformed, too long or ambiguous head.
pub fn parse_response_head(
    bytes: &[u8],
    method: &Method,
) -> Result<Option<(ResponseHead, usize)>, TransportError> {
    let mut skipped = 0;
    loop {
        let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut []);
        let config = httparse::ParserConfig::default();
        let parsed = config.parse_response_with_uninit_headers(&mut response, &bytes[skipped..], &mut fields);
        let length = match parsed {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD_BYTES => return Ok(None),
            Ok(httparse::Status::Partial) => {
                return Err(TransportError::InvalidResponse("its head is too long"));
            }
            Err(httparse::Error::TooManyHeaders) => {
                return Err(TransportError::InvalidResponse("its head has too many fields"));
            }
            Err(_) => return Err(TransportError::InvalidResponse("its head is malformed")),
        };
        skipped += length;
        match response.code {
            Some(101) => return Err(TransportError::InvalidResponse("it changes the protocol")),
            Some(100..=199) => {}
            _ => return Ok(Some((ResponseHead::from_parsed(&response, method)?, skipped))),
        }
    }
}

impl ResponseHead {
    fn from_parsed(response: &httparse::Response<'_, '_>, method: &Method) -> Result<Self, TransportError> {
        let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or(TransportError::InvalidResponse("its status is no status"))?;
        let http_1_1 = response.version == Some(1);
        let (mut content_type, mut retry_after) = (None, None);
        let (mut close, mut keep_alive) = (false, false);
        let (mut length, mut coded, mut chunked) = (None, false, false);
        for field in response.headers.iter() {
            let value = field.value;
            if is_field(field.name, "content-type") {
                content_type = Some(match value {
                    b"application/json" => HeaderValue::from_static("application/json"),
                    other => HeaderValue::from_bytes(other)
                        .map_err(|_| TransportError::InvalidResponse("its `content-type` is malformed"))?,
                });
            } else if is_field(field.name, "content-length") {
                for one in value.split(|byte| *byte == b',') {
                    let one = parse_digits(one)
                        .ok_or(TransportError::InvalidResponse("its `content-length` is no number"))?;
                    if length.is_some_and(|before| before != one) {
                        return Err(TransportError::InvalidResponse("it has two lengths"));
                    }
                    length = Some(one);
                }
            } else if is_field(field.name, "transfer-encoding") {
                for coding in split_list(value) {
                    // The gateway never requests another coding and cannot decode one.
                    if !coding.eq_ignore_ascii_case(b"chunked") || chunked {
                        return Err(TransportError::InvalidResponse(
                            "it has a transfer coding other than `chunked`",
                        ));
                    }
                    chunked = true;
                }
                coded = true;
            } else if is_field(field.name, "connection") {
                close |= split_list(value).any(|word| word.eq_ignore_ascii_case(b"close"));
                keep_alive |= split_list(value).any(|word| word.eq_ignore_ascii_case(b"keep-alive"));
            } else if is_field(field.name, "retry-after") {
                retry_after = parse_digits(value);
            }
        }
        let bodyless = *method == Method::HEAD || matches!(status.as_u16(), 204 | 304);
        let framing = match length {
            _ if bodyless => BodyFraming::ENDED,
            // Chunked coding overrides a length (RFC 9112, section 6.3). A response with both is suspicious, so its
            // connection is not reused.
            _ if chunked => BodyFraming::CHUNKED,
            Some(length) => BodyFraming::Length(length),
            None => BodyFraming::Close,
        };
        let plain = framing != BodyFraming::Close && !(coded && (length.is_some() || !http_1_1));
        let keep = plain && !close && (http_1_1 || keep_alive);
        Ok(Self { status, content_type, retry_after_s: retry_after, framing, keep_alive: keep })
    }
}

fn is_field(name: &str, wanted: &str) -> bool {
    name.eq_ignore_ascii_case(wanted)
}

fn split_list(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|word| !word.is_empty())
}

/// Parses decimal digits, without a sign.
fn parse_digits(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii();
    let digits = text.iter().all(u8::is_ascii_digit);
    if digits { std::str::from_utf8(text).ok()?.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<(ResponseHead, usize)>, String> {
        parse_response_head(text.as_bytes(), &Method::POST).map_err(|fault| fault.to_string())
    }

    fn framing(text: &str) -> (BodyFraming, bool) {
        let (head, length) = read(&format!("{text}\r\n\r\nrest")).unwrap().unwrap();
        assert_eq!(length, text.len() + 4);
        (head.framing, head.keep_alive)
    }

    #[test]
    fn derives_framing_from_the_head() {
        let ok = |fields: &str| framing(&format!("HTTP/1.1 200 OK{fields}"));
        assert_eq!(ok("\r\ncontent-length: 5"), (BodyFraming::Length(5), true));
        assert_eq!(ok("\r\nContent-Length: 5, 5\r\nContent-LENGTH:5"), (BodyFraming::Length(5), true));
        assert_eq!(ok("\r\ntransfer-encoding: Chunked"), (BodyFraming::CHUNKED, true));
        assert_eq!(
            ok("\r\ntransfer-encoding: chunked\r\nconnection: x, Close"),
            (BodyFraming::CHUNKED, false)
        );
        assert_eq!(ok("\r\ntransfer-encoding: chunked\r\ncontent-length: 5"), (BodyFraming::CHUNKED, false));
        assert_eq!(ok(""), (BodyFraming::Close, false));
        assert_eq!(framing("HTTP/1.1 204 No Content\r\ncontent-length: 5"), (BodyFraming::ENDED, true));
        assert_eq!(framing("HTTP/1.0 200 OK\r\ncontent-length: 5"), (BodyFraming::Length(5), false));
        let kept = "HTTP/1.0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive";
        assert_eq!(framing(kept), (BodyFraming::Length(5), true));
        let early = "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\nconnection: keep-alive";
        assert_eq!(framing(early), (BodyFraming::CHUNKED, false));
        let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\na: b\r\n\r\nHTTP/1.1 200 OK";
        assert_eq!(framing(&format!("{interim}\r\ncontent-length: 5")), (BodyFraming::Length(5), true));
        let whole = parse_response_head(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", &Method::HEAD)
            .unwrap()
            .unwrap()
            .0;
        assert_eq!(whole.framing, BodyFraming::ENDED);
    }

    #[test]
    fn parses_status_content_type_and_retry_after() {
        let text =
            "HTTP/1.1 429 Slow\r\ncontent-type: text/plain\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n";
        let head = read(text).unwrap().unwrap().0;
        assert_eq!((head.status.as_u16(), head.retry_after_s), (429, Some(7)));
        assert_eq!(head.content_type.unwrap(), "text/plain");
        for end in 0..text.len() {
            assert_eq!(read(&text[..end]), Ok(None), "{end} bytes are no head");
        }
    }

    #[test]
    fn rejects_malformed_heads() {
        let many: String = (0..101).map(|index| format!("\r\nx-{index}: y")).collect();
        for (text, words) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6", "two lengths"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 5, 6", "two lengths"),
            ("HTTP/1.1 200 OK\r\ncontent-length: +5", "no number"),
            ("HTTP/1.1 200 OK\r\ncontent-length: ", "no number"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999", "no number"),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked", "transfer coding"),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked", "transfer coding"),
            ("HTTP/1.1 101 Switching\r\nupgrade: x", "changes the protocol"),
            ("HTTP/1.1 200 OK\r\na : b", "malformed"),
            ("HTTP/1.1 200 OK\r\na: b\r\n c", "malformed"),
            ("HTTP/2 200 OK", "malformed"),
            ("SSH-2.0-OpenSSH", "malformed"),
            (&format!("HTTP/1.1 200 OK{many}"), "too many"),
        ] {
            let refused = read(&format!("{text}\r\n\r\n")).expect_err(text);
            assert!(refused.contains(words), "{text}: {refused}");
        }
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(MAX_HEAD_BYTES));
        assert!(read(&long).unwrap_err().contains("too long"));
    }
}
