//! The scrub: hashes the whole store again now and then, gently, and mends what went bad.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::fetch::FetchRequest;
use weightd_core::store::{StoreError, Verified};

use crate::rpc::Engine;

/// Scrubs every `interval`, reading at most `rate` bytes a second, until `stop`.
pub(super) async fn run(
    engine: Arc<Engine>,
    interval: Duration,
    rate: u64,
    stop: CancellationToken,
) {
    loop {
        // At random within the interval's last tenth, so that nodes that started together part.
        let pause = interval.mul_f64(0.9 + fastrand::f64() / 10.0);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        match once(&engine, rate, &stop).await {
            Ok(verified) => {
                let (checked, bytes, damaged) =
                    (verified.checked, verified.bytes, verified.damaged.len());
                tracing::info!(checked, bytes, damaged, "store scrubbed");
            }
            Err(error) => tracing::error!(error = %Chain(&error), "scrub failed"),
        }
    }
}

async fn once(
    engine: &Arc<Engine>,
    rate: u64,
    stop: &CancellationToken,
) -> Result<Verified, StoreError> {
    let (store, stop) = (Arc::clone(&engine.store), stop.clone());
    let (before, verified) = blocking::run(move || {
        // What a snapshot was is known only as long as it is published.
        let before = store.snapshots()?;
        let begun = Instant::now();
        let mut read = 0_u64;
        let verified = store.verify(None, &mut |bytes| {
            read += bytes;
            let due = Duration::from_secs_f64(read as f64 / rate as f64);
            std::thread::sleep(
                due.saturating_sub(begun.elapsed())
                    .min(Duration::from_secs(5)),
            );
            if stop.is_cancelled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        Ok::<_, StoreError>((before, verified))
    })
    .await?;
    engine
        .metrics
        .verified(verified.bytes, verified.damaged.len() as u64);
    let mut models: HashMap<_, _> = before
        .into_iter()
        .map(|snapshot| (snapshot.manifest.snapshot.clone(), snapshot.manifest))
        .collect();
    for damaged in &verified.damaged {
        tracing::error!(sha256 = %damaged.sha256, snapshots = damaged.snapshots.len(), "damaged blob set aside");
        for manifest in damaged.snapshots.iter().filter_map(|id| models.remove(id)) {
            let request = FetchRequest {
                model: manifest.model,
                patterns: manifest.patterns,
                pin: None,
            };
            drop(engine.fetcher.fetch(request));
        }
    }
    Ok(verified)
}
