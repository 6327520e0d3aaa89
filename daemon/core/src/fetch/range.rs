//! One range of one file: read over as many connections as that takes, gathered, written.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use tokio::time::Instant;

use super::Shared;
use super::pace::Gait;
use super::parts::{Origin, PartsError};
use super::patience::{Patience, pause};
use super::width::Place;
use crate::blocking;
use crate::buffers::Buffer;
use crate::metrics::Metrics;
use crate::source::{RemoteFile, SourceError};
use crate::store::{Part, StoreError};

/// Connections of a range that are replaced for crawling, one after the other.
const CRAWLS: u32 = 2;

/// Where bytes go that arrive.
pub(super) enum Sink {
    Part(Arc<Part>),
    Memory(Vec<u8>),
}

/// One range of one file, read over one connection at a time.
pub(super) struct Ranged {
    origin: Origin,
    file: Arc<RemoteFile>,
    pub(super) sink: Sink,
    range: Range<u64>,
    /// The first byte that is not in the sink.
    at: u64,
    /// The origin serves the file only from its first byte on: what is here is read and dropped.
    pub(super) from_start: bool,
    /// Connections in a row that were replaced for crawling.
    crawls: u32,
}

/// Why one connection ended before its range did.
enum Ended {
    Source(SourceError),
    Cut,
    Stalled,
    Slow,
    Disk(StoreError),
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        Self::Disk(error)
    }
}

impl Ranged {
    pub(super) fn new(
        origin: &Origin,
        file: &Arc<RemoteFile>,
        part: &Arc<Part>,
        range: Range<u64>,
    ) -> Self {
        Self::of(origin, file, Sink::Part(Arc::clone(part)), range)
    }

    pub(super) fn of(
        origin: &Origin,
        file: &Arc<RemoteFile>,
        sink: Sink,
        range: Range<u64>,
    ) -> Self {
        let at = range.start;
        let (origin, file) = (origin.clone(), Arc::clone(file));
        Self {
            origin,
            file,
            sink,
            range,
            at,
            from_start: false,
            crawls: 0,
        }
    }

    /// Reads the range to its end, over as many connections as that takes.
    pub(super) async fn fetch(mut self, first: Connection) -> Result<(), PartsError> {
        self.bring(first).await
    }

    /// As [`Ranged::fetch`] does, for whoever wants its sink then.
    pub(super) async fn bring(&mut self, first: Connection) -> Result<(), PartsError> {
        let shared = Arc::clone(&self.origin.shared);
        let _under_way = shared.tier.as_ref().map(|tier| tier.rates().origin.begin());
        let mut connection = Some(first);
        let mut patience = Patience::new(self.at);
        while self.at < self.range.end {
            let connected = match connection.take() {
                Some(connected) => connected,
                None => Connection::new(&self.origin.shared).await,
            };
            let Err(ended) = self.read_on().await else {
                continue;
            };
            // Others may use it while this range pauses.
            drop(connected);
            self.pause(ended, &mut patience).await?;
        }
        if let Sink::Part(part) = &self.sink
            && !self.origin.shared.limits.is_small(self.file.size)
        {
            let (part, range) = (Arc::clone(part), self.range.clone());
            blocking::run(move || part.start_write_back(range)).await;
        }
        Ok(())
    }

    /// Waits before the next connection, unless there should be none.
    async fn pause(&self, ended: Ended, patience: &mut Patience) -> Result<(), PartsError> {
        let Origin { shared, meter, .. } = &self.origin;
        let failures = patience.failed(self.at, &shared.limits);
        let (reason, retry_after, error) = self.explain(ended)?;
        let pause = match reason {
            "slow" | "stalled" => Some(Duration::ZERO),
            _ => pause(failures, retry_after),
        };
        // An origin that has sent nothing at all may be gone for good. One that has comes back.
        let out = patience.is_out(&shared.limits, meter.bytes_fetched() > 0);
        let Some(pause) = pause.filter(|_| !out) else {
            return Err(error.into());
        };
        shared.metrics.retried(self.origin.scheme, reason);
        let path = &self.file.path;
        tracing::debug!(%path, offset = self.at, reason, failures, %error, "range broke off, reading on");
        meter.waits().paused(&error, pause);
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// What to count, how long to wait, and the error if it goes on like that; or the error at once if
    /// a retry is no use.
    fn explain(
        &self,
        ended: Ended,
    ) -> Result<(&'static str, Option<Duration>, SourceError), PartsError> {
        let unavailable = |detail: String| SourceError::Unavailable {
            what: self.file.path.to_string(),
            detail,
            retry_after: None,
        };
        Ok(match ended {
            Ended::Disk(error) => return Err(error.into()),
            Ended::Source(error) => match error {
                SourceError::Unavailable { retry_after, .. } => {
                    self.origin.shared.width.pushed_back();
                    ("unavailable", retry_after, error)
                }
                _ => return Err(error.into()),
            },
            Ended::Cut => (
                "cut",
                None,
                unavailable("the connection ended early, again and again".to_owned()),
            ),
            Ended::Stalled => {
                let seconds = self.origin.shared.limits.stall_timeout.as_secs();
                (
                    "stalled",
                    None,
                    unavailable(format!("nothing arrived for {seconds} s, again and again")),
                )
            }
            Ended::Slow => (
                "slow",
                None,
                unavailable("its connections crawl".to_owned()),
            ),
        })
    }

    /// Reads over one connection, and writes what arrives.
    async fn read_on(&mut self) -> Result<(), Ended> {
        let limits = self.origin.shared.limits;
        let start = if self.from_start { 0 } else { self.at };
        let mut skip = self.at - start;
        let meter = Arc::clone(&self.origin.meter);
        let _reading = meter.waits().reading();
        let source = &self.origin.source;
        let opened = source.read(&self.file, start..self.range.end).await;
        let mut stream = opened.map_err(Ended::Source)?;
        let mut runner = self.origin.pace.runner();
        let mut block = None;
        let ended = loop {
            let gathered = block
                .as_ref()
                .map_or(0, |block: &Buffer| block.len() as u64);
            let left = self.range.end - self.at - gathered;
            if left == 0 {
                break Ok(());
            }
            let Ok(next) = tokio::time::timeout(limits.stall_timeout, stream.next()).await else {
                break Err(Ended::Stalled);
            };
            let mut bytes = match next {
                Some(Ok(bytes)) => bytes,
                Some(Err(error)) => break Err(Ended::Source(error)),
                None => break Err(Ended::Cut),
            };
            self.origin.count(bytes.len() as u64);
            if let Sink::Part(part) = &self.sink {
                part.count_arrived(bytes.len() as u64);
            }
            let gait = runner.count(bytes.len() as u64);
            let dropped = skip.min(bytes.len() as u64);
            skip -= dropped;
            bytes.advance(usize::try_from(dropped).expect("no longer than the bytes"));
            bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            let begun = Instant::now();
            block = self.take(bytes, block).await?;
            runner.waited(begun.elapsed());
            match gait {
                // After two in a row one is given its time: the path may be slow. And from the start on
                // another one would first bring again what is here.
                Gait::Crawls if self.crawls < CRAWLS && !self.from_start => {
                    self.crawls += 1;
                    break Err(Ended::Slow);
                }
                Gait::Stands => break Err(Ended::Slow),
                Gait::Crawls | Gait::Runs => {}
            }
        };
        if !matches!(ended, Err(Ended::Slow)) {
            self.crawls = 0;
        }
        // What arrived is kept, however the connection ended: the next one reads on from there.
        if let Some(block) = block {
            self.write(block).await?;
        }
        ended
    }

    /// Gathers the bytes that arrived next.
    ///
    /// They are let go of before more are read, so that the connection reads into the same memory again: new memory
    /// for each read would cost more than a copy.
    async fn take(
        &mut self,
        mut bytes: Bytes,
        block: Option<Buffer>,
    ) -> Result<Option<Buffer>, StoreError> {
        if let Sink::Memory(held) = &mut self.sink {
            held.extend_from_slice(&bytes);
            self.at += bytes.len() as u64;
            return Ok(None);
        }
        let mut gathered = block;
        while !bytes.is_empty() {
            let mut block = match gathered.take() {
                Some(block) => block,
                None => self.origin.shared.gather(self.at),
            };
            bytes.advance(block.fill(&bytes));
            if block.is_full() {
                self.write(block).await?;
            } else {
                gathered = Some(block);
            }
        }
        Ok(gathered)
    }

    /// Writes what follows the bytes that are on disk.
    async fn write(&mut self, block: Buffer) -> Result<(), StoreError> {
        let Sink::Part(part) = &self.sink else {
            unreachable!("bytes in memory are not gathered");
        };
        let (at, bytes, writing) = (self.at, block.len() as u64, Arc::clone(part));
        blocking::run(move || writing.write_block(at, block)).await?;
        self.at += bytes;
        // A smaller file is hashed when all of it is here.
        if !self.origin.shared.limits.is_small(self.file.size) {
            part.caught_up().await;
        }
        Ok(())
    }
}

/// One of the connections that all fetches share. Dropping it gives it back.
pub(super) struct Connection {
    _place: Place,
    metrics: Arc<Metrics>,
}

impl Connection {
    pub(super) async fn new(shared: &Shared) -> Self {
        let place = shared.width.place().await;
        shared.metrics.connections.inc();
        Self {
            _place: place,
            metrics: Arc::clone(&shared.metrics),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Shared {
    /// Memory to gather the bytes of a file from byte `at` on.
    fn gather(&self, at: u64) -> Buffer {
        let block = self.limits.block_bytes(self.width.now());
        self.buffers
            .resize(usize::try_from(block).expect("at most 1 MiB"));
        self.buffers.gather(at)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::BoxFuture;
    use futures::{FutureExt, stream};

    use super::*;
    use crate::digest::Claims;
    use crate::fetch::FetchLimits;
    use crate::model::{ModelRef, Patterns, RelPath, Revision};
    use crate::source::{ByteStream, Listing, Source, Sources, Vouched};
    use crate::store::{Claimed, StageKey, Store, StoreLimits};

    const SIZE: u64 = 4 << 20;

    /// What one read does.
    #[derive(Debug, Clone, Copy)]
    enum Does {
        /// 100 kB each second, which is a crawl next to the neighbours.
        Crawl,
        /// The connection ends before its first byte.
        Cut,
    }

    /// Reads that do as planned, the last first; then they run.
    struct Planned(Mutex<Vec<Does>>, AtomicUsize);

    impl Source for Planned {
        fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
            unreachable!("only read is called")
        }

        fn list<'a>(
            &'a self,
            _: &'a Revision,
            _: &'a Patterns,
        ) -> BoxFuture<'a, Result<Listing, SourceError>> {
            unreachable!("only read is called")
        }

        fn read<'a>(
            &'a self,
            _: &'a RemoteFile,
            range: Range<u64>,
        ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            let (piece, left) = match self.0.lock().unwrap().pop() {
                Some(Does::Crawl) => (100_000, range.end - range.start),
                Some(Does::Cut) => (1, 0),
                None => (SIZE, range.end - range.start),
            };
            let pieces = (0..left.div_ceil(piece)).map(move |n| piece.min(left - n * piece));
            let bytes = stream::iter(pieces).then(|length| async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok(Bytes::from(vec![7; usize::try_from(length).unwrap()]))
            });
            async { Ok(bytes.boxed()) }.boxed()
        }
    }

    /// Reads one range next to fast neighbours; returns how many connections that took.
    async fn connections(from_start: bool, plan: &[Does]) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
        let path = RelPath::new("a.bin").unwrap();
        let file = Arc::new(RemoteFile {
            path,
            size: SIZE,
            identity: None,
            claims: Claims::default(),
            vouched: Vouched::BySource,
            xet_hash: None,
            told: None,
        });
        let Claimed::Mine(claim) = store.claim(&StageKey::of(&file)).unwrap() else {
            panic!("somebody else has it");
        };
        let part = claim.stage(&store, SIZE).unwrap();
        let planned = plan.iter().rev().copied().collect();
        let source = Arc::new(Planned(Mutex::new(planned), AtomicUsize::new(0)));
        let limits = FetchLimits::default();
        let shared = Arc::new(Shared {
            store,
            sources: Arc::new(Nowhere),
            turns: super::super::FileTurns::of_all(&limits),
            limits,
            metrics: Arc::default(),
            width: super::super::Width::new(limits.connections),
            buffers: limits.buffers(),
            hashing: Arc::default(),
            tier: None,
        });
        let model: ModelRef = "hf://org/model".parse().unwrap();
        let origin = Origin {
            source: Arc::clone(&source) as Arc<dyn Source>,
            scheme: model.scheme(),
            meter: Arc::new(super::super::progress::Meter::new(model)),
            pace: Arc::default(),
            shared,
        };
        let mut neighbours: Vec<_> = (0..3).map(|_| origin.pace.runner()).collect();
        tokio::time::advance(Duration::from_secs(1)).await;
        neighbours.iter_mut().for_each(|runner| {
            runner.count(100 << 20);
        });
        drop(neighbours);

        let mut range = Ranged::new(&origin, &file, &part, 0..SIZE);
        range.from_start = from_start;
        let fetched = range.fetch(Connection::new(&origin.shared).await).await;

        assert!(fetched.is_ok(), "{fetched:?}");
        assert_eq!(part.present(), SIZE);
        source.1.load(Ordering::Relaxed)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_crawls_is_replaced_whatever_came_before() {
        use Does::{Crawl, Cut};
        assert_eq!(connections(false, &[Crawl]).await, 2);
        assert_eq!(connections(false, &[Cut, Crawl]).await, 3);
        assert_eq!(connections(false, &[Cut, Crawl, Cut, Crawl]).await, 5);
        // The third in a row is given its time.
        assert_eq!(connections(false, &[Crawl; 9]).await, 3);
        assert_eq!(connections(false, &[Crawl, Crawl, Cut, Crawl]).await, 5);
        // From the start on a new one would bring again what is here.
        assert_eq!(connections(true, &[Crawl; 9]).await, 1);
    }

    struct Nowhere;

    impl Sources for Nowhere {
        fn open(&self, _: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
            unreachable!("the range has its source")
        }
    }
}
