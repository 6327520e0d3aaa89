//! Which bytes a node brings next, and by which way. Nothing here knows a clock, a file or a socket, so a
//! simulation of a thousand nodes asks the same questions, and is as patient.

use std::time::Duration;

/// How often a byte may leave its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Egress {
    /// Once for all nodes: what another node brings is waited for.
    #[default]
    Once,
    /// As often as it takes to be fastest.
    Fastest,
}

/// What can be done with the shared tier now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Nothing.
    Away,
    /// It can be read: it is full, or mounted read-only.
    ReadOnly,
    /// Everything.
    Full,
}

/// Where a segment's bytes are, seen from one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere yet, and nobody brings them.
    Free,
    /// Another node has claimed it.
    Theirs {
        /// And has not been heard of for as long as it takes to be thought dead.
        silent: bool,
    },
    /// This node has claimed it.
    Mine,
    /// In the shared tier.
    Here,
}

/// One segment of a file, seen from one node.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Where it is.
    pub place: Place,
    /// Bytes of it that this node lacks, and does not bring by any way.
    pub idle: u64,
    /// Bytes of it that this node copies now, and does not fetch as well.
    pub copying: u64,
}

/// What a node knows as it chooses.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// The policy.
    pub egress: Egress,
    /// The shared tier.
    pub reach: Reach,
    /// The segments of one file, in order.
    pub segments: &'a [Segment],
    /// Bytes that this node has set out to fetch from origins and did not receive yet, of all files.
    pub outstanding: u64,
    /// Pieces of this file that are copied now.
    pub copies: usize,
    /// Bytes that this node copies now, of all files.
    pub copying: u64,
    /// Bytes of a piece, which is fetched or copied at a time.
    pub piece_bytes: u64,
    /// Bytes per second from origins, once that is known.
    pub origin_rate: Option<f64>,
    /// Bytes per second from the shared tier, once that is known.
    pub shared_rate: Option<f64>,
    /// A random number, so that nodes choose apart.
    pub random: u64,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// Claim this segment, whether it is free or its owner silent.
    Claim(usize),
    /// Copy a piece of this segment from the shared tier.
    Copy(usize),
    /// Fetch a piece of this segment from the origin.
    Fetch(usize),
    /// Fetch a piece from the origin that is being copied.
    Race(usize),
    /// Nothing until something changes.
    Wait,
}

/// Pieces of one file that are copied at a time.
pub const COPIES: usize = 8;

/// Pieces that a node copies at once, of all files together.
pub const NODE_COPIES: usize = 12;

/// Blocks that a node writes to the shared tier at once: each takes its bytes of memory.
pub const WRITES: usize = 4;

/// Bytes that are written to the shared tier before they are synced.
pub const SYNC_BYTES: u64 = 64 << 20;

/// How soon the shared tier is looked at again when something has changed there, and how late at most.
pub const LOOK: Duration = Duration::from_millis(200);
/// See [`LOOK`].
pub const LATEST_LOOK: Duration = Duration::from_secs(2);

/// How often a writer looks for bytes that have come.
pub const WRITER_LOOK: Duration = Duration::from_millis(25);

/// How often a claim's content changes within the time after which its owner is thought dead…
pub const BEATS: u32 = 5;

/// …and how often those who wait for it look, at most.
pub const LISTENS: u32 = 10;

/// Calls for one file that may fail before it is brought without the shared tier.
pub const FAILURES: u32 = 5;

/// An owner that was silent for so much of the claim timeout is thought dead: the rest of it is for noticing, and
/// for beginning anew.
pub const SILENT: f64 = 0.7;

/// Pieces that are copied at a time as long as the rate of the shared tier is not known.
const FIRST_COPIES: u64 = 2;

/// How far ahead a node claims and copies: what it fetches within this time, in seconds. More would leave nothing to the
/// others, less would leave its connections idle between two segments.
const AHEAD_SECONDS: f64 = 1.0;

impl Situation<'_> {
    /// What to do next.
    #[must_use]
    pub fn next(&self) -> Move {
        if self.reach == Reach::Away {
            return self.first(|_| true).map_or(Move::Wait, Move::Fetch);
        }
        if let Some(mine) = self.first(|segment| segment.place == Place::Mine) {
            return Move::Fetch(mine);
        }
        let here = |segment: &Segment| segment.place == Place::Here;
        if let Some(here) = self.first(here).filter(|_| self.may_copy()) {
            return Move::Copy(here);
        }
        if !self.is_hungry() {
            return Move::Wait;
        }
        if let Some(open) = self.any_open() {
            return match self.reach {
                Reach::Full => Move::Claim(open),
                // Nobody can share it: each node brings it for itself.
                Reach::ReadOnly | Reach::Away => Move::Fetch(open),
            };
        }
        match self.egress {
            Egress::Once => Move::Wait,
            Egress::Fastest => self.overtake(),
        }
    }

    /// Whether the origin can be asked for more.
    fn is_hungry(&self) -> bool {
        let ahead = self.origin_rate.unwrap_or(0.0) * AHEAD_SECONDS;
        (self.outstanding as f64) < ahead.max(self.piece_bytes as f64)
    }

    /// Whether more can be copied at once. From a slow tier no more than it can bring soon: what is half copied
    /// when the origin overtakes it came in vain.
    fn may_copy(&self) -> bool {
        let ahead = match self.shared_rate {
            Some(rate) => (rate * AHEAD_SECONDS).max(self.piece_bytes as f64),
            None => (FIRST_COPIES * self.piece_bytes) as f64,
        };
        self.copies < COPIES && (self.copying as f64) < ahead
    }

    fn first(&self, wanted: impl Fn(&Segment) -> bool) -> Option<usize> {
        let idle = |segment: &Segment| segment.idle > 0 && wanted(segment);
        self.segments.iter().position(idle)
    }

    /// One of the segments that nobody brings: not the first, which everybody would choose.
    fn any_open(&self) -> Option<usize> {
        let open = |(_, segment): &(usize, &Segment)| {
            let open = matches!(segment.place, Place::Free | Place::Theirs { silent: true });
            segment.idle > 0 && open
        };
        let count = self.segments.iter().enumerate().filter(open).count() as u64;
        let chosen = usize::try_from(self.random.checked_rem(count)?).ok()?;
        let mut open = self.segments.iter().enumerate().filter(open);
        open.nth(chosen).map(|(index, _)| index)
    }

    /// Fetches what would come from the shared tier, if the origin brings a piece of it before the shared tier
    /// has brought the rest. From the end: copying goes from the front.
    fn overtake(&self) -> Move {
        let left: u64 = self.segments.iter().map(|one| one.idle + one.copying).sum();
        let by_shared = self.shared_rate.map(|rate| left as f64 / rate);
        let by_origin = self.origin_rate.map(|rate| self.piece_bytes as f64 / rate);
        let waits = |segment: &Segment| matches!(segment.place, Place::Theirs { .. });
        let last = |wanted: &dyn Fn(&Segment) -> bool| {
            let found = |segment: &Segment| segment.idle > 0 && wanted(segment);
            self.segments.iter().rposition(found)
        };
        let faster = match (by_origin, by_shared) {
            (Some(origin), Some(shared)) => origin < shared,
            // What others bring may never come. What is there comes, at a rate that is known soon.
            (_, None) => return last(&waits).map_or(Move::Wait, Move::Fetch),
            (None, Some(_)) => true,
        };
        if !faster {
            return Move::Wait;
        }
        if let Some(index) = last(&waits).or_else(|| last(&|_| true)) {
            return Move::Fetch(index);
        }
        let copied = self.segments.iter().rposition(|one| one.copying > 0);
        copied.map_or(Move::Wait, Move::Race)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn segment(place: Place) -> Segment {
        Segment {
            place,
            idle: 256 * MIB,
            copying: 0,
        }
    }

    fn situation(segments: &[Segment]) -> Situation<'_> {
        Situation {
            egress: Egress::Once,
            reach: Reach::Full,
            segments,
            outstanding: 0,
            copies: 0,
            copying: 0,
            piece_bytes: 16 * MIB,
            origin_rate: None,
            shared_rate: None,
            random: 0,
        }
    }

    const THEIRS: Place = Place::Theirs { silent: false };
    const SILENT: Place = Place::Theirs { silent: true };

    #[test]
    fn a_byte_leaves_its_origin_once() {
        let others = [segment(THEIRS), segment(THEIRS)];
        assert_eq!(situation(&others).next(), Move::Wait);
        let some = [segment(THEIRS), segment(Place::Free), segment(Place::Here)];
        assert_eq!(situation(&some).next(), Move::Copy(2));
        let busy = Situation {
            copies: COPIES,
            ..situation(&some)
        };
        assert_eq!(busy.next(), Move::Claim(1));
        let dead = [segment(SILENT), segment(THEIRS)];
        assert_eq!(situation(&dead).next(), Move::Claim(0));
    }

    #[test]
    fn nodes_choose_apart_and_no_more_than_they_can_fetch() {
        let free = [segment(Place::Free); 4];
        let at = |random| Situation {
            random,
            ..situation(&free)
        };
        assert_eq!(at(5).next(), Move::Claim(1));
        assert_eq!(at(7).next(), Move::Claim(3));
        let full = Situation {
            outstanding: 16 * MIB,
            ..situation(&free)
        };
        assert_eq!(full.next(), Move::Wait);
        let fast = Situation {
            origin_rate: Some(1e9),
            ..full
        };
        assert_eq!(fast.next(), Move::Claim(0));
    }

    #[test]
    fn without_the_tier_everything_comes_from_the_origin() {
        for place in [Place::Free, THEIRS, Place::Here, Place::Mine] {
            let segments = [segment(place)];
            let away = Situation {
                reach: Reach::Away,
                outstanding: 1 << 40,
                ..situation(&segments)
            };
            assert_eq!(away.next(), Move::Fetch(0), "{place:?}");
        }
        let free = [segment(Place::Free), segment(Place::Here)];
        let full = Situation {
            reach: Reach::ReadOnly,
            ..situation(&free)
        };
        assert_eq!(full.next(), Move::Copy(1));
        let copying = Situation {
            copies: COPIES,
            ..full
        };
        assert_eq!(copying.next(), Move::Fetch(0));
    }

    #[test]
    fn no_more_is_copied_at_once_than_a_slow_tier_brings_soon() {
        let here = [segment(Place::Here); 4];
        let copying = |pieces: u64, shared_rate| Situation {
            copies: pieces as usize,
            copying: pieces * 16 * MIB,
            shared_rate,
            ..situation(&here)
        };
        let moves = |pieces, rate| copying(pieces, rate).next();
        assert_eq!(moves(1, None), Move::Copy(0));
        assert_eq!(moves(2, None), Move::Wait);
        assert_eq!(moves(0, Some(1e6)), Move::Copy(0));
        assert_eq!(moves(1, Some(1e6)), Move::Wait);
        assert_eq!(moves(7, Some(1e9)), Move::Copy(0));
        assert_eq!(moves(COPIES as u64, Some(1e9)), Move::Wait);
    }

    #[test]
    fn the_fastest_way_overtakes_a_slow_tier_and_only_that() {
        let here = [segment(Place::Here); 2];
        let copying = Situation {
            egress: Egress::Fastest,
            copies: COPIES,
            origin_rate: Some(100e6),
            ..situation(&here)
        };
        let with = |shared_rate| Situation {
            shared_rate: Some(shared_rate),
            ..copying
        };
        assert_eq!(copying.next(), Move::Wait, "its rate is not known yet");
        assert_eq!(with(10e6).next(), Move::Fetch(1));
        assert_eq!(with(10e9).next(), Move::Wait);
        let last = [Segment {
            idle: 0,
            copying: 16 * MIB,
            ..segment(Place::Here)
        }];
        let end = Situation {
            segments: &last,
            ..with(10e6)
        };
        assert_eq!(end.next(), Move::Race(0));
        let once = Situation {
            egress: Egress::Once,
            ..end
        };
        assert_eq!(once.next(), Move::Wait);
    }
}
