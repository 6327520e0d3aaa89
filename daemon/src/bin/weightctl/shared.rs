//! Work on the shared tier itself, which needs no daemon: collecting, and importing a cache.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use serde_json::json;
use weightd::config::Span;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::shared::{
    CollectPolicy, Imported, SharedCollected, SharedError, SharedOptions, SharedStore, Why,
    is_segment,
};

use crate::args::{Global, SharedGc, Tier};
use crate::output::{self, Output, bytes, count, seconds};
use crate::progress::{Bar, shorten};
use crate::{Told, Usage};

/// How long a node may be silent, as the daemons have it by default.
const SILENCE: Duration = Duration::from_secs(15);

/// How long what no model needs stays.
const GRACE: Span = Span::hours(24);

/// Whether `gc` is for the shared tier.
pub(crate) fn is_meant(tier: Tier, wanted: &SharedGc, partial: bool) -> anyhow::Result<bool> {
    match tier {
        Tier::Shared if partial => Err(Usage::error(
            "--partial is for the local tier: of the shared one unfinished blobs always go, after --grace",
        )),
        Tier::Local if *wanted != SharedGc::default() => Err(Usage::error(
            "--max-age, --max-bytes, --grace and --dry-run are for the shared tier: add --tier shared",
        )),
        Tier::Local => Ok(false),
        Tier::Shared => Ok(true),
    }
}

fn root(global: &Global) -> anyhow::Result<PathBuf> {
    let root = { global.shared_root.clone() }.filter(|root| !root.as_os_str().is_empty());
    root.ok_or_else(|| {
        Usage::error(
            "where is the shared tier? name it with --shared-root DIR, or in WEIGHTD_SHARED_ROOT",
        )
    })
}

fn failed(
    what: &str,
    error: &(dyn std::error::Error + 'static),
    hint: Option<&str>,
) -> anyhow::Error {
    let hint = hint.map(|hint| format!("\nhint: {hint}"));
    anyhow!("{what}: {}{}", Chain(error), hint.unwrap_or_default())
}

/// Collects in the shared tier.
pub(crate) async fn gc(global: &Global, output: Output, wanted: SharedGc) -> anyhow::Result<()> {
    let root = root(global)?;
    let grace = wanted.grace.unwrap_or(GRACE);
    let policy = CollectPolicy {
        max_age: wanted.max_age.map(|age| age.0),
        max_bytes: wanted.max_bytes.map(|bytes| bytes.0),
        grace: grace.0,
        silence: global.tier.claim_timeout.map_or(SILENCE, |time| time.0),
        dry_run: wanted.dry_run,
    };
    let collected = blocking::run(move || {
        let store = SharedStore::open_existing(&root)?;
        store.collect(&policy, &std::thread::sleep)
    });
    let collected = collected.await.map_err(|error| match &error {
        SharedError::NotAStore { path } => {
            let path = path.display();
            anyhow!("there is no shared store at {path}\nhint: is the file system mounted?")
        }
        error => failed("cannot collect in the shared tier", error, error.hint()),
    })?;
    let mut value = serde_json::to_value(&collected)?;
    value["dry_run"] = policy.dry_run.into();
    output.result(&value, |_| {
        collected_text(&collected, policy.dry_run, grace)
    })?;
    if collected.failed.is_empty() {
        return Ok(());
    }
    for failure in &collected.failed {
        output::error(failure);
    }
    Err(Told.into())
}

fn collected_text(collected: &SharedCollected, dry_run: bool, grace: Span) -> String {
    let mut text = String::new();
    for gone in &collected.snapshots {
        let why = match gone.why {
            Why::Age => "",
            Why::Room => ", to make room",
        };
        text.push_str(&format!(
            "{}: {}, not used for {}{why}\n",
            shorten(&gone.model.to_string()),
            bytes(gone.bytes),
            age(gone.age_seconds),
        ));
    }
    let removed = if dry_run { "would remove" } else { "removed" };
    let freed = if dry_run { "to be freed" } else { "freed" };
    text.push_str(&format!(
        "{removed} {}, {}, {} and {} set aside, {} {freed}\n",
        count(collected.snapshots.len() as u64, "model"),
        count(collected.blobs, "unused blob"),
        count(collected.fills, "unfinished blob"),
        collected.asides,
        bytes(collected.bytes_freed),
    ));
    if collected.snapshots_in_use + collected.blobs_in_use > 0 {
        text.push_str(&format!(
            "kept {} and {}: in use\n",
            count(collected.snapshots_in_use, "model"),
            count(collected.blobs_in_use, "blob"),
        ));
    }
    if collected.blobs_young > 0 {
        let blobs = count(collected.blobs_young, "unused blob");
        text.push_str(&format!("kept {blobs}: changed less than {grace} ago\n"));
    }
    text
}

fn age(age_seconds: u64) -> String {
    match age_seconds / 86_400 {
        0 | 1 => seconds(age_seconds as f64),
        days => count(days, "day"),
    }
}

/// Imports a cache into the shared tier.
pub(crate) async fn import(
    global: &Global,
    output: Output,
    dir: PathBuf,
    copy: bool,
) -> anyhow::Result<()> {
    let root = root(global)?;
    if global
        .tier
        .segment
        .is_some_and(|bytes| !is_segment(bytes.0))
    {
        let text = "--shared-segment is a multiple of 1 MiB, up to 64 GiB";
        return Err(Usage::error(text));
    }
    let options = SharedOptions {
        segment_bytes: global.tier.segment.map(|bytes| bytes.0),
        file_system: None,
    };
    let store = SharedStore::open(&root, &options);
    let store =
        store.map_err(|error| failed("cannot open the shared tier", &error, error.hint()))?;
    let begun = Instant::now();
    let bar = Bar::new(output);
    let (from, hashing) = (dir.clone(), bar.clone());
    let imported = blocking::run(move || {
        store.import(&from, copy, &|done, all| {
            hashing.bytes("importing", done, all)
        })
    });
    let imported = imported.await;
    bar.clear();
    let imported = imported.map_err(|error| {
        failed(
            &format!("cannot import {}", dir.display()),
            &error,
            error.hint(),
        )
    })?;
    let took = begun.elapsed().as_secs_f64();
    let mut value = serde_json::to_value(&imported)?;
    value["seconds"] = json!(took);
    output.result(&value, |_| imported_text(&imported, took))?;
    complain(&imported, &dir)
}

fn imported_text(imported: &Imported, took: f64) -> String {
    let mut text = String::new();
    for model in &imported.models {
        let ways = [
            (model.bytes_linked, "linked"),
            (model.bytes_copied, "copied"),
            (model.bytes_present, "already there"),
        ];
        let ways = ways.iter().filter(|(some, _)| *some > 0);
        let ways: Vec<String> = ways
            .map(|(some, how)| format!("{} {how}", bytes(*some)))
            .collect();
        text.push_str(&format!(
            "{}\n{} of {}: {}\n",
            model.model,
            count(model.files, "file"),
            bytes(model.bytes),
            ways.join(", "),
        ));
    }
    for left in &imported.skipped {
        text.push_str(&format!("left out {}: {}\n", left.path.display(), left.why));
    }
    let hashed: u64 = imported.models.iter().map(|model| model.bytes_hashed).sum();
    let models = count(imported.models.len() as u64, "model");
    text.push_str(&match hashed {
        0 => format!("imported {models}, nothing was left to hash\n"),
        _ => {
            let rate = bytes((hashed as f64 / took.max(0.001)) as u64);
            let (hashed, took) = (bytes(hashed), seconds(took));
            format!("imported {models}, {hashed} hashed in {took} ({rate}/s)\n")
        }
    });
    text
}

/// Tells what was wrong with the cache, and fails if something was.
fn complain(imported: &Imported, dir: &Path) -> anyhow::Result<()> {
    for damaged in &imported.damaged {
        let models = damaged
            .models
            .iter()
            .map(|model| shorten(&model.to_string()));
        output::error(&format!(
            "{} is damaged: {}\nhint: delete it, and download {} again",
            damaged.path.display(),
            damaged.why,
            models.collect::<Vec<_>>().join(", "),
        ));
    }
    for refused in &imported.refused {
        output::error(&format!(
            "{} is refused: {}",
            refused.path.display(),
            refused.why
        ));
    }
    if !imported.damaged.is_empty() || !imported.refused.is_empty() {
        return Err(Told.into());
    }
    if imported.models.is_empty() {
        output::error(&format!("nothing in {} could be imported", dir.display()));
        return Err(Told.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_for_the_shared_tier() {
        let nothing = SharedGc::default();
        let dry = SharedGc {
            dry_run: true,
            ..nothing.clone()
        };
        assert!(!is_meant(Tier::Local, &nothing, true).unwrap());
        assert!(is_meant(Tier::Shared, &nothing, false).unwrap());
        assert!(is_meant(Tier::Shared, &dry, false).unwrap());
        assert!(is_meant(Tier::Local, &dry, false).is_err());
        assert!(is_meant(Tier::Shared, &nothing, true).is_err());
    }
}
