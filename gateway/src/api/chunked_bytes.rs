//! A known body, handed on in pieces. hyper copies each piece into its one write buffer, which costs less than a list of slices
//! for the kernel to collect; pieces keep that buffer from growing to the size of the longest prompt and staying so.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// Size of a piece.
const CHUNK_BYTES: usize = 16 << 10;

/// A body of known bytes.
pub struct ChunkedBytes(pub Bytes);

impl ChunkedBytes {
    /// The next piece.
    pub fn next_chunk(&mut self) -> Option<Bytes> {
        let length = self.0.len().min(CHUNK_BYTES);
        (length > 0).then(|| self.0.split_to(length))
    }
}

impl Body for ChunkedBytes {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.next_chunk().map(|piece| Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }
}
