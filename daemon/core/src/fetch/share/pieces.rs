//! What of a file is to be brought, cut into pieces.

use std::ops::Range;

use tokio::task::AbortHandle;

use crate::fetch::parts::split;
use crate::shared::{Fill, Owed};

/// Bytes that are brought at a time, by one way or, in a race, by both.
pub(super) struct Piece {
    pub(super) range: Range<u64>,
    pub(super) segment: usize,
    pub(super) done: bool,
    pub(super) copying: Option<(AbortHandle, Owed)>,
    pub(super) fetching: Option<AbortHandle>,
    /// Taken on with its segment, to be fetched.
    pub(super) owed: Option<Owed>,
}

impl Piece {
    pub(super) fn is_idle(&self) -> bool {
        !self.done && self.copying.is_none() && self.fetching.is_none()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }

    pub(super) fn finish(&mut self) {
        self.done = true;
        self.owed = None;
        let copying = self.copying.take().map(|(task, _)| task);
        for task in [copying, self.fetching.take()].into_iter().flatten() {
            task.abort();
        }
    }
}

/// Cuts what is missing at the borders of segments and pieces.
pub(super) fn cut(missing: Vec<Range<u64>>, fill: &Fill, piece_bytes: u64) -> Vec<Piece> {
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
