//! Progress on a terminal; silent elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use weightd_proto::weightd::v1::{Progress, VerifyProgress, Wait, Warming, progress::Phase};

use crate::output::{self, Output};

/// One bar, for one command's work.
#[derive(Clone)]
pub(crate) struct Bar(ProgressBar);

impl Bar {
    pub(crate) fn new(output: Output) -> Self {
        let bar = ProgressBar::new(0);
        if !output.is_text() || !std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
            return Self(bar);
        }
        let template = "{prefix}  [{bar:32}] {msg}";
        bar.set_style(
            ProgressStyle::with_template(template)
                .expect("it parses")
                .progress_chars("=> "),
        );
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    pub(crate) fn fetch(&self, progress: &Progress) {
        let doing = match progress.phase() {
            Phase::Unspecified | Phase::Resolving => match &progress.wait {
                Some(wait) => waiting(wait),
                None => "resolving".to_owned(),
            },
            Phase::WaitingForRoom => "making room".to_owned(),
            Phase::Fetching => fetching(progress),
            Phase::Publishing => "publishing".to_owned(),
        };
        self.0.set_prefix(shorten(&progress.model));
        self.0.set_length(progress.bytes);
        self.0.set_position(progress.bytes_done);
        self.0.set_message(doing);
    }

    pub(crate) fn verify(&self, progress: &VerifyProgress) {
        self.bytes("verifying", progress.bytes_done, progress.bytes);
    }

    pub(crate) fn warm(&self, warming: &Warming) {
        self.bytes("warming", warming.bytes_warm, warming.bytes);
    }

    /// Bytes done so far, and all.
    pub(crate) fn bytes(&self, doing: &'static str, done: u64, all: u64) {
        self.0.set_prefix(doing);
        self.0.set_length(all);
        self.0.set_position(done);
        let (done, all) = (output::bytes(done), output::bytes(all));
        self.0.set_message(format!("{done} of {all}"));
    }

    /// Steps taken so far, and all.
    pub(crate) fn steps(&self, doing: &'static str, done: u64, all: u64) {
        self.0.set_prefix(doing);
        self.0.set_length(all);
        self.0.set_position(done);
        self.0.set_message(format!("{done} of {all}"));
    }

    pub(crate) fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// What a fetch waits for, and how long it will if that is known.
pub(crate) fn waiting(wait: &Wait) -> String {
    let now = jiff::Timestamp::now().as_second();
    let left = wait
        .until
        .map(|until| u32::try_from(until - now).unwrap_or_default());
    let left = left.filter(|left| *left > 0);
    let left = left.map(|left| format!(", for {} more", output::seconds(left.into())));
    format!("waiting for {}{}", wait.detail, left.unwrap_or_default())
}

fn fetching(progress: &Progress) -> String {
    if let Some(wait) = &progress.wait {
        return format!(
            "{} of {}, {}",
            output::bytes(progress.bytes_done),
            output::bytes(progress.bytes),
            waiting(wait)
        );
    }
    let rate = output::bytes(progress.bytes_per_second as u64);
    let eta = progress
        .eta_seconds
        .map(|eta| format!(", {} left", output::seconds(eta)))
        .unwrap_or_default();
    format!(
        "{} of {}, {}/{} files, {rate}/s{eta}",
        output::bytes(progress.bytes_done),
        output::bytes(progress.bytes),
        progress.files_done,
        progress.files,
    )
}

/// A commit or digest is too long for a line that also shows figures.
pub(crate) fn shorten(model: &str) -> String {
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

    #[test]
    fn what_a_fetch_waits_for_has_its_end_if_that_is_known() {
        let mut wait = Wait {
            detail: "the origin's rate limit".to_owned(),
            ..Wait::default()
        };
        assert_eq!(waiting(&wait), "waiting for the origin's rate limit");
        wait.until = Some(jiff::Timestamp::now().as_second() + 7200);
        let text = waiting(&wait);
        let start = "waiting for the origin's rate limit, for ";
        assert!(text.starts_with(start) && text.ends_with(" more"), "{text}");
        wait.until = Some(0);
        assert_eq!(waiting(&wait), "waiting for the origin's rate limit");
    }

    #[test]
    fn only_what_is_resolved_is_shortened() {
        let commit = "0e9e39f249a16976918f6564b8830bc894c89659";
        assert_eq!(
            shorten(&format!("hf://org/model@{commit}")),
            "hf://org/model@0e9e39f249a1"
        );
        // The twelfth byte of this branch is in the middle of a letter.
        for branch in ["é".repeat(20), "x".repeat(40), format!("{commit}0")] {
            let model = format!("hf://org/model@x{branch}");
            assert_eq!(shorten(&model), model);
        }
    }
}
