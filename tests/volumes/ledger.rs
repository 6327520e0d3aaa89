//! The Events of the stand-in API server, with the checks of a real one.

use axum::response::Response;
use serde_json::{Value, json};

use crate::api::{respond, status};

/// What a real server takes for a note.
const NOTE_BYTES: usize = 1024;

/// The Events that a server has, as its core API shows them.
#[derive(Default)]
pub(crate) struct Ledger {
    events: Vec<Value>,
    writes: Vec<String>,
}

/// A line of `kubectl describe pod`, without its age.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    pub(crate) kind: String,
    pub(crate) reason: String,
    pub(crate) count: u64,
    pub(crate) message: String,
}

/// Where a request writes.
pub(crate) struct Place {
    core: bool,
    namespace: String,
    name: Option<String>,
}

impl Place {
    /// `None` if that is no path of Events.
    pub(crate) fn parse(path: &str) -> Option<Self> {
        let strict = path.strip_prefix("/apis/events.k8s.io/v1/namespaces/");
        let core = path.strip_prefix("/api/v1/namespaces/");
        let mut parts = strict.or(core)?.split('/');
        let namespace = parts.next()?.to_owned();
        (parts.next()? == "events").then(|| Self {
            core: core.is_some(),
            namespace,
            name: parts.next().map(str::to_owned),
        })
    }

    /// RBAC's group and verb.
    pub(crate) fn right(&self) -> (&'static str, &'static str) {
        let group = if self.core { "" } else { "events.k8s.io" };
        let verb = if self.name.is_some() {
            "patch"
        } else {
            "create"
        };
        (group, verb)
    }
}

impl Ledger {
    pub(crate) fn asked(&mut self, place: &Place) {
        let (group, verb) = place.right();
        self.writes
            .push(format!("{verb} {group} {}", place.namespace));
    }

    /// How many writes were asked for, whatever the answer.
    pub(crate) fn writes(&self) -> usize {
        self.writes.len()
    }

    pub(crate) fn forget(&mut self) {
        self.events.clear();
    }

    /// What `kubectl describe pod` finds for a pod, the oldest first.
    pub(crate) fn of(&self, name: &str, uid: &str) -> Vec<Line> {
        let of_pod = self.events.iter().filter(|event| {
            let object = &event["involvedObject"];
            object["name"] == name && object["uid"] == uid && object["namespace"] == "team-a"
        });
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let lines = of_pod.map(|event| Line {
            kind: text(&event["type"]),
            reason: text(&event["reason"]),
            count: event["series"]["count"].as_u64().unwrap_or(1),
            message: text(&event["message"]),
        });
        lines.collect()
    }

    pub(crate) fn write(&mut self, place: &Place, body: &Value) -> Response {
        match &place.name {
            None => self.create(place, body),
            Some(name) => self.patch(place, name, body),
        }
    }

    fn create(&mut self, place: &Place, body: &Value) -> Response {
        let name = &body["metadata"]["name"];
        let text = |key: &str| body[key].as_str().unwrap_or_default();
        let wrong = [
            (place.core, "made through the core API"),
            (text("eventTime").is_empty(), "eventTime"),
            (text("action").is_empty(), "action"),
            (text("reason").is_empty(), "reason"),
            (
                text("reportingController") != "csi.weightd.io",
                "reportingController",
            ),
            (text("reportingInstance") != "node-1", "reportingInstance"),
            (text("note").len() > NOTE_BYTES, "note"),
            (!matches!(text("type"), "Normal" | "Warning"), "type"),
            (
                body["metadata"]["namespace"] != *place.namespace,
                "metadata.namespace",
            ),
            (
                body["regarding"]["namespace"] != *place.namespace,
                "regarding.namespace",
            ),
            (body["regarding"]["kind"] != "Pod", "regarding.kind"),
            (!body["series"].is_null(), "series"),
        ];
        if let Some((_, field)) = wrong.iter().find(|(wrong, _)| *wrong) {
            return status(422, "Invalid", &format!("event is invalid: {field}"));
        }
        if self
            .events
            .iter()
            .any(|event| event["metadata"]["name"] == *name)
        {
            let text = format!("events.events.k8s.io {name} already exists");
            return status(409, "AlreadyExists", &text);
        }
        let mut event = body.clone();
        event["message"] = event["note"].take();
        event["involvedObject"] = event["regarding"].take();
        self.events.push(event);
        respond(201, body.to_string())
    }

    fn patch(&mut self, place: &Place, name: &str, body: &Value) -> Response {
        let found = self.events.iter_mut().find(|event| {
            let metadata = &event["metadata"];
            metadata["name"] == name && metadata["namespace"] == *place.namespace
        });
        let Some(event) = found else {
            return status(404, "NotFound", &format!("events {name:?} not found"));
        };
        let count = body["series"]["count"].as_u64().unwrap_or_default();
        let observed = body["series"]["lastObservedTime"].is_string();
        let message = body["message"].as_str().unwrap_or_default();
        // Through events.k8s.io nothing but the series may change.
        let allowed = place.core || message.is_empty() && body["note"].is_null();
        if !allowed || !observed || count < 2 || message.len() > NOTE_BYTES {
            return status(422, "Invalid", "event is invalid: field is immutable");
        }
        event["message"] = json!(message);
        event["series"] = body["series"].clone();
        respond(
            200,
            json!({ "metadata": event["metadata"], "involvedObject": {} }).to_string(),
        )
    }
}
