//! Events on pods: a few words for whoever asks why a pod waits.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use weightd_kube::Cause;

/// Events that wait for an API server that is slow. More are not told.
const WAITING: usize = 64;

/// Bytes of an event's note.
///
/// Source: the API server takes at most 1,024.
const NOTE_MAX: usize = 1000;

/// How long one may take to be written.
const PATIENCE: Duration = Duration::from_secs(5);

/// Events that may be written in a row.
///
/// Source: client-go's `EventCorrelator`, which lets 25 through for one object.
const BURST: f64 = 25.0;

/// Events a second in the long run: pods that name models which there are not cost the API server no more.
const A_SECOND: f64 = 2.0;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// The tier is being filled.
    Begun,
    /// It has the model.
    Done,
    /// It is left to the nodes, as it should be.
    Left,
    /// It will not have it, and why.
    Not,
}

/// Holds events back that come too fast.
struct Pace {
    left: f64,
    seen: Instant,
}

impl Pace {
    fn new() -> Self {
        Self {
            left: BURST,
            seen: Instant::now(),
        }
    }

    /// Waits until one more may be written.
    async fn turn(&mut self) {
        let now = Instant::now();
        let earned = (now - self.seen).as_secs_f64() * A_SECOND;
        (self.left, self.seen) = ((self.left + earned).min(BURST) - 1.0, now);
        if self.left < 0.0 {
            sleep(Duration::from_secs_f64(-self.left / A_SECOND)).await;
        }
    }
}

/// Writes events, one after the other, until it is dropped.
pub(super) struct Teller {
    events: mpsc::Sender<(ObjectReference, Event)>,
    _writing: AbortOnDropHandle<()>,
}

impl Teller {
    pub(super) fn new(client: Client, pod: &str) -> Self {
        let reporter = Reporter {
            controller: "weightd.io/controller".to_owned(),
            instance: Some(pod.to_owned()),
        };
        let recorder = Recorder::new(client, reporter);
        let (events, mut coming) = mpsc::channel::<(ObjectReference, Event)>(WAITING);
        let writing = tokio::spawn(async move {
            let mut pace = Pace::new();
            while let Some((about, event)) = coming.recv().await {
                pace.turn().await;
                match timeout(PATIENCE, recorder.publish(&event, &about)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        let error = Cause::from(error);
                        tracing::debug!(%error, "event not written");
                    }
                    Err(_) => tracing::debug!("event not written in time"),
                }
            }
        });
        Self {
            events,
            _writing: AbortOnDropHandle::new(writing),
        }
    }

    /// Has `text` written on the pod that is `about`. An event is no promise: one too many is left out.
    pub(super) fn tell(&self, about: &ObjectReference, word: Word, text: &str) {
        let (type_, reason, action) = match word {
            Word::Begun => (EventType::Normal, "WeightsPrefetching", "FillSharedTier"),
            // Another action: the recorder takes the same one again for a repetition of the same words.
            Word::Done => (EventType::Normal, "WeightsPrefetching", "FilledSharedTier"),
            Word::Left => (EventType::Normal, "WeightsNotPrefetched", "FillSharedTier"),
            Word::Not => (EventType::Warning, "WeightsNotPrefetched", "FillSharedTier"),
        };
        let mut note = text.to_owned();
        if note.len() > NOTE_MAX {
            note.truncate(note.floor_char_boundary(NOTE_MAX));
            note.push('…');
        }
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note),
            action: action.to_owned(),
            secondary: None,
        };
        if self.events.try_send((about.clone(), event)).is_err() {
            tracing::debug!("event left out: too many wait");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn events_come_at_once_and_then_slowly() {
        let (mut pace, began) = (Pace::new(), Instant::now());
        for _ in 0..25 {
            pace.turn().await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO);

        for _ in 0..20 {
            pace.turn().await;
        }
        let took = began.elapsed().as_secs_f64();
        assert!((9.0..11.0).contains(&took), "{took}");
        tokio::time::advance(Duration::from_secs(3600)).await;
        let began = Instant::now();
        for _ in 0..26 {
            pace.turn().await;
        }
        assert!(
            !began.elapsed().is_zero(),
            "an hour of rest earns no more than one burst"
        );
    }
}
