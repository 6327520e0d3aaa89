//! What kubelet is told. It ends up in `kubectl describe pod`.

use std::error::Error;

use k8s_openapi::jiff::Timestamp;
use tonic::{Code, Status};
use weightd_proto::weightd::v1::progress::Phase;
use weightd_proto::weightd::v1::{Progress, Wait};

use crate::mount::MountError;
use crate::pod::PodError;

/// An error and its causes, each once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

pub(crate) fn of_mount(error: &MountError) -> Status {
    let hint = error.hint().map(|hint| format!("\nhint: {hint}"));
    Status::internal(chain(error) + &hint.unwrap_or_default())
}

/// Of an API server. Only that it refuses us is final: kubelet need not ask again until somebody mends that.
pub(super) fn of_pod(error: &PodError) -> Status {
    let code = match error {
        PodError::Unavailable { .. } => Code::Unavailable,
        PodError::Denied { .. } => Code::FailedPrecondition,
        PodError::Gone { .. } => Code::Aborted,
    };
    let hint = error.hint().map(|hint| format!("\nhint: {hint}"));
    Status::new(code, chain(error) + &hint.unwrap_or_default())
}

/// A refusal of what the annotation `key` names: whoever is to mend it must know where it stands.
pub(super) fn of_annotated(key: &str, status: Status) -> Status {
    let code = status.code();
    if !matches!(
        code,
        Code::InvalidArgument | Code::NotFound | Code::PermissionDenied
    ) {
        return status;
    }
    let message = status.message();
    let (text, hint) = message.split_at(message.find("\nhint: ").unwrap_or(message.len()));
    let text = format!("{text} (the pod's annotation `{key}` names the model){hint}");
    Status::new(code, text)
}

/// The model is on its way: kubelet shall ask again.
pub(super) fn still_fetching(model: &str, progress: Option<&Progress>) -> Status {
    const GO_ON: &str = "hint: nothing to do: the fetch goes on, and kubelet asks again";
    let Some(now) = progress.filter(|now| now.bytes > 0) else {
        let mut text = format!("{model} is not here yet: its origin has not said what it holds");
        if let Some(wait) = progress.and_then(|now| now.wait.as_ref()) {
            text += &format!(", {}", waiting_for(wait));
        }
        return Status::aborted(format!("{text}\n{GO_ON}"));
    };
    let model = if now.model.is_empty() {
        model
    } else {
        &now.model
    };
    if now.phase() == Phase::WaitingForRoom {
        let all = bytes(now.bytes as f64);
        return Status::aborted(format!(
            "{model} of {all} waits for room in the store\nhint: raise the store's limits, or remove models with \
             weightctl rm and unpin"
        ));
    }
    let (done, all) = (bytes(now.bytes_done as f64), bytes(now.bytes as f64));
    let mut text = format!("{model} is still being fetched: {done} of {all}");
    if let Some(wait) = &now.wait {
        text += &format!(", {}", waiting_for(wait));
        return Status::aborted(format!("{text}\n{GO_ON}"));
    }
    if now.bytes_per_second > 0.0 {
        text += &format!(" at {}/s", bytes(now.bytes_per_second));
    }
    if let Some(eta) = now.eta_seconds.filter(|eta| eta.is_finite()) {
        text += &format!(", about {} left", time(eta));
    }
    Status::aborted(format!("{text}\n{GO_ON}"))
}

/// What it waits for, and until when: an Event is read later than it is written.
pub(crate) fn waiting_for(wait: &Wait) -> String {
    let until = wait.until.and_then(|at| Timestamp::from_second(at).ok());
    let until = until.map(|at| format!(", until {} UTC", at.strftime("%H:%M:%S")));
    format!("waiting for {}{}", wait.detail, until.unwrap_or_default())
}

pub(crate) fn bytes(bytes: f64) -> String {
    let (mut amount, mut unit) = (bytes, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if amount < 1024.0 {
            break;
        }
        (amount, unit) = (amount / 1024.0, larger);
    }
    match unit {
        "B" => format!("{amount:.0} B"),
        _ => format!("{amount:.1} {unit}"),
    }
}

pub(crate) fn time(seconds: f64) -> String {
    match seconds.round() as u64 {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..6000 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{:.1} h", seconds as f64 / 3600.0),
    }
}

/// Logs a refusal where it is handled. That a model is still on its way is no news.
pub(super) fn log(what: &'static str, path: &str, status: &Status) {
    let (code, error) = (status.code(), status.message());
    match code {
        Code::Aborted => tracing::info!(target_path = path, ?code, error, "{what}"),
        _ => tracing::warn!(target_path = path, ?code, error, "{what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_an_annotated_model_names_the_annotation_before_the_remedy() {
        let key = "weightd.io/model";

        let status = of_annotated(key, Status::not_found("no such model\nhint: look"));

        assert_eq!(status.code(), Code::NotFound);
        let expected =
            "no such model (the pod's annotation `weightd.io/model` names the model)\nhint: look";
        assert_eq!(status.message(), expected);
        let away = of_annotated(key, Status::unavailable("the daemon is away"));
        assert_eq!(away.message(), "the daemon is away");
    }

    #[test]
    fn kubelet_is_told_how_far_it_is() {
        let now = Progress {
            model: "hf://org/model@abc".to_owned(),
            bytes: 65 << 30,
            bytes_done: 13 << 30,
            bytes_per_second: 410.0 * 1024.0 * 1024.0,
            eta_seconds: Some(133.0),
            ..Progress::default()
        };

        let status = still_fetching("hf://org/model", Some(&now));

        assert_eq!(status.code(), Code::Aborted);
        let line = status.message().lines().next();
        assert_eq!(
            line,
            Some(
                "hf://org/model@abc is still being fetched: 13.0 GiB of 65.0 GiB at 410.0 MiB/s, about 3 min left"
            )
        );
        let early = still_fetching("hf://org/model", None);
        assert!(
            early
                .message()
                .starts_with("hf://org/model is not here yet"),
            "{early}"
        );
    }
}
