//! Writing one Event.
//!
//! An Event is made in `events.k8s.io/v1`, which checks it strictly. There its note can never change again, so
//! later words come through the core API, which is the same object: `kubectl describe` then shows one line for
//! each reason, with the newest words, and how often it was told over what time.

use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event as CoreEvent, ObjectReference};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Error};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout};
use weightd_kube::Cause;

use crate::pod::PodName;

/// Who reports.
const CONTROLLER: &str = "csi.weightd.io";

/// What an Event may say.
///
/// Source: `NoteLengthLimit` in kubernetes/pkg/apis/core/validation/events.go.
const NOTE_BYTES: usize = 1024;

/// The same for the name of the reporter.
const INSTANCE_BYTES: usize = 128;

/// The longest name of an object.
const NAME_BYTES: usize = 253;

/// How long a write may take.
const WRITE: Duration = Duration::from_secs(5);

/// Writes of a node in a row.
const BURST: f64 = 25.0;

/// Writes of a node per second after that: 1. Kubelet itself may write 50 (`eventRecordQPS`).
const RATE: f64 = 1.0;

/// Why something is told. The contract with whoever filters Events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Reason {
    Fetching,
    Ready,
    Failed,
}

impl Reason {
    fn kind(self) -> &'static str {
        match self {
            Self::Fetching | Self::Ready => "Normal",
            Self::Failed => "Warning",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fetching => "WeightsFetching",
            Self::Ready => "WeightsReady",
            Self::Failed => "WeightsFailed",
        })
    }
}

/// One write.
#[derive(Debug)]
pub(super) struct Post {
    pub(super) name: String,
    pub(super) pod: PodName,
    pub(super) reason: Reason,
    pub(super) note: String,
    /// How often it was written before.
    pub(super) count: i32,
}

/// Why it was not written.
#[derive(Debug)]
pub(super) enum Refusal {
    /// RBAC lacks something.
    Denied { verb: &'static str, error: Cause },
    /// Not this one: its namespace is going away, or the server finds it invalid.
    Never(Cause),
    /// The server is slow or away.
    Away(Cause),
}

/// What RBAC calls the resource of a verb.
pub(super) fn resource(verb: &str) -> &'static str {
    match verb {
        "create" => "events.events.k8s.io",
        _ => "events",
    }
}

/// A name that only this reason for this volume of this pod has, also after the plugin was started anew.
pub(super) fn event_name(pod: &PodName, volume: &str, reason: Reason) -> String {
    let digest = Sha256::digest(format!("{}\n{volume}\n{reason}", pod.uid));
    let hex = digest.iter().take(8).fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let most = NAME_BYTES - 1 - hex.len();
    let pod = &pod.name[..pod.name.len().min(most)];
    format!("{}.{hex}", pod.trim_end_matches(['.', '-']))
}

/// Writes as one node.
pub(super) struct Poster {
    client: Client,
    instance: String,
}

impl Poster {
    pub(super) fn new(client: Client, node_id: &str) -> Self {
        let instance = cut(node_id, INSTANCE_BYTES).to_owned();
        Self { client, instance }
    }

    /// Writes it; returns how often it was written by now.
    pub(super) async fn post(&self, post: &Post) -> Result<i32, Refusal> {
        let written = timeout(WRITE, self.write(post)).await;
        written.unwrap_or_else(|_| {
            let slow = std::io::Error::other(format!("no answer within {} s", WRITE.as_secs()));
            Err(Refusal::Away(Error::Service(Box::new(slow)).into()))
        })
    }

    async fn write(&self, post: &Post) -> Result<i32, Refusal> {
        if post.count == 0 {
            return match self.create(post).await {
                // By this plugin before it was started anew.
                Err(error) if is(&error, 409) => match self.patch(post, 2).await {
                    Ok(()) => Ok(2),
                    Err(error) => Err(refusal("patch", error)),
                },
                Ok(()) => Ok(1),
                Err(error) => Err(refusal("create", error)),
            };
        }
        let count = post.count.saturating_add(1);
        match self.patch(post, count).await {
            // The server forgets Events after an hour.
            Err(error) if is(&error, 404) => match self.create(post).await {
                Ok(()) => Ok(1),
                Err(error) => Err(refusal("create", error)),
            },
            Ok(()) => Ok(count),
            Err(error) => Err(refusal("patch", error)),
        }
    }

    async fn create(&self, post: &Post) -> Result<(), Error> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &post.pod.namespace);
        let event = Event {
            metadata: ObjectMeta {
                name: Some(post.name.clone()),
                namespace: Some(post.pod.namespace.clone()),
                ..ObjectMeta::default()
            },
            action: Some("Mount".to_owned()),
            event_time: Some(MicroTime(Timestamp::now())),
            note: Some(cut(&post.note, NOTE_BYTES).to_owned()),
            reason: Some(post.reason.to_string()),
            regarding: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(post.pod.name.clone()),
                namespace: Some(post.pod.namespace.clone()),
                // A static pod's is that of its manifest, by which `kubectl describe` looks for its Events.
                uid: Some(post.pod.uid.clone()),
                ..ObjectReference::default()
            }),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            type_: Some(post.reason.kind().to_owned()),
            ..Event::default()
        };
        let created = events.create(&PostParams::default(), &event).await;
        created.map(drop)
    }

    async fn patch(&self, post: &Post, count: i32) -> Result<(), Error> {
        let events: Api<CoreEvent> = Api::namespaced(self.client.clone(), &post.pod.namespace);
        let patch = Patch::Merge(json!({
            "message": cut(&post.note, NOTE_BYTES),
            "series": { "count": count, "lastObservedTime": MicroTime(Timestamp::now()) },
        }));
        let patched = events
            .patch(&post.name, &PatchParams::default(), &patch)
            .await;
        patched.map(drop)
    }
}

fn is(error: &Error, code: u16) -> bool {
    matches!(error, Error::Api(status) if status.code == code)
}

fn refusal(verb: &'static str, error: Error) -> Refusal {
    let (code, ending) = match &error {
        Error::Api(status) => {
            let causes = status.details.iter().flat_map(|details| &details.causes);
            let mut reasons = causes.map(|cause| cause.reason.as_str());
            (
                status.code,
                reasons.any(|reason| reason == "NamespaceTerminating"),
            )
        }
        _ => (0, false),
    };
    let error = Cause::from(error);
    match code {
        403 if ending => Refusal::Never(error),
        401 | 403 => Refusal::Denied { verb, error },
        400 | 404 | 409 | 422 => Refusal::Never(error),
        _ => Refusal::Away(error),
    }
}

/// At most so many bytes.
fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

/// What the node may still write: a bucket of tokens.
pub(super) struct Budget {
    tokens: f64,
    at: Instant,
}

impl Budget {
    pub(super) fn full(now: Instant) -> Self {
        Self {
            tokens: BURST,
            at: now,
        }
    }

    /// When the next write may be.
    pub(super) fn next(&mut self, now: Instant) -> Instant {
        let earned = now.duration_since(self.at).as_secs_f64() * RATE;
        self.tokens = (self.tokens + earned).min(BURST);
        self.at = now;
        let lacking = (1.0 - self.tokens).max(0.0);
        now + Duration::from_secs_f64(lacking / RATE)
    }

    pub(super) fn take(&mut self) {
        self.tokens -= 1.0;
    }
}
