//! New files, written through the page cache and synced: what the disk alone allows.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

const BLOCK_BYTES: usize = 1 << 20;

/// Writes `bytes` over `threads` files at once, syncs each, and deletes them afterwards.
pub(crate) fn measure(dir: &Path, threads: u64, bytes: u64) -> Result<Value> {
    let paths: Vec<_> = (0..threads)
        .map(|number| dir.join(format!("ceiling-{number}")))
        .collect();
    let begun = Instant::now();
    let written = std::thread::scope(|scope| {
        let writers: Vec<_> = paths
            .iter()
            .map(|path| scope.spawn(move || write(path, bytes / threads)))
            .collect();
        writers
            .into_iter()
            .try_for_each(|writer| writer.join().expect("it does not panic"))
    });
    let seconds = begun.elapsed().as_secs_f64();
    for path in &paths {
        // One that could not be made is no second error.
        let _ = std::fs::remove_file(path);
    }
    written.with_context(|| format!("cannot write to `{}`", dir.display()))?;
    Ok(json!({ "seconds": seconds, "gigabytes_per_second": bytes as f64 / 1e9 / seconds }))
}

fn write(path: &Path, bytes: u64) -> io::Result<()> {
    let block: Vec<u8> = (0..BLOCK_BYTES).map(|at| (at * 31 / 7) as u8).collect();
    let mut file = File::create(path)?;
    let mut left = bytes as usize;
    while left > 0 {
        let now = left.min(block.len());
        file.write_all(&block[..now])?;
        left -= now;
    }
    file.sync_data()
}
