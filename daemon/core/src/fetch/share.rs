//! Bringing the bytes of one file through both tiers: what this node won it fetches from the origin and writes
//! to the shared tier behind, what others won it copies from there as it lands.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use self::copy::{Copied, CopyError};
use self::pieces::{Piece, cut};
use self::questions::{Answer, Looked, Questions, set_aside};
use self::upload::Upload;
use super::parts::{Origin, PartsError};
use super::range::{Connection, Ranged};
use crate::errors::Chain;
use crate::shared::choice::{
    FAILURES, LATEST_LOOK, LISTENS, LOOK, Move, Place, Reach, SILENT, Segment, Situation,
};
use crate::shared::{
    BLOCK_BYTES, Egress, Fill, SegmentView, SharedClaim, SharedTier, Silence, Sums, Trouble, View,
    is_shareable,
};
use crate::source::{RemoteFile, SourceError};
use crate::store::{Part, StageKey};

mod copy;
mod pieces;
mod questions;
mod upload;

/// Claims of others that are read in one look.
const CLAIMS_A_LOOK: usize = 16;

/// Bytes that one call reads or writes.
const STEP_BYTES: usize = 1 << 20;

/// Times that damaged bytes of one file are set aside before it is brought without the shared tier.
const SET_ASIDE: u32 = 2;

/// How long the fastest way waits for an answer of the shared tier before it goes on without.
const IMPATIENT: Duration = Duration::from_millis(250);

/// How long a node that cannot reach the origin leaves it to the others…
const LEAVE_TO_OTHERS: Duration = Duration::from_secs(15);

/// …and how often, before it gives up.
const TRIES_OF_ORIGIN: u32 = 4;

/// One file in the shared tier, for one try to bring it.
pub(super) struct Share {
    tier: Arc<SharedTier>,
    key: StageKey,
    size: u64,
    fill: Mutex<Arc<Fill>>,
    /// Bytes that came from the shared tier.
    copied: Arc<AtomicU64>,
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
            fill: Mutex::new(Arc::new(opened.ok()?)),
            tier,
            key,
            size,
            copied: Arc::default(),
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

    /// The local bytes proved wrong: those in the shared tier are set aside, whoever brought them. True if some
    /// of the local ones came from there.
    pub(super) async fn is_to_blame(&self) -> bool {
        set_aside(&self.tier, &self.fill(), &self.key).await;
        self.copied.load(Ordering::Relaxed) > 0
    }
}

/// How a piece ended.
enum Ended {
    Fetched(Result<(), PartsError>),
    /// From this directory.
    Copied(Arc<Fill>, Result<(), CopyError>),
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
    questions: Questions,
    view: View,
    /// It was looked at what is there.
    seen: bool,
    next_look: Instant,
    pause: Duration,
    clock: Instant,
    silence: Silence,
    heard: Option<Instant>,
    /// Claims whose owners were silent for too long.
    silent: HashMap<usize, u32>,
    /// What this node asks to be its own.
    claiming: Option<usize>,
    /// Segments that this node has claimed, each with the turn.
    mine: HashMap<usize, u32>,
    sums: HashMap<usize, Arc<Sums>>,
    failures: u32,
    /// When the tier was last left out in the middle of it.
    stalled_at: Option<Instant>,
    /// The directory is to be replaced; true if it holds damage.
    replace: Option<bool>,
    /// It holds damage, and nothing is to be copied from there any more.
    replacing: bool,
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
        let piece_bytes = piece_bytes.min(fill.segment_bytes());
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
            questions: Questions::new(&share.tier),
            view: View {
                sealed: false,
                segments: vec![SegmentView::default(); fill.segments()],
            },
            fill,
            seen: false,
            next_look: now,
            pause: LOOK,
            clock: now,
            silence: Silence::default(),
            heard: None,
            silent: HashMap::new(),
            claiming: None,
            mine: HashMap::new(),
            sums: HashMap::new(),
            failures: 0,
            stalled_at: None,
            replace: None,
            replacing: false,
            set_aside: 0,
            left_until: None,
            tries_of_origin: 0,
        }
    }

    async fn run(mut self) -> Result<(), PartsError> {
        let shared = Arc::clone(&self.origin.shared);
        let tier = Arc::clone(self.tier);
        let meter = Arc::clone(&self.origin.meter);
        let connection = || Connection::new(&shared);
        // Kept across turns of the loop, so that this file keeps its place among those that wait.
        let mut next = std::pin::pin!(connection());
        while self.pieces.iter().any(|piece| !piece.done) {
            let changed = tier.changed().notified();
            self.ask();
            let chosen = self.choose();
            match chosen {
                Move::Claim(segment) => self.claim(segment),
                Move::Copy(segment) if self.copy(segment) => continue,
                _ => {}
            }
            let fetch = matches!(chosen, Move::Fetch(_) | Move::Race(_));
            let wake = self.wake();
            let waits = matches!(chosen, Move::Wait) && self.tasks.is_empty();
            let _waits = waits.then(|| meter.waits().neighbour());
            tokio::select! {
                connected = &mut next, if fetch && self.fetching < shared.limits.connections => {
                    next.set(connection());
                    self.fetch(chosen, connected);
                }
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok((piece, ended)) => self.ended(piece, ended)?,
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                answer = self.questions.answer() => self.answered(answer),
                () = tokio::time::sleep_until(wake) => {}
                () = changed => {}
            }
        }
        Ok(())
    }

    /// When to look again what is to be done, if nothing happens before.
    fn wake(&self) -> Instant {
        if !self.questions.is_pending() {
            return self.next_look;
        }
        match IMPATIENT.checked_sub(self.questions.pending_for()) {
            Some(left) if !left.is_zero() => Instant::now() + left,
            _ => Instant::now() + LATEST_LOOK,
        }
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
            reach: match self.reach() {
                // Whoever wants the fastest way does not wait to be told that it may go.
                Reach::Full if self.is_impatient() => Reach::ReadOnly,
                reach => reach,
            },
            segments: &segments,
            outstanding: self.tier.outstanding(),
            copies: copies.count(),
            copying: self.tier.copying(),
            piece_bytes: self.piece_bytes,
            origin_rate: rates.origin.get(),
            shared_rate: rates.shared.get(),
            random: fastrand::u64(..),
        };
        let chosen = situation.next();
        let of_origin = matches!(chosen, Move::Claim(_) | Move::Fetch(_) | Move::Race(_));
        let asked = matches!(chosen, Move::Claim(_)) && self.questions.is_pending();
        // What can only be read may hold it all.
        let unseen = !self.seen && situation.reach == Reach::ReadOnly && !self.is_impatient();
        match asked || unseen || of_origin && self.is_left_to_others() {
            true => Move::Wait,
            false => chosen,
        }
    }

    fn is_impatient(&self) -> bool {
        let fastest = self.tier.config().egress == Egress::Fastest;
        fastest && self.questions.pending_for() >= IMPATIENT
    }

    fn is_left_to_others(&self) -> bool {
        self.left_until.is_some_and(|until| until > Instant::now())
    }

    fn place(&self, index: usize) -> Place {
        let segment = self.view.segments[index];
        let mine = self.mine.contains_key(&index);
        let claiming = self.claiming == Some(index);
        if (mine || claiming && self.is_impatient()) && !self.is_left_to_others() {
            return Place::Mine;
        }
        // Its checksums are asked for first, and one question waits for the other.
        let can_copy = self.sums.contains_key(&index) || !self.questions.is_pending();
        match segment.turn {
            _ if segment.here && can_copy => Place::Here,
            Some(turn) => Place::Theirs {
                silent: self
                    .silent
                    .get(&index)
                    .is_some_and(|silent| *silent >= turn),
            },
            None if segment.here || claiming => Place::Theirs { silent: false },
            None => Place::Free,
        }
    }

    /// Asks what is due, unless an answer is still awaited.
    fn ask(&mut self) {
        if self.questions.is_pending() {
            return;
        }
        let replace = self.replace.filter(|_| self.tier.reach() != Reach::Away);
        if let Some(damaged) = replace {
            self.replace = None;
            let (key, size) = (self.share.key.clone(), self.share.size);
            self.questions.replace(&self.fill, key, size, damaged);
        } else if Instant::now() >= self.next_look {
            let listen = self.wait_for_whom();
            self.questions.look(&self.fill, listen);
        }
    }

    /// The segments whose owners keep this node waiting, if it is time to hear of them.
    fn wait_for_whom(&mut self) -> Vec<usize> {
        let often = self.tier.config().claim_timeout / 20;
        if self.heard.is_some_and(|heard| heard.elapsed() < often) {
            return Vec::new();
        }
        let idle = self.pieces.iter().filter(|piece| piece.is_idle());
        let mut waiting: Vec<usize> = idle
            .map(|piece| piece.segment)
            .filter(|segment| !self.mine.contains_key(segment))
            .collect();
        waiting.dedup();
        // Some at a time, or many claims would make one look take longer than a tier may.
        fastrand::shuffle(&mut waiting);
        waiting.truncate(CLAIMS_A_LOOK);
        if !waiting.is_empty() {
            self.heard = Some(Instant::now());
        }
        waiting
    }

    fn answered(&mut self, answer: Answer) {
        match answer {
            Answer::Looked(Ok(looked)) => self.looked(looked),
            Answer::Looked(Err(error)) => {
                tracing::debug!(path = %self.file.path, error = %Chain(&error), "shared tier not looked at");
                self.pause = LATEST_LOOK;
                self.look_later();
                if let Trouble::Failed(_) = error {
                    // The directory may be gone: it was removed.
                    self.failed(&error);
                    self.replace.get_or_insert(false);
                }
            }
            Answer::Claimed {
                segment,
                turn,
                claim,
            } => {
                self.claiming = None;
                match claim {
                    Ok(Some(claim)) => return self.claimed(segment, turn, claim),
                    Ok(None) => {
                        self.view.segments[segment].turn = Some(turn);
                        self.next_look = Instant::now() + LOOK / 4;
                    }
                    Err(error) => {
                        self.failed(&error);
                        // The directory may be gone: it was collected.
                        self.replace.get_or_insert(false);
                    }
                }
                self.let_go(segment);
            }
            Answer::Summed { .. } if self.replacing => {}
            Answer::Summed { segment, sums } => match sums {
                Ok(Some(sums)) => {
                    self.sums.insert(segment, Arc::new(sums));
                }
                Ok(None) => self.damaged(),
                Err(error) => self.failed(&error),
            },
            Answer::Replaced { damaged, opened } => match opened {
                Ok(fill) if Arc::ptr_eq(&fill, &self.fill) => {}
                // Another store, cut in another way.
                Ok(fill) if fill.segment_bytes() != self.fill.segment_bytes() => {
                    self.failures = FAILURES;
                }
                Ok(fill) => self.begin_anew(fill),
                Err(error) => {
                    self.failed(&error);
                    self.replace = Some(damaged);
                }
            },
        }
    }

    fn look_later(&mut self) {
        self.next_look = Instant::now() + self.pause.mul_f64(0.75 + fastrand::f64() / 2.0);
    }

    fn looked(&mut self, looked: Looked) {
        let timeout = self.tier.config().claim_timeout;
        self.pause = match looked.view == self.view {
            true => self
                .pause
                .mul_f64(1.5)
                .min(LATEST_LOOK)
                .min(timeout / LISTENS),
            false => LOOK,
        };
        (self.view, self.seen) = (looked.view, true);
        self.give_up_what_others_did();
        for (segment, turn, content) in looked.heard {
            let now = self.clock.elapsed();
            let silence = self.silence.observe(segment, turn, content, now);
            if silence >= timeout.mul_f64(SILENT) {
                tracing::info!(path = %self.file.path, segment, "claim of a silent node is taken over");
                self.silent.insert(segment, turn);
            } else {
                // It came back, or another one has claimed this turn since.
                self.silent.remove(&segment);
            }
        }
        self.look_later();
    }

    /// What this node had claimed and another one finished is copied like all else.
    fn give_up_what_others_did(&mut self) {
        let done = |segment: &usize| self.view.segments[*segment].here;
        let done: Vec<usize> = self.mine.keys().copied().filter(done).collect();
        for segment in done {
            self.mine.remove(&segment);
            for piece in &mut self.pieces {
                if piece.segment != segment || piece.done {
                    continue;
                }
                piece.owed = None;
                if let Some(task) = piece.fetching.take() {
                    task.abort();
                    self.fetching -= 1;
                }
                // It may have been this node itself, and the news of its last piece are on their way.
                if self.part.present_in(&piece.range) == piece.bytes() {
                    piece.finish();
                }
            }
        }
    }

    fn claim(&mut self, segment: usize) {
        // At once, so that no other file of this node claims for the same hunger.
        for piece in &mut self.pieces {
            if piece.segment == segment && !piece.done {
                piece.owed = Some(self.tier.owe(piece.bytes()));
            }
        }
        let turn = self.view.segments[segment].turn.map_or(0, |turn| turn + 1);
        self.claiming = Some(segment);
        self.questions.claim(&self.fill, segment, turn);
    }

    fn claimed(&mut self, segment: usize, turn: u32, claim: SharedClaim) {
        self.mine.insert(segment, turn);
        let upload = Upload {
            tier: Arc::clone(self.tier),
            fill: Arc::clone(&self.fill),
            part: Arc::clone(self.part),
            verified: Arc::clone(&self.share.verified),
            segment,
            claim,
        };
        self.tier.behind().spawn(upload.run());
    }

    /// What was to be fetched of a segment is not, but for what is on its way.
    fn let_go(&mut self, segment: usize) {
        for piece in &mut self.pieces {
            if piece.segment == segment && piece.fetching.is_none() {
                piece.owed = None;
            }
        }
    }

    fn failed(&mut self, error: &Trouble) {
        let path = &self.file.path;
        tracing::debug!(%path, error = %Chain(error), "shared tier failed");
        // When it hangs many calls say so, one after the other.
        let stalled = matches!(error, Trouble::Away(_));
        let known = |at: Instant| at.elapsed() < self.tier.config().stall_timeout;
        if stalled && self.stalled_at.is_some_and(known) {
            return;
        }
        if stalled {
            self.stalled_at = Some(Instant::now());
        }
        self.failures += 1;
    }

    /// Starts to copy a piece; false if the checksums of its segment have to be asked for first.
    fn copy(&mut self, segment: usize) -> bool {
        let Some(sums) = self.sums.get(&segment).map(Arc::clone) else {
            self.questions.sums(&self.fill, segment);
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
            copied: Arc::clone(&self.share.copied),
        };
        let from = Arc::clone(&self.fill);
        let task = async move { (index, Ended::Copied(from, copy.run().await)) };
        let owed = self.tier.owe_copy(piece.bytes());
        piece.copying = Some((self.tasks.spawn(task), owed));
        true
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
        // What was copied of it is not fetched, too.
        let start = self.part.end_of_run(piece.range.start).min(piece.range.end);
        let rest = start..piece.range.end;
        let ranged = Ranged::new(self.origin, self.file, self.part, rest);
        self.fetching += 1;
        let task = async move { (index, Ended::Fetched(ranged.fetch(connection).await)) };
        piece.fetching = Some(self.tasks.spawn(task));
    }

    fn ended(&mut self, index: usize, ended: Ended) -> Result<(), PartsError> {
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
            Ended::Copied(from, result) => {
                piece.copying = None;
                match result {
                    Ok(()) => {
                        self.finish_piece(index);
                        self.tries_of_origin = 0;
                    }
                    Err(CopyError::Local(error)) => return Err(error.into()),
                    Err(CopyError::Bad(bad)) => {
                        tracing::warn!(path = %self.file.path, error = %bad, "damaged bytes in the shared tier");
                        // Of the directory that is replaced now many copies may say so.
                        if Arc::ptr_eq(&from, &self.fill) && !self.replacing {
                            self.damaged();
                        }
                    }
                    Err(CopyError::Trouble(error)) => self.failed(&error),
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
    fn damaged(&mut self) {
        self.set_aside += 1;
        (self.replace, self.replacing) = (Some(true), true);
        // Nothing more is copied from there.
        self.sums.clear();
        self.view.segments.fill(SegmentView::default());
    }

    /// Another directory has the blob's name now.
    fn begin_anew(&mut self, fill: Arc<Fill>) {
        *self
            .share
            .fill
            .lock()
            .expect("no holder of this lock panics") = Arc::clone(&fill);
        self.fill = fill;
        (self.sums, self.mine) = (HashMap::new(), HashMap::new());
        (self.silence, self.silent) = (Silence::default(), HashMap::new());
        (self.replace, self.replacing, self.seen) = (None, false, false);
        self.view.segments.fill(SegmentView::default());
        // What was claimed there is not: it would count against what can be claimed here.
        for piece in &mut self.pieces {
            if piece.fetching.is_none() {
                piece.owed = None;
            }
        }
        self.next_look = Instant::now();
    }
}
