//! `Bringing` of `fetch/share.rs`, by the virtual clock: one file on its way on one node.

use std::rc::Rc;

use anyhow::Result;
use std::time::Duration;
use weightd_core::shared::choice::{
    BEATS, Egress, FAILURES, LATEST_LOOK, LISTENS, LOOK, Move, Reach, Situation,
};
use weightd_core::shared::{BLOCK_BYTES, SharedClaim};

use super::node::{Piece, Run, Stage, Upload, Work, Writer};
use super::tier::Kind;
use super::world::{Call, Event, Step, World};

/// Lists per second of a file that has nothing more to see: pauses are [`LATEST_LOOK`] long, on average.
fn idle_looks() -> f64 {
    1.0 / LATEST_LOOK.as_secs_f64()
}

impl World {
    /// All files of a node look whether there is something to do.
    pub(super) fn turn_all(&mut self, node: usize) -> Result<()> {
        for file in self.nodes[node].in_flight() {
            self.turn(node, file)?;
        }
        Ok(())
    }

    /// It is time to look, or would be if there were something new to see.
    pub(super) fn wake(&mut self, node: usize, index: usize) -> Result<()> {
        let file = self.nodes[node].file(index);
        if file.is_some_and(|file| file.quiet.is_some()) {
            self.plan_look(node, index);
        }
        self.turn(node, index)
    }

    /// The loop of one file, until it has to wait.
    pub(super) fn turn(&mut self, node: usize, index: usize) -> Result<()> {
        loop {
            let now = self.now;
            let away = self.nodes[node].away;
            let Some(file) = self.nodes[node].file(index).filter(|file| !file.busy) else {
                return Ok(());
            };
            if file.left == 0 {
                self.brought(node, index);
                return Ok(());
            }
            if now >= file.next_look {
                if !away {
                    file.busy = true;
                    self.call_for(node, index, &[(Kind::List, 1)], Call::Look);
                    return Ok(());
                }
                file.pause = LATEST_LOOK;
                self.plan_look(node, index);
            }
            let goes_on = match self.choose(node, index) {
                Move::Claim(segment) => return self.wait_for_turn(node, index, segment),
                Move::Copy(segment) => self.copy(node, index, segment)?,
                Move::Fetch(segment) => self.fetch(node, index, segment, false),
                Move::Race(segment) => self.fetch(node, index, segment, true),
                Move::Wait => false,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    fn choose(&mut self, node: usize, index: usize) -> Move {
        let (now, moved) = (self.now, self.origin.moved(self.now, node));
        let copied = self.read.moved(now, node);
        let random = self.random.u64(..);
        let piece_bytes = self.limits.part_bytes.next_multiple_of(BLOCK_BYTES);
        let node = &mut self.nodes[node];
        let segments = node.files.iter().flatten().flat_map(|file| &file.segments);
        let copying = segments.map(|segment| segment.copying).sum();
        let Some(file) = node.files[index].as_deref() else {
            return Move::Wait;
        };
        let situation = Situation {
            egress: self.setup.egress,
            reach: match node.away || file.failures >= FAILURES {
                true => Reach::Away,
                false => Reach::Full,
            },
            segments: &file.segments,
            outstanding: node.outstanding,
            copies: file.copies,
            copying,
            piece_bytes,
            origin_rate: node.origin_rate.get(now, moved),
            shared_rate: node.shared_rate.get(now, copied),
            random,
        };
        situation.next()
    }

    fn call_for(&mut self, node: usize, file: usize, requests: &[(Kind, usize)], call: Call) {
        let (then, stalled) = (Event::Called(file, call), Event::Stalled(file, call));
        self.call(node, requests, then, stalled);
    }

    pub(super) fn called(&mut self, node: usize, index: usize, call: Call) -> Result<()> {
        match call {
            Call::Open => self.go_on(node, index),
            Call::Look => self.looked(node, index),
            Call::Listen => self.listened(node, index),
            Call::Claim { segment, turn } => self.claimed(node, index, segment, turn),
            Call::Sums { segment } => {
                if let Some(file) = self.nodes[node].file(index) {
                    file.sums[segment] = true;
                }
                self.go_on(node, index)
            }
        }
    }

    pub(super) fn stalled(&mut self, node: usize, index: usize, call: Call) -> Result<()> {
        self.leave_out(node)?;
        let Some(file) = self.nodes[node].file(index) else {
            return Ok(());
        };
        match call {
            Call::Open => file.failures = FAILURES,
            Call::Look | Call::Listen => {
                file.pause = LATEST_LOOK;
                self.plan_look(node, index);
            }
            Call::Claim { .. } => {
                file.failures += 1;
                self.give_turn(node)?;
            }
            Call::Sums { .. } => file.failures += 1,
        }
        self.go_on(node, index)
    }

    fn go_on(&mut self, node: usize, index: usize) -> Result<()> {
        if let Some(file) = self.nodes[node].file(index) {
            file.busy = false;
        }
        self.turn(node, index)
    }

    fn looked(&mut self, node: usize, index: usize) -> Result<()> {
        let (now, view) = (self.now, self.blobs[index].look()?);
        let Some(file) = self.nodes[node].file(index) else {
            return Ok(());
        };
        let changed = !Rc::ptr_eq(&view, &file.view) && *view != *file.view;
        file.pause = match changed {
            true => LOOK,
            false => file.pause.mul_f64(1.5).min(LATEST_LOOK),
        };
        file.view = view;
        file.place_all();
        self.give_up_what_others_did(node, index)?;
        let Some(file) = self.nodes[node].file(index) else {
            return Ok(());
        };
        let patience = self.setup.claim_timeout.as_secs_f64();
        let wanted = file.waits_for();
        if !wanted.is_empty() && now - file.heard >= patience / f64::from(LISTENS) {
            file.heard = now;
            let opens = [(Kind::Open, wanted.len())];
            file.wanted = wanted;
            self.call_for(node, index, &opens, Call::Listen);
            return Ok(());
        }
        self.plan_look(node, index);
        self.go_on(node, index)
    }

    fn listened(&mut self, node: usize, index: usize) -> Result<()> {
        let (now, patience) = (self.now, self.setup.claim_timeout);
        let blob = &mut self.blobs[index];
        if let Some(file) = self.nodes[node].file(index) {
            for (segment, turn) in std::mem::take(&mut file.wanted) {
                let text = blob.read_claim(segment, turn)?;
                let silence =
                    file.silence
                        .observe(segment, turn, text, Duration::from_secs_f64(now));
                if silence >= patience {
                    file.silent.insert(segment, turn);
                    file.place(segment);
                }
            }
        }
        self.plan_look(node, index);
        self.go_on(node, index)
    }

    /// Says when a file looks next.
    fn plan_look(&mut self, node: usize, index: usize) {
        let jitter = 0.75 + self.random.f64() / 2.0;
        let (now, egress) = (self.now, self.setup.egress);
        let Some(file) = self.nodes[node].file(index) else {
            return;
        };
        if file.view.is_whole() {
            // It goes on looking, but for nothing: these looks are counted all at once.
            if file.quiet.is_none() {
                file.quiet = Some(now);
                self.ledger.background += idle_looks();
            }
            // What else it may wake up for is hunger.
            file.pause = LATEST_LOOK;
            file.next_look = f64::INFINITY;
            if egress == Egress::Fastest {
                let at = now + LATEST_LOOK.as_secs_f64() * jitter;
                self.at(at, node, Event::Wake(index));
            }
            return;
        }
        file.next_look = now + file.pause.as_secs_f64() * jitter;
        let at = file.next_look;
        self.at(at, node, Event::Wake(index));
    }

    /// A file that had nothing more to see is done with.
    pub(super) fn unquiet(&mut self, node: usize, index: usize) {
        let now = self.now;
        let quiet = self.nodes[node]
            .file(index)
            .and_then(|file| file.quiet.take());
        if let Some(since) = quiet {
            self.ledger.background -= idle_looks();
            self.ledger
                .count_steady(Kind::List, since, now, idle_looks());
        }
    }

    fn give_up_what_others_did(&mut self, node: usize, index: usize) -> Result<()> {
        let Some(file) = self.nodes[node].file(index) else {
            return Ok(());
        };
        let done = |segment: &usize| file.mine[*segment] && file.view.segments[*segment].here;
        let done: Vec<usize> = (0..file.mine.len()).filter(done).collect();
        for segment in done {
            let pieces = self.blobs[index].of_segment[segment].clone();
            for piece in pieces {
                let Some(file) = self.nodes[node].file(index) else {
                    break;
                };
                let Piece { fetching, done, .. } = file.pieces[piece];
                if !done {
                    self.disown(node, index, piece);
                    self.abort(node, fetching)?;
                }
            }
            if let Some(file) = self.nodes[node].file(index) {
                file.mine[segment] = false;
                file.place(segment);
            }
        }
        Ok(())
    }

    fn wait_for_turn(&mut self, node: usize, index: usize, segment: usize) -> Result<()> {
        if let Some(file) = self.nodes[node].file(index) {
            file.busy = true;
        }
        match self.nodes[node].turn.take((index, segment)) {
            true => self.claim(node, index, segment),
            false => Ok(()),
        }
    }

    fn give_turn(&mut self, node: usize) -> Result<()> {
        match self.nodes[node].turn.give() {
            Some((file, segment)) => self.claim(node, file, segment),
            None => Ok(()),
        }
    }

    fn claim(&mut self, node: usize, index: usize, segment: usize) -> Result<()> {
        // Another file of this node may have satisfied the hunger meanwhile.
        if !matches!(self.choose(node, index), Move::Claim(_)) {
            self.give_turn(node)?;
            return self.go_on(node, index);
        }
        let Some(file) = self.nodes[node].file(index) else {
            return Ok(());
        };
        let turn = file.view.segments[segment].turn.map_or(0, |turn| turn + 1);
        let call = Call::Claim { segment, turn };
        self.call_for(node, index, &[(Kind::Create, 1)], call);
        Ok(())
    }

    fn claimed(&mut self, node: usize, index: usize, segment: usize, turn: u32) -> Result<()> {
        let claim = self.blobs[index].claim(segment, turn, &self.nodes[node].owner)?;
        match claim {
            Some(claim) => self.own(node, index, segment, turn, claim),
            None => {
                self.outcome.conflicts += 1;
                let now = self.now;
                if let Some(file) = self.nodes[node].file(index) {
                    Rc::make_mut(&mut file.view).segments[segment].turn = Some(turn);
                    file.place(segment);
                    file.next_look = now;
                }
            }
        }
        self.give_turn(node)?;
        self.go_on(node, index)
    }

    fn own(&mut self, node: usize, index: usize, segment: usize, turn: u32, claim: SharedClaim) {
        self.outcome.takeovers += u64::from(turn > 0);
        let blob = &self.blobs[index];
        let of = &mut self.nodes[node];
        let Some(file) = of.files[index].as_deref_mut() else {
            return;
        };
        file.mine[segment] = true;
        file.place(segment);
        let mut here = 0;
        for piece in blob.of_segment[segment].clone() {
            let state = &mut file.pieces[piece];
            match state.done {
                true => here += blob.pieces[piece].bytes,
                false if !state.owed => {
                    state.owed = true;
                    of.outstanding += blob.pieces[piece].bytes;
                }
                false => {}
            }
        }
        self.write_behind(node, index, (segment, turn), claim, here, false);
    }

    /// Starts to write a segment to the tier, `here` bytes of which this node has.
    pub(super) fn write_behind(
        &mut self,
        node: usize,
        file: usize,
        of: (usize, u32),
        claim: SharedClaim,
        here: u64,
        rest: bool,
    ) {
        let (segment, turn) = of;
        let number = self.nodes[node].uploads.len();
        self.nodes[node].uploads.push(Upload {
            file,
            segment,
            turn,
            claim,
            writer: Writer::Busy,
            backlog: here,
            left: self.blobs[file].segment_bytes(segment),
            unsynced: 0,
            progress: here,
            shown: 0,
            rest,
        });
        let then = Event::Upload(number, Step::Begun);
        let failed = Event::UploadFailed(number);
        self.call(node, &[(Kind::Open, 1)], then, failed);
        let beat = self.setup.claim_timeout.as_secs_f64() / f64::from(BEATS);
        self.after(beat, node, Event::Beat(number));
    }

    /// Starts to copy a piece; false if the file has to wait.
    fn copy(&mut self, node: usize, index: usize, segment: usize) -> Result<bool> {
        let blob = &self.blobs[index];
        let of = &mut self.nodes[node];
        let Some(file) = of.files[index].as_deref_mut() else {
            return Ok(false);
        };
        if !file.sums[segment] {
            file.busy = true;
            self.call_for(node, index, &[(Kind::Open, 1)], Call::Sums { segment });
            return Ok(false);
        }
        let idle = |piece: &usize| is_idle(file.pieces[*piece]);
        let Some(piece) = blob.of_segment[segment].clone().find(idle) else {
            return Ok(false);
        };
        let id = of.runs.add(Run {
            work: Work::Copy { file: index, piece },
            stage: Stage::Waiting,
            left: 0,
            moving: blob.pieces[piece].bytes,
        });
        file.set(blob, piece, |piece| piece.copying = id);
        if of.copies.take(id) {
            self.open(node, id)?;
        }
        Ok(true)
    }

    /// A copy has its place: it opens the bytes.
    fn open(&mut self, node: usize, id: u32) -> Result<()> {
        let now = self.now;
        let moved = self.read.moved(now, node);
        let of = &mut self.nodes[node];
        of.shared_rate.begin(now, moved);
        let Some(run) = of.runs.of(id) else {
            return Ok(());
        };
        run.stage = Stage::Asking;
        let Work::Copy { file, .. } = run.work else {
            return Ok(());
        };
        if of.away {
            // Not at once: whoever starts it goes on with its own turn first.
            self.after(0.0, node, Event::Unopened(id));
            return Ok(());
        }
        // By its final name, then by the other one.
        let opens = match self.blobs[file].look()?.sealed {
            true => 1,
            false => 2,
        };
        let (then, failed) = (Event::Opened(id), Event::Unopened(id));
        self.call(node, &[(Kind::Open, opens)], then, failed);
        Ok(())
    }

    /// Starts to fetch a piece; false if the file has to wait.
    fn fetch(&mut self, node: usize, index: usize, segment: usize, race: bool) -> bool {
        let now = self.now;
        let moved = self.origin.moved(now, node);
        let blob = &self.blobs[index];
        let of = &mut self.nodes[node];
        let Some(file) = of.files[index].as_deref_mut() else {
            return false;
        };
        let wanted = |piece: &usize| {
            let piece = file.pieces[*piece];
            match race {
                false => is_idle(piece),
                true => piece.copying != 0 && piece.fetching == 0,
            }
        };
        let mut pieces = blob.of_segment[segment].clone();
        let away = of.away || file.failures >= FAILURES;
        let found = match file.mine[segment] || away {
            true => pieces.find(wanted),
            false => pieces.rfind(wanted),
        };
        let Some(piece) = found else { return false };
        let most = self.limits.connections;
        if file.fetching >= most || !of.connections.take(index) {
            return false;
        }
        let bytes = blob.pieces[piece].bytes;
        // What is written behind goes on block by block.
        let moving = match file.mine[segment] {
            true => bytes.min(BLOCK_BYTES),
            false => bytes,
        };
        let id = of.runs.add(Run {
            work: Work::Fetch { file: index, piece },
            stage: Stage::Asking,
            left: bytes - moving,
            moving,
        });
        file.set(blob, piece, |piece| piece.fetching = id);
        if !std::mem::replace(&mut file.pieces[piece].owed, true) {
            of.outstanding += bytes;
        }
        of.origin_rate.begin(now, moved);
        let latency = self.setup.speeds.origin_latency.as_secs_f64();
        let latency = self.about(latency);
        self.after(latency, node, Event::Answered(id));
        true
    }

    pub(super) fn copied(&mut self, node: usize, id: u32) -> Result<()> {
        let run = self.nodes[node].runs.of(id);
        // What this one no longer copies another file may.
        let Some(Work::Copy { file, piece }) = run.map(|run| run.work) else {
            return Ok(());
        };
        self.finish_piece(node, file, piece)?;
        self.turn_all(node)
    }

    pub(super) fn copy_failed(&mut self, node: usize, id: u32) -> Result<()> {
        let Some(Work::Copy { file, .. }) = self.end_run(node, id)? else {
            return Ok(());
        };
        if let Some(file) = self.nodes[node].file(file) {
            file.failures += 1;
        }
        self.turn_all(node)
    }

    pub(super) fn fetched(&mut self, node: usize, id: u32) -> Result<()> {
        let now = self.now;
        let Some(run) = self.nodes[node].runs.of(id) else {
            return Ok(());
        };
        let (moved, work) = (run.moving, run.work);
        run.moving = run.left.min(BLOCK_BYTES);
        run.left -= run.moving;
        let next = run.moving;
        if next > 0 {
            self.origin.start(now, node, id, next as f64);
        }
        if let Work::Fetch { file, piece } = work {
            let segment = self.blobs[file].pieces[piece].segment;
            self.credit(node, file, segment, moved);
            if next == 0 {
                self.finish_piece(node, file, piece)?;
                self.turn_all(node)?;
            }
        }
        Ok(())
    }

    /// A piece is here: whatever brought it, or still tries to, ends.
    fn finish_piece(&mut self, node: usize, index: usize, piece: usize) -> Result<()> {
        self.disown(node, index, piece);
        let (now, hash) = (self.now, self.setup.speeds.hash);
        let blob = &self.blobs[index];
        let Some(file) = self.nodes[node].files[index].as_deref_mut() else {
            return Ok(());
        };
        // First: the places that become free are taken at once, and not for this piece.
        file.set(blob, piece, |piece| piece.done = true);
        file.left -= 1;
        while file.pieces.get(file.front).is_some_and(|piece| piece.done) {
            let bytes = blob.pieces[file.front].bytes as f64;
            file.hashed_at = file.hashed_at.max(now) + bytes / hash;
            file.front += 1;
        }
        let Piece {
            copying, fetching, ..
        } = file.pieces[piece];
        self.abort(node, copying)?;
        self.abort(node, fetching)
    }

    fn disown(&mut self, node: usize, index: usize, piece: usize) {
        let bytes = self.blobs[index].pieces[piece].bytes;
        let of = &mut self.nodes[node];
        if let Some(file) = of.files[index].as_deref_mut()
            && std::mem::take(&mut file.pieces[piece].owed)
        {
            of.outstanding -= bytes;
        }
    }

    fn abort(&mut self, node: usize, id: u32) -> Result<()> {
        if id != 0 {
            self.end_run(node, id)?;
        }
        Ok(())
    }

    /// Ends a transfer, and hands its place on.
    fn end_run(&mut self, node: usize, id: u32) -> Result<Option<Work>> {
        let now = self.now;
        let Some(run) = self.nodes[node].runs.take(id) else {
            return Ok(None);
        };
        match run.work {
            Work::Copy { file, piece } => {
                self.read.stop(now, node, id);
                let (blob, moved) = (&self.blobs[file], self.read.moved(now, node));
                let of = &mut self.nodes[node];
                if let Some(file) = of.files[file].as_deref_mut() {
                    file.set(blob, piece, |piece| piece.copying = 0);
                }
                if run.stage == Stage::Waiting {
                    of.copies.leave(&id);
                    return Ok(Some(run.work));
                }
                of.shared_rate.end(now, moved);
                if let Some(next) = of.copies.give() {
                    self.open(node, next)?;
                }
            }
            Work::Fetch { file, piece } => {
                self.origin.stop(now, node, id);
                let busy = self.origin.streams(node) > 0;
                self.read.share(now, node, busy);
                let (blob, moved) = (&self.blobs[file], self.origin.moved(now, node));
                let of = &mut self.nodes[node];
                if let Some(file) = of.files[file].as_deref_mut() {
                    file.set(blob, piece, |piece| piece.fetching = 0);
                }
                of.origin_rate.end(now, moved);
                let mut next = of.connections.offer();
                while let Some(file) = next {
                    self.turn(node, file)?;
                    next = self.nodes[node].connections.offer_again();
                }
            }
            Work::Write { .. } | Work::Hung => {}
        }
        Ok(Some(run.work))
    }

    /// All bytes of a file are here.
    fn brought(&mut self, node: usize, index: usize) {
        self.unquiet(node, index);
        let now = self.now;
        if let Some(file) = self.nodes[node].file(index) {
            file.busy = true;
            let at = file.hashed_at.max(now);
            self.at(at, node, Event::Hashed(index));
        }
    }

    pub(super) fn hashed(&mut self, node: usize, index: usize) -> Result<()> {
        self.nodes[node].files[index] = None;
        self.nodes[node].verified[index] = true;
        self.look_for_rest(node, index);
        self.begin_file(node);
        if self.nodes[node].verified.iter().all(|verified| *verified) {
            self.warmed(node);
        }
        Ok(())
    }
}

fn is_idle(piece: Piece) -> bool {
    !piece.done && piece.copying == 0 && piece.fetching == 0
}
