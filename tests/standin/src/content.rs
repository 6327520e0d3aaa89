//! What a file holds: bytes in memory, a file on disk, or a pattern of any size.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use http_body_util::combinators::BoxBody;
use hyper::body::{Frame, SizeHint};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

/// What the handlers answer with, before faults and counting.
pub(crate) type Body = BoxBody<Bytes, io::Error>;

/// Bytes handed to the socket at once: 512 KiB, past which loopback gets no faster.
const CHUNK_BYTES: u64 = 512 << 10;

/// Bytes after which a pattern repeats: 4 MiB.
const TILE_BYTES: usize = 4 << 20;

/// Content that needs no memory of its own size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Nothing but zeros.
    Zeros,
    /// Pseudo-random bytes from a seed, repeated every 4 MiB.
    Noise(u64),
}

impl Pattern {
    fn tile(self) -> Bytes {
        let mut tile = vec![0; TILE_BYTES];
        if let Self::Noise(seed) = self {
            fastrand::Rng::with_seed(seed).fill(&mut tile);
        }
        tile.into()
    }

    /// The sha256 of the first `size` bytes, in hex. Takes about half a second per GB.
    pub fn sha256(self, size: u64) -> String {
        sha256_of_tile(&self.tile(), size)
    }
}

fn sha256_of_tile(tile: &Bytes, size: u64) -> String {
    let mut hash = Sha256::new();
    let mut left = size;
    while left > 0 {
        let step = left.min(tile.len() as u64);
        hash.update(&tile[..step as usize]);
        left -= step;
    }
    hex::encode(hash.finalize())
}

/// The bytes of one file or object. Cloning is cheap.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Memory(Bytes),
    Disk { path: PathBuf, size: u64 },
    Tile { tile: Bytes, size: u64 },
}

impl Content {
    pub(crate) fn disk(path: &Path) -> io::Result<Self> {
        let size = std::fs::metadata(path)?.len();
        Ok(Self::Disk {
            path: path.to_path_buf(),
            size,
        })
    }

    pub(crate) fn pattern(pattern: Pattern, size: u64) -> Self {
        Self::Tile {
            tile: pattern.tile(),
            size,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Disk { size, .. } | Self::Tile { size, .. } => *size,
        }
    }

    pub(crate) fn sha256(&self) -> io::Result<String> {
        match self {
            Self::Memory(bytes) => Ok(hex::encode(Sha256::digest(bytes))),
            Self::Tile { tile, size } => Ok(sha256_of_tile(tile, *size)),
            Self::Disk { .. } => {
                let mut hash = Sha256::new();
                self.read_in_chunks(|chunk| hash.update(chunk))?;
                Ok(hex::encode(hash.finalize()))
            }
        }
    }

    /// Calls `each` with all the bytes, in order.
    pub(crate) fn read_in_chunks(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => each(bytes),
            Self::Tile { tile, size } => {
                let mut left = *size;
                while left > 0 {
                    let step = left.min(tile.len() as u64);
                    each(&tile[..step as usize]);
                    left -= step;
                }
            }
            Self::Disk { path, size } => {
                let file = File::open(path)?;
                let mut buffer = vec![0; CHUNK_BYTES as usize];
                let mut offset = 0;
                while offset < *size {
                    let step = (*size - offset).min(CHUNK_BYTES);
                    file.read_exact_at(&mut buffer[..step as usize], offset)?;
                    each(&buffer[..step as usize]);
                    offset += step;
                }
            }
        }
        Ok(())
    }

    /// The `length` bytes from `start`, which must lie within the content.
    pub(crate) fn body(&self, start: u64, length: u64) -> io::Result<Body> {
        let source = match self {
            Self::Memory(bytes) => {
                Source::Slice(bytes.slice(start as usize..(start + length) as usize))
            }
            Self::Tile { tile, .. } => Source::Tile {
                tile: tile.clone(),
                offset: start,
            },
            Self::Disk { path, .. } => Source::Disk(read_ahead(File::open(path)?, start, length)?),
        };
        Ok(ContentBody {
            source,
            left: length,
        }
        .boxed())
    }
}

/// Reads in a thread of its own, so that disk and socket work at the same time.
fn read_ahead(
    file: File,
    start: u64,
    length: u64,
) -> io::Result<mpsc::Receiver<io::Result<Bytes>>> {
    let (chunks, receiver) = mpsc::channel(4);
    std::thread::Builder::new()
        .name("standin-read".to_owned())
        .spawn(move || {
            let end = start + length;
            let mut offset = start;
            while offset < end {
                let step = (end - offset).min(CHUNK_BYTES);
                let mut buffer = BytesMut::zeroed(step as usize);
                let chunk = file
                    .read_exact_at(&mut buffer, offset)
                    .map(|()| buffer.freeze());
                let failed = chunk.is_err();
                // The receiver is gone when the client is: nobody wants the rest.
                if chunks.blocking_send(chunk).is_err() || failed {
                    return;
                }
                offset += step;
            }
        })?;
    Ok(receiver)
}

enum Source {
    Slice(Bytes),
    Tile { tile: Bytes, offset: u64 },
    Disk(mpsc::Receiver<io::Result<Bytes>>),
}

struct ContentBody {
    source: Source,
    left: u64,
}

impl hyper::body::Body for ContentBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        if this.left == 0 {
            return Poll::Ready(None);
        }
        let step = this.left.min(CHUNK_BYTES);
        let chunk = match &mut this.source {
            Source::Slice(bytes) => bytes.split_to(step as usize),
            Source::Tile { tile, offset } => {
                let start = (*offset % tile.len() as u64) as usize;
                let end = tile.len().min(start + step as usize);
                *offset += (end - start) as u64;
                tile.slice(start..end)
            }
            Source::Disk(receiver) => match ready!(receiver.poll_recv(context)) {
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
            },
        };
        this.left -= chunk.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// A body that is all there already.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    let bytes = bytes.into();
    let left = bytes.len() as u64;
    ContentBody {
        source: Source::Slice(bytes),
        left,
    }
    .boxed()
}
