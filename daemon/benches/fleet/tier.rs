//! The shared tier as all nodes of the simulation see it: the real directories, and a count of what is asked
//! of them. A directory that nobody has changed is not read again, only counted.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use anyhow::Result;
use weightd_core::shared::{
    BLOCK_BYTES, Fill, SharedClaim, SharedOptions, SharedStore, Sums, View,
};
use weightd_core::store::StageKey;

/// Requests to the metadata server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Create,
    List,
    Open,
    /// Renames, removals, changes of attributes.
    Other,
}

/// Requests of each [`Kind`].
pub(crate) type Counts = [f64; 4];

/// What was asked of the metadata server, second by second.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    seconds: Vec<Counts>,
    /// Requests per second that begin or end at a second.
    steady: Vec<Counts>,
    /// Requests per second now that are not counted one by one.
    pub(super) background: f64,
}

impl Ledger {
    pub(super) fn count(&mut self, now: f64, kind: Kind, requests: f64) {
        let second = now as usize;
        if self.seconds.len() <= second {
            self.seconds.resize(second + 1, [0.0; 4]);
        }
        self.seconds[second][kind as usize] += requests;
    }

    /// Counts so many requests per second for a span of time.
    pub(super) fn count_steady(&mut self, kind: Kind, from: f64, until: f64, each_second: f64) {
        let (first, last) = (from as usize, until as usize);
        if self.steady.len() <= last {
            self.steady.resize(last + 1, [0.0; 4]);
        }
        if first == last {
            return self.count(from, kind, (until - from) * each_second);
        }
        self.count(from, kind, ((first + 1) as f64 - from) * each_second);
        self.count(until, kind, (until - last as f64) * each_second);
        self.steady[first + 1][kind as usize] += each_second;
        self.steady[last][kind as usize] -= each_second;
    }

    /// All requests, and those of the second that had the most, with the second.
    pub(super) fn sum(&self) -> (Counts, Counts, f64) {
        let (mut all, mut peak, mut at) = ([0.0; 4], [0.0; 4], 0.0);
        let mut steady = [0.0; 4];
        for second in 0..self.seconds.len().max(self.steady.len()) {
            let counted = self.seconds.get(second).copied().unwrap_or_default();
            let change = self.steady.get(second).copied().unwrap_or_default();
            let counts: Counts = std::array::from_fn(|kind| {
                steady[kind] += change[kind];
                counted[kind] + steady[kind]
            });
            for (sum, count) in all.iter_mut().zip(counts) {
                *sum += count;
            }
            if counts.iter().sum::<f64>() > peak.iter().sum() {
                (peak, at) = (counts, second as f64);
            }
        }
        (all, peak, at)
    }
}

/// A piece of a blob.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) bytes: u64,
    pub(super) segment: usize,
}

/// One blob: a shard of the model.
pub(super) struct Blob {
    fill: Fill,
    pub(super) pieces: Vec<Span>,
    /// The pieces of each segment.
    pub(super) of_segment: Vec<Range<usize>>,
    view: Option<Rc<View>>,
    claims: HashMap<(usize, u32), Option<String>>,
}

impl Blob {
    pub(super) fn new(store: &SharedStore, number: usize, size: u64, piece: u64) -> Result<Self> {
        let key = StageKey::of_identity(&format!("shard {number}"));
        let fill = store.fill(&key, size)?;
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < size {
            let segment = fill.segment_of(at);
            let end = ((at / piece + 1) * piece).min(fill.range(segment).end);
            let bytes = end - at;
            pieces.push(Span { bytes, segment });
            at = end;
        }
        let of_segment = (0..fill.segments()).map(|segment| {
            let start = pieces.partition_point(|span| span.segment < segment);
            start..pieces.partition_point(|span| span.segment <= segment)
        });
        Ok(Self {
            of_segment: of_segment.collect(),
            fill,
            pieces,
            view: None,
            claims: HashMap::new(),
        })
    }

    pub(super) fn segment_bytes(&self, segment: usize) -> u64 {
        let range = self.fill.range(segment);
        range.end - range.start
    }

    pub(super) fn look(&mut self) -> Result<Rc<View>> {
        let view = match self.view.take() {
            Some(view) => view,
            None => Rc::new(self.fill.look()?),
        };
        self.view = Some(Rc::clone(&view));
        Ok(view)
    }

    pub(super) fn claim(
        &mut self,
        segment: usize,
        turn: u32,
        owner: &str,
    ) -> Result<Option<SharedClaim>> {
        self.view = None;
        self.claims.remove(&(segment, turn));
        Ok(self.fill.claim(segment, turn, owner)?)
    }

    pub(super) fn beat(&mut self, claim: &SharedClaim, of: (usize, u32), done: u64) -> Result<()> {
        self.claims.remove(&of);
        Ok(self.fill.beat(claim, done)?)
    }

    pub(super) fn read_claim(&mut self, segment: usize, turn: u32) -> Result<Option<String>> {
        if let Some(text) = self.claims.get(&(segment, turn)) {
            return Ok(text.clone());
        }
        let text = self.fill.read_claim(segment, turn)?;
        self.claims.insert((segment, turn), text.clone());
        Ok(text)
    }

    /// Says that a segment is here. Its bytes are not: nobody reads them.
    pub(super) fn finish(&mut self, segment: usize) -> Result<()> {
        self.view = None;
        let blocks = self.segment_bytes(segment).div_ceil(BLOCK_BYTES);
        let sums = Sums::new(usize::try_from(blocks)?);
        Ok(self.fill.finish(segment, &sums)?)
    }

    pub(super) fn release(&mut self, claim: &SharedClaim, of: (usize, u32)) -> Result<()> {
        self.view = None;
        self.claims.remove(&of);
        Ok(self.fill.release(claim)?)
    }

    pub(super) fn part(&self) -> Result<()> {
        self.fill.part()?;
        Ok(())
    }

    pub(super) fn seal(&mut self) -> Result<()> {
        self.view = None;
        Ok(self.fill.seal()?)
    }
}

/// Makes a store with a directory for each shard of the model.
pub(super) fn make(
    root: &Path,
    bytes: u64,
    shards: usize,
    segment: u64,
    piece: u64,
) -> Result<Vec<Blob>> {
    let options = SharedOptions {
        segment_bytes: Some(segment),
        file_system: None,
    };
    let store = SharedStore::open(root, &options)?;
    let size = bytes / shards as u64;
    (0..shards)
        .map(|number| Blob::new(&store, number, size.max(1), piece))
        .collect()
}
