//! Minimal HTTP/1.1 for the load generator and the mock node: fixed requests, and responses with a length or in chunks.
//! Cheap, so that the measurement shows the proxy between them. Not safe for untrusted peers.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A connection with its read buffer.
pub(crate) struct Wire {
    pub(crate) stream: TcpStream,
    buffer: Vec<u8>,
    /// Number of consumed bytes of `buffer`.
    at: usize,
}

/// Framing of a body.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Framing {
    Length(usize),
    Chunked,
}

/// Head of a message.
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) framing: Framing,
}

impl Wire {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let _unset = stream.set_nodelay(true);
        Self { stream, buffer: Vec::with_capacity(4096), at: 0 }
    }

    pub(crate) async fn connect(address: &str) -> io::Result<Self> {
        Ok(Self::new(TcpStream::connect(address).await?))
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.at..]
    }

    /// Reads more data. Returns `false` at the end of the stream.
    async fn more(&mut self) -> io::Result<bool> {
        if self.at > 0 {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
        Ok(self.stream.read_buf(&mut self.buffer).await? > 0)
    }

    /// Reads a head. Returns `None` if the peer closed the connection before it.
    pub(crate) async fn head(&mut self) -> io::Result<Option<Head>> {
        let end = loop {
            if let Some(end) = memchr::memmem::find(self.rest(), b"\r\n\r\n") {
                break end + 4;
            }
            let empty = self.rest().is_empty();
            if !self.more().await? {
                return if empty { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        };
        let head = &self.rest()[..end];
        let status = head
            .get(9..12)
            .and_then(|text| std::str::from_utf8(text).ok())
            .and_then(|text| text.parse().ok());
        let mut framing = Framing::Length(0);
        for line in head.split(|byte| *byte == b'\n') {
            let Some(colon) = memchr::memchr(b':', line) else { continue };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            if name.eq_ignore_ascii_case(b"content-length") {
                let length = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                framing = Framing::Length(length.ok_or(io::ErrorKind::InvalidData)?);
            } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
                framing = Framing::Chunked;
            }
        }
        self.at += end;
        Ok(Some(Head { status: status.unwrap_or(0), framing }))
    }

    /// Reads a body of known length and calls `on` with its bytes.
    pub(crate) async fn body(&mut self, length: usize, mut on: impl FnMut(&[u8])) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            let take = left.min(self.rest().len());
            on(&self.buffer[self.at..self.at + take]);
            self.at += take;
            left -= take;
            if left > 0 && !self.more().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Reads the next chunk of a chunked body. Returns `false` after the last one.
    pub(crate) async fn chunk(&mut self, mut on: impl FnMut(&[u8])) -> io::Result<bool> {
        let (start, length) = loop {
            if let Some(end) = memchr::memmem::find(self.rest(), b"\r\n") {
                let text = std::str::from_utf8(&self.rest()[..end]).map_err(io::Error::other)?;
                break (end + 2, usize::from_str_radix(text.trim(), 16).map_err(io::Error::other)?);
            }
            if !self.more().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        while self.rest().len() < start + length + 2 {
            if !self.more().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        on(&self.rest()[start..start + length]);
        self.at += start + length + 2;
        Ok(length > 0)
    }

    /// Reads a whole response and returns its status.
    pub(crate) async fn answer(&mut self, mut on: impl FnMut(&[u8])) -> io::Result<u16> {
        let head = self.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match head.framing {
            Framing::Length(length) => self.body(length, on).await?,
            Framing::Chunked => while self.chunk(&mut on).await? {},
        }
        Ok(head.status)
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }
}

/// Encodes a chat request.
pub(crate) fn request(key: Option<&str>, body: &str) -> Vec<u8> {
    let key = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\n{key}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Returns the body of a chat request, with `fields` inserted verbatim.
pub(crate) fn chat(fields: &str, prompt: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}]{fields}}}"#)
}
