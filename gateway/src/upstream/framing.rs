//! Framing of response bodies (RFC 9112, sections 6 and 7): by length, in chunks, or until the connection closes.
//! Returns slices of the input without a copy.

use super::error::TransportError;

/// Largest number of bytes of all chunk extensions and trailers of a body. Their content is discarded.
const MAX_EXTRA_BYTES: u32 = 16 << 10;

/// State of a body that is being received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFraming {
    /// Number of bytes left; 0 at the end.
    Length(u64),
    /// Chunked transfer coding: position, and bytes of extensions and trailers so far.
    Chunked(ChunkState, u32),
    /// All data until the connection closes.
    Close,
}

/// Position in a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkState {
    /// A digit of a chunk size.
    Size {
        /// Value of the digits so far.
        size: u64,
        /// Whether there was a digit.
        begun: bool,
    },
    /// A chunk extension; with the chunk size.
    Extension(u64),
    /// The LF after a chunk size; with the chunk size.
    SizeEnd(u64),
    /// Chunk data; with the number of bytes left.
    Data(u64),
    /// The CR after chunk data.
    DataCr,
    /// The LF after chunk data.
    DataLf,
    /// The beginning of a trailer line, or of the empty line that ends the body.
    Trailer,
    /// The rest of a trailer line.
    TrailerRest,
    /// The LF that ends the body.
    TrailerEnd,
}

impl BodyFraming {
    /// The start of a chunked body.
    pub const CHUNKED: Self = Self::Chunked(ChunkState::Size { size: 0, begun: false }, 0);
    /// The end of a body.
    pub const ENDED: Self = Self::Length(0);

    /// Returns whether the body has ended.
    pub fn has_ended(&self) -> bool {
        *self == Self::ENDED
    }

    /// Smallest number of bytes that are left.
    pub fn lower_bound(&self) -> u64 {
        match *self {
            Self::Length(left) | Self::Chunked(ChunkState::Data(left), _) => left,
            Self::Chunked(..) | Self::Close => 0,
        }
    }

    /// Removes the next part of the body from `input` and returns it. An empty result means that `input` is consumed or
    /// the body has ended. Returns [`TransportError::Protocol`] for invalid chunks.
    pub fn next_data<'a>(&mut self, input: &mut &'a [u8]) -> Result<&'a [u8], TransportError> {
        match self {
            Self::Close => Ok(std::mem::take(input)),
            Self::Length(left) => Ok(split_prefix(input, left)),
            Self::Chunked(chunk, extra) => {
                while !input.is_empty() {
                    if let ChunkState::Data(left) = chunk {
                        let piece = split_prefix(input, left);
                        if *left == 0 {
                            *chunk = ChunkState::DataCr;
                        }
                        return Ok(piece);
                    }
                    let (byte, rest) = (input[0], &input[1..]);
                    *input = rest;
                    if matches!(
                        chunk,
                        ChunkState::Extension(_) | ChunkState::Trailer | ChunkState::TrailerRest
                    ) {
                        *extra += 1;
                        if *extra > MAX_EXTRA_BYTES {
                            return Err(TransportError::InvalidResponse("its chunks carry too much else"));
                        }
                    }
                    let Some(next) = chunk.next(byte).map_err(TransportError::InvalidResponse)? else {
                        *self = Self::ENDED;
                        break;
                    };
                    *chunk = next;
                }
                Ok(&[])
            }
        }
    }

    /// Handles the end of the connection. Returns [`TransportError::Truncated`] unless the body has ended with it.
    pub fn on_close(&mut self) -> Result<(), TransportError> {
        match self {
            Self::Close => {
                *self = Self::ENDED;
                Ok(())
            }
            ended if ended.has_ended() => Ok(()),
            _ => Err(TransportError::Truncated),
        }
    }
}

/// Removes at most `left` bytes from `input`, and subtracts their number from `left`.
fn split_prefix<'a>(input: &mut &'a [u8], left: &mut u64) -> &'a [u8] {
    let count = input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
    let (piece, rest) = input.split_at(count);
    *left -= count as u64;
    *input = rest;
    piece
}

impl ChunkState {
    /// Returns the position after `byte`, or `None` at the end of the body.
    fn next(self, byte: u8) -> Result<Option<Self>, &'static str> {
        Ok(Some(match (self, byte) {
            (Self::Size { size, .. }, digit) if digit.is_ascii_hexdigit() => {
                let value = (digit as char).to_digit(16).unwrap_or_default();
                let size = size.checked_mul(16).ok_or("a chunk's size is too large")? + u64::from(value);
                Self::Size { size, begun: true }
            }
            (Self::Size { size, begun: true }, b';' | b' ' | b'\t') => Self::Extension(size),
            (Self::Size { size, begun: true } | Self::Extension(size), b'\r') => Self::SizeEnd(size),
            (Self::Size { .. }, _) => return Err("a chunk's size is not a number"),
            (Self::Extension(_), b'\n') => return Err("a chunk's first line ends without CR"),
            (Self::Extension(size), _) => Self::Extension(size),
            (Self::SizeEnd(0), b'\n') => Self::Trailer,
            (Self::SizeEnd(size), b'\n') => Self::Data(size),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { size: 0, begun: false },
            (Self::Trailer, b'\r') => Self::TrailerEnd,
            (Self::Trailer | Self::TrailerRest, b'\n') => Self::Trailer,
            (Self::Trailer | Self::TrailerRest, _) => Self::TrailerRest,
            (Self::TrailerEnd, b'\n') => return Ok(None),
            (Self::SizeEnd(_) | Self::Data(_) | Self::DataCr | Self::DataLf | Self::TrailerEnd, _) => {
                return Err("a chunk does not end where it should");
            }
        }))
    }
}
