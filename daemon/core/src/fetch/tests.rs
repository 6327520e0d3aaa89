//! The fetcher against an origin in memory that misbehaves on order.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};

use super::*;
use crate::digest::{Claims, Digest};
use crate::model::{Patterns, Revision};
use crate::source::{ByteStream, Listing, RemoteFile, Source, Vouched, select};
use crate::store::StoreLimits;

mod again;
mod room;
mod told;
mod turns;

/// What goes wrong with one read.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Cut(usize),
    Stall(usize),
    Flip,
    /// For this many seconds.
    Busy(u64),
    NoRanges,
    NoRangesNow,
    Denied,
    None,
}

/// A model in memory.
#[derive(Default)]
struct Origin {
    files: BTreeMap<String, Vec<u8>>,
    /// Taken one by one, by the reads of files named `*.bin`.
    faults: Mutex<Vec<Fault>>,
    reads: Mutex<Vec<(String, Range<u64>)>>,
    sent: AtomicUsize,
    claim: bool,
    /// It claims nothing before it is read.
    tells: bool,
}

impl Origin {
    fn new(files: &[(&str, Vec<u8>)]) -> Arc<Self> {
        let files = files
            .iter()
            .map(|(path, bytes)| ((*path).to_owned(), bytes.clone()))
            .collect();
        Arc::new(Self {
            files,
            claim: true,
            ..Self::default()
        })
    }

    fn failing(faults: &[Fault]) -> Arc<Self> {
        let files = BTreeMap::from([("a.bin".to_owned(), content(100_000))]);
        Arc::new(Self {
            files,
            claim: true,
            faults: Mutex::new(faults.to_vec()),
            ..Self::default()
        })
    }
}

struct OriginSource(Arc<Origin>, ModelRef);

impl Source for OriginSource {
    fn resolve(&self) -> BoxFuture<'_, Result<Revision, SourceError>> {
        async { Ok(Revision::of_listing(self.0.files.keys().cloned())) }.boxed()
    }

    fn list<'a>(
        &'a self,
        _revision: &'a Revision,
        patterns: &'a Patterns,
    ) -> BoxFuture<'a, Result<Listing, SourceError>> {
        async move {
            let all = self
                .0
                .files
                .iter()
                .map(|(path, bytes)| (path.clone(), bytes.len() as u64, bytes));
            let (chosen, left_out) = select(&self.1, all.collect(), patterns)?;
            let file = |(path, size, bytes): (RelPath, u64, &Vec<u8>)| RemoteFile {
                identity: (!self.0.claim).then(|| format!("memory:{path}")),
                claims: Claims {
                    sha256: self.0.claim.then(|| Digest::of(bytes)),
                    ..Claims::default()
                },
                path,
                size,
                vouched: Vouched::BySource,
                xet_hash: None,
                told: self.0.tells.then(Arc::default),
            };
            Ok(Listing {
                files: chosen.into_iter().map(file).collect(),
                left_out,
            })
        }
        .boxed()
    }

    fn read<'a>(
        &'a self,
        file: &'a RemoteFile,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        let what = file.path.to_string();
        self.0
            .reads
            .lock()
            .unwrap()
            .push((what.clone(), range.clone()));
        let all = &self.0.files[file.path.as_str()];
        tell(file, &range, all);
        let mut bytes = all
            [usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
            .to_vec();
        let faulty = what.ends_with(".bin");
        let fault = faulty.then(|| self.0.faults.lock().unwrap().pop());
        let mut stalls = false;
        match fault.flatten() {
            Some(Fault::Cut(after)) => bytes.truncate(after),
            Some(Fault::Stall(after)) => {
                bytes.truncate(after);
                stalls = true;
            }
            Some(Fault::Flip) => bytes[0] ^= 1,
            Some(Fault::Busy(seconds)) => {
                let error = SourceError::Unavailable {
                    what,
                    detail: "busy".into(),
                    retry_after: Some(Duration::from_secs(seconds)),
                };
                return async { Err(error) }.boxed();
            }
            Some(Fault::Denied) => {
                let error = SourceError::Denied {
                    what,
                    detail: String::new(),
                    hint: None,
                };
                return async { Err(error) }.boxed();
            }
            Some(Fault::NoRanges) if range.start > 0 => {
                self.0.faults.lock().unwrap().push(Fault::NoRanges);
                return async { Err(SourceError::NoRanges { what }) }.boxed();
            }
            Some(Fault::NoRangesNow) => {
                return async { Err(SourceError::NoRanges { what }) }.boxed();
            }
            Some(Fault::NoRanges | Fault::None) | None => {}
        }
        self.0.sent.fetch_add(bytes.len(), Ordering::Relaxed);
        let pieces: Vec<_> = bytes
            .chunks(1000)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let stream = stream::iter(pieces);
        let stream = if stalls {
            stream.chain(stream::pending()).boxed()
        } else {
            stream.boxed()
        };
        async { Ok(stream) }.boxed()
    }
}

/// Says what is claimed of a file as all of it is read.
fn tell(file: &RemoteFile, range: &Range<u64>, bytes: &[u8]) {
    if let Some(told) = file.told.as_ref().filter(|_| *range == (0..file.size)) {
        let sha256 = Some(Digest::of(bytes));
        let _ = told.set(Claims {
            sha256,
            ..Claims::default()
        });
    }
}

struct Only(Arc<Origin>);

impl Sources for Only {
    fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        Ok(Arc::new(OriginSource(Arc::clone(&self.0), model.clone())))
    }
}

fn content(size: u32) -> Vec<u8> {
    (0..size)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn limits() -> FetchLimits {
    FetchLimits {
        connections: 4,
        memory_bytes: 256 << 10,
        part_bytes: 16 << 10,
        attempts: 3,
        stall_timeout: Duration::from_millis(100),
        patience: Duration::from_secs(2),
        ..FetchLimits::default()
    }
}

fn fetcher(root: &std::path::Path, origin: &Arc<Origin>) -> Arc<Fetcher> {
    fetcher_with(root, origin, limits())
}

fn fetcher_with(root: &std::path::Path, origin: &Arc<Origin>, limits: FetchLimits) -> Arc<Fetcher> {
    let store = Store::open(root, StoreLimits::default()).unwrap();
    Fetcher::new(
        store,
        Arc::new(Only(Arc::clone(origin))),
        limits,
        Arc::default(),
    )
}

fn request(include: &[&str]) -> FetchRequest {
    let include = include.iter().map(|&glob| glob.to_owned()).collect();
    let patterns = Patterns::new(include, vec![]).unwrap();
    FetchRequest {
        model: "hf://org/model".parse().unwrap(),
        patterns,
        pin: None,
    }
}

fn assert_tree(fetched: &Fetched, origin: &Origin) {
    for file in &fetched.snapshot.manifest.files {
        let bytes = fs::read(fetched.snapshot.path.join(&file.path)).unwrap();
        assert!(
            bytes == origin.files[file.path.as_str()],
            "{} differs",
            file.path
        );
    }
    assert_eq!(fetched.snapshot.manifest.files.len(), origin.files.len());
}

async fn fetch_failing(
    faults: &[Fault],
) -> (Result<Fetched, FetchError>, Arc<Origin>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::failing(faults);
    let fetched = fetcher(dir.path(), &origin)
        .fetch(request(&["*"]))
        .wait()
        .await;
    if let Ok(fetched) = &fetched {
        assert_tree(fetched, &origin);
    }
    (fetched, origin, dir)
}

#[tokio::test]
async fn a_second_fetch_moves_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[
        ("a.bin", content(50_000)),
        ("b/c.txt", content(10)),
        ("empty.json", vec![]),
    ]);
    let fetcher = fetcher(dir.path(), &origin);

    let first = fetcher.fetch(request(&["*"])).wait().await.unwrap();
    let second = fetcher.fetch(request(&["*"])).wait().await.unwrap();

    assert_tree(&first, &origin);
    assert_eq!((first.bytes_fetched, first.bytes_reused), (50_010, 0));
    assert_eq!((second.bytes_fetched, second.bytes_reused), (0, 50_010));
    assert_eq!(origin.sent.load(Ordering::Relaxed), 50_010);
}

#[tokio::test]
async fn other_patterns_bring_only_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[
        ("a.bin", content(5000)),
        ("b.json", content(100)),
        ("twin.bin", content(5000)),
    ]);
    let fetcher = fetcher(dir.path(), &origin);
    fetcher.fetch(request(&["a.bin"])).wait().await.unwrap();
    let all = fetcher.fetch(request(&["*"])).wait().await.unwrap();
    assert_tree(&all, &origin);
    assert_eq!((all.bytes_fetched, all.bytes_reused), (100, 10_000));
}

#[tokio::test]
async fn bytes_without_a_claim_are_known_by_their_origins_name() {
    let dir = tempfile::tempdir().unwrap();
    let files = BTreeMap::from([("a.bin".to_owned(), content(5000))]);
    let origin = Arc::new(Origin {
        files,
        ..Origin::default()
    });
    let fetcher = fetcher(dir.path(), &origin);
    fetcher.fetch(request(&["*"])).wait().await.unwrap();
    let again = fetcher.fetch(request(&["a*"])).wait().await.unwrap();
    assert_eq!((again.bytes_fetched, again.bytes_reused), (0, 5000));
}

#[tokio::test]
async fn two_processes_share_one_download() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(3_000_000)), ("b.bin", content(2_000_000))]);
    let (one, two) = (fetcher(dir.path(), &origin), fetcher(dir.path(), &origin));
    let (one, two) = (one.fetch(request(&["*"])), two.fetch(request(&["*"])));
    let (one, two) = tokio::join!(one.wait(), two.wait());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_tree(&one, &origin);
    assert_eq!(one.snapshot.path, two.snapshot.path);
    assert_eq!(origin.sent.load(Ordering::Relaxed), 5_000_000);
    assert_eq!(one.bytes_fetched + two.bytes_fetched, 5_000_000);
}

#[test]
fn many_fetches_at_once_leave_threads_to_write_with() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .enable_all()
        .build()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..400_u32)
        .map(|n| (format!("{}/{n}.json", n % 100), content(20_000 + n)))
        .collect();
    let files: Vec<_> = files
        .iter()
        .map(|(path, bytes)| (path.as_str(), bytes.clone()))
        .collect();
    let origin = Origin::new(&files);
    runtime.block_on(async {
        let fetcher = fetcher(dir.path(), &origin);
        let fetches = (0..100).map(|n| fetcher.fetch(request(&[&format!("{n}/*")])).wait());
        let all = futures::future::join_all(fetches);
        let all = tokio::time::timeout(Duration::from_secs(60), all).await;
        for fetched in all.expect("the fetches hang") {
            assert_eq!(fetched.unwrap().snapshot.manifest.files.len(), 4);
        }
    });
    // What a test that fails left hanging must not keep it from ending.
    runtime.shutdown_background();
}

#[tokio::test]
async fn a_cut_connection_is_read_on_at_the_byte() {
    let (fetched, origin, _dir) =
        fetch_failing(&[Fault::Cut(700), Fault::Cut(0), Fault::Cut(5)]).await;
    assert_eq!(fetched.unwrap().bytes_fetched, 100_000);
    assert_eq!(origin.sent.load(Ordering::Relaxed), 100_000);
}

#[tokio::test]
async fn a_connection_that_delivers_nothing_is_replaced() {
    let (fetched, origin, _dir) = fetch_failing(&[Fault::Stall(2000), Fault::Stall(0)]).await;
    fetched.unwrap();
    assert_eq!(origin.sent.load(Ordering::Relaxed), 100_000);
}

#[tokio::test]
async fn a_busy_origin_is_asked_again_but_not_for_ever() {
    let (fetched, ..) = fetch_failing(&[Fault::Busy(0); 2]).await;
    fetched.unwrap();
    let (fetched, ..) = fetch_failing(&[Fault::Busy(0); 100]).await;
    let error = fetched.expect_err("asked for ever");
    assert!(
        Chain(&error)
            .to_string()
            .ends_with("a.bin is unavailable: busy"),
        "{}",
        Chain(&error)
    );
}

#[tokio::test]
async fn an_origin_that_has_sent_bytes_is_waited_for() {
    for (patience, survives) in [(60, true), (0, false)] {
        let dir = tempfile::tempdir().unwrap();
        let origin = Origin::failing(&[Fault::Busy(0), Fault::Busy(0), Fault::None]);
        let limits = FetchLimits {
            connections: 1,
            attempts: 1,
            patience: Duration::from_secs(patience),
            ..limits()
        };
        let fetcher = fetcher_with(dir.path(), &origin, limits);
        let fetched = fetcher.fetch(request(&["*"])).wait().await;
        assert_eq!(fetched.is_ok(), survives, "{fetched:?}");
    }
}

#[tokio::test]
async fn a_pause_that_an_origin_asks_for_holds_nobody_else_up() {
    let dir = tempfile::tempdir().unwrap();
    let files = [("a.bin", content(50_000)), ("b.json", content(40_000))];
    let origin = Origin::new(&files);
    *origin.faults.lock().unwrap() = vec![Fault::Busy(300)];
    let limits = FetchLimits {
        connections: 1,
        ..limits()
    };
    let fetcher = fetcher_with(dir.path(), &origin, limits);
    let paused = fetcher.fetch(request(&["a.bin"]));
    while !origin.faults.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let other = fetcher.fetch(request(&["b.json"])).wait();
    let other = tokio::time::timeout(Duration::from_secs(10), other).await;

    other.expect("it waits for the other fetch").unwrap();
    fetcher.shutdown(Duration::from_secs(5)).await;
    drop(paused);
}

#[tokio::test]
async fn a_pause_that_nobody_would_sit_out_is_an_error() {
    let fetching = fetch_failing(&[Fault::Busy(100_000)]);
    let fetched = tokio::time::timeout(Duration::from_secs(10), fetching).await;
    let (fetched, ..) = fetched.expect("it sits out a day");
    assert!(fetched.is_err(), "{fetched:?}");
}

#[tokio::test]
async fn a_flipped_bit_is_found_and_the_file_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(100_000)), ("b.json", content(500))]);
    let fetcher = fetcher(dir.path(), &origin);
    fetcher.fetch(request(&["b.json"])).wait().await.unwrap();
    origin.faults.lock().unwrap().push(Fault::Flip);

    let fetched = fetcher.fetch(request(&["*"])).wait().await.unwrap();

    assert_tree(&fetched, &origin);
    let counted = (fetched.bytes_fetched, fetched.bytes_reused);
    assert_eq!(counted, (200_000, 500));
}

#[tokio::test]
async fn bytes_that_stay_wrong_are_an_error_and_leave_nothing() {
    let (fetched, _, dir) = fetch_failing(&[Fault::Flip; 100]).await;
    let error = fetched.expect_err("published wrong bytes");
    assert!(matches!(error, FetchError::Mismatch { .. }), "{error}");
    let blobs = fs::read_dir(dir.path().join("blobs/sha256"))
        .unwrap()
        .count();
    let staged = fs::read_dir(dir.path().join("staging")).unwrap().count();
    assert_eq!((blobs, staged), (0, 0));
}

#[tokio::test]
async fn an_origin_without_ranges_is_read_from_the_start() {
    let (fetched, ..) = fetch_failing(&[Fault::NoRanges; 8]).await;
    fetched.unwrap();
}

#[tokio::test]
async fn bytes_that_were_hashed_are_not_written_again() {
    let dir = tempfile::tempdir().unwrap();
    // Taken from the end: the first range is right, the second is refused, the whole body is damaged.
    let origin = Origin::failing(&[Fault::Flip, Fault::NoRangesNow, Fault::None]);
    let one_by_one = FetchLimits {
        connections: 1,
        ..limits()
    };
    let fetcher = fetcher_with(dir.path(), &origin, one_by_one);

    let fetched = fetcher.fetch(request(&["*"])).wait().await.unwrap();

    assert_tree(&fetched, &origin);
    assert_eq!(origin.sent.load(Ordering::Relaxed), (16 << 10) + 100_000);
}

#[tokio::test]
async fn what_is_denied_is_not_asked_again() {
    let (fetched, ..) = fetch_failing(&[Fault::Denied]).await;
    let error = fetched.expect_err("fetched what was denied");
    assert!(
        matches!(
            error,
            FetchError::Source {
                source: SourceError::Denied { .. },
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_broken_shard_is_never_published() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("model.safetensors", vec![255; 64])]);
    let error = fetcher(dir.path(), &origin)
        .fetch(request(&[]))
        .wait()
        .await
        .expect_err("published");
    assert!(matches!(error, FetchError::Broken { .. }), "{error}");
    assert_eq!(
        fs::read_dir(dir.path().join("snapshots")).unwrap().count(),
        0
    );
}

#[tokio::test]
async fn a_stopped_fetch_goes_on_in_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::failing(&[Fault::Stall(9000); 12]);
    let first = fetcher(dir.path(), &origin);
    let fetch = first.fetch(request(&["*"]));
    while origin.sent.load(Ordering::Relaxed) < 30_000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    first.shutdown(Duration::from_secs(5)).await;
    assert!(matches!(
        fetch.wait().await,
        Err(FetchError::Stopped { .. })
    ));
    origin.faults.lock().unwrap().clear();

    let second = fetcher(dir.path(), &origin);
    assert_eq!(second.resume().unwrap(), 1);
    let fetched = second.fetch(request(&["*"])).wait().await.unwrap();

    assert_tree(&fetched, &origin);
    assert!(second.store().recorded_fetches().unwrap().is_empty());
}

/// An origin that is away the first few times.
struct Away(Arc<Origin>, AtomicUsize);

impl Sources for Away {
    fn open(&self, model: &ModelRef) -> Result<Arc<dyn Source>, SourceError> {
        let left = |left: usize| left.checked_sub(1);
        let (relaxed, what) = (Ordering::Relaxed, model.to_string());
        match self.1.fetch_update(relaxed, relaxed, left) {
            Err(_) => Only(Arc::clone(&self.0)).open(model),
            Ok(_) => Err(SourceError::Unavailable {
                what,
                detail: "away".to_owned(),
                retry_after: None,
            }),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_fetch_on_record_outlives_an_origin_that_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(5000))]);
    let store = Store::open(dir.path(), StoreLimits::default()).unwrap();
    let sources = Arc::new(Away(Arc::clone(&origin), AtomicUsize::new(4)));
    let fetcher = Fetcher::new(store, sources, limits(), Arc::default());

    fetcher.fetch(request(&["*"])).wait().await.unwrap_err();
    let on_record = || fetcher.store().recorded_fetches().unwrap().len();
    assert_eq!(on_record(), 1, "its record is lost");

    assert_eq!(fetcher.resume().unwrap(), 1);
    while on_record() > 0 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_tree(
        &fetcher.fetch(request(&["*"])).wait().await.unwrap(),
        &origin,
    );
}

#[tokio::test]
async fn a_record_that_stays_spoils_no_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::failing(&[Fault::Stall(0)]);
    let fetcher = fetcher(dir.path(), &origin);
    let fetch = fetcher.fetch(request(&["*"]));
    while origin.reads.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let records = fs::read_dir(dir.path().join("fetches")).unwrap();
    for record in records.map(|entry| entry.unwrap().path()) {
        fs::remove_file(&record).unwrap();
        fs::create_dir(&record).unwrap();
    }
    assert_tree(&fetch.wait().await.unwrap(), &origin);
}

/// The staged file whose name ends so.
fn staged(root: &std::path::Path, ending: &str) -> Option<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(root.join("staging")).unwrap();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    let path = paths.find(|path| path.extension().is_some_and(|part| part == ending))?;
    let bytes = fs::read(&path).unwrap();
    Some((path, bytes))
}

#[tokio::test]
async fn bytes_that_the_disk_lost_are_noticed_while_others_still_come() {
    let dir = tempfile::tempdir().unwrap();
    // Each of the four connections brings a block, and then nothing more.
    let faults = [vec![Fault::Stall(0); 40], vec![Fault::Stall(9000); 4]].concat();
    let origin = Origin::failing(&faults);
    let first = fetcher(dir.path(), &origin);
    let fetch = first.fetch(request(&["*"]));
    while staged(dir.path(), "journal").is_none_or(|(_, bytes)| bytes.len() < 4 * 32) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    first.shutdown(Duration::from_secs(5)).await;
    drop(fetch);
    let (part, mut bytes) = staged(dir.path(), "part").unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 1);
    fs::write(part, bytes).unwrap();
    let patient = FetchLimits {
        stall_timeout: Duration::from_secs(3600),
        ..limits()
    };
    // Whatever is read next hangs, until the damage is found and all is read anew.
    *origin.faults.lock().unwrap() = vec![Fault::Stall(0); 4];

    let second = fetcher_with(dir.path(), &origin, patient);
    let fetched = second.fetch(request(&["*"])).wait();
    let fetched = tokio::time::timeout(Duration::from_secs(10), fetched).await;

    assert_tree(
        &fetched.expect("the damage goes unnoticed").unwrap(),
        &origin,
    );
}

#[tokio::test]
async fn a_plan_says_what_a_fetch_would_do() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a.bin", content(5000)), ("b.json", content(100))]);
    let fetcher = fetcher(dir.path(), &origin);
    fetcher.fetch(request(&["a.bin"])).wait().await.unwrap();
    let request = request(&["*"]);
    let plan = fetcher
        .plan(&request.model, &request.patterns)
        .await
        .unwrap();
    assert_eq!(
        (plan.bytes, plan.bytes_local, plan.bytes_to_fetch),
        (5100, 5000, 100)
    );
    assert!(!plan.published && plan.room.evict.is_empty());
}

#[tokio::test]
async fn a_file_read_from_its_start_shows_how_far_it_is() {
    let dir = tempfile::tempdir().unwrap();
    // Taken from the end: ranges are refused, and the whole body hangs after a block.
    let origin = Origin::failing(&[Fault::Stall(70_000), Fault::NoRangesNow]);
    let limits = FetchLimits {
        connections: 1,
        memory_bytes: 64 << 10,
        stall_timeout: Duration::from_secs(3600),
        ..limits()
    };
    let fetcher = fetcher_with(dir.path(), &origin, limits);
    let mut progress = fetcher.fetch(request(&["*"])).progress();

    let shown = progress.wait_for(|seen| seen.bytes_done > 0);
    let shown = tokio::time::timeout(Duration::from_secs(10), shown).await;

    assert!(shown.is_ok(), "it shows nothing");
    fetcher.shutdown(Duration::from_secs(5)).await;
}
