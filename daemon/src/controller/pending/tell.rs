//! Events on pods: a few words for whoever asks why a pod waits.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use weightd_kube::Cause;

/// Events that wait for an API server that is slow. More are not told.
const WAITING: usize = 64;

/// Bytes of an event's note.
///
/// Source: the API server takes at most 1,024.
const NOTE_MAX: usize = 1000;

/// How long one may take to be written.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// The tier is being filled.
    Begun,
    /// It has the model.
    Done,
    /// It will not have it, and why.
    Not,
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
            while let Some((about, event)) = coming.recv().await {
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
