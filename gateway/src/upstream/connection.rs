//! An HTTP/1.1 connection to a node, driven by the request that uses it, one request at a time. Without a task and a
//! channel, a relayed chunk wakes one task only, and dropping the request closes the socket at once. Reads and writes
//! use a buffer of the thread. The connection stores only data that could not be written or parsed yet.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::Method;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connect::{Connector, NodeStream};
use super::error::TransportError;
use super::framing::BodyFraming;
use super::request::UpstreamRequest;
use super::response_head;
use super::response_head::{MAX_HEAD_BYTES, ResponseHead};
use super::target::Target;

/// Largest number of bytes of one read or write.
const BUFFER_BYTES: usize = 16 << 10;

thread_local! {
    static INPUT: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into());
    static OUTPUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A connection.
pub struct Connection {
    stream: NodeStream,
    /// Unwritten parts of the request: the head with the beginning of the body, and the rest of the body.
    unsent: [Bytes; 2],
    /// Whether the stream may hold written data in its own buffer, as TLS does.
    unflushed: bool,
    /// Beginning of a response head that is not complete.
    partial_head: Vec<u8>,
    response: IncomingBody,
    /// Whether the connection has served a request. The node may have closed it since, unnoticed.
    was_used: bool,
}

/// State of the response body that is being received.
struct IncomingBody {
    /// Body data that arrived with the head.
    early: Bytes,
    framing: BodyFraming,
    /// Whether the connection can serve another request.
    keep: bool,
}

impl Connection {
    /// Opens a connection within `limit`. The error is a description for logs.
    pub async fn open(connector: &Connector, target: &Target, limit: Duration) -> Result<Box<Self>, String> {
        let stream = connector.connect(&target.url, target.policy, limit).await;
        let stream = stream.map_err(|error| format!("cannot connect: {error}"))?;
        // Boxed once, because the connection moves between owners with every request.
        Ok(Box::new(Self {
            stream,
            unsent: [Bytes::new(), Bytes::new()],
            unflushed: false,
            partial_head: Vec::new(),
            response: IncomingBody { early: Bytes::new(), framing: BodyFraming::ENDED, keep: true },
            was_used: false,
        }))
    }

    /// Returns whether the node may have closed the connection before it received the request. A failure is then not
    /// the node's.
    pub fn may_be_stale(&self) -> bool {
        self.was_used && self.partial_head.is_empty()
    }

    /// Returns whether another request may be sent.
    pub fn is_reusable(&self) -> bool {
        self.response.keep && self.has_ended() && self.is_sent()
    }

    /// Returns whether the response has been read to its end.
    pub fn has_ended(&self) -> bool {
        self.response.framing.has_ended() && self.response.early.is_empty()
    }

    /// Smallest number of bytes that are left of the response.
    pub fn lower_bound(&self) -> u64 {
        self.response.early.len() as u64 + self.response.framing.lower_bound()
    }

    /// Returns whether the node has neither closed the connection nor sent unexpected data.
    pub fn is_open(&mut self, context: &mut Context<'_>) -> bool {
        poll_read(&mut self.stream, context, |_| ()).is_pending()
    }

    /// Sends a request and waits for the response head.
    pub async fn send(
        &mut self,
        request: &UpstreamRequest,
        target: &Target,
    ) -> Result<ResponseHead, TransportError> {
        let mut begun = false;
        let head = std::future::poll_fn(|context| {
            let written =
                if begun { self.poll_write_rest(context) } else { self.write_head(context, request, target) };
            begun = true;
            // A node may reject a request and close before it has read all of it. Its response takes precedence over
            // the write error.
            match (self.poll_head(context, &request.method), written) {
                (Poll::Pending | Poll::Ready(Err(_)), Err(error)) => Poll::Ready(Err(error.into())),
                (head, Err(_)) => {
                    self.abandon_write();
                    head
                }
                (head, Ok(())) => head,
            }
        });
        let head = head.await?;
        self.was_used = true;
        Ok(head)
    }

    /// Returns the next chunk of the response body, or `None` at its end.
    pub fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, TransportError>>> {
        if !self.response.early.is_empty() {
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.response.early))));
        }
        if !self.is_sent() && self.poll_write_rest(context).is_err() {
            self.abandon_write();
        }
        while !self.has_ended() {
            let answer = &mut self.response;
            let read = poll_read(&mut self.stream, context, |input| match input {
                [] => answer.framing.on_close().map(|()| Bytes::new()),
                input => answer.decode(input),
            });
            match ready!(read).map_err(TransportError::from).flatten() {
                Ok(data) if data.is_empty() => {}
                read => return Poll::Ready(Some(read)),
            }
        }
        Poll::Ready(None)
    }

    /// Writes the head with the beginning of the body in one call. The rest of a long body is written without a copy.
    fn write_head(
        &mut self,
        context: &mut Context<'_>,
        request: &UpstreamRequest,
        target: &Target,
    ) -> io::Result<()> {
        OUTPUT.with_borrow_mut(|output| {
            output.clear();
            request.write_head(target, output);
            let along = request.body.len().min(BUFFER_BYTES.saturating_sub(output.len()));
            output.extend_from_slice(&request.body[..along]);
            self.unflushed = true;
            let written = match Pin::new(&mut self.stream).poll_write(context, output) {
                Poll::Ready(written) => written?,
                Poll::Pending => 0,
            };
            self.unsent = [Bytes::copy_from_slice(&output[written..]), request.body.slice(along..)];
            Ok::<_, io::Error>(())
        })?;
        self.poll_write_rest(context)
    }

    /// Writes as much of the rest of the request as the node accepts.
    fn poll_write_rest(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        for part in &mut self.unsent {
            while !part.is_empty() {
                match Pin::new(&mut self.stream).poll_write(context, part) {
                    Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(written) => part.advance(written?),
                    Poll::Pending => return Ok(()),
                }
            }
        }
        if self.unflushed
            && let Poll::Ready(flushed) = Pin::new(&mut self.stream).poll_flush(context)
        {
            flushed?;
            self.unflushed = false;
        }
        Ok(())
    }

    fn is_sent(&self) -> bool {
        self.unsent.iter().all(Bytes::is_empty) && !self.unflushed
    }

    /// The response is already arriving, so only the reuse of the connection is lost.
    fn abandon_write(&mut self) {
        self.unsent = [Bytes::new(), Bytes::new()];
        self.unflushed = false;
        self.response.keep = false;
    }

    fn poll_head(
        &mut self,
        context: &mut Context<'_>,
        method: &Method,
    ) -> Poll<Result<ResponseHead, TransportError>> {
        let Self { stream, partial_head: partial, response: answer, .. } = self;
        loop {
            let read = poll_read(stream, context, |input| match input {
                [] if partial.is_empty() => Err(TransportError::Closed),
                [] => Err(TransportError::Truncated),
                input if partial.is_empty() => match response_head::parse_response_head(input, method)? {
                    Some((head, length)) => answer.begin(head, &input[length..]).map(Some),
                    None => {
                        partial.extend_from_slice(input);
                        Ok(None)
                    }
                },
                input => {
                    partial.extend_from_slice(input);
                    // A head that arrives in many small reads is parsed only when it can be complete.
                    if partial.len() < MAX_HEAD_BYTES && !may_end_head(&partial[..], input.len()) {
                        return Ok(None);
                    }
                    let Some((head, length)) = response_head::parse_response_head(partial, method)? else {
                        return Ok(None);
                    };
                    let head = answer.begin(head, &partial[length..])?;
                    *partial = Vec::new();
                    Ok(Some(head))
                }
            });
            if let Some(head) = ready!(read).map_err(TransportError::from).flatten().transpose() {
                return Poll::Ready(head);
            }
        }
    }
}

impl IncomingBody {
    /// Starts the body of a response; `input` was read with the head.
    fn begin(&mut self, head: ResponseHead, input: &[u8]) -> Result<ResponseHead, TransportError> {
        (self.framing, self.keep) = (head.framing, head.keep_alive);
        self.early = self.decode(input)?;
        Ok(head)
    }

    /// Returns the body data in `input`, in one buffer.
    fn decode(&mut self, mut input: &[u8]) -> Result<Bytes, TransportError> {
        let first = self.framing.next_data(&mut input)?;
        let mut next = self.framing.next_data(&mut input)?;
        let data = if next.is_empty() {
            Bytes::copy_from_slice(first)
        } else {
            let mut data = BytesMut::with_capacity(first.len() + next.len() + input.len());
            data.extend_from_slice(first);
            while !next.is_empty() {
                data.extend_from_slice(next);
                next = self.framing.next_data(&mut input)?;
            }
            data.freeze()
        };
        // Data after the response is unexpected, so the connection is not reused.
        self.keep &= input.is_empty();
        Ok(data)
    }
}

/// Reads once and calls `take` with the data, which is empty at the end of the stream.
fn poll_read<T>(
    stream: &mut NodeStream,
    context: &mut Context<'_>,
    take: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    INPUT.with_borrow_mut(|input| {
        let mut input = ReadBuf::new(input);
        ready!(Pin::new(stream).poll_read(context, &mut input))?;
        Poll::Ready(Ok(take(input.filled())))
    })
}

/// Returns whether an empty line may end within the last `new` bytes.
fn may_end_head(bytes: &[u8], new: usize) -> bool {
    let from = bytes.len().saturating_sub(new + 2);
    memchr::memchr_iter(b'\n', &bytes[from..])
        .any(|at| matches!(bytes[from + at + 1..], [b'\n', ..] | [b'\r', b'\n', ..]))
}
