//! A model to serve: the same as the stand-in's, so that what we check of a shard holds.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use weightd_standin::generate::write_model;

const SEED: u64 = 1;

/// Writes a model of `shards` files of weights.
pub(crate) fn write(dir: &Path, shards: usize, bytes_per_shard: u64) -> Result<Value> {
    let files = write_model(dir, SEED, shards, bytes_per_shard)
        .with_context(|| format!("cannot write to `{}`", dir.display()))?;
    Ok(json!({ "files": files }))
}
