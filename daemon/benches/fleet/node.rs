//! One node of the simulation: what it has on its way, and who waits for a place.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use weightd_core::shared::choice::{self, LOOK, Place, Segment};
use weightd_core::shared::{SegmentView, SharedClaim, Silence, View};

use super::rate::Rate;
use super::tier::Blob;

/// Places that are taken in turn, as in a semaphore.
pub(super) struct Places<T> {
    free: usize,
    waiting: VecDeque<T>,
}

impl<T: PartialEq> Places<T> {
    pub(super) fn new(free: usize) -> Self {
        let waiting = VecDeque::new();
        Self { free, waiting }
    }

    /// Takes a place; otherwise `who` waits for one.
    pub(super) fn take(&mut self, who: T) -> bool {
        if self.free > 0 {
            self.free -= 1;
            return true;
        }
        if !self.waiting.contains(&who) {
            self.waiting.push_back(who);
        }
        false
    }

    /// Gives a place back, to whoever has waited longest, if somebody has.
    pub(super) fn give(&mut self) -> Option<T> {
        let next = self.waiting.pop_front();
        if next.is_none() {
            self.free += 1;
        }
        next
    }

    /// Gives a place back, and says who may want it.
    pub(super) fn offer(&mut self) -> Option<T> {
        self.free += 1;
        self.waiting.pop_front()
    }

    /// Who may want a place that nobody has taken.
    pub(super) fn offer_again(&mut self) -> Option<T> {
        (self.free > 0).then(|| self.waiting.pop_front()).flatten()
    }

    pub(super) fn leave(&mut self, who: &T) {
        self.waiting.retain(|waiting| waiting != who);
    }
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Copy {
        file: usize,
        piece: usize,
    },
    Fetch {
        file: usize,
        piece: usize,
    },
    Write {
        upload: usize,
    },
    /// A call that took too long: nobody waits for it, but it goes on.
    Hung,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// For a place.
    Waiting,
    /// For an answer.
    Asking,
    Moving,
}

/// One transfer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) work: Work,
    pub(super) stage: Stage,
    /// Bytes after those that move now.
    pub(super) left: u64,
    /// Bytes that move now.
    pub(super) moving: u64,
}

/// The transfers of a node. A number is not used again soon, so a late event finds nothing.
#[derive(Default)]
pub(super) struct Runs {
    slots: Vec<(u32, Option<Run>)>,
    free: Vec<u32>,
}

const SLOT_BITS: u32 = 10;

impl Runs {
    pub(super) fn add(&mut self, run: Run) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len()).expect("few transfers at once") - 1
        });
        assert!(slot < 1 << SLOT_BITS, "too many transfers at once");
        let (uses, place) = &mut self.slots[slot as usize];
        *uses = (*uses + 1) % (1 << (32 - SLOT_BITS));
        *place = Some(run);
        (*uses << SLOT_BITS | slot) + 1
    }

    pub(super) fn of(&mut self, id: u32) -> Option<&mut Run> {
        let slot = (id - 1) & ((1 << SLOT_BITS) - 1);
        let (uses, run) = self.slots.get_mut(slot as usize)?;
        (*uses == (id - 1) >> SLOT_BITS).then_some(())?;
        run.as_mut()
    }

    pub(super) fn take(&mut self, id: u32) -> Option<Run> {
        let run = *self.of(id)?;
        let slot = (id - 1) & ((1 << SLOT_BITS) - 1);
        self.slots[slot as usize].1 = None;
        self.free.push(slot);
        Some(run)
    }

    /// The number of a transfer for this.
    pub(super) fn find(&self, work: Work) -> Option<u32> {
        let wanted = |(_, run): &(u32, Option<Run>)| run.is_some_and(|run| run.work == work);
        let slot = self.slots.iter().position(wanted)?;
        let uses = self.slots[slot].0;
        Some((uses << SLOT_BITS | u32::try_from(slot).ok()?) + 1)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Run> {
        self.slots.iter().filter_map(|(_, run)| run.as_ref())
    }
}

/// A piece of a file; 0 is no transfer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Piece {
    pub(super) copying: u32,
    pub(super) fetching: u32,
    pub(super) done: bool,
    pub(super) owed: bool,
}

/// One file on its way: `Bringing` of the fetcher.
pub(super) struct Bring {
    pub(super) pieces: Vec<Piece>,
    /// Pieces that are not done.
    pub(super) left: usize,
    pub(super) segments: Vec<Segment>,
    pub(super) view: Rc<View>,
    pub(super) next_look: f64,
    pub(super) pause: Duration,
    pub(super) heard: f64,
    pub(super) silence: Silence,
    pub(super) silent: HashMap<usize, u32>,
    /// Claims that are being read.
    pub(super) wanted: Vec<(usize, u32)>,
    pub(super) mine: Vec<bool>,
    pub(super) sums: Vec<bool>,
    pub(super) copies: usize,
    pub(super) fetching: usize,
    pub(super) failures: u32,
    /// It waits for a call, or for its turn to claim.
    pub(super) busy: bool,
    /// Since when there is nothing new to be seen.
    pub(super) quiet: Option<f64>,
    /// The first piece that is not done, and when all before it is hashed.
    pub(super) front: usize,
    pub(super) hashed_at: f64,
}

impl Bring {
    pub(super) fn new(blob: &Blob, now: f64) -> Self {
        let segments = blob.of_segment.len();
        let idle = |segment| Segment {
            place: Place::Free,
            idle: blob.segment_bytes(segment),
            copying: 0,
        };
        Self {
            pieces: vec![Piece::default(); blob.pieces.len()],
            left: blob.pieces.len(),
            segments: (0..segments).map(idle).collect(),
            view: Rc::new(View {
                sealed: false,
                segments: vec![SegmentView::default(); segments],
            }),
            next_look: now,
            pause: LOOK,
            heard: now,
            silence: Silence::default(),
            silent: HashMap::new(),
            wanted: Vec::new(),
            mine: vec![false; segments],
            sums: vec![false; segments],
            copies: 0,
            fetching: 0,
            failures: 0,
            busy: true,
            quiet: None,
            front: 0,
            hashed_at: now,
        }
    }

    /// Changes a piece, and with it what is known of its segment.
    pub(super) fn set(&mut self, blob: &Blob, index: usize, change: impl FnOnce(&mut Piece)) {
        let span = blob.pieces[index];
        let piece = &mut self.pieces[index];
        let segment = &mut self.segments[span.segment];
        let counts = |piece: &Piece| {
            let idle = !piece.done && piece.copying == 0 && piece.fetching == 0;
            let copying = !piece.done && piece.copying != 0 && piece.fetching == 0;
            (
                u64::from(idle) * span.bytes,
                u64::from(copying) * span.bytes,
            )
        };
        let before = counts(piece);
        self.copies -= usize::from(piece.copying != 0);
        self.fetching -= usize::from(piece.fetching != 0);
        change(piece);
        self.copies += usize::from(piece.copying != 0);
        self.fetching += usize::from(piece.fetching != 0);
        let after = counts(piece);
        segment.idle = segment.idle - before.0 + after.0;
        segment.copying = segment.copying - before.1 + after.1;
    }

    pub(super) fn place_all(&mut self) {
        for index in 0..self.segments.len() {
            self.place(index);
        }
    }

    pub(super) fn place(&mut self, index: usize) {
        let seen = self.view.segments[index];
        self.segments[index].place = match seen.turn {
            _ if self.mine[index] => Place::Mine,
            _ if seen.here => Place::Here,
            Some(turn) => Place::Theirs {
                silent: self.silent.get(&index).is_some_and(|of| *of >= turn),
            },
            None => Place::Free,
        };
    }

    /// What is to be listened for.
    pub(super) fn waits_for(&self) -> Vec<(usize, u32)> {
        let waited = |index: &usize| {
            let place = self.segments[*index].place;
            matches!(place, Place::Theirs { silent: false })
        };
        let waited = (0..self.segments.len()).filter(waited);
        waited
            .filter_map(|index| Some((index, self.view.segments[index].turn?)))
            .collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writer {
    /// For bytes, or an answer.
    Waiting,
    /// About to look for bytes.
    Looking,
    /// For a place, or at work.
    Busy,
    Ended,
}

/// One claimed segment on its way to the shared tier: `Upload` of the fetcher.
pub(super) struct Upload {
    pub(super) file: usize,
    pub(super) segment: usize,
    pub(super) turn: u32,
    pub(super) claim: SharedClaim,
    pub(super) writer: Writer,
    /// Bytes that are here and not written.
    pub(super) backlog: u64,
    /// Bytes that are not written.
    pub(super) left: u64,
    pub(super) unsynced: u64,
    /// What counts as progress, and what the claim says of it.
    pub(super) progress: u64,
    pub(super) shown: u64,
    /// What nobody had brought by the time this node had all of it.
    pub(super) rest: bool,
}

/// One node.
pub(super) struct Node {
    pub(super) owner: String,
    pub(super) start: f64,
    pub(super) warm: Option<f64>,
    pub(super) alive: bool,
    /// The next file to begin.
    pub(super) next_file: usize,
    pub(super) files: Vec<Option<Box<Bring>>>,
    pub(super) verified: Vec<bool>,
    /// Bytes that are owed by the origin.
    pub(super) outstanding: u64,
    pub(super) connections: Places<usize>,
    pub(super) copies: Places<u32>,
    pub(super) writes: Places<usize>,
    /// The turn to claim.
    pub(super) turn: Places<(usize, usize)>,
    pub(super) origin_rate: Rate,
    pub(super) shared_rate: Rate,
    pub(super) runs: Runs,
    pub(super) uploads: Vec<Upload>,
    /// The shared tier is left out.
    pub(super) away: bool,
    pub(super) answered: f64,
    /// What each stream had moved in the last seconds: copies and writes.
    pub(super) samples: VecDeque<(f64, f64)>,
}

impl Node {
    pub(super) fn new(number: usize, shards: usize, connections: usize) -> Self {
        Self {
            owner: format!("node-{number}"),
            start: 0.0,
            warm: None,
            alive: true,
            next_file: 0,
            files: std::iter::repeat_with(|| None).take(shards).collect(),
            verified: vec![false; shards],
            outstanding: 0,
            connections: Places::new(connections),
            copies: Places::new(choice::NODE_COPIES),
            writes: Places::new(choice::WRITES),
            turn: Places::new(1),
            origin_rate: Rate::default(),
            shared_rate: Rate::default(),
            runs: Runs::default(),
            uploads: Vec::new(),
            away: false,
            answered: f64::NEG_INFINITY,
            samples: VecDeque::new(),
        }
    }

    pub(super) fn file(&mut self, file: usize) -> Option<&mut Bring> {
        self.files[file].as_deref_mut()
    }

    pub(super) fn in_flight(&self) -> Vec<usize> {
        let files = self.files.iter().enumerate();
        files
            .filter_map(|(index, file)| file.is_some().then_some(index))
            .collect()
    }

    pub(super) fn upload_of(&mut self, file: usize, segment: usize) -> Option<usize> {
        self.uploads.iter().position(|upload| {
            upload.file == file && upload.segment == segment && upload.writer != Writer::Ended
        })
    }
}
