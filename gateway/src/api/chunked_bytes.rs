//! A response body of known bytes, sent in chunks. hyper copies each chunk into its one write buffer, which is cheaper
//! than a vectored write of many slices. The chunk size bounds that buffer; otherwise it would grow to the longest
//! prompt and keep that size.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// Largest size of a chunk, in bytes.
const CHUNK_BYTES: usize = 16 << 10;

/// A body of known bytes. Implements [`Body`] without copying the bytes.
pub struct ChunkedBytes(pub Bytes);

impl ChunkedBytes {
    /// Returns the next chunk, of at most 16 KiB, or `None` at the end.
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
