//! The clock, the links, and who comes, dies and is watched.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::path::Path;

use anyhow::{Result, ensure};
use weightd_core::fetch::FetchLimits;
use weightd_core::shared::BLOCK_BYTES;
use weightd_core::shared::choice::{BEATS, NODE_COPIES, WRITES};

use super::flow::{Ceiling, Link};
use super::node::{Bring, Node, Stage, Work};
use super::tier::{Blob, Kind, Ledger, make};
use super::{Outcome, Setup};

/// What a file waits for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    Open,
    Look,
    Listen,
    Claim { segment: usize, turn: u32 },
    Sums { segment: usize },
}

/// What a writer has waited for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Begun,
    Look,
    Synced,
    Finished,
    Released,
}

/// What happens at a time, on a node.
#[derive(Debug, Clone, Copy)]
pub(super) enum Event {
    Start,
    Kill,
    /// It is time for a file to look.
    Wake(usize),
    Called(usize, Call),
    Stalled(usize, Call),
    /// A copy has opened the bytes, or not in time.
    Opened(u32),
    Unopened(u32),
    /// The origin answers.
    Answered(u32),
    /// All bytes of a file are hashed.
    Hashed(usize),
    Upload(usize, Step),
    UploadFailed(usize),
    Beat(usize),
    /// Looks what the tier lacks of a verified file.
    Rest(usize),
    Seal(usize),
    Probe,
    Back,
    /// Looks for calls that take too long, on all nodes.
    Watch,
}

#[derive(Debug)]
struct Timed {
    at: f64,
    number: u64,
    node: usize,
    event: Event,
}

impl Ord for Timed {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_time = self.at.total_cmp(&other.at);
        by_time.then(self.number.cmp(&other.number))
    }
}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Timed {}

pub(super) struct World {
    pub(super) setup: Setup,
    pub(super) limits: FetchLimits,
    pub(super) now: f64,
    queue: BinaryHeap<Reverse<Timed>>,
    pub(super) nodes: Vec<Node>,
    pub(super) blobs: Vec<Blob>,
    pub(super) origin: Link,
    pub(super) read: Link,
    pub(super) write: Link,
    pub(super) ledger: Ledger,
    /// Until when the metadata server is busy.
    metadata_busy: f64,
    pub(super) random: fastrand::Rng,
    /// Nodes that are to become warm.
    cold: usize,
    /// Segments that are not in the tier.
    pub(super) unfilled: usize,
    pub(super) outcome: Outcome,
}

/// When each node starts.
pub(super) fn starts(setup: &Setup) -> Vec<f64> {
    let mut random = fastrand::Rng::with_seed(setup.seed);
    let spread = setup.spread.as_secs_f64();
    (0..setup.nodes).map(|_| random.f64() * spread).collect()
}

/// What a node can take from the origin.
pub(super) fn origin(setup: &Setup, node: usize) -> Ceiling {
    let speeds = setup.speeds;
    let most = match node < setup.slow {
        true => setup.slow_origin,
        false => speeds.node_origin,
    };
    let most = most.min(speeds.disk);
    Ceiling {
        node: most,
        shared: most,
        stream: speeds.connection,
    }
}

impl World {
    pub(super) fn new(setup: Setup, root: &Path) -> Result<Self> {
        let limits = FetchLimits::default();
        let (speeds, nodes, shards) = (setup.speeds, setup.nodes, setup.shards);
        let piece = limits.part_bytes.next_multiple_of(BLOCK_BYTES);
        let blobs = make(root, setup.bytes, shards, setup.segment, piece)?;
        let from_origin = speeds.node_origin.min(speeds.disk);
        let from_tier = speeds.node_tier.min(speeds.disk);
        let read = Ceiling {
            node: from_tier,
            // Both are written to the same disk.
            shared: from_tier
                .min(speeds.disk - from_origin)
                .max(from_tier / 20.0),
            stream: speeds.stream,
        };
        let write = Ceiling {
            node: speeds.node_tier,
            shared: speeds.node_tier,
            stream: speeds.stream,
        };
        // As many again may hang, and more.
        let (copies, writes) = (NODE_COPIES * 8, WRITES * 8);
        let origin = (0..nodes).map(|node| origin(&setup, node)).collect();
        let mut world = Self {
            nodes: (0..nodes)
                .map(|number| Node::new(number, shards, limits.connections))
                .collect(),
            unfilled: blobs.iter().map(|blob| blob.of_segment.len()).sum(),
            blobs,
            origin: Link::new(speeds.origin, origin, limits.connections),
            read: Link::new(speeds.tier_read, vec![read; nodes], copies),
            write: Link::new(speeds.tier_write, vec![write; nodes], writes),
            ledger: Ledger::default(),
            metadata_busy: 0.0,
            random: fastrand::Rng::with_seed(setup.seed ^ 0x5eed),
            cold: nodes,
            outcome: Outcome::default(),
            now: 0.0,
            queue: BinaryHeap::new(),
            limits,
            setup,
        };
        world.plan();
        Ok(world)
    }

    fn plan(&mut self) {
        for (node, start) in starts(&self.setup).into_iter().enumerate() {
            self.nodes[node].start = start;
            self.at(start, node, Event::Start);
        }
        let mut nodes: Vec<usize> = (0..self.setup.nodes).collect();
        self.random.shuffle(&mut nodes);
        for node in nodes.into_iter().take(self.setup.kill) {
            let within = self.setup.kill_within.as_secs_f64();
            let after = self.random.f64() * within;
            self.at(self.nodes[node].start + after, node, Event::Kill);
        }
        self.at(1.0, 0, Event::Watch);
    }

    pub(super) fn run(mut self) -> Result<Outcome> {
        let mut ended = Vec::new();
        while self.cold > 0 {
            let event = self.queue.peek().map_or(f64::INFINITY, |next| next.0.at);
            let links = [&mut self.origin, &mut self.read, &mut self.write];
            let streams = links.map(|link| link.next().unwrap_or(f64::INFINITY));
            let stream = streams.into_iter().fold(f64::INFINITY, f64::min);
            let next = event.min(stream);
            ensure!(next.is_finite(), "the simulation stands still");
            self.now = self.now.max(next);
            self.outcome.events += 1;
            if event <= stream {
                let Some(Reverse(timed)) = self.queue.pop() else {
                    continue;
                };
                if matches!(timed.event, Event::Watch) {
                    // Beside it there is always something else to come.
                    let something = !self.queue.is_empty() || stream.is_finite();
                    ensure!(something, "the simulation stands still");
                }
                self.handle(timed.node, timed.event)?;
                continue;
            }
            for (which, at) in streams.into_iter().enumerate() {
                if at <= self.now {
                    let link = [&mut self.origin, &mut self.read, &mut self.write];
                    link[which].ended(self.now, &mut ended);
                }
            }
            for (node, id) in ended.drain(..) {
                self.moved(node, id)?;
            }
        }
        Ok(self.end())
    }

    fn end(mut self) -> Outcome {
        let now = self.now;
        for node in 0..self.nodes.len() {
            for file in self.nodes[node].in_flight() {
                self.unquiet(node, file);
            }
            self.outcome.origin_bytes += self.origin.moved(now, node);
            self.outcome.read_bytes += self.read.moved(now, node);
            self.outcome.written_bytes += self.write.moved(now, node);
            let (start, warm) = (self.nodes[node].start, self.nodes[node].warm);
            if let Some(warm) = warm {
                let beats = f64::from(BEATS) / self.setup.claim_timeout.as_secs_f64();
                self.ledger.count_steady(Kind::Open, start, warm, beats);
                self.outcome.warm.push(warm);
            }
        }
        self.outcome.warm.sort_by(f64::total_cmp);
        let (all, peak, at) = self.ledger.sum();
        (self.outcome.requests, self.outcome.peak) = (all, peak);
        self.outcome.peak_at = at;
        self.outcome
    }

    pub(super) fn at(&mut self, at: f64, node: usize, event: Event) {
        self.outcome.events += 1;
        let number = self.outcome.events;
        self.queue.push(Reverse(Timed {
            at,
            number,
            node,
            event,
        }));
    }

    pub(super) fn after(&mut self, seconds: f64, node: usize, event: Event) {
        self.at(self.now + seconds, node, event);
    }

    /// Between half and one and a half of it.
    pub(super) fn about(&mut self, seconds: f64) -> f64 {
        seconds * (0.5 + self.random.f64())
    }

    /// Asks the metadata server, one request after the other; returns how long that takes.
    pub(super) fn ask(&mut self, requests: &[(Kind, usize)]) -> f64 {
        let mut count = 0;
        for (kind, requests) in requests {
            self.ledger.count(self.now, *kind, *requests as f64);
            count += requests;
        }
        let free = self.setup.speeds.metadata - self.ledger.background;
        let free = free.max(self.setup.speeds.metadata / 20.0);
        self.metadata_busy = self.metadata_busy.max(self.now) + count as f64 / free;
        let latency = self.setup.speeds.tier_latency.as_secs_f64();
        self.about(latency * count as f64) + self.metadata_busy - self.now
    }

    /// Asks, and goes on with `then`; with `stalled` if that takes too long.
    pub(super) fn call(
        &mut self,
        node: usize,
        requests: &[(Kind, usize)],
        then: Event,
        stalled: Event,
    ) {
        let takes = self.ask(requests);
        let patience = self.setup.stall_timeout.as_secs_f64();
        if takes <= patience {
            return self.after(takes, node, then);
        }
        self.outcome.stalls += 1;
        self.after(patience, node, stalled);
    }

    fn handle(&mut self, node: usize, event: Event) -> Result<()> {
        if !self.nodes[node].alive && !matches!(event, Event::Watch) {
            return Ok(());
        }
        match event {
            Event::Start => self.start(node),
            Event::Kill => {
                self.kill(node);
                Ok(())
            }
            Event::Wake(file) => self.wake(node, file),
            Event::Called(file, call) => self.called(node, file, call),
            Event::Stalled(file, call) => self.stalled(node, file, call),
            Event::Opened(id) | Event::Answered(id) => {
                self.move_on(node, id);
                Ok(())
            }
            Event::Unopened(id) => {
                self.leave_out(node)?;
                self.copy_failed(node, id)
            }
            Event::Hashed(file) => self.hashed(node, file),
            Event::Upload(upload, step) => self.upload(node, upload, step),
            Event::UploadFailed(upload) => self.upload_failed(node, upload),
            Event::Beat(upload) => self.beat(node, upload),
            Event::Rest(file) => self.rest(node, file),
            Event::Seal(file) => self.seal(file),
            Event::Probe => {
                self.probe(node);
                Ok(())
            }
            Event::Back => {
                self.nodes[node].away = false;
                self.nodes[node].answered = self.now;
                self.turn_all(node)
            }
            Event::Watch => self.watch(),
        }
    }

    fn start(&mut self, node: usize) -> Result<()> {
        // The lease.
        self.ask(&[(Kind::Create, 1)]);
        for _ in 0..self.limits.files_in_flight.min(self.setup.shards) {
            self.begin_file(node);
        }
        Ok(())
    }

    /// Begins the next file, if there is one.
    pub(super) fn begin_file(&mut self, node: usize) {
        let file = self.nodes[node].next_file;
        if file == self.setup.shards {
            return;
        }
        self.nodes[node].next_file += 1;
        self.nodes[node].files[file] = Some(Box::new(Bring::new(&self.blobs[file], self.now)));
        let mut requests = vec![(Kind::Open, 2), (Kind::Create, 1)];
        // Whether the tier answers is asked again after 10 s: FORMAT, five directories, a file made, read and
        // removed.
        if self.now - self.nodes[node].answered > 10.0 {
            self.nodes[node].answered = self.now;
            requests.extend([(Kind::Create, 6), (Kind::Open, 2), (Kind::Other, 2)]);
        }
        let call = Call::Open;
        let (then, stalled) = (Event::Called(file, call), Event::Stalled(file, call));
        self.call(node, &requests, then, stalled);
    }

    /// A node has all of the model.
    pub(super) fn warmed(&mut self, node: usize) {
        self.nodes[node].warm = Some(self.now);
        self.cold -= 1;
    }

    fn kill(&mut self, node: usize) {
        if self.nodes[node].warm.is_some() {
            return;
        }
        for file in self.nodes[node].in_flight() {
            self.unquiet(node, file);
        }
        for link in [&mut self.origin, &mut self.read, &mut self.write] {
            link.stop_all(self.now, node);
        }
        self.nodes[node].alive = false;
        self.cold -= 1;
    }

    /// Starts the bytes of a transfer that has waited for an answer.
    fn move_on(&mut self, node: usize, id: u32) {
        let now = self.now;
        let Some(run) = self.nodes[node].runs.of(id) else {
            return;
        };
        run.stage = Stage::Moving;
        let bytes = run.moving as f64;
        match run.work {
            Work::Fetch { .. } => {
                self.origin.start(now, node, id, bytes);
                self.read.share(now, node, true);
            }
            Work::Copy { .. } => self.read.start(now, node, id, bytes),
            Work::Write { .. } => self.write.start(now, node, id, bytes),
            Work::Hung => {}
        }
    }

    /// Bytes of a transfer have moved.
    fn moved(&mut self, node: usize, id: u32) -> Result<()> {
        let Some(run) = self.nodes[node].runs.of(id) else {
            return Ok(());
        };
        match run.work {
            Work::Copy { .. } => self.copied(node, id),
            Work::Fetch { .. } => self.fetched(node, id),
            Work::Write { upload } => self.written(node, id, upload),
            Work::Hung => {
                self.nodes[node].runs.take(id);
                Ok(())
            }
        }
    }

    /// The tier did not answer: it is left out until a probe finds that it does.
    pub(super) fn leave_out(&mut self, node: usize) -> Result<()> {
        if std::mem::replace(&mut self.nodes[node].away, true) {
            return Ok(());
        }
        self.outcome.left_out += 1;
        let soon = self.random.f64() * 0.1;
        self.after(soon, node, Event::Probe);
        self.turn_all(node)
    }

    fn probe(&mut self, node: usize) {
        let requests = [(Kind::Create, 6), (Kind::Open, 2), (Kind::Other, 2)];
        let takes = self.ask(&requests);
        let patience = self.setup.stall_timeout.as_secs_f64();
        match takes <= patience {
            true => self.after(takes, node, Event::Back),
            // The pause between looks at a tier that is left out.
            false => self.after(patience + 2.0, node, Event::Probe),
        }
    }

    /// Looks, once a second, for calls that have taken too long: those whose block has not moved on.
    fn watch(&mut self) -> Result<()> {
        self.after(1.0, 0, Event::Watch);
        let patience = self.setup.stall_timeout.as_secs_f64();
        let block = BLOCK_BYTES as f64;
        let slow = [(&self.read, NODE_COPIES * 2), (&self.write, WRITES)];
        let slow = slow.map(|(link, streams)| link.slowest(streams) < 2.0 * block / patience);
        if slow == [false, false] {
            for node in &mut self.nodes {
                node.samples.clear();
            }
            return Ok(());
        }
        for node in 0..self.nodes.len() {
            let now = self.now;
            let each = (self.read.each(now, node), self.write.each(now, node));
            let samples = &mut self.nodes[node].samples;
            samples.push_front(each);
            samples.truncate(patience.ceil() as usize + 1);
            if samples.len() <= patience.ceil() as usize || !self.nodes[node].alive {
                continue;
            }
            let Some((read, written)) = self.nodes[node].samples.back().copied() else {
                continue;
            };
            let copies = self.read.older_than(now, node, read, block);
            let writes = self.write.older_than(now, node, written, block);
            for id in copies.into_iter().chain(writes) {
                self.hang(node, id)?;
            }
        }
        Ok(())
    }

    /// Nobody waits for this transfer any more, but its block goes on.
    fn hang(&mut self, node: usize, id: u32) -> Result<()> {
        let now = self.now;
        let Some(run) = self.nodes[node]
            .runs
            .of(id)
            .filter(|run| run.work != Work::Hung)
        else {
            return Ok(());
        };
        let work = run.work;
        self.outcome.stalls += 1;
        let hung = self.nodes[node].runs.add(super::node::Run {
            work: Work::Hung,
            stage: Stage::Moving,
            left: 0,
            moving: BLOCK_BYTES,
        });
        let rest = BLOCK_BYTES as f64 / 2.0;
        self.leave_out(node)?;
        match work {
            Work::Write { upload } => {
                self.write.start(now, node, hung, rest);
                self.upload_failed(node, upload)
            }
            _ => {
                self.read.start(now, node, hung, rest);
                self.copy_failed(node, id)
            }
        }
    }
}
