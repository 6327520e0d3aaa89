//! Progress on a terminal; silent elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use weightd_proto::weightd::v1::{Progress, VerifyProgress, progress::Phase};

use crate::output::{self, Output};

/// One bar, for one command's work.
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
            Phase::Unspecified | Phase::Resolving => "resolving".to_owned(),
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
        self.0.set_prefix("verifying");
        self.0.set_length(progress.bytes);
        self.0.set_position(progress.bytes_done);
        let (done, all) = (
            output::bytes(progress.bytes_done),
            output::bytes(progress.bytes),
        );
        self.0.set_message(format!("{done} of {all}"));
    }

    pub(crate) fn clear(&self) {
        self.0.finish_and_clear();
    }
}

fn fetching(progress: &Progress) -> String {
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

/// A commit is too long for a line that also shows figures.
pub(crate) fn shorten(model: &str) -> String {
    match model.rsplit_once('@') {
        Some((name, revision)) if revision.len() >= 40 => format!("{name}@{}", &revision[..12]),
        _ => model.to_owned(),
    }
}
