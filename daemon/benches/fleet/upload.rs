//! `Upload` and `Rest` of `fetch/share/upload.rs`, by the virtual clock: writing behind.

use anyhow::Result;
use weightd_core::shared::BLOCK_BYTES;
use weightd_core::shared::choice::{BEATS, SYNC_BYTES, WRITER_LOOK};

use super::node::{Run, Stage, Work, Writer};
use super::tier::Kind;
use super::world::{Event, Step, World};

impl World {
    pub(super) fn upload(&mut self, node: usize, number: usize, step: Step) -> Result<()> {
        let upload = &mut self.nodes[node].uploads[number];
        let (file, of) = (upload.file, (upload.segment, upload.turn));
        match step {
            Step::Released => {
                let claim = upload.claim.clone();
                self.blobs[file].release(&claim, of)?;
                return self.upload_ended(node, number);
            }
            _ if upload.writer == Writer::Ended => {}
            Step::Begun => {
                self.blobs[file].part()?;
                self.write_next(node, number);
            }
            Step::Look => self.write_next(node, number),
            Step::Synced => {
                upload.unsynced = 0;
                let over = upload.left == 0;
                self.give_write(node);
                if !over {
                    self.write_next(node, number);
                    return Ok(());
                }
                let then = Event::Upload(number, Step::Finished);
                let requests = [(Kind::Create, 1), (Kind::Other, 1)];
                self.call(node, &requests, then, Event::UploadFailed(number));
            }
            Step::Finished => {
                upload.writer = Writer::Ended;
                if !self.blobs[file].look()?.segments[of.0].here {
                    self.unfilled -= 1;
                    if self.unfilled == 0 {
                        self.outcome.filled = Some(self.now);
                    }
                }
                self.blobs[file].finish(of.0)?;
                let takes = self.ask(&[(Kind::Other, 1)]);
                self.after(takes, node, Event::Upload(number, Step::Released));
            }
        }
        Ok(())
    }

    /// Writes the next block, if there is one and it has its turn.
    fn write_next(&mut self, node: usize, number: usize) {
        let of = &mut self.nodes[node];
        let upload = &mut of.uploads[number];
        if upload.backlog < upload.left.min(BLOCK_BYTES) {
            upload.writer = Writer::Waiting;
            return;
        }
        upload.writer = Writer::Busy;
        if of.writes.take(number) {
            self.write_block(node, number);
        }
    }

    fn write_block(&mut self, node: usize, number: usize) {
        let now = self.now;
        let of = &mut self.nodes[node];
        let bytes = of.uploads[number].left.min(BLOCK_BYTES);
        let id = of.runs.add(Run {
            work: Work::Write { upload: number },
            stage: Stage::Moving,
            left: 0,
            moving: bytes,
        });
        self.write.start(now, node, id, bytes as f64);
    }

    fn give_write(&mut self, node: usize) {
        while let Some(next) = self.nodes[node].writes.give() {
            if self.nodes[node].uploads[next].writer != Writer::Ended {
                return self.write_block(node, next);
            }
        }
    }

    /// Bytes of a segment have come.
    pub(super) fn credit(&mut self, node: usize, file: usize, segment: usize, bytes: u64) {
        let Some(number) = self.nodes[node].upload_of(file, segment) else {
            return;
        };
        let upload = &mut self.nodes[node].uploads[number];
        upload.backlog = (upload.backlog + bytes).min(upload.left);
        upload.progress += bytes;
        let enough = upload.backlog >= upload.left.min(BLOCK_BYTES);
        if enough && upload.writer == Writer::Waiting {
            upload.writer = Writer::Looking;
            let soon = self.random.f64() * WRITER_LOOK.as_secs_f64();
            self.after(soon, node, Event::Upload(number, Step::Look));
        }
    }

    pub(super) fn written(&mut self, node: usize, id: u32, number: usize) -> Result<()> {
        let of = &mut self.nodes[node];
        let Some(run) = of.runs.take(id) else {
            return Ok(());
        };
        let upload = &mut of.uploads[number];
        upload.backlog -= run.moving;
        upload.left -= run.moving;
        upload.progress += run.moving;
        upload.unsynced += run.moving;
        if upload.unsynced >= SYNC_BYTES || upload.left == 0 {
            // It keeps its place.
            let sync = self.setup.speeds.sync.as_secs_f64();
            let sync = self.about(sync);
            self.after(sync, node, Event::Upload(number, Step::Synced));
            return Ok(());
        }
        self.give_write(node);
        self.write_next(node, number);
        Ok(())
    }

    pub(super) fn upload_failed(&mut self, node: usize, number: usize) -> Result<()> {
        self.leave_out(node)?;
        let now = self.now;
        let of = &mut self.nodes[node];
        let writer = &mut of.uploads[number].writer;
        if std::mem::replace(writer, Writer::Ended) == Writer::Ended {
            return Ok(());
        }
        of.writes.leave(&number);
        if let Some(id) = of.runs.find(Work::Write { upload: number }) {
            of.runs.take(id);
            self.write.stop(now, node, id);
            self.give_write(node);
        }
        let takes = self.ask(&[(Kind::Other, 1)]);
        self.after(takes, node, Event::Upload(number, Step::Released));
        Ok(())
    }

    fn upload_ended(&mut self, node: usize, number: usize) -> Result<()> {
        let (file, segment, rest) = {
            let upload = &self.nodes[node].uploads[number];
            (upload.file, upload.segment, upload.rest)
        };
        if self.nodes[node].verified[file] {
            self.look_and_seal(node, file);
        }
        if rest && self.blobs[file].look()?.segments[segment].here {
            self.look_for_rest(node, file);
        }
        self.turn_all(node)
    }

    pub(super) fn beat(&mut self, node: usize, number: usize) -> Result<()> {
        let moved = self.origin.moved(self.now, node) as u64;
        let of = &mut self.nodes[node];
        let upload = &mut of.uploads[number];
        if upload.writer == Writer::Ended {
            return Ok(());
        }
        let segments = &self.blobs[upload.file].pieces;
        let flows = of.runs.iter().any(|run| match run.work {
            Work::Fetch { file, piece } => {
                let same = file == upload.file && segments[piece].segment == upload.segment;
                same && run.stage == Stage::Moving
            }
            Work::Copy { .. } | Work::Write { .. } | Work::Hung => false,
        });
        // Smaller parts of a block are progress, too.
        let progress = upload.progress + if flows { moved } else { 0 };
        if progress != upload.shown {
            upload.shown = progress;
            let (file, of) = (upload.file, (upload.segment, upload.turn));
            let claim = upload.claim.clone();
            self.blobs[file].beat(&claim, of, progress)?;
            self.ask(&[(Kind::Open, 1)]);
        }
        let beat = self.setup.claim_timeout.as_secs_f64() / f64::from(BEATS);
        self.after(beat, node, Event::Beat(number));
        Ok(())
    }

    pub(super) fn look_for_rest(&mut self, node: usize, file: usize) {
        let takes = self.ask(&[(Kind::List, 1)]);
        self.after(takes, node, Event::Rest(file));
    }

    /// Writes what nobody brings, and seals what is whole.
    pub(super) fn rest(&mut self, node: usize, file: usize) -> Result<()> {
        let view = self.blobs[file].look()?;
        for (segment, seen) in view.segments.iter().enumerate() {
            if seen.here || seen.turn.is_some() {
                continue;
            }
            self.ask(&[(Kind::Create, 1)]);
            let claim = self.blobs[file].claim(segment, 0, &self.nodes[node].owner)?;
            if let Some(claim) = claim {
                let bytes = self.blobs[file].segment_bytes(segment);
                self.write_behind(node, file, (segment, 0), claim, bytes, true);
                return Ok(());
            }
        }
        self.look_and_seal(node, file);
        Ok(())
    }

    fn look_and_seal(&mut self, node: usize, file: usize) {
        let takes = self.ask(&[(Kind::List, 1)]);
        self.after(takes, node, Event::Seal(file));
    }

    pub(super) fn seal(&mut self, file: usize) -> Result<()> {
        let view = self.blobs[file].look()?;
        if view.is_whole() && !view.sealed {
            self.ask(&[(Kind::Other, 1)]);
            self.blobs[file].seal()?;
        }
        Ok(())
    }
}
