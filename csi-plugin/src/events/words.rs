//! What an Event says, to somebody who reads `kubectl describe pod`.

use std::time::Duration;

use tonic::Code;
use weightd_proto::weightd::v1::Progress;
use weightd_proto::weightd::v1::progress::Phase;

use crate::node::words::{bytes, time, waiting_for};

/// The volume is not there yet, or not all of it.
pub(super) fn fetching(
    model: &str,
    volume: &str,
    mounted: bool,
    progress: Option<&Progress>,
) -> String {
    let model = shorten(model);
    let doing = match mounted {
        true => format!("filling volume `{volume}`, which is mounted already, with {model}"),
        false => format!("fetching {model} for volume `{volume}`"),
    };
    format!("{doing}: {}", how_far(progress, &model))
}

fn how_far(progress: Option<&Progress>, model: &str) -> String {
    let Some(now) = progress else {
        return "its origin is asked what it holds, and whether the pod may have it".to_owned();
    };
    let wait = now.wait.as_ref().map(waiting_for);
    match now.phase() {
        Phase::Unspecified | Phase::Resolving => {
            wait.unwrap_or_else(|| "its origin is asked what it holds".to_owned())
        }
        Phase::WaitingForRoom => {
            let all = bytes(now.bytes as f64);
            format!("waiting for room for {all} in the node's store")
        }
        Phase::Fetching => {
            let mut text = of(now.bytes_done, now.bytes);
            match wait {
                Some(wait) => text += &format!(", {wait}"),
                None => text += &rate(now, model),
            }
            text
        }
        Phase::Publishing => format!("{} are here and checked", bytes(now.bytes as f64)),
    }
}

fn rate(now: &Progress, model: &str) -> String {
    let mut text = String::new();
    if now.bytes_per_second >= 1.0 {
        let rate = bytes(now.bytes_per_second);
        text += &format!(", {rate}/s{}", from(now, model));
    }
    if let Some(eta) = now.eta_seconds.filter(|eta| eta.is_finite()) {
        text += &format!(", about {} left", time(eta));
    }
    text
}

/// Where most of the bytes come from now.
fn from(now: &Progress, model: &str) -> String {
    let shared = now.bytes_per_second_shared / now.bytes_per_second;
    let origin = origin(model);
    match shared {
        0.95.. => " from the shared tier".to_owned(),
        0.05.. => format!(" from {origin} and the shared tier"),
        _ => format!(" from {origin}"),
    }
}

fn origin(model: &str) -> &'static str {
    match model.split_once("://") {
        Some(("hf", _)) => "the Hub",
        Some(("s3", _)) => "S3",
        Some(("file", _)) => "its directory",
        _ => "its origin",
    }
}

/// It cannot be had now, and is asked for again.
pub(super) fn waiting(model: &str, volume: &str, code: Code, why: &str) -> String {
    let why = one_line(why);
    let model = shorten(model);
    match code {
        Code::ResourceExhausted => {
            format!("waiting for room for {model} for volume `{volume}`: {why}")
        }
        _ => format!("fetching {model} for volume `{volume}`: tried again after: {why}"),
    }
}

/// It cannot be had.
pub(super) fn failed(volume: &str, why: &str) -> String {
    format!("volume `{volume}`: {}", one_line(why))
}

/// It is there. `found` is what was here when it began.
pub(super) fn ready(
    model: &str,
    volume: &str,
    filled: bool,
    took: Duration,
    progress: Option<&Progress>,
    found: Option<u64>,
) -> String {
    let model = shorten(model);
    let took = time(took.as_secs_f64());
    let is = if filled {
        "complete with"
    } else {
        "mounted with"
    };
    let mut text = format!("volume `{volume}` is {is} {model}");
    let Some(now) = progress.filter(|now| now.bytes > 0) else {
        return format!("{text}, after {took}");
    };
    text += &format!(": {} in {took}", bytes(now.bytes as f64));
    // Else it went on while nobody listened, and these figures are old.
    if now.bytes_done >= now.bytes {
        text += &ways(now, &model, found);
    }
    text
}

/// How much came which way.
fn ways(now: &Progress, model: &str, found: Option<u64>) -> String {
    let brought = now.bytes_fetched + now.bytes_shared;
    if brought == 0 {
        return match found.is_some_and(|found| found < now.bytes) {
            true => ", brought by another fetch on this node".to_owned(),
            false => ", all of it was on the node".to_owned(),
        };
    }
    let parts = [
        (now.bytes_fetched, format!("from {}", origin(model))),
        (now.bytes_shared, "from the shared tier".to_owned()),
        (
            now.bytes.saturating_sub(brought),
            "was on the node".to_owned(),
        ),
    ];
    let parts = parts.into_iter().filter(|(amount, _)| *amount > 0);
    parts
        .map(|(amount, way)| format!(", {} {way}", bytes(amount as f64)))
        .collect()
}

fn of(done: u64, all: u64) -> String {
    let (done, all) = (bytes(done as f64), bytes(all as f64));
    match (done.split_once(' '), all.split_once(' ')) {
        (Some((amount, unit)), Some((_, whole))) if unit == whole => format!("{amount} of {all}"),
        _ => format!("{done} of {all}"),
    }
}

/// In a table no line may break.
fn one_line(text: &str) -> String {
    text.replace("\nhint: ", "; hint: ").replace('\n', " ")
}

/// A commit or digest is too long for a line that also shows figures.
fn shorten(model: &str) -> String {
    let long = |revision: &str| {
        matches!(revision.len(), 40 | 64) && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    match model.rsplit_once('@') {
        Some((name, revision)) if long(revision) => format!("{name}@{}", &revision[..12]),
        _ => model.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn now() -> Progress {
        Progress {
            phase: Phase::Fetching.into(),
            bytes: 65 * GIB,
            bytes_done: 12 * GIB,
            bytes_per_second: 2.0 * GIB as f64,
            ..Progress::default()
        }
    }

    fn told(change: impl FnOnce(&mut Progress)) -> String {
        let mut progress = now();
        change(&mut progress);
        let text = fetching("s3://bucket/model", "model", false, Some(&progress));
        let start = "fetching s3://bucket/model for volume `model`: ";
        text.strip_prefix(start).expect("it begins so").to_owned()
    }

    #[test]
    fn where_the_bytes_come_from_is_told() {
        let from = |shared: f64| told(|now| now.bytes_per_second_shared = shared * GIB as f64);
        assert_eq!(from(0.0), "12.0 of 65.0 GiB, 2.0 GiB/s from S3");
        let both = "12.0 of 65.0 GiB, 2.0 GiB/s from S3 and the shared tier";
        assert_eq!(from(1.0), both);
        assert_eq!(
            from(2.0),
            "12.0 of 65.0 GiB, 2.0 GiB/s from the shared tier"
        );
    }

    #[test]
    fn each_phase_has_its_words() {
        let phase = |phase: Phase| told(|now| now.phase = phase.into());
        assert_eq!(phase(Phase::Resolving), "its origin is asked what it holds");
        let room = "waiting for room for 65.0 GiB in the node's store";
        assert_eq!(phase(Phase::WaitingForRoom), room);
        assert_eq!(phase(Phase::Publishing), "65.0 GiB are here and checked");
        let small = told(|now| (now.bytes_done, now.bytes_per_second) = (1 << 20, 0.0));
        assert_eq!(small, "1.0 MiB of 65.0 GiB");
    }

    #[test]
    fn the_end_says_how_much_came_which_way() {
        let end = |change: fn(&mut Progress), found| {
            let mut now = now();
            now.bytes_done = now.bytes;
            change(&mut now);
            let took = Duration::from_secs(63);
            let text = ready("hf://org/model", "model", true, took, Some(&now), found);
            let start = "volume `model` is complete with hf://org/model: 65.0 GiB in 63 s";
            text.strip_prefix(start).expect("it begins so").to_owned()
        };
        let all = ", 65.0 GiB from the Hub";
        assert_eq!(end(|now| now.bytes_fetched = now.bytes, None), all);
        let other = ", brought by another fetch on this node";
        assert_eq!(end(|_| {}, Some(GIB)), other);
        assert_eq!(end(|_| {}, Some(65 * GIB)), ", all of it was on the node");
        // The last news are of before its end.
        assert_eq!(end(|now| now.bytes_done = GIB, None), "");
    }
}
