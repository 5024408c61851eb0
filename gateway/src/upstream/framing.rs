//! Where the body of a node's answer ends (RFC 9112, sections 6 and 7): after so many bytes, after its last chunk, or with the
//! connection. Copies nothing: it points at the pieces of a body within what was read.

use super::error::TransportError;

/// Most bytes of chunk extensions and trailers together, which are read and left out.
const EXTRA_BYTES: u32 = 16 << 10;

/// How much of a body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// So many bytes; none: it has ended.
    Length(u64),
    /// Chunks, and what was read of the next one.
    Chunked(Chunk, u32),
    /// All until the connection is closed.
    Close,
}

/// What comes next of a chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// A digit of a chunk's size, the first or a further one.
    Size {
        /// Read so far.
        size: u64,
        /// Whether a digit was read.
        begun: bool,
    },
    /// The rest of a chunk's first line.
    Extension(u64),
    /// The LF behind it.
    SizeEnd(u64),
    /// So many bytes of a chunk.
    Data(u64),
    /// The CR behind a chunk.
    DataCr,
    /// The LF behind a chunk.
    DataLf,
    /// The first byte of a trailer's line, or of the empty one that ends the body.
    Trailer,
    /// The rest of a trailer's line.
    TrailerRest,
    /// The LF that ends the body.
    TrailerEnd,
}

impl Framing {
    /// A chunked body that begins.
    pub const CHUNKED: Self = Self::Chunked(Chunk::Size { size: 0, begun: false }, 0);
    /// A body that has ended.
    pub const ENDED: Self = Self::Length(0);

    /// Whether nothing follows.
    pub fn ended(&self) -> bool {
        *self == Self::ENDED
    }

    /// Bytes that follow at least.
    pub fn lower_bound(&self) -> u64 {
        match *self {
            Self::Length(left) | Self::Chunked(Chunk::Data(left), _) => left,
            Self::Chunked(..) | Self::Close => 0,
        }
    }

    /// Takes the next piece of the body off `input`: an empty one when all of `input` is used up or the body has ended.
    pub fn piece<'a>(&mut self, input: &mut &'a [u8]) -> Result<&'a [u8], TransportError> {
        match self {
            Self::Close => Ok(std::mem::take(input)),
            Self::Length(left) => Ok(take(input, left)),
            Self::Chunked(chunk, extra) => {
                while !input.is_empty() {
                    if let Chunk::Data(left) = chunk {
                        let piece = take(input, left);
                        if *left == 0 {
                            *chunk = Chunk::DataCr;
                        }
                        return Ok(piece);
                    }
                    let (byte, rest) = (input[0], &input[1..]);
                    *input = rest;
                    if matches!(chunk, Chunk::Extension(_) | Chunk::Trailer | Chunk::TrailerRest) {
                        *extra += 1;
                        if *extra > EXTRA_BYTES {
                            return Err(TransportError::Protocol("its chunks carry too much else"));
                        }
                    }
                    let Some(next) = chunk.next(byte).map_err(TransportError::Protocol)? else {
                        *self = Self::ENDED;
                        break;
                    };
                    *chunk = next;
                }
                Ok(&[])
            }
        }
    }

    /// The node has closed the connection.
    pub fn closed(&mut self) -> Result<(), TransportError> {
        match self {
            Self::Close => {
                *self = Self::ENDED;
                Ok(())
            }
            ended if ended.ended() => Ok(()),
            _ => Err(TransportError::Truncated),
        }
    }
}

/// At most `left` bytes off `input`.
fn take<'a>(input: &mut &'a [u8], left: &mut u64) -> &'a [u8] {
    let count = input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
    let (piece, rest) = input.split_at(count);
    *left -= count as u64;
    *input = rest;
    piece
}

impl Chunk {
    /// What follows `byte`; nothing after the end of the body.
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
