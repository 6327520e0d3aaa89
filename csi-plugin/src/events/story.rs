//! What is told of one volume, and when.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Status};
use weightd_proto::weightd::v1::{Acquired, Progress, Volume};

use super::post::{Post, Reason, event_name};
use super::words;
use crate::pod::PodName;

/// The pauses between what is told of a volume that waits, in units of the time before the first: 30 s, 1 min,
/// 2 min, then 5 min.
const PAUSES: [u32; 4] = [6, 12, 24, 60];

/// The same for news, such as that it waits for something else now: 15 s.
const NEWS: u32 = 3;

/// What is happening to a volume.
#[derive(Debug, Clone)]
enum State {
    /// It is being asked for, or fetched.
    Fetching,
    /// It cannot be had now.
    Waiting(Code, String),
    /// It cannot be had before somebody mends something.
    Failed(String),
    /// It is mounted, with all its files.
    Ready,
}

/// One volume of one pod, over all calls of kubelet.
pub(super) struct Story {
    pod: PodName,
    volume: String,
    model: String,
    begun: Instant,
    /// The time before the first event.
    unit: Duration,
    state: State,
    progress: Option<Progress>,
    /// Bytes that were here when it began.
    found: Option<u64>,
    /// It is mounted, before its files are here.
    filling: bool,
    /// Calls at work.
    calls: u32,
    touched: Instant,
    due: Option<Instant>,
    told: Option<Instant>,
    round: usize,
    /// How often each reason was posted.
    counts: HashMap<Reason, i32>,
    /// It is being written.
    posting: bool,
    /// Another process has begun to tell it, maybe.
    resumed: bool,
}

/// What is to be written next.
pub(super) enum Turn {
    /// This, of that holder's volume.
    Now(String, Post),
    At(Instant),
    Never,
}

/// Picks what is most urgent: how a story ended, then those of which nothing was told yet, then the longest due.
/// `quiet` says until when nothing may be written to a namespace.
pub(super) fn next(
    stories: &mut HashMap<String, Story>,
    now: Instant,
    quiet: impl Fn(&str) -> Option<Instant>,
) -> Turn {
    let due = stories.iter().filter_map(|(holder, story)| {
        let due = story.due()?;
        let quiet = quiet(&story.pod.namespace).unwrap_or(due);
        Some((due.max(quiet), story.rank(), holder))
    });
    let first = due.min_by_key(|(due, rank, _)| match *due <= now {
        true => (now, *rank, *due),
        false => (*due, 0, *due),
    });
    match first {
        Some((due, _, holder)) if due <= now => Turn::Now(holder.clone(), stories[holder].post()),
        Some((due, ..)) => Turn::At(due),
        None => Turn::Never,
    }
}

impl Story {
    pub(super) fn begin(pod: PodName, volume: String, now: Instant, unit: Duration) -> Self {
        Self {
            pod,
            volume,
            model: String::new(),
            begun: now,
            unit,
            state: State::Fetching,
            progress: None,
            found: None,
            filling: false,
            calls: 0,
            touched: now,
            due: Some(now + unit),
            told: None,
            round: 0,
            counts: HashMap::new(),
            posting: false,
            resumed: false,
        }
    }

    /// Of a volume that was mounted, and not complete, before this process began.
    pub(super) fn resume(pod: PodName, volume: String, now: Instant, unit: Duration) -> Self {
        Self {
            filling: true,
            resumed: true,
            ..Self::begin(pod, volume, now, unit)
        }
    }

    pub(super) fn called(&mut self) {
        self.calls += 1;
    }

    pub(super) fn left(&mut self, now: Instant) {
        self.calls = self.calls.saturating_sub(1);
        self.touched = now;
    }

    pub(super) fn model(&mut self, model: &str) {
        if !model.is_empty() {
            model.clone_into(&mut self.model);
        }
    }

    pub(super) fn progress(&mut self, progress: Progress, now: Instant) {
        if self.model.is_empty() {
            self.model(&progress.model);
        }
        if progress.bytes > 0 {
            self.found.get_or_insert(progress.bytes_done);
        }
        let kind = |progress: &Progress| {
            let wait = progress.wait.as_ref().map(|wait| wait.kind);
            (progress.phase, wait)
        };
        let fetched = matches!(self.state, State::Fetching);
        // That bytes come again may last no longer than a moment.
        let waits = progress.wait.is_some();
        if !fetched || waits && self.progress.as_ref().map(kind) != Some(kind(&progress)) {
            self.news(now);
        }
        self.state = State::Fetching;
        self.progress = Some(progress);
        self.touched = now;
    }

    pub(super) fn waits(&mut self, status: &Status, now: Instant) {
        if !matches!(self.state, State::Waiting(code, _) if code == status.code()) {
            self.news(now);
        }
        self.state = State::Waiting(status.code(), status.message().to_owned());
        self.touched = now;
    }

    pub(super) fn failed(&mut self, why: &str, now: Instant) {
        if !matches!(&self.state, State::Failed(before) if before == why) {
            // At once, also if it is the first that is told.
            self.due = Some(now);
            self.round = 0;
        }
        self.state = State::Failed(why.to_owned());
        self.touched = now;
    }

    pub(super) fn mounted(&mut self, acquired: &Acquired, now: Instant) {
        if self.model.is_empty() {
            self.model(&acquired.model);
        }
        self.filling = !acquired.complete;
        self.touched = now;
        if acquired.complete {
            self.ready(now);
        } else if self.told.is_none() {
            self.due = Some(now + self.unit);
        }
    }

    /// What the daemon says of a volume that is mounted, and was not complete.
    pub(super) fn filled(&mut self, volume: &Volume, now: Instant) {
        if !self.filling {
            return;
        }
        if volume.error.is_empty() || volume.complete {
            if let Some(progress) = &volume.progress {
                self.progress(progress.clone(), now);
            }
        } else if let Some(why) = volume.error.strip_prefix("failed: ") {
            self.failed(why, now);
        } else {
            let why = volume.error.strip_prefix("retrying: ");
            self.waits(&Status::unavailable(why.unwrap_or(&volume.error)), now);
        }
        if volume.complete {
            self.ready(now);
        }
        self.touched = now;
    }

    fn ready(&mut self, now: Instant) {
        self.state = State::Ready;
        self.due = Some(now);
    }

    /// Something changed that is worth telling before the next turn.
    fn news(&mut self, now: Instant) {
        let Some(told) = self.told else { return };
        let soon = now.max(told + self.unit * NEWS);
        self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
    }

    /// When to tell of it. Between two calls nobody knows how far a fetch is.
    fn due(&self) -> Option<Instant> {
        let known = match self.state {
            State::Fetching => self.calls > 0 || self.filling,
            // What nobody asks for any more is not told again and again.
            State::Waiting(..) | State::Failed(_) => {
                self.told.is_none_or(|told| self.touched > told)
            }
            // Who was told nothing waited for nothing.
            State::Ready => self.posting || self.resumed || !self.counts.is_empty(),
        };
        self.due.filter(|_| known)
    }

    fn rank(&self) -> u8 {
        match self.state {
            State::Failed(_) | State::Ready => 0,
            State::Fetching | State::Waiting(..) if self.counts.is_empty() => 1,
            State::Fetching | State::Waiting(..) => 2,
        }
    }

    pub(super) fn post(&self) -> Post {
        let (reason, note) = match &self.state {
            State::Fetching => (Reason::Fetching, self.fetching()),
            State::Waiting(code, why) => (
                Reason::Fetching,
                words::waiting(&self.model, &self.volume, *code, why),
            ),
            State::Failed(why) => (Reason::Failed, words::failed(&self.volume, why)),
            State::Ready => (Reason::Ready, self.summary()),
        };
        Post {
            name: event_name(&self.pod, &self.volume, reason),
            count: self.counts.get(&reason).copied().unwrap_or_default(),
            pod: self.pod.clone(),
            reason,
            note,
        }
    }

    fn fetching(&self) -> String {
        let (model, volume) = (&self.model, &self.volume);
        words::fetching(model, volume, self.filling, self.progress.as_ref())
    }

    fn summary(&self) -> String {
        let progress = self.progress.as_ref();
        let took = match progress.filter(|_| self.resumed) {
            Some(now) => Duration::try_from_secs_f64(now.elapsed_seconds).unwrap_or_default(),
            None => self.touched - self.begun,
        };
        let (model, volume) = (&self.model, &self.volume);
        words::ready(model, volume, self.filling, took, progress, self.found)
    }

    /// It is being written, or is no more.
    pub(super) fn posting(&mut self, posting: bool) {
        self.posting = posting;
    }

    /// It was written, for the `count`th time.
    pub(super) fn posted(&mut self, post: &Post, count: i32, now: Instant) {
        self.counts.insert(post.reason, count);
        self.told = Some(now);
        if matches!(self.state, State::Ready) && post.reason == Reason::Ready {
            self.due = None;
            return;
        }
        // What came while it was written stays urgent.
        let urgent = matches!(&self.state, State::Failed(_) | State::Ready);
        if urgent && post.note != self.post().note {
            return;
        }
        let pause = PAUSES[self.round.min(PAUSES.len() - 1)];
        self.round += 1;
        self.due = Some(now + self.unit * pause);
    }

    /// It cannot be told.
    pub(super) fn give_up(&mut self) {
        self.due = None;
        self.state = State::Ready;
        self.counts.clear();
        self.filling = false;
    }

    pub(super) fn is_filling(&self) -> bool {
        self.filling && !matches!(self.state, State::Ready)
    }

    /// All its files are here.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, State::Ready) && self.due().is_some()
    }

    /// There is nothing more to tell.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Ready) && self.due().is_none()
    }

    pub(super) fn is_forgotten(&self, now: Instant, after: Duration) -> bool {
        self.calls == 0 && !self.filling && now.duration_since(self.touched) >= after
    }
}
