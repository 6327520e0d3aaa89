//! Hashing the next blocks of two files at once, which takes little longer than one of them.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use weightd_sha256::Sha256;

use crate::buffers::Buffer;

/// How long a block waits for one of another file: 3 ms, in which 1 MiB comes at 350 MB/s. Slower, the hash costs little.
const PATIENCE: Duration = Duration::from_millis(3);

/// After so many waits in vain no more blocks go alone before the next one waits.
const MOST_IN_VAIN: u32 = 4;

/// Where the hashers of files meet.
#[derive(Debug)]
pub(crate) struct SideBySide {
    patience: Duration,
    is_faster: bool,
    meeting: Mutex<Meeting>,
}

#[derive(Debug, Default)]
struct Meeting {
    /// How many files are being hashed.
    files: usize,
    waiting: Option<Waiting>,
    /// How many have waited so far.
    waits: u64,
    /// How many did so in vain since the last one that did not.
    in_vain: u32,
    /// How many blocks go alone before one waits again.
    alone: u32,
}

/// A block whose thread sleeps until somebody else has hashed it.
#[derive(Debug)]
struct Waiting {
    wait: u64,
    block: Unhashed,
    hashed: SyncSender<Sha256>,
}

/// The next block of a file, and the hash of what comes before it.
#[derive(Debug)]
struct Unhashed {
    hash: Sha256,
    bytes: Buffer,
}

/// How a block is hashed.
enum Way {
    Alone(Unhashed),
    With(Unhashed, Waiting),
    /// By somebody else.
    Hashed(Sha256),
}

/// A file's place among those that are hashed. Dropping it gives it up.
#[derive(Debug)]
pub(super) struct Seat(Arc<SideBySide>);

impl Seat {
    pub(super) fn new(meeting: &Arc<SideBySide>) -> Self {
        meeting.lock().files += 1;
        Self(Arc::clone(meeting))
    }

    /// Takes the next bytes of the file into its hash.
    pub(super) fn update(&self, hash: Sha256, bytes: Buffer) -> Sha256 {
        match self.0.meet(Unhashed { hash, bytes }) {
            Way::Hashed(hash) => hash,
            Way::Alone(Unhashed { mut hash, bytes }) => {
                hash.update(&bytes);
                hash
            }
            Way::With(Unhashed { mut hash, bytes }, Waiting { block, hashed, .. }) => {
                let mut other = block.hash;
                Sha256::update_two([&mut hash, &mut other], [&bytes, &block.bytes]);
                // Its memory is free before its file goes on.
                drop(block.bytes);
                let sent = hashed.send(other);
                sent.expect("who waits does so until then");
                hash
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.lock().files -= 1;
    }
}

impl Default for SideBySide {
    fn default() -> Self {
        Self {
            patience: PATIENCE,
            is_faster: weightd_sha256::two_are_faster(),
            meeting: Mutex::default(),
        }
    }
}

impl SideBySide {
    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds company for a block, and waits a little for it.
    fn meet(&self, block: Unhashed) -> Way {
        let mut meeting = self.lock();
        if let Some(waiting) = meeting.waiting.take() {
            meeting.in_vain = 0;
            return Way::With(block, waiting);
        }
        if !self.is_faster || meeting.files < 2 || meeting.alone > 0 {
            meeting.alone = meeting.alone.saturating_sub(1);
            return Way::Alone(block);
        }
        // It has room for the one hash that is sent.
        let (hashed, outcome) = sync_channel(1);
        meeting.waits += 1;
        let wait = meeting.waits;
        meeting.waiting = Some(Waiting {
            wait,
            block,
            hashed,
        });
        drop(meeting);
        match outcome.recv_timeout(self.patience) {
            Ok(hash) => return Way::Hashed(hash),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => unreachable!("who takes a block hashes it"),
        }
        let mut meeting = self.lock();
        let Some(waiting) = meeting.waiting.take_if(|waiting| waiting.wait == wait) else {
            // Somebody came just now.
            drop(meeting);
            return Way::Hashed(outcome.recv().expect("who takes a block hashes it"));
        };
        // Another file's bytes may not come for long: a file that is alone soon waits for every 16th block only.
        meeting.alone = (1 << meeting.in_vain) - 1;
        meeting.in_vain = MOST_IN_VAIN.min(meeting.in_vain + 1);
        Way::Alone(waiting.block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;
    use crate::digest::Digest;

    fn meeting(patience: Duration) -> Arc<SideBySide> {
        let meeting = SideBySide {
            patience,
            is_faster: true,
            ..SideBySide::default()
        };
        Arc::new(meeting)
    }

    fn block(bytes: &[u8]) -> Buffer {
        let mut block = Buffers::new(bytes.len(), 1).take(0);
        block.fill(bytes);
        block
    }

    fn hash(seat: &Seat, blocks: &[&[u8]]) -> Digest {
        let hash = blocks.iter().fold(Sha256::default(), |hash, bytes| {
            seat.update(hash, block(bytes))
        });
        Digest::from_bytes(hash.finish())
    }

    #[test]
    fn two_files_are_hashed_together_and_a_longer_one_goes_on_alone() {
        // Nobody but the other one ends a wait.
        let meeting = meeting(Duration::MAX);
        let seats = [Seat::new(&meeting), Seat::new(&meeting)];
        let [one, other] = seats;
        let second = std::thread::spawn(move || hash(&other, &[b"x", b"yz"]));
        let first = hash(&one, &[b"weights ", b"of a model"]);
        assert_eq!(second.join().unwrap(), Digest::of(b"xyz"));
        assert_eq!(first, Digest::of(b"weights of a model"));

        // The other one has given up its place.
        assert_eq!(hash(&one, &[b"alone"]), Digest::of(b"alone"));
        assert_eq!(meeting.lock().waits, 2);
    }

    #[test]
    fn a_file_whose_company_does_not_come_waits_ever_more_seldom() {
        let meeting = meeting(Duration::ZERO);
        let seats = [Seat::new(&meeting), Seat::new(&meeting)];
        let waited: Vec<_> = (0..64)
            .filter(|_| {
                let before = meeting.lock().waits;
                assert_eq!(hash(&seats[0], &[b"block"]), Digest::of(b"block"));
                meeting.lock().waits > before
            })
            .collect();
        assert_eq!(waited, [0, 1, 3, 7, 15, 31, 47, 63]);
    }
}
