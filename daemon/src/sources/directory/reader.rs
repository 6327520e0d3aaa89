//! The bytes of one file.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use nix::fcntl::OFlag;
use weightd_core::blocking;
use weightd_core::source::{ByteStream, SourceError};

use super::Place;
use super::walk::{Found, Mark};

/// Bytes read at once: 1 MiB.
const PIECE_BYTES: u64 = 1 << 20;

/// Reads `range` of the file that was found.
pub(super) async fn read(
    place: &Arc<Place>,
    found: Found,
    range: Range<u64>,
) -> Result<ByteStream, SourceError> {
    let place = Arc::clone(place);
    let file = blocking::run(move || Open::new(place, found)).await?;
    let file = Arc::new(file);
    let next = move |at: Option<u64>| {
        let file = Arc::clone(&file);
        let end = range.end;
        async move {
            let at = at.filter(|at| *at < end)?;
            let piece = at..end.min(at + PIECE_BYTES);
            let goes_on = piece.end;
            let bytes = blocking::run(move || file.piece(piece)).await;
            // After an error there is no place to go on, and the stream ends.
            let next = bytes.is_ok().then_some(goes_on);
            Some((bytes, next))
        }
    };
    Ok(stream::unfold(Some(range.start), next).boxed())
}

struct Open {
    place: Arc<Place>,
    found: Found,
    file: File,
}

impl Open {
    fn new(place: Arc<Place>, found: Found) -> Result<Self, SourceError> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => changed(&found, "it is gone"),
            _ => place.failed("open", &found.place, &error),
        };
        let mut options = OpenOptions::new();
        // A pipe that took the file's place would hold us up until somebody writes to it.
        options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
        let file = options.open(&found.place).map_err(failed)?;
        if place.allowed.is_some() {
            // What is open now, whatever the path led to before.
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            let real = fs::read_link(&link);
            let real = real.map_err(|error| place.failed("follow", Path::new(&link), &error))?;
            place.allow(&real)?;
        }
        let open = Self { place, found, file };
        open.check()?;
        Ok(open)
    }

    /// Is the file still the one that was found?
    fn check(&self) -> Result<(), SourceError> {
        let metadata = self.file.metadata();
        let metadata =
            metadata.map_err(|error| self.place.failed("look at", &self.found.place, &error))?;
        match metadata.is_file() && Mark::of(&metadata) == self.found.mark {
            true => Ok(()),
            false => Err(changed(
                &self.found,
                "it has another size or time than when it was listed",
            )),
        }
    }

    fn piece(&self, range: Range<u64>) -> Result<Bytes, SourceError> {
        let length = usize::try_from(range.end - range.start).expect("a piece fits into memory");
        let mut bytes = vec![0; length];
        let read = self.file.read_exact_at(&mut bytes, range.start);
        // Looked at after the read: what was written before it shows in the time.
        self.check()?;
        match read {
            Ok(()) => Ok(bytes.into()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(changed(
                &self.found,
                "it is shorter than when it was listed",
            )),
            Err(error) => Err(self.place.failed("read", &self.found.place, &error)),
        }
    }
}

fn changed(found: &Found, detail: &str) -> SourceError {
    SourceError::Changed {
        what: format!("`{}`", found.place.display()),
        detail: detail.to_owned(),
    }
}
