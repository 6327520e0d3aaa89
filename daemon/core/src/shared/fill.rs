//! One blob of the shared tier: its directory, its segments, and who brings them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{At, BLOCK_BYTES, SharedError, SharedStore, make_dir};
use crate::fault;
use crate::store::StageKey;

/// One blob's directory, held open: what is done here is done in this very directory, whatever its name is by
/// now.
#[derive(Debug)]
pub struct Fill {
    dir: OwnedFd,
    /// Where it was opened.
    path: PathBuf,
    size: u64,
    segment_bytes: u64,
}

/// What of a blob is in the shared tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// It has its final name.
    pub sealed: bool,
    /// Its segments, in order.
    pub segments: Vec<SegmentView>,
}

/// What is known of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentView {
    /// Its bytes are here.
    pub here: bool,
    /// The last turn that was claimed and not let go.
    pub turn: Option<u32>,
}

impl View {
    /// Whether all of it is here.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.segments.iter().all(|segment| segment.here)
    }
}

impl SharedStore {
    /// Opens the directory of a blob of `size` bytes, and makes it if there is none.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn fill(&self, key: &StageKey, size: u64) -> Result<Fill, SharedError> {
        let path = self.blobs().join(key.to_string());
        make_dir(&path)?;
        fault::point("shared.begun");
        self.open_fill(path, size)
    }

    /// Opens the directory of a blob, if there is one.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn find(&self, key: &StageKey, size: u64) -> Result<Option<Fill>, SharedError> {
        match self.open_fill(self.blobs().join(key.to_string()), size) {
            Err(SharedError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            found => found.map(Some),
        }
    }

    pub(super) fn open_fill(&self, path: PathBuf, size: u64) -> Result<Fill, SharedError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let dir = nix::fcntl::open(&path, flags, Mode::empty()).at("open", &path)?;
        Ok(Fill {
            dir,
            path,
            size,
            segment_bytes: self.segment_bytes(),
        })
    }
}

/// The bytes of a blob in the making, open for writing.
#[derive(Debug)]
pub struct Part {
    file: File,
    path: PathBuf,
}

impl Part {
    /// Writes one block.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn write(&self, offset: u64, block: &[u8]) -> Result<(), SharedError> {
        self.file
            .write_all_at(block, offset)
            .at("write", &self.path)?;
        fault::point("shared.written");
        Ok(())
    }

    /// Waits until what was written is on disk.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn sync(&self) -> Result<(), SharedError> {
        self.file.sync_data().at("sync", &self.path)?;
        fault::point("shared.synced");
        Ok(())
    }
}

impl Fill {
    /// How many segments the blob has.
    #[must_use]
    pub fn segments(&self) -> usize {
        usize::try_from(self.size.div_ceil(self.segment_bytes)).expect("no file is that large")
    }

    /// How many bytes a segment has, unless it is the last.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// The bytes of a segment.
    #[must_use]
    pub fn range(&self, segment: usize) -> Range<u64> {
        let start = segment as u64 * self.segment_bytes;
        start..(start + self.segment_bytes).min(self.size)
    }

    /// The segment that byte `at` belongs to.
    #[must_use]
    pub fn segment_of(&self, at: u64) -> usize {
        usize::try_from(at / self.segment_bytes).expect("no file is that large")
    }

    /// The blocks of a segment, each with one checksum.
    pub fn blocks(&self, segment: usize) -> impl Iterator<Item = Range<u64>> + use<> {
        let Range { start, end } = self.range(segment);
        (0..(end - start).div_ceil(BLOCK_BYTES)).map(move |block| {
            let at = start + block * BLOCK_BYTES;
            at..(at + BLOCK_BYTES).min(end)
        })
    }

    /// Looks what is here and what is claimed.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn look(&self) -> Result<View, SharedError> {
        let mut view = View {
            sealed: false,
            segments: vec![SegmentView::default(); self.segments()],
        };
        for name in self.names()? {
            match name.split_once('.') {
                None if name == "blob" => view.sealed = true,
                Some((segment, "sums")) => {
                    if let Some(segment) = place(&mut view, segment) {
                        segment.here = true;
                    }
                }
                Some((segment, rest)) => {
                    let turn = rest
                        .strip_suffix(".claim")
                        .and_then(|turn| turn.parse().ok())
                        .filter(|turn| *turn <= LAST_TURN);
                    if let (Some(turn), Some(segment)) = (turn, place(&mut view, segment)) {
                        segment.turn = segment.turn.max(Some(turn));
                    }
                }
                None => {}
            }
        }
        Ok(view)
    }

    pub(super) fn names(&self) -> Result<Vec<String>, SharedError> {
        // A descriptor of its own: the place in a directory is part of what is open.
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let mut dir = Dir::openat(&self.dir, ".", flags, Mode::empty()).at("list", &self.path)?;
        let mut names = Vec::new();
        let most = MOST_NAMES + 8 * self.segments();
        for entry in dir.iter() {
            let entry = entry.at("list", &self.path)?;
            if names.len() >= most {
                return Err(io::Error::from(io::ErrorKind::InvalidData)).at("list", &self.path);
            }
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }

    /// Claims a turn of a segment; `None` if somebody else was faster, or it is here by now.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn claim(
        &self,
        segment: usize,
        turn: u32,
        owner: &str,
    ) -> Result<Option<SharedClaim>, SharedError> {
        if turn > LAST_TURN {
            return Err(io::Error::from(io::ErrorKind::InvalidData)).at("claim", &self.path);
        }
        let name = format!("{segment}.{turn}.claim");
        let file = match self.open(&name, OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            opened => opened.at("claim", &self.path.join(&name))?,
        };
        fault::point("shared.claimed");
        let claim = SharedClaim {
            name,
            owner: owner.to_owned(),
        };
        // A list of names is not a moment's picture: the last owner may have finished and let go meanwhile.
        let here = self.has(&format!("{segment}.sums"));
        let begun = here.at("look at", &self.path).and_then(|here| {
            self.beat_into(&claim, &file, 0)?;
            Ok(!here)
        });
        if !matches!(begun, Ok(true)) {
            // Nobody would work on it.
            self.release(&claim)?;
        }
        Ok(begun?.then_some(claim))
    }

    /// Says that the work on a claimed segment goes on: others see that the content has changed.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`], also if the claim was removed.
    pub fn beat(&self, claim: &SharedClaim, progress: u64) -> Result<(), SharedError> {
        // Opened each time: NFS shows others what was written when it is closed.
        let opened = self.open(&claim.name, OFlag::O_WRONLY);
        let file = opened.at("open", &self.path.join(&claim.name))?;
        self.beat_into(claim, &file, progress)
    }

    fn beat_into(
        &self,
        claim: &SharedClaim,
        mut file: &File,
        progress: u64,
    ) -> Result<(), SharedError> {
        let text = format!("{progress:020} {}\n", claim.owner);
        file.write_all(text.as_bytes())
            .at("write", &self.path.join(&claim.name))
    }

    /// What stands in a claim now; `None` if it was let go.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn read_claim(&self, segment: usize, turn: u32) -> Result<Option<String>, SharedError> {
        let name = format!("{segment}.{turn}.claim");
        self.read(&name).at("read", &self.path.join(&name))
    }

    /// Lets go of a claim.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn release(&self, claim: &SharedClaim) -> Result<(), SharedError> {
        let removed = self.remove(&claim.name);
        removed.at("remove", &self.path.join(&claim.name))
    }

    /// Opens the bytes for writing, and makes the file if there is none.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn part(&self) -> Result<Part, SharedError> {
        let path = self.path.join("part");
        let file = self.open("part", OFlag::O_CREAT | OFlag::O_RDWR);
        let file = file.at("make", &path)?;
        if file.metadata().at("look at", &path)?.len() != self.size {
            file.set_len(self.size).at("make room for", &path)?;
        }
        fault::point("shared.part");
        Ok(Part { file, path })
    }

    /// Opens the bytes for reading; `None` if there are none, or not as many as there should be.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn bytes(&self) -> Result<Option<File>, SharedError> {
        for name in ["blob", "part", "blob"] {
            match self.open(name, OFlag::O_RDONLY) {
                // It may get its final name between the two looks.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                opened => {
                    let file = opened.at("open", &self.path.join(name))?;
                    let found = file.metadata().at("look at", &self.path)?;
                    let good = found.is_file() && found.len() == self.size;
                    return Ok(good.then_some(file));
                }
            }
        }
        Ok(None)
    }

    /// The checksums of a segment that is here; `None` if it is not, or they make no sense.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn sums(&self, segment: usize) -> Result<Option<Sums>, SharedError> {
        let name = format!("{segment}.sums");
        let text = self.read(&name).at("read", &self.path.join(&name))?;
        let blocks = self.blocks(segment).count();
        let sums = text.and_then(|text| Sums::parse(&text));
        Ok(sums.filter(|sums| sums.0.len() == blocks))
    }

    /// Says that a segment is here: its bytes are on disk, and these are their checksums.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn finish(&self, segment: usize, sums: &Sums) -> Result<(), SharedError> {
        let name = format!("{segment}.sums");
        let temporary = format!("{name}.{}", uuid::Uuid::new_v4());
        let write = || {
            let mut file =
                self.open(&temporary, OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY)?;
            file.write_all(sums.to_string().as_bytes())?;
            file.sync_data()?;
            self.rename(&temporary, &name)
        };
        let written = write();
        if written.is_err() {
            let _ = self.remove(&temporary);
        }
        written.at("write", &self.path.join(&name))?;
        fault::point("shared.finished");
        Ok(())
    }

    /// Says that a segment is not here after all: its bytes do not have its checksums.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn strike(&self, segment: usize) -> Result<(), SharedError> {
        let name = format!("{segment}.sums");
        self.remove(&name).at("remove", &self.path.join(&name))
    }

    /// Gives the bytes their final name, if they do not have it yet.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn seal(&self) -> Result<(), SharedError> {
        match self.rename("part", "blob") {
            // Somebody else did.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed.at("name", &self.path.join("blob"))?,
        }
        fault::point("shared.sealed");
        Ok(())
    }

    /// Takes the blob's name away, if it still stands for this directory: the bytes are damaged. Whoever needs
    /// them next begins anew.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn set_aside(&self) -> Result<bool, SharedError> {
        if !self.is_named()? {
            return Ok(false);
        }
        let aside = aside_name(&self.path);
        match std::fs::rename(&self.path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            renamed => {
                renamed.at("set aside", &self.path)?;
                // Another node may have been faster, and another directory have the name since we looked.
                if !self.is_at(&aside)? {
                    let given_back = std::fs::rename(&aside, &self.path);
                    return given_back.map(|()| false).at("give back", &self.path);
                }
                fault::point("shared.set_aside");
                Ok(true)
            }
        }
    }

    /// Whether the blob's name still stands for this directory.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn is_named(&self) -> Result<bool, SharedError> {
        self.is_at(&self.path)
    }

    fn is_at(&self, path: &Path) -> Result<bool, SharedError> {
        let open = nix::sys::stat::fstat(&self.dir).at("look at", path)?;
        match std::fs::symlink_metadata(path) {
            Ok(named) => Ok(named.ino() == open.st_ino),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).at("look at", path),
        }
    }

    pub(super) fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn open(&self, name: &str, flags: OFlag) -> io::Result<File> {
        // A pipe that somebody put there would else be waited for, for ever.
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let mode = Mode::from_bits_truncate(0o644);
        let file = openat(&self.dir, name, flags, mode)?;
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty()))?;
        Ok(File::from(file))
    }

    fn has(&self, name: &str) -> io::Result<bool> {
        match fstatat(self.dir.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(nix::Error::ENOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// A small file's text; `None` if it is not there.
    pub(super) fn read(&self, name: &str) -> io::Result<Option<String>> {
        match self.open(name, OFlag::O_RDONLY) {
            Ok(file) => {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut io::Read::take(file, SMALL_BYTES), &mut bytes)?;
                Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.dir, from, &self.dir, to)?)
    }

    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(nix::Error::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Bytes that its files take on disk, and the newest change among them in seconds of the file system's
    /// time.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`].
    pub fn usage(&self) -> Result<(u64, i64), SharedError> {
        let (mut bytes, mut newest) = (0, 0);
        for name in self.names()? {
            match fstatat(
                self.dir.as_fd(),
                name.as_str(),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            ) {
                Ok(FileStat {
                    st_blocks,
                    st_ctime,
                    ..
                }) => {
                    if name != ".." && name != "." {
                        bytes += u64::try_from(st_blocks).unwrap_or(0) * 512;
                    }
                    if name != ".." {
                        newest = newest.max(st_ctime);
                    }
                }
                Err(nix::Error::ENOENT) => {}
                Err(errno) => return Err(errno).at("look at", &self.path.join(name)),
            }
        }
        Ok((bytes, newest))
    }
}

/// Names in a blob's directory, besides some for each segment. More are not ours.
const MOST_NAMES: usize = 10_000;

/// Turns of a claim. Nobody gets that far.
const LAST_TURN: u32 = 999_999;

/// The most that is read of a small file: the checksums of a 64 GiB segment are 288 KiB.
const SMALL_BYTES: u64 = 1 << 20;

fn place<'a>(view: &'a mut View, segment: &str) -> Option<&'a mut SegmentView> {
    view.segments.get_mut(segment.parse::<usize>().ok()?)
}

/// A name beside a blob's directory that nobody looks for.
pub(super) fn aside_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".aside.{}", uuid::Uuid::new_v4()));
    path.with_file_name(name)
}

/// A segment that this process has claimed.
#[derive(Debug, Clone)]
pub struct SharedClaim {
    name: String,
    owner: String,
}

/// CRC-32C of each block of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sums(Vec<u32>);

/// A block's bytes are not those that were written.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the block at byte {at} is damaged")]
pub struct BadBlock {
    /// Where it starts.
    pub at: u64,
}

impl Sums {
    /// Of `count` blocks, to be filled in.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self(vec![0; count])
    }

    /// The checksum of a block.
    #[must_use]
    pub fn of(block: &[u8]) -> u32 {
        let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, block);
        u32::try_from(sum).expect("a CRC-32 has 32 bits")
    }

    /// Notes the checksum of the segment's block number `index`.
    pub fn set(&mut self, index: usize, sum: u32) {
        self.0[index] = sum;
    }

    /// Checks the bytes of the segment's block number `index`, which starts at byte `at` of the file.
    ///
    /// # Errors
    ///
    /// [`BadBlock`].
    pub fn check(&self, index: usize, at: u64, block: &[u8]) -> Result<(), BadBlock> {
        match self.0.get(index) {
            Some(sum) if *sum == Self::of(block) => Ok(()),
            _ => Err(BadBlock { at }),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        // The last line says that nothing is cut off.
        let sums = text.strip_suffix("end\n")?;
        let sums = sums.lines().map(|line| u32::from_str_radix(line, 16).ok());
        sums.collect::<Option<_>>().map(Self)
    }
}

impl std::fmt::Display for Sums {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for sum in &self.0 {
            writeln!(f, "{sum:08x}")?;
        }
        writeln!(f, "end")
    }
}

/// Who was silent for how long, by the observer's own clock.
#[derive(Debug, Default)]
pub struct Silence {
    seen: HashMap<(usize, u32), (Option<String>, Duration)>,
}

impl Silence {
    /// Notes what stands in a claim at the time `now`; returns for how long it has not changed.
    pub fn observe(
        &mut self,
        segment: usize,
        turn: u32,
        content: Option<String>,
        now: Duration,
    ) -> Duration {
        let seen = self.seen.entry((segment, turn)).or_insert((None, now));
        if seen.0 != content {
            *seen = (content, now);
        }
        now.saturating_sub(seen.1)
    }
}
