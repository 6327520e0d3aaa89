//! Bringing the bytes of the files: linked or copied, hashed, and named.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use nix::fcntl::{AtFlags, OFlag};
use nix::unistd::linkat;

use super::{Job, cache, key};
use crate::digest::{ClaimMismatch, Claims, Digest, GitOid, Verifier};
use crate::fault;
use crate::shared::{At, BLOCK_BYTES, Fill, SharedError, SharedStore, Sums};

/// Files hashed at once, at most: each takes a block's bytes of memory.
const WORKERS: usize = 8;

/// How a file came into the shared tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    Present,
    Linked,
    Copied,
    /// There is nothing to bring of an empty file.
    Empty,
}

#[derive(Debug, Clone)]
pub(super) struct Sound {
    pub(super) sha256: Digest,
    pub(super) key: Option<String>,
    pub(super) how: How,
}

/// A file's fate. `Err` says what is wrong with its bytes.
pub(super) type Fate = Result<Sound, String>;

/// Why one file was not brought.
enum Failure {
    /// Its bytes are wrong, or cannot be read.
    Damaged(String),
    Shared(SharedError),
}

impl From<SharedError> for Failure {
    fn from(error: SharedError) -> Self {
        Self::Shared(error)
    }
}

impl From<ClaimMismatch> for Failure {
    fn from(error: ClaimMismatch) -> Self {
        Self::Damaged(
            error
                .to_string()
                .replace("the source claims", "the cache says"),
        )
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Damaged(format!("it cannot be read: {error}"))
    }
}

/// Files on their way into the shared tier.
pub(super) struct Bringing<'a> {
    store: &'a SharedStore,
    jobs: &'a [Job<'a>],
    copy: bool,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    hashed: AtomicU64,
    bytes: u64,
    next: AtomicUsize,
    /// Jobs by size: who begins with the largest does not wait for it in the end.
    order: Vec<usize>,
    fates: Mutex<Vec<Option<Fate>>>,
    failed: Mutex<Option<SharedError>>,
}

impl<'a> Bringing<'a> {
    pub(super) fn new(
        store: &'a SharedStore,
        jobs: &'a [Job<'a>],
        copy: bool,
        progress: &'a (dyn Fn(u64, u64) + Sync),
    ) -> Self {
        let mut order: Vec<usize> = (0..jobs.len()).collect();
        order.sort_by_key(|job| std::cmp::Reverse(jobs[*job].size));
        let missing = jobs.iter().filter(|job| job.present.is_none());
        Self {
            store,
            jobs,
            copy,
            progress,
            hashed: AtomicU64::new(0),
            bytes: missing.map(|job| job.size).sum(),
            next: AtomicUsize::new(0),
            order,
            fates: Mutex::new(vec![None; jobs.len()]),
            failed: Mutex::new(None),
        }
    }

    pub(super) fn run(self) -> Result<Vec<Fate>, SharedError> {
        (self.progress)(0, self.bytes);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let workers = cores.min(WORKERS).min(self.jobs.len());
        thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| self.work());
            }
        });
        if let Some(error) = self.failed.into_inner().expect("no holder panics") {
            return Err(error);
        }
        let fates = self.fates.into_inner().expect("no holder panics");
        let fates = fates.into_iter().flatten().collect::<Vec<_>>();
        assert_eq!(fates.len(), self.jobs.len(), "each job has its fate");
        Ok(fates)
    }

    fn work(&self) {
        let mut buffer = vec![0; usize::try_from(BLOCK_BYTES).expect("a block fits in memory")];
        while let Some(job) = self.order.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let fate = match self.bring(&self.jobs[*job], &mut buffer) {
                Ok(sound) => Ok(sound),
                Err(Failure::Damaged(why)) => Err(why),
                Err(Failure::Shared(error)) => {
                    // The others end after the file that they are at.
                    self.next.store(self.jobs.len(), Ordering::Relaxed);
                    *self.failed.lock().expect("no holder panics") = Some(error);
                    return;
                }
            };
            self.fates.lock().expect("no holder panics")[*job] = Some(fate);
        }
    }

    fn bring(&self, job: &Job<'_>, buffer: &mut [u8]) -> Result<Sound, Failure> {
        if let (Some(sha256), Some(key)) = (job.present, job.key()) {
            return Ok(Sound {
                sha256,
                key: Some(key.to_string()),
                how: How::Present,
            });
        }
        let mut claims = job.claims;
        if claims.sha256.is_none() && claims.git_oid.is_none() {
            claims = self.guess(job, buffer)?;
        }
        let Some(key) = key(job.size, &claims) else {
            let sha256 = Verifier::new(0, claims).finish()?;
            return Ok(Sound {
                sha256,
                key: None,
                how: How::Empty,
            });
        };
        let fill = self.store.fill(&key, job.size)?;
        let temporary = format!("blob.{}", uuid::Uuid::new_v4());
        let brought = match claims.sha256 {
            // Another file of the same bytes was faster.
            Some(digest) if is_whole(&fill)? => Ok((digest, How::Present)),
            _ => self.bring_into(&fill, &temporary, job, claims, buffer),
        };
        if brought.is_err() {
            let _ = fill.remove(&temporary);
        }
        let (sha256, how) = brought?;
        Ok(Sound {
            sha256,
            key: Some(key.to_string()),
            how,
        })
    }

    fn bring_into(
        &self,
        fill: &Fill,
        temporary: &str,
        job: &Job<'_>,
        claims: Claims,
        buffer: &mut [u8],
    ) -> Result<(Digest, How), Failure> {
        let blocks = (0..fill.segments()).flat_map(|segment| fill.blocks(segment));
        let mut hashing = Hashing::new(job.size, claims, buffer, self);
        let how = if !self.copy && link(job, fill, temporary)? {
            // What was linked is hashed, whatever has its old name by now.
            let file = fill.open(temporary, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
            hashing.read(&file, blocks, None)?;
            file.sync_data()?;
            How::Linked
        } else {
            let from = cache::open_file(&job.from.dir, &job.path)?;
            let new = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY;
            let to = fill.open(temporary, new);
            let to = to.at("make a file in", fill.path())?;
            hashing.read(&from, blocks, Some((&to, fill.path())))?;
            to.sync_data().at("sync a file in", fill.path())?;
            How::Copied
        };
        let (sha256, sums) = hashing.finish()?;
        fault::point("shared.import.linked");
        if is_whole(fill)? {
            // Another node was faster.
            let removed = fill.remove(temporary);
            removed.at("remove a file in", fill.path())?;
            return Ok((sha256, How::Present));
        }
        let named = fill.rename(temporary, "blob");
        named.at("name a file in", fill.path())?;
        // A rename between two links to the same file does nothing: an import that died had named it.
        let removed = fill.remove(temporary);
        removed.at("remove a file in", fill.path())?;
        // Who still writes to it gives no unfinished bytes the name again.
        let removed = fill.remove("part");
        removed.at("remove a file in", fill.path())?;
        fault::point("shared.import.named");
        finish(fill, sums)?;
        Ok((sha256, how))
    }

    /// What the Hub would probably say of a file that the cache has no hash of. If it says otherwise, nobody
    /// looks for the blob that this one becomes.
    fn guess(&self, job: &Job<'_>, buffer: &mut [u8]) -> Result<Claims, Failure> {
        let mut file = cache::open_file(&job.from.dir, &job.path)?;
        let mut claims = Claims::default();
        // Source: the Hub's documentation, "Getting started with repositories": git takes no file of more than
        // 10 MB; and the `.gitattributes` that it makes for a new repository.
        if job.size > 10_000_000
            || [".safetensors", ".model"]
                .iter()
                .any(|end| job.path.ends_with(end))
        {
            let mut hashing = Hashing::new(job.size, claims, buffer, self);
            hashing.read(&file, whole(job.size), None)?;
            claims.sha256 = Some(hashing.finish()?.0);
        } else {
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut io::Read::take(&mut file, job.size), &mut bytes)?;
            claims.git_oid = Some(GitOid::of(&bytes));
        }
        Ok(claims)
    }

    fn hashed(&self, bytes: u64) {
        let hashed = self.hashed.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // A file without a hash in the cache is read twice.
        (self.progress)(hashed.min(self.bytes), self.bytes);
    }
}

fn whole(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size.div_ceil(BLOCK_BYTES)).map(move |block| {
        let start = block * BLOCK_BYTES;
        start..(start + BLOCK_BYTES).min(size)
    })
}

/// Says that all segments of a blob are here; `sums` are those of its blocks.
fn finish(fill: &Fill, sums: Vec<u32>) -> Result<(), SharedError> {
    let mut sums = sums.into_iter();
    for segment in 0..fill.segments() {
        let mut of_segment = Sums::new(fill.blocks(segment).count());
        for (index, sum) in { fill.blocks(segment) }
            .zip(&mut sums)
            .map(|(_, sum)| sum)
            .enumerate()
        {
            of_segment.set(index, sum);
        }
        fill.finish(segment, &of_segment)?;
    }
    Ok(())
}

/// One file being read, hashed, and perhaps copied.
struct Hashing<'a> {
    size: u64,
    verifier: Verifier,
    sums: Vec<u32>,
    buffer: &'a mut [u8],
    progress: &'a Bringing<'a>,
}

impl<'a> Hashing<'a> {
    fn new(size: u64, claims: Claims, buffer: &'a mut [u8], progress: &'a Bringing<'a>) -> Self {
        Self {
            size,
            verifier: Verifier::new(size, claims),
            sums: Vec::new(),
            buffer,
            progress,
        }
    }

    fn read(
        &mut self,
        file: &File,
        blocks: impl Iterator<Item = Range<u64>>,
        to: Option<(&File, &Path)>,
    ) -> Result<(), Failure> {
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() != self.size {
            return Err(Failure::Damaged("it changes while it is read".to_owned()));
        }
        for Range { start, end } in blocks {
            let bytes = usize::try_from(end - start).expect("a block fits in memory");
            let block = &mut self.buffer[..bytes];
            file.read_exact_at(block, start)?;
            self.verifier.update(block);
            self.sums.push(Sums::of(block));
            if let Some((copy, path)) = to {
                copy.write_all_at(block, start)
                    .at("write a file in", path)?;
            }
            self.progress.hashed(end - start);
        }
        Ok(())
    }

    /// The digest, and the checksums of the blocks.
    fn finish(self) -> Result<(Digest, Vec<u32>), ClaimMismatch> {
        Ok((self.verifier.finish()?, self.sums))
    }
}

/// Links a file of the cache into a blob's directory. False if it has to be copied.
fn link(job: &Job<'_>, fill: &Fill, name: &str) -> Result<bool, Failure> {
    use nix::errno::Errno::{EACCES, EMLINK, ENOENT, EOPNOTSUPP, EPERM, EXDEV};
    let (folder, from) = cache::open_folder(&job.from.dir, &job.path)?;
    if cache::open_file(&folder, from)?.metadata()?.mode() & 0o444 != 0o444 {
        return Ok(false);
    }
    match linkat(&folder, from, fill.dir(), name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(EXDEV | EMLINK | EPERM | EACCES | EOPNOTSUPP) => Ok(false),
        Err(ENOENT) => Err(Failure::Damaged("it is gone".to_owned())),
        Err(errno) => Ok(Err(errno).at("link a file into", fill.path())?),
    }
}

/// Whether a blob has its name, and all its segments.
pub(super) fn is_whole(fill: &Fill) -> Result<bool, SharedError> {
    let view = fill.look()?;
    Ok(view.sealed && view.is_whole() && fill.bytes()?.is_some())
}
