//! Bandwidth as a fluid: streams of many nodes over one link, shared fairly (max-min) between the nodes, and
//! equally between the streams of a node.
//!
//! Nodes with the same ceiling always have the same rate, so they form a class, and the link keeps one count
//! for each class: the bytes that a member has moved. A stream ends when that count reaches a mark. A change
//! costs as much as there are classes, not as there are nodes.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Differences below this many bytes are rounding.
const ROUNDING: f64 = 1.0;

/// What has no limit: infinities do not add up.
const UNLIMITED: f64 = 1e14;

/// What a node can take of a link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ceiling {
    /// Bytes per second of all its streams.
    pub(super) node: f64,
    /// The same while another link needs its share.
    pub(super) shared: f64,
    /// Bytes per second of one stream.
    pub(super) stream: f64,
}

impl Ceiling {
    /// Bytes per second of so many streams: alone, and while another link needs its share.
    fn of(&self, streams: usize) -> [f64; 2] {
        let streams = (streams as f64 * self.stream).min(UNLIMITED);
        [self.node.min(streams), self.shared.min(streams)]
    }
}

/// One link that all nodes use.
#[derive(Debug)]
pub(super) struct Link {
    total: f64,
    classes: Vec<Class>,
    members: Vec<Member>,
    /// Until when the counts of the classes are right.
    at: f64,
    changed: bool,
}

#[derive(Debug)]
struct Class {
    ceiling: f64,
    rate: f64,
    members: usize,
    /// Bytes that each member has moved since the start.
    moved: f64,
    /// When the next stream of each member ends, by the count above.
    ends: BinaryHeap<End>,
}

#[derive(Debug)]
struct Member {
    ceiling: Ceiling,
    class: Option<usize>,
    shares: bool,
    streams: Vec<Stream>,
    /// Bytes that each of its streams has moved: what starts now ends when this has grown by its bytes.
    each: f64,
    /// The class's count when the ones here were right.
    mark: f64,
    moved: f64,
    generation: u32,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    id: u32,
    start: f64,
    end: f64,
}

#[derive(Debug)]
struct End {
    at: f64,
    node: usize,
    generation: u32,
}

impl Ord for End {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_time = other.at.total_cmp(&self.at);
        by_time.then_with(|| other.node.cmp(&self.node))
    }
}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for End {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for End {}

impl Member {
    fn new(ceiling: Ceiling) -> Self {
        Self {
            ceiling,
            class: None,
            shares: false,
            streams: Vec::new(),
            each: 0.0,
            mark: 0.0,
            moved: 0.0,
            generation: 0,
        }
    }
}

impl Link {
    /// A link of `total` bytes per second between nodes, each with its ceiling.
    pub(super) fn new(total: f64, nodes: Vec<Ceiling>, most_streams: usize) -> Self {
        let mut kinds = nodes.clone();
        kinds.sort_by(|a, b| a.node.total_cmp(&b.node));
        kinds.dedup();
        let mut ceilings: Vec<f64> = kinds
            .iter()
            .flat_map(|kind| (1..=most_streams).flat_map(|streams| kind.of(streams)))
            .collect();
        ceilings.sort_by(f64::total_cmp);
        ceilings.dedup();
        let class = |ceiling| Class {
            ceiling,
            rate: 0.0,
            members: 0,
            moved: 0.0,
            ends: BinaryHeap::new(),
        };
        Self {
            total: total.min(UNLIMITED * nodes.len() as f64),
            classes: ceilings.into_iter().map(class).collect(),
            members: nodes.into_iter().map(Member::new).collect(),
            at: 0.0,
            changed: false,
        }
    }

    /// Starts a stream.
    pub(super) fn start(&mut self, now: f64, node: usize, id: u32, bytes: f64) {
        self.change(now, node, |member| {
            member.streams.push(Stream {
                id,
                start: member.each,
                end: member.each + bytes,
            });
        });
    }

    /// Ends a stream early.
    pub(super) fn stop(&mut self, now: f64, node: usize, id: u32) {
        if self.members[node].streams.iter().any(|one| one.id == id) {
            self.change(now, node, |member| {
                member.streams.retain(|stream| stream.id != id);
            });
        }
    }

    /// Ends all streams of a node.
    pub(super) fn stop_all(&mut self, now: f64, node: usize) {
        self.change(now, node, |member| member.streams.clear());
    }

    /// Says whether another link needs its share of what this node can take.
    pub(super) fn share(&mut self, now: f64, node: usize, shares: bool) {
        if self.members[node].shares != shares {
            self.change(now, node, |member| member.shares = shares);
        }
    }

    pub(super) fn streams(&self, node: usize) -> usize {
        self.members[node].streams.len()
    }

    /// Bytes that a node has moved until `now`.
    pub(super) fn moved(&self, now: f64, node: usize) -> f64 {
        self.members[node].moved + self.unsettled(now, node)
    }

    /// Bytes that each stream of a node would have moved until `now`, had it been there from the start.
    pub(super) fn each(&self, now: f64, node: usize) -> f64 {
        let member = &self.members[node];
        member.each + self.unsettled(now, node) / member.streams.len().max(1) as f64
    }

    /// Bytes per second of the slowest stream, with so many on a node.
    pub(super) fn slowest(&self, streams: usize) -> f64 {
        let used = self.classes.iter().filter(|class| class.members > 0);
        let rates = used.map(|class| class.rate / streams as f64);
        rates.fold(f64::INFINITY, f64::min)
    }

    /// Streams of a node whose current block of `block` bytes began when each had moved `each` bytes, or before.
    pub(super) fn older_than(&self, now: f64, node: usize, each: f64, block: f64) -> Vec<u32> {
        let done = self.each(now, node);
        let old = |stream: &&Stream| {
            let begun = ((done - stream.start + ROUNDING) / block).floor() * block;
            stream.start + begun <= each
        };
        let streams = self.members[node].streams.iter();
        streams.filter(old).map(|stream| stream.id).collect()
    }

    /// When the next stream ends.
    pub(super) fn next(&mut self) -> Option<f64> {
        if std::mem::take(&mut self.changed) {
            self.level();
        }
        let (members, at) = (&self.members, self.at);
        let next = self.classes.iter_mut().filter_map(|class| {
            let current = |end: &End| members[end.node].generation == end.generation;
            while class.ends.peek().is_some_and(|end| !current(end)) {
                class.ends.pop();
            }
            let left = class.ends.peek()?.at - class.moved;
            (class.rate > 0.0).then(|| at + left.max(0.0) / class.rate)
        });
        next.min_by(f64::total_cmp)
    }

    /// Takes out the streams that have ended by `now`.
    pub(super) fn ended(&mut self, now: f64, ended: &mut Vec<(usize, u32)>) {
        self.advance(now);
        for index in 0..self.classes.len() {
            loop {
                let class = &mut self.classes[index];
                // Time has no finer steps than this.
                let step = ROUNDING.max(class.rate * 1e-9);
                let due = class.moved + step;
                let Some(end) = class.ends.peek().filter(|end| end.at <= due) else {
                    break;
                };
                let (node, generation) = (end.node, end.generation);
                class.ends.pop();
                if self.members[node].generation == generation {
                    self.end_due(now, node, step, ended);
                }
            }
        }
    }

    fn end_due(&mut self, now: f64, node: usize, step: f64, ended: &mut Vec<(usize, u32)>) {
        self.change(now, node, |member| {
            let ends = member.streams.iter().map(|stream| stream.end);
            let first = ends.fold(f64::INFINITY, f64::min);
            member.each = member.each.max(first);
            let due = member.each + step;
            member.streams.retain(|stream| {
                let over = stream.end <= due;
                if over {
                    ended.push((node, stream.id));
                }
                !over
            });
        });
    }

    fn unsettled(&self, now: f64, node: usize) -> f64 {
        let member = &self.members[node];
        member.class.map_or(0.0, |class| {
            let class = &self.classes[class];
            class.moved + class.rate * (now - self.at) - member.mark
        })
    }

    fn advance(&mut self, now: f64) {
        let seconds = now - self.at;
        if seconds <= 0.0 {
            return;
        }
        if std::mem::take(&mut self.changed) {
            self.level();
        }
        for class in &mut self.classes {
            if class.members > 0 {
                class.moved += class.rate * seconds;
            }
        }
        self.at = now;
    }

    fn change(&mut self, now: f64, node: usize, change: impl FnOnce(&mut Member)) {
        self.advance(now);
        let unsettled = self.unsettled(self.at, node);
        let member = &mut self.members[node];
        member.moved += unsettled;
        member.each += unsettled / member.streams.len().max(1) as f64;
        change(member);
        member.generation = member.generation.wrapping_add(1);
        let ends = member.streams.iter().map(|stream| stream.end);
        let first = ends.fold(f64::INFINITY, f64::min);
        let (count, left) = (member.streams.len() as f64, first - member.each);
        let [alone, shared] = member.ceiling.of(member.streams.len());
        let ceiling = if member.shares { shared } else { alone };
        let before = member.class.take();
        if count > 0.0 {
            let index = self
                .classes
                .partition_point(|class| class.ceiling < ceiling);
            let index = index.min(self.classes.len() - 1);
            let class = &mut self.classes[index];
            member.class = Some(index);
            member.mark = class.moved;
            class.ends.push(End {
                at: class.moved + left * count,
                node,
                generation: member.generation,
            });
        }
        if member.class != before {
            if let Some(before) = before {
                self.classes[before].members -= 1;
            }
            if let Some(class) = member.class {
                self.classes[class].members += 1;
            }
            self.changed = true;
        }
    }

    /// Gives each class its rate: those that want less than a fair share leave the rest to the others.
    fn level(&mut self) {
        let mut left: usize = self.classes.iter().map(|class| class.members).sum();
        let mut free = self.total;
        for class in self.classes.iter_mut().filter(|class| class.members > 0) {
            class.rate = class.ceiling.min(free / left as f64);
            free = (free - class.rate * class.members as f64).max(0.0);
            left -= class.members;
        }
    }
}
