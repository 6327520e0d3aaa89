//! The scrub: hashes the whole store again now and then, gently, and mends what went bad.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::FetchRequest;
use weightd_core::manifest::Manifest;
use weightd_core::model::SnapshotId;
use weightd_core::pace::Pace;
use weightd_core::store::{Store, StoreError, Verified};

use super::Daemon;

/// Scrubs every `interval`, reading at most `rate` bytes a second, until the daemon stops.
pub(super) async fn run(daemon: Daemon, interval: Duration, rate: u64) {
    let store = Arc::clone(&daemon.engine.store);
    let mut last = blocking::run(move || last_pass(&store)).await;
    loop {
        // At random within the interval's last tenth, so that nodes that started together part.
        let pause = interval.mul_f64(0.9 + fastrand::f64() / 10.0);
        tokio::select! {
            () = daemon.stop.cancelled() => return,
            () = tokio::time::sleep(pause.saturating_sub(last.elapsed().unwrap_or_default())) => {}
        }
        match once(&daemon, rate).await {
            Ok(verified) => {
                let (checked, bytes, damaged) =
                    (verified.checked, verified.bytes, verified.damaged.len());
                tracing::info!(checked, bytes, damaged, "store scrubbed");
            }
            Err(error) => tracing::error!(error = %Chain(&error), "scrub failed"),
        }
        last = SystemTime::now();
    }
}

/// When the store was last scrubbed to its end; its age begins when a daemon first sees it.
fn last_pass(store: &Store) -> SystemTime {
    let noted = fs::metadata(mark(store)).and_then(|metadata| metadata.modified());
    noted.unwrap_or_else(|_| {
        note_pass(store);
        SystemTime::now()
    })
}

/// Keeps the time of a pass in the store: a daemon that is restarted more often than it scrubs would
/// otherwise never come to it.
fn note_pass(store: &Store) {
    let noted = File::create(mark(store)).and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = noted {
        tracing::warn!(%error, "time of the scrub not kept");
    }
}

fn mark(store: &Store) -> PathBuf {
    store.root().join("scrubbed")
}

async fn once(daemon: &Daemon, rate: u64) -> Result<Verified, StoreError> {
    let (store, stop) = (Arc::clone(&daemon.engine.store), daemon.stop.clone());
    let (verified, withdrawn) = blocking::run(move || {
        let mut pace = Pace::new(rate, Instant::now());
        let verified = store.verify(None, &mut |bytes| {
            wait(pace.after(bytes, Instant::now()), &stop)
        })?;
        if !stop.is_cancelled() {
            note_pass(&store);
        }
        let ids = verified.damaged.iter().flat_map(|blob| &blob.snapshots);
        let ids: BTreeSet<&SnapshotId> = ids.collect();
        let withdrawn = ids.into_iter().filter_map(|id| withdrawn(&store, id));
        let withdrawn: Vec<Manifest> = withdrawn.collect();
        Ok::<_, StoreError>((verified, withdrawn))
    })
    .await?;
    let metrics = &daemon.engine.metrics;
    metrics.verified(verified.bytes, verified.damaged.len() as u64);
    for damaged in &verified.damaged {
        tracing::error!(sha256 = %damaged.sha256, snapshots = damaged.snapshots.len(), "damaged blob set aside");
    }
    for manifest in withdrawn {
        let request = FetchRequest {
            model: manifest.model,
            patterns: manifest.patterns,
            pin: None,
        };
        daemon.bring(request.into());
    }
    Ok(verified)
}

/// What a snapshot was that has just been withdrawn. It may have been published after the pass began, so
/// only what the store kept of it can tell. `None` if somebody has fetched it again already.
fn withdrawn(store: &Store, id: &SnapshotId) -> Option<Manifest> {
    let dir = store.root().join("snapshots").join(id.as_str());
    let kept = fs::read(dir.join("withdrawn.json"));
    match kept.and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::from)) {
        Ok(manifest) => Some(manifest),
        Err(error) => {
            tracing::warn!(snapshot = %id, %error, "withdrawn snapshot not fetched again");
            None
        }
    }
}

/// Sleeps on a thread of the blocking pool, unless the daemon stops.
fn wait(pause: Duration, stop: &CancellationToken) -> ControlFlow<()> {
    let stopped = async { tokio::time::timeout(pause, stop.cancelled()).await };
    match Handle::current().block_on(stopped) {
        Ok(()) => ControlFlow::Break(()),
        Err(_) => ControlFlow::Continue(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_last_pass_outlives_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Store::open(dir.path(), weightd_core::store::StoreLimits::default()).unwrap();
        let first = last_pass(&open());
        let old = SystemTime::now() - Duration::from_secs(8 * 24 * 3600);
        assert!(first > old, "a new store is not overdue");

        let file = File::options().write(true).open(mark(&open())).unwrap();
        file.set_modified(old).unwrap();

        assert_eq!(last_pass(&open()), old);
        note_pass(&open());
        assert!(last_pass(&open()) >= first);
    }
}
