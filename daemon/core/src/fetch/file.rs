//! One missing file of a fetch: from its claim to its name.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::Instant;

use super::parts::{self, Origin, PartsError};
use super::progress::FileMeter;
use super::room::Reserved;
use super::seal::Sealer;
use super::share::Share;
use super::{FetchError, FileTurns, Job};
use crate::digest::{ClaimMismatch, Digest};
use crate::errors::Chain;
use crate::manifest::FileEntry;
use crate::source::RemoteFile;
use crate::store::{
    Checked, Claimed, HashError, Lease, Part, StageKey, Store, StoreError, Unsealed, Watch,
};

/// How often we look whether somebody else is done with the same bytes.
const LOOK: Duration = Duration::from_millis(100);

/// How often a file whose bytes prove wrong is fetched in all.
const WRONG_BYTES: u32 = 2;

/// How often it is brought with the help of the shared tier, if bytes from there were among them.
const WRONG_SHARED: u32 = 2;

/// How often a file is staged anew because the disk lost bytes of an earlier run.
const TORN: u32 = 3;

/// Links a file into the lease if its bytes are here.
pub(super) fn link_if_here(
    store: &Store,
    lease: &Lease,
    file: &RemoteFile,
) -> Result<Option<FileEntry>, StoreError> {
    let Some((digest, believed)) = store.digest_of(file)? else {
        return Ok(None);
    };
    let here = lease.add(digest, file.size, &file.path)?;
    Ok(here.then(|| FileEntry {
        believed,
        ..entry(file, digest)
    }))
}

fn entry(file: &RemoteFile, sha256: Digest) -> FileEntry {
    FileEntry {
        path: file.path.clone(),
        size: file.size,
        sha256,
        git_oid: file.claims.git_oid,
        xet_hash: file.xet_hash.clone(),
        believed: false,
    }
}

/// Of more little files than this each comes whole or not at all. With fewer, what a claim costs is nothing.
pub(super) const MANY: usize = 128;

/// Whether a file's bytes are hashed where they arrived: 128 KiB take less time than to hand them to another thread.
pub(super) fn is_little(file: &RemoteFile) -> bool {
    file.size <= 128 << 10
}

/// How work on a missing file begins.
enum Begun {
    /// Whoever had the claim before has sealed the bytes.
    Here(FileEntry),
    Mine(Arc<Part>),
    Theirs(Watch),
}

/// Claims a file's bytes and readies the file that they are written to. With `room`, it has its room from there.
fn begin(
    store: &Store,
    lease: &Lease,
    file: &RemoteFile,
    room: Option<&Arc<Reserved>>,
) -> Result<Begun, StoreError> {
    let claim = match store.claim(&StageKey::of(file))? {
        Claimed::Mine(claim) => claim,
        Claimed::Theirs(watch) => return Ok(Begun::Theirs(watch)),
    };
    // Looked up with the claim in hand: whoever had it before may have sealed the bytes.
    if let Some(entry) = link_if_here(store, lease, file)? {
        return Ok(Begun::Here(entry));
    }
    if let Some(room) = room {
        room.take(store, file);
    }
    claim.stage(store, file.size).map(Begun::Mine)
}

/// One missing file of a fetch.
pub(super) struct OneFile<'a> {
    pub(super) job: &'a Job,
    pub(super) origin: &'a Origin,
    pub(super) file: Arc<RemoteFile>,
    pub(super) lease: &'a Arc<Lease>,
    pub(super) room: &'a Arc<Reserved>,
    pub(super) sealer: &'a Sealer,
    pub(super) own: &'a FileTurns,
    /// It is one of many little files.
    pub(super) many: bool,
}

/// A file's turn, of its own fetch and of all together.
type Turns<'a> = (SemaphorePermit<'a>, SemaphorePermit<'a>);

/// What came of one try at a file.
enum Tried {
    Here(FileEntry),
    /// So many bytes of an earlier run.
    Torn(u64),
    Wrong(ClaimMismatch),
    /// Some of the bytes came from the shared tier, where they are set aside now.
    WrongShared(ClaimMismatch),
}

impl OneFile<'_> {
    /// Brings it, from wherever that works.
    pub(super) async fn fetch(self) -> Result<FileEntry, FetchError> {
        let meter = self.job.meter.file();
        let (mut wrong, mut torn, mut wrong_shared) = (0, 0, 0);
        loop {
            let first = wrong + torn + wrong_shared == 0;
            // After that alone: it must not go on like this.
            let alone = wrong > 0 || wrong_shared >= WRONG_SHARED;
            let tried = match self.comes_whole() {
                true => self.try_whole().await?,
                false => self.try_once(&meter, first, alone).await?,
            };
            match tried {
                Tried::Here(entry) => {
                    meter.set(entry.size);
                    return Ok(entry);
                }
                Tried::Torn(bytes) => {
                    torn += 1;
                    meter.lost(bytes);
                }
                Tried::WrongShared(source) => {
                    wrong_shared += 1;
                    meter.found(0);
                    tracing::warn!(path = %self.file.path, error = %Chain(&source), "wrong bytes, some of them from the shared tier");
                }
                Tried::Wrong(source) => {
                    wrong += 1;
                    meter.found(0);
                    self.origin.shared.metrics.mismatched(self.origin.scheme);
                    let path = self.file.path.clone();
                    tracing::warn!(%path, error = %Chain(&source), wrong, "wrong bytes, fetching the file again");
                    if wrong >= WRONG_BYTES {
                        let model = self.job.request.model.clone();
                        return Err(FetchError::Mismatch {
                            model,
                            path,
                            source,
                        });
                    }
                }
            }
            if torn >= TORN {
                let detail = "the disk keeps losing bytes that were written".to_owned();
                let source = std::io::Error::other(detail);
                let path = self.file.path.as_str().into();
                return Err(self.job.store_error(StoreError::Io {
                    op: "stage",
                    path,
                    source,
                }));
            }
        }
    }

    /// `first` says that the file has not taken its room yet, `alone` that the shared tier is not to help.
    async fn try_once(
        &self,
        meter: &FileMeter<'_>,
        first: bool,
        alone: bool,
    ) -> Result<Tried, FetchError> {
        let (part, turns) = loop {
            let own = self.own.acquire(self.file.size).await;
            let turn = self.origin.shared.turns.acquire(self.file.size).await;
            let room = Arc::clone(self.room);
            let begin = move |store: &Store, lease: &Lease, file: &RemoteFile| {
                begin(store, lease, file, first.then_some(&room))
            };
            match self.on_store(begin).await? {
                Begun::Here(entry) => {
                    meter.found(entry.size);
                    return Ok(Tried::Here(entry));
                }
                Begun::Mine(part) => break (part, (own, turn)),
                Begun::Theirs(watch) => {
                    // It hashes nothing, and what it waits for may take as long as its origin is away.
                    drop(turn);
                    self.follow(watch, meter).await?;
                }
            }
        };
        match first {
            true => meter.found(part.present()),
            // Some of it this fetch itself has brought.
            false => meter.set(part.present()),
        }
        let share = Share::open(self.origin.shared.tier.as_ref(), &self.file).await;
        self.download(part, share.as_ref(), alone, meter, turns)
            .await
    }

    async fn download(
        &self,
        part: Arc<Part>,
        share: Option<&Share>,
        alone: bool,
        meter: &FileMeter<'_>,
        turns: Turns<'_>,
    ) -> Result<Tried, FetchError> {
        let begun = Instant::now();
        let helped = share.filter(|_| !alone);
        let error = match parts::download(self.origin, &self.file, &part, meter, helped).await {
            Ok(digest) => {
                self.seal(Unsealed::Staged(Arc::clone(&part)), digest, begun, turns)
                    .await?;
                if let Some(share) = share {
                    share.finish(&part);
                }
                return Ok(Tried::Here(entry(&self.file, digest)));
            }
            Err(error) => error,
        };
        if let PartsError::Hash(HashError::Mismatch(_)) = error {
            self.on_store(move |_, _, _| part.discard()).await?;
        }
        match (self.failed(error)?, helped) {
            (Tried::Wrong(mismatch), Some(share)) if share.is_to_blame().await => {
                Ok(Tried::WrongShared(mismatch))
            }
            (tried, _) => Ok(tried),
        }
    }

    /// Whether it is held in memory until it has its name. The shared tier takes its bytes from the disk.
    fn comes_whole(&self) -> bool {
        self.many && is_little(&self.file) && self.origin.shared.tier.is_none()
    }

    /// Nobody claims these bytes: to bring the files that another process is just at twice costs less than to ask for each
    /// of all who brings it, and to begin anew less than to note what is here.
    async fn try_whole(&self) -> Result<Tried, FetchError> {
        let own = self.own.acquire(self.file.size).await;
        let turn = self.origin.shared.turns.acquire(self.file.size).await;
        let begun = Instant::now();
        match parts::gather(self.origin, &self.file).await {
            Ok((bytes, digest)) => {
                self.seal(Unsealed::InMemory(bytes), digest, begun, (own, turn))
                    .await?;
                Ok(Tried::Here(entry(&self.file, digest)))
            }
            Err(error) => self.failed(error),
        }
    }

    /// What to do about bytes that did not come.
    #[allow(
        clippy::result_large_err,
        reason = "as all futures of a fetch return it"
    )]
    fn failed(&self, error: PartsError) -> Result<Tried, FetchError> {
        let error = match error {
            PartsError::Hash(error) => error,
            PartsError::Source(error) => return Err(self.job.source_error(error)),
        };
        match error {
            HashError::Torn { bytes } => {
                tracing::warn!(path = %self.file.path, bytes, "bytes of an earlier run are damaged, fetching them again");
                Ok(Tried::Torn(bytes))
            }
            HashError::Mismatch(mismatch) => Ok(Tried::Wrong(mismatch)),
            HashError::Store(error) => Err(self.job.store_error(error)),
            HashError::Closed => Err(self.job.stopped()),
        }
    }

    /// Gives bytes their name that came since `begun`.
    async fn seal(
        &self,
        bytes: Unsealed,
        digest: Digest,
        begun: Instant,
        turns: Turns<'_>,
    ) -> Result<(), FetchError> {
        let hashed = Instant::now();
        let checked = Checked {
            bytes,
            digest,
            file: Arc::clone(&self.file),
        };
        let sealed = match self.origin.shared.limits.is_small(self.file.size) {
            true => {
                let place = self.sealer.place(&checked).await;
                // Others may come meanwhile: the more wait to be sealed together, the less each costs.
                drop(turns);
                self.sealer.together(checked, place).await
            }
            false => self.sealer.alone(checked).await,
        };
        sealed.map_err(|error| self.job.store_error(error))?;
        let (path, bytes) = (&self.file.path, self.file.size);
        let hashed_s = (hashed - begun).as_secs_f64();
        let sealed_s = hashed.elapsed().as_secs_f64();
        tracing::debug!(%path, bytes, %digest, hashed_s, sealed_s, "blob sealed");
        Ok(())
    }

    /// Waits while somebody else works on the same bytes.
    async fn follow(&self, watch: Watch, meter: &FileMeter<'_>) -> Result<(), FetchError> {
        let _waits = self.job.meter.waits().others();
        let watch = Arc::new(watch);
        loop {
            tokio::time::sleep(LOOK).await;
            let look = Arc::clone(&watch);
            let (over, bytes) = self
                .on_store(move |_, _, _| Ok((look.over()?, look.bytes())))
                .await?;
            if over {
                return Ok(());
            }
            meter.set(bytes.min(self.file.size));
        }
    }

    async fn on_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store, &Lease, &RemoteFile) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, FetchError> {
        let (lease, file) = (Arc::clone(self.lease), Arc::clone(&self.file));
        let store = &self.origin.shared.store;
        self.job
            .on_store(store, move |store| work(store, &lease, &file))
            .await
    }
}
