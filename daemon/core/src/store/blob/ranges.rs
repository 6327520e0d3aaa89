//! A set of byte ranges.

use std::ops::Range;

/// Ranges that are sorted, apart from each other and not empty.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|old| old.end < range.start);
        let to = self.0.partition_point(|old| old.start <= range.end);
        let mut merged = range;
        for old in &self.0[from..to] {
            merged = merged.start.min(old.start)..merged.end.max(old.end);
        }
        self.0.splice(from..to, [merged]);
    }

    /// Where the bytes that follow `from` without a hole end.
    pub(super) fn end_of_run(&self, from: u64) -> u64 {
        let at = self.0.partition_point(|range| range.end <= from);
        self.0
            .get(at)
            .filter(|range| range.start <= from)
            .map_or(from, |range| range.end)
    }

    /// What is missing of a file of `size` bytes.
    pub(super) fn holes(&self, size: u64) -> Vec<Range<u64>> {
        let mut holes = Vec::new();
        let mut at = 0;
        for range in &self.0 {
            if at < range.start {
                holes.push(at..range.start);
            }
            at = range.end;
        }
        if at < size {
            holes.push(at..size);
        }
        holes
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_and_leave_holes() {
        let mut ranges = Ranges::default();
        for range in [10..20, 40..50, 20..30, 0..5, 60..60] {
            ranges.insert(range);
        }
        assert_eq!(ranges.0, [0..5, 10..30, 40..50]);
        assert_eq!(ranges.holes(60), [5..10, 30..40, 50..60]);
        assert_eq!(ranges.bytes(), 35);
        assert_eq!(
            [0, 5, 10, 29, 30].map(|from| ranges.end_of_run(from)),
            [5, 5, 30, 30, 30]
        );
        ranges.insert(5..45);
        assert_eq!(ranges.0, vec![0..50; 1]);
        assert_eq!(ranges.holes(50), []);
    }
}
