//! The admission webhook: what the API server asks about pods, and what it is answered.
//!
//! It never refuses a pod. What cannot be understood is answered with an HTTP error, after which the API server goes
//! on without us (`failurePolicy: Ignore`).

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Semaphore;
use weightd_core::errors::Chain;
use weightd_core::metrics::Metrics;

use super::inject::{Injected, inject};

/// Bytes of a question.
///
/// Source: an API server takes requests of at most 3 MiB, and wraps them.
const QUESTION_MAX: usize = 4 << 20;

/// Questions that are read at once: with what they are made of, 128 MiB.
const READERS: usize = 32;

/// Questions that are thought about at once: as a tree of values, one takes ten times its bytes.
const THINKERS: usize = 2;

/// Everything at once is at most so old: the API server waits no longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What questions are answered by.
pub(super) struct Webhook {
    driver: String,
    /// The namespace of this pod, whose pods are never touched.
    namespace: String,
    metrics: Arc<Metrics>,
    readers: Semaphore,
    thinkers: Semaphore,
}

/// The part of `admission.k8s.io/v1` AdmissionReview that is needed. The pod stays as it came: what this program
/// knows nothing of must not get lost.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Question {
    api_version: String,
    kind: String,
    request: Option<Request>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    resource: Resource,
    #[serde(default)]
    sub_resource: Option<String>,
    #[serde(default)]
    namespace: Option<String>,
    operation: String,
    #[serde(default)]
    object: Value,
}

#[derive(Deserialize)]
struct Resource {
    #[serde(default)]
    group: String,
    resource: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    api_version: &'static str,
    kind: &'static str,
    response: Verdict,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Verdict {
    uid: String,
    allowed: bool,
    /// The patch's JSON, in base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<k8s_openapi::ByteString>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Why a question gets no answer.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    #[error("the question cannot be read: it is larger than {QUESTION_MAX} bytes, or was cut off")]
    Body(#[source] axum::Error),
    #[error("the question is no AdmissionReview")]
    Json(#[source] serde_json::Error),
    #[error("the question is no AdmissionReview of admission.k8s.io/v1 with a request")]
    Version,
    #[error("the pod cannot be completed")]
    Pod(#[from] super::inject::Misshapen),
    #[error("the question took too long to come")]
    Slow,
}

impl Webhook {
    pub(super) fn new(driver: String, namespace: String, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            driver,
            namespace,
            metrics,
            readers: Semaphore::new(READERS),
            thinkers: Semaphore::new(THINKERS),
        })
    }

    pub(super) fn routes(self: &Arc<Self>) -> Router {
        Router::new()
            .route("/mutate", post(mutate))
            .with_state(Arc::clone(self))
    }

    async fn answer(&self, body: Body) -> Result<Answer, Unanswered> {
        let reader = self.readers.acquire().await;
        let bytes = to_bytes(body, QUESTION_MAX).await;
        let bytes = bytes.map_err(Unanswered::Body)?;
        let thinker = self.thinkers.acquire().await;
        let question: Question = serde_json::from_slice(&bytes).map_err(Unanswered::Json)?;
        drop(bytes);
        let v1 =
            question.api_version == "admission.k8s.io/v1" && question.kind == "AdmissionReview";
        let request = question.request.filter(|_| v1).ok_or(Unanswered::Version)?;
        let verdict = self.decide(request);
        drop((reader, thinker));
        Ok(Answer {
            api_version: "admission.k8s.io/v1",
            kind: "AdmissionReview",
            response: verdict?,
        })
    }

    fn decide(&self, request: Request) -> Result<Verdict, Unanswered> {
        let Injected { pod, warnings } = if self.is_ours(&request) {
            inject(&request.object, &self.driver)?
        } else {
            Injected::default()
        };
        let patch = pod.map(|pod| {
            let patch = json_patch::diff(&request.object, &pod);
            k8s_openapi::ByteString(serde_json::to_vec(&patch).expect("a patch is JSON"))
        });
        self.metrics.admitted(match (&patch, warnings.is_empty()) {
            (_, false) => "warned",
            (Some(_), true) => "injected",
            (None, true) => "unchanged",
        });
        let namespace = request.namespace.as_deref().unwrap_or_default();
        if patch.is_some() || !warnings.is_empty() {
            tracing::info!(
                namespace,
                injected = patch.is_some(),
                ?warnings,
                "pod admitted"
            );
        }
        Ok(Verdict {
            uid: request.uid,
            allowed: true,
            patch_type: patch.as_ref().map(|_| "JSONPatch"),
            patch,
            warnings,
        })
    }

    /// Whether it is about a new pod that we may change, whatever the configuration in the cluster says.
    fn is_ours(&self, request: &Request) -> bool {
        let namespace = request.namespace.as_deref().unwrap_or_default();
        request.operation == "CREATE"
            && request.resource.group.is_empty()
            && request.resource.resource == "pods"
            && request
                .sub_resource
                .as_deref()
                .unwrap_or_default()
                .is_empty()
            && namespace != self.namespace
            && namespace != "kube-system"
    }
}

async fn mutate(State(webhook): State<Arc<Webhook>>, body: Body) -> Response {
    let answer = tokio::time::timeout(PATIENCE, webhook.answer(body)).await;
    let error = match answer.unwrap_or(Err(Unanswered::Slow)) {
        Ok(answer) => return Json(answer).into_response(),
        Err(error) => error,
    };
    webhook.metrics.admitted("invalid");
    // What it says about itself may be anybody's words: who reaches this port is not known.
    tracing::warn!(error = %Chain(&error), "question not answered");
    let text = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    (
        StatusCode::BAD_REQUEST,
        text,
        format!("{}\n", Chain(&error)),
    )
        .into_response()
}

#[cfg(test)]
mod tests;
