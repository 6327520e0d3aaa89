//! Bringing the bytes of one file through both tiers: what this node won it fetches from the origin and writes
//! to the shared tier behind, what others won it copies from there as it lands.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use self::copy::{Copied, CopyError};
use self::upload::Upload;
use super::parts::{Connection, Origin, PartsError, Ranged, split};
use crate::blocking;
use crate::errors::Chain;
use crate::shared::choice::{
    FAILURES, LATEST_LOOK, LISTENS, LOOK, Move, Place, Reach, Segment, Situation,
};
use crate::shared::{
    BLOCK_BYTES, Fill, SegmentView, SharedTier, Silence, Sums, View, is_shareable,
};
use crate::source::{RemoteFile, SourceError};
use crate::store::{Part, StageKey};

mod copy;
mod upload;

/// Times that damaged bytes of one file are set aside before it is brought without the shared tier.
const SET_ASIDE: u32 = 2;

/// How long a node that cannot reach the origin leaves it to the others…
const LEAVE_TO_OTHERS: Duration = Duration::from_secs(15);

/// …and how often, before it gives up.
const TRIES_OF_ORIGIN: u32 = 4;

/// One file in the shared tier, for one try to bring it.
pub(super) struct Share {
    tier: Arc<SharedTier>,
    key: StageKey,
    size: u64,
    fill: std::sync::Mutex<Arc<Fill>>,
    /// Bytes that came from the shared tier.
    copied: AtomicU64,
    /// The local bytes are what the origin claims.
    verified: Arc<AtomicBool>,
}

impl Share {
    /// `None` if the file is not to be shared, or the tier cannot be used now.
    pub(super) async fn open(tier: Option<&Arc<SharedTier>>, file: &RemoteFile) -> Option<Self> {
        let tier = Arc::clone(tier?);
        if !is_shareable(file) || !tier.answers().await {
            return None;
        }
        let (key, size) = (StageKey::of(file), file.size);
        let wanted = key.clone();
        // A tier that cannot be written may hold it all the same.
        let opened = tier
            .run(move |store| match store.find(&wanted, size)? {
                Some(fill) => Ok(fill),
                None => store.fill(&wanted, size),
            })
            .await
            .inspect_err(|error| {
                tracing::debug!(path = %file.path, error = %Chain(error), "file brought without the shared tier");
            });
        Some(Self {
            fill: std::sync::Mutex::new(Arc::new(opened.ok()?)),
            tier,
            key,
            size,
            copied: AtomicU64::new(0),
            verified: Arc::default(),
        })
    }

    fn fill(&self) -> Arc<Fill> {
        let fill = self.fill.lock().expect("no holder of this lock panics");
        Arc::clone(&fill)
    }

    /// Brings what `part` is missing of `file`.
    pub(super) async fn fetch(
        &self,
        origin: &Origin,
        file: &Arc<RemoteFile>,
        part: &Arc<Part>,
    ) -> Result<(), PartsError> {
        Bringing::new(self, origin, file, part).run().await
    }

    /// The local bytes proved right: the shared tier gets what it still lacks of them, behind.
    pub(super) fn finish(&self, part: &Arc<Part>) {
        self.verified.store(true, Ordering::Relaxed);
        let rest = upload::Rest {
            tier: Arc::clone(&self.tier),
            fill: self.fill(),
            part: Arc::clone(part),
            verified: Arc::clone(&self.verified),
        };
        self.tier.behind().spawn(rest.write());
    }

    /// The local bytes proved wrong. True if some came from the shared tier: there they are set aside.
    pub(super) async fn is_to_blame(&self) -> bool {
        if self.copied.load(Ordering::Relaxed) == 0 {
            return false;
        }
        self.set_aside().await;
        true
    }

    async fn set_aside(&self) {
        let fill = self.fill();
        let key = self.key.clone();
        match self.tier.run(move |_| fill.set_aside()).await {
            Ok(true) => {
                tracing::warn!(%key, "damaged blob in the shared tier set aside");
                self.tier.metrics().shared_failed("damaged");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%key, error = %Chain(&error), "damaged blob in the shared tier not set aside");
            }
        }
    }

    /// Opens what has the blob's name now.
    async fn open_again(&self) -> bool {
        let (key, size) = (self.key.clone(), self.size);
        match self.tier.run(move |store| store.fill(&key, size)).await {
            Ok(fill) => {
                *self.fill.lock().expect("no holder of this lock panics") = Arc::new(fill);
                true
            }
            Err(_) => false,
        }
    }
}

/// Bytes that are brought at a time, by one way or, in a race, by both.
struct Piece {
    range: Range<u64>,
    segment: usize,
    done: bool,
    copying: Option<AbortHandle>,
    fetching: Option<AbortHandle>,
    /// Taken on with its segment, to be fetched.
    owed: Option<crate::shared::Owed>,
}

impl Piece {
    fn is_idle(&self) -> bool {
        !self.done && self.copying.is_none() && self.fetching.is_none()
    }

    fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn finish(&mut self) {
        self.done = true;
        self.owed = None;
        for task in [self.copying.take(), self.fetching.take()]
            .into_iter()
            .flatten()
        {
            task.abort();
        }
    }
}

/// How a piece ended.
enum Ended {
    Fetched(Result<(), PartsError>),
    Copied(Result<(), CopyError>),
}

/// One file on its way.
struct Bringing<'a> {
    share: &'a Share,
    tier: &'a Arc<SharedTier>,
    origin: &'a Origin,
    file: &'a Arc<RemoteFile>,
    part: &'a Arc<Part>,
    fill: Arc<Fill>,
    pieces: Vec<Piece>,
    piece_bytes: u64,
    tasks: JoinSet<(usize, Ended)>,
    fetching: usize,
    view: View,
    next_look: Instant,
    pause: Duration,
    clock: Instant,
    silence: Silence,
    heard: Instant,
    /// Claims whose owners were silent for too long.
    silent: HashMap<usize, u32>,
    /// Segments that this node has claimed, each with the turn.
    mine: HashMap<usize, u32>,
    sums: HashMap<usize, Arc<Sums>>,
    failures: u32,
    set_aside: u32,
    /// The origin is left to the others until then.
    left_until: Option<Instant>,
    tries_of_origin: u32,
}

impl<'a> Bringing<'a> {
    fn new(
        share: &'a Share,
        origin: &'a Origin,
        file: &'a Arc<RemoteFile>,
        part: &'a Arc<Part>,
    ) -> Self {
        let fill = share.fill();
        let part_bytes = origin.shared.limits.part_bytes;
        // Whole blocks: each is checked as a whole.
        let piece_bytes = part_bytes.next_multiple_of(BLOCK_BYTES);
        let now = Instant::now();
        Self {
            share,
            tier: &share.tier,
            origin,
            file,
            part,
            pieces: cut(part.missing(), &fill, piece_bytes),
            piece_bytes,
            tasks: JoinSet::new(),
            fetching: 0,
            view: View {
                sealed: false,
                segments: vec![SegmentView::default(); fill.segments()],
            },
            fill,
            next_look: now,
            pause: LOOK,
            clock: now,
            silence: Silence::default(),
            heard: now,
            silent: HashMap::new(),
            mine: HashMap::new(),
            sums: HashMap::new(),
            failures: 0,
            set_aside: 0,
            left_until: None,
            tries_of_origin: 0,
        }
    }

    async fn run(mut self) -> Result<(), PartsError> {
        let shared = Arc::clone(&self.origin.shared);
        let tier = Arc::clone(self.tier);
        let connection = || Connection::new(&shared);
        // Kept across turns of the loop, so that this file keeps its place among those that wait.
        let mut next = std::pin::pin!(connection());
        while self.pieces.iter().any(|piece| !piece.done) {
            if Instant::now() >= self.next_look {
                self.look().await;
            }
            let chosen = self.choose();
            match chosen {
                Move::Claim(segment) => {
                    self.claim(segment).await;
                    continue;
                }
                Move::Copy(segment) if self.copy(segment).await => continue,
                _ => {}
            }
            let fetch = matches!(chosen, Move::Fetch(_) | Move::Race(_));
            let changed = tier.changed().notified();
            tokio::select! {
                connected = &mut next, if fetch && self.fetching < shared.limits.connections => {
                    next.set(connection());
                    self.fetch(chosen, connected);
                }
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok((piece, ended)) => self.ended(piece, ended).await?,
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                () = tokio::time::sleep_until(self.next_look) => {}
                () = changed => {}
            }
        }
        Ok(())
    }

    fn reach(&self) -> Reach {
        if self.failures >= FAILURES || self.set_aside > SET_ASIDE {
            return Reach::Away;
        }
        self.tier.reach()
    }

    fn choose(&mut self) -> Move {
        let mut segments: Vec<Segment> = (0..self.view.segments.len())
            .map(|index| Segment {
                place: self.place(index),
                idle: 0,
                copying: 0,
            })
            .collect();
        for piece in self.pieces.iter().filter(|piece| !piece.done) {
            let segment = &mut segments[piece.segment];
            if piece.is_idle() {
                segment.idle += piece.bytes();
            } else if piece.fetching.is_none() {
                segment.copying += piece.bytes();
            }
        }
        let copies = self.pieces.iter().filter(|piece| piece.copying.is_some());
        let rates = self.tier.rates();
        let situation = Situation {
            egress: self.tier.config().egress,
            reach: self.reach(),
            segments: &segments,
            outstanding: self.tier.outstanding(),
            copies: copies.count(),
            piece_bytes: self.piece_bytes,
            origin_rate: rates.origin.get(),
            shared_rate: rates.shared.get(),
            random: fastrand::u64(..),
        };
        let chosen = situation.next();
        let of_origin = matches!(chosen, Move::Claim(_) | Move::Fetch(_) | Move::Race(_));
        match of_origin && self.is_left_to_others() {
            true => Move::Wait,
            false => chosen,
        }
    }

    fn is_left_to_others(&self) -> bool {
        self.left_until.is_some_and(|until| until > Instant::now())
    }

    fn place(&self, index: usize) -> Place {
        let segment = self.view.segments[index];
        if self.mine.contains_key(&index) && !self.is_left_to_others() {
            return Place::Mine;
        }
        match segment.turn {
            _ if segment.here => Place::Here,
            Some(turn) => Place::Theirs {
                silent: self
                    .silent
                    .get(&index)
                    .is_some_and(|silent| *silent >= turn),
            },
            None => Place::Free,
        }
    }

    /// Looks what the others have done.
    async fn look(&mut self) {
        let fill = Arc::clone(&self.fill);
        match self.tier.run(move |_| fill.look()).await {
            Ok(view) => {
                let changed = view != self.view;
                self.pause = match changed {
                    true => LOOK,
                    false => self.pause.mul_f64(1.5).min(LATEST_LOOK),
                };
                self.view = view;
                self.give_up_what_others_did();
            }
            Err(error) => {
                tracing::debug!(path = %self.file.path, error = %Chain(&error), "shared tier not looked at");
                self.pause = LATEST_LOOK;
            }
        }
        self.listen().await;
        self.next_look = Instant::now() + self.pause.mul_f64(0.75 + fastrand::f64() / 2.0);
    }

    /// Looks whether those who have claimed what this node needs are still at work.
    async fn listen(&mut self) {
        let timeout = self.tier.config().claim_timeout;
        let wanted: Vec<(usize, u32)> = (0..self.view.segments.len())
            .filter(|index| matches!(self.place(*index), Place::Theirs { silent: false }))
            .filter_map(|index| Some((index, self.view.segments[index].turn?)))
            .collect();
        if wanted.is_empty() || self.heard.elapsed() < timeout / LISTENS {
            return;
        }
        self.heard = Instant::now();
        let fill = Arc::clone(&self.fill);
        let read = self.tier.run(move |_| {
            let read = |(segment, turn)| Ok((segment, turn, fill.read_claim(segment, turn)?));
            wanted.into_iter().map(read).collect::<Result<Vec<_>, _>>()
        });
        for (segment, turn, content) in read.await.unwrap_or_default() {
            let now = self.clock.elapsed();
            let silence = self.silence.observe(segment, turn, content, now);
            if silence >= timeout {
                tracing::info!(path = %self.file.path, segment, "claim of a silent node is taken over");
                self.silent.insert(segment, turn);
            }
        }
    }

    /// What this node had claimed and another one finished is copied like all else.
    fn give_up_what_others_did(&mut self) {
        let done = |segment: &usize| self.view.segments[*segment].here;
        let done: Vec<usize> = self.mine.keys().copied().filter(done).collect();
        for segment in done {
            self.mine.remove(&segment);
            for piece in &mut self.pieces {
                if piece.segment == segment && !piece.done {
                    piece.owed = None;
                    if let Some(task) = piece.fetching.take() {
                        task.abort();
                        self.fetching -= 1;
                    }
                }
            }
        }
    }

    async fn claim(&mut self, segment: usize) {
        let tier = Arc::clone(self.tier);
        // Another file of this node may have satisfied the hunger meanwhile.
        let _turn = tier.turn().lock().await;
        if !matches!(self.choose(), Move::Claim(_)) {
            return;
        }
        let turn = self.view.segments[segment].turn.map_or(0, |turn| turn + 1);
        let (fill, owner) = (Arc::clone(&self.fill), tier.owner().to_owned());
        let claimed = tier.run(move |_| fill.claim(segment, turn, &owner)).await;
        match claimed {
            Ok(Some(claim)) => {
                self.mine.insert(segment, turn);
                for piece in &mut self.pieces {
                    if piece.segment == segment && !piece.done {
                        piece.owed = Some(tier.owe(piece.bytes()));
                    }
                }
                let upload = Upload {
                    tier: Arc::clone(&tier),
                    fill: Arc::clone(&self.fill),
                    part: Arc::clone(self.part),
                    verified: Arc::clone(&self.share.verified),
                    segment,
                    claim,
                };
                tier.behind().spawn(upload.run());
            }
            Ok(None) => {
                self.view.segments[segment].turn = Some(turn);
                self.next_look = Instant::now();
            }
            Err(error) => {
                self.failed(&Chain(&error).to_string());
                // The directory may be gone: it was collected.
                if self.share.open_again().await {
                    self.begin_anew();
                }
            }
        }
    }

    fn failed(&mut self, error: &str) {
        self.failures += 1;
        tracing::debug!(path = %self.file.path, error, "shared tier failed");
    }

    /// Starts to copy a piece; false if its segment turns out not to be here.
    async fn copy(&mut self, segment: usize) -> bool {
        let Some(sums) = self.sums_of(segment).await else {
            return false;
        };
        let wanted = |piece: &Piece| piece.segment == segment && piece.is_idle();
        let Some(index) = self.pieces.iter().position(wanted) else {
            return false;
        };
        let piece = &mut self.pieces[index];
        let copy = Copied {
            tier: Arc::clone(self.tier),
            fill: Arc::clone(&self.fill),
            sums,
            segment,
            range: piece.range.clone(),
            part: Arc::clone(self.part),
            meter: Arc::clone(&self.origin.meter),
        };
        let task = async move { (index, Ended::Copied(copy.run().await)) };
        piece.copying = Some(self.tasks.spawn(task));
        true
    }

    async fn sums_of(&mut self, segment: usize) -> Option<Arc<Sums>> {
        if let Some(sums) = self.sums.get(&segment) {
            return Some(Arc::clone(sums));
        }
        let fill = Arc::clone(&self.fill);
        match self.tier.run(move |_| fill.sums(segment)).await {
            Ok(Some(sums)) => {
                let sums = Arc::new(sums);
                self.sums.insert(segment, Arc::clone(&sums));
                Some(sums)
            }
            Ok(None) => {
                self.damaged().await;
                None
            }
            Err(error) => {
                self.failed(&Chain(&error).to_string());
                None
            }
        }
    }

    fn fetch(&mut self, chosen: Move, connection: Connection) {
        let (segment, race) = match chosen {
            Move::Fetch(segment) => (segment, false),
            Move::Race(segment) => (segment, true),
            Move::Claim(_) | Move::Copy(_) | Move::Wait => return,
        };
        let wanted = |piece: &Piece| match race {
            false => piece.segment == segment && piece.is_idle(),
            true => piece.segment == segment && piece.copying.is_some() && piece.fetching.is_none(),
        };
        // What is not ours is taken from its end: who copies begins at the front.
        let found = match self.mine.contains_key(&segment) || self.reach() == Reach::Away {
            true => self.pieces.iter().position(wanted),
            false => self.pieces.iter().rposition(wanted),
        };
        let Some(index) = found else { return };
        let piece = &mut self.pieces[index];
        if piece.owed.is_none() {
            piece.owed = Some(self.tier.owe(piece.bytes()));
        }
        let ranged = Ranged::new(self.origin, self.file, self.part, piece.range.clone());
        self.fetching += 1;
        let task = async move { (index, Ended::Fetched(ranged.fetch(connection).await)) };
        piece.fetching = Some(self.tasks.spawn(task));
    }

    async fn ended(&mut self, index: usize, ended: Ended) -> Result<(), PartsError> {
        let piece = &mut self.pieces[index];
        match ended {
            Ended::Fetched(result) => {
                // It may have been aborted after its last step.
                if piece.fetching.take().is_some() {
                    self.fetching -= 1;
                }
                match result {
                    Ok(()) => {
                        self.finish_piece(index);
                        self.tries_of_origin = 0;
                    }
                    Err(error) => self.without_origin(index, error)?,
                }
            }
            Ended::Copied(result) => {
                piece.copying = None;
                match result {
                    Ok(()) => {
                        let bytes = piece.bytes();
                        self.share.copied.fetch_add(bytes, Ordering::Relaxed);
                        self.finish_piece(index);
                        self.tries_of_origin = 0;
                    }
                    Err(CopyError::Local(error)) => return Err(error.into()),
                    Err(CopyError::Bad(bad)) => {
                        tracing::warn!(path = %self.file.path, error = %bad, "damaged bytes in the shared tier");
                        self.damaged().await;
                    }
                    Err(CopyError::Trouble(error)) => self.failed(&Chain(&error).to_string()),
                }
            }
        }
        Ok(())
    }

    fn finish_piece(&mut self, index: usize) {
        let piece = &mut self.pieces[index];
        if piece.fetching.is_some() {
            self.fetching -= 1;
        }
        piece.finish();
    }

    /// A node that cannot reach the origin leaves it to the others for a while, if there may be any.
    fn without_origin(&mut self, index: usize, error: PartsError) -> Result<(), PartsError> {
        let passes = matches!(&error, PartsError::Source(SourceError::Unavailable { .. }));
        let alone = self.reach() != Reach::Full || self.tries_of_origin >= TRIES_OF_ORIGIN;
        if !passes || alone {
            return Err(error);
        }
        if !self.is_left_to_others() {
            self.tries_of_origin += 1;
            self.left_until = Some(Instant::now() + LEAVE_TO_OTHERS);
            tracing::warn!(path = %self.file.path, "origin out of reach, left to the other nodes for now");
        }
        self.pieces[index].owed = None;
        Ok(())
    }

    /// Damaged bytes are set aside, and brought anew under the same name.
    async fn damaged(&mut self) {
        self.set_aside += 1;
        self.share.set_aside().await;
        if !self.share.open_again().await {
            self.failures = FAILURES;
            return;
        }
        self.begin_anew();
    }

    /// What has the blob's name now is another directory.
    fn begin_anew(&mut self) {
        self.fill = self.share.fill();
        (self.sums, self.mine) = (HashMap::new(), HashMap::new());
        (self.silence, self.silent) = (Silence::default(), HashMap::new());
        self.view.segments.fill(SegmentView::default());
        self.next_look = Instant::now();
    }
}

/// Cuts what is missing at the borders of segments and pieces.
fn cut(missing: Vec<Range<u64>>, fill: &Fill, piece_bytes: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for range in split(missing, piece_bytes) {
        let mut at = range.start;
        while at < range.end {
            let segment = fill.segment_of(at);
            let end = fill.range(segment).end.min(range.end);
            pieces.push(Piece {
                range: at..end,
                segment,
                done: false,
                copying: None,
                fetching: None,
                owed: None,
            });
            at = end;
        }
    }
    pieces
}

/// Reads a block of the local bytes on the blocking pool.
async fn read_local(
    part: &Arc<Part>,
    range: Range<u64>,
) -> Result<Vec<u8>, crate::store::StoreError> {
    let part = Arc::clone(part);
    blocking::run(move || part.read(range)).await
}
