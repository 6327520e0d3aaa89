//! A fleet of nodes that fill one shared tier together, by a virtual clock and without sockets.
//!
//! Real: every decision ([`Situation`](weightd_core::shared::choice::Situation)), every claim, view and
//! checksum file (`SharedStore` and `Fill` on a directory), how silence is found out, and the figures by which
//! the fetcher looks, listens, beats and limits itself. Virtual: time, and bytes, which flow through links that
//! nodes share fairly ([`flow`]). Rendered here, and to be kept like the original: the loop of
//! `fetch/share.rs` ([`bring`]) and the writer of `fetch/share/upload.rs` ([`upload`]).
//!
//! Left out: memory, processors, retries of the origin, damaged bytes, the collector, a tier that is full, and
//! the bound on calls at once. A call to the tier takes its latency, and longer if the metadata server cannot
//! keep up; what takes longer than the stall timeout fails as it does in the original.

use std::time::Duration;

use anyhow::Result;
use weightd_core::shared::choice::Egress;

mod alone;
mod bring;
mod flow;
mod node;
mod rate;
mod tier;
mod upload;
mod world;

pub(crate) use alone::alone;
pub(crate) use tier::Counts;

/// How fast everything is, in bytes per second unless it says otherwise. No limit is infinite.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Speeds {
    /// From the origin to one node.
    pub(crate) node_origin: f64,
    /// From the origin to all.
    pub(crate) origin: f64,
    /// Over one connection to the origin.
    pub(crate) connection: f64,
    /// Between the tier and one node, each way.
    pub(crate) node_tier: f64,
    /// From the tier to all.
    pub(crate) tier_read: f64,
    /// From all to the tier.
    pub(crate) tier_write: f64,
    /// Of one call after the other that reads or writes the tier.
    pub(crate) stream: f64,
    /// Writing to a node's disk.
    pub(crate) disk: f64,
    /// Hashing one file.
    pub(crate) hash: f64,
    /// Until the first byte of a ranged read.
    pub(crate) origin_latency: Duration,
    /// Of one request to the tier's metadata.
    pub(crate) tier_latency: Duration,
    /// Of one sync in the tier.
    pub(crate) sync: Duration,
    /// Requests to the tier's metadata that are answered in a second.
    pub(crate) metadata: f64,
}

/// One run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) nodes: usize,
    /// Bytes of the model.
    pub(crate) bytes: u64,
    pub(crate) shards: usize,
    pub(crate) segment: u64,
    pub(crate) egress: Egress,
    pub(crate) speeds: Speeds,
    /// So many nodes get less from the origin, and that is it.
    pub(crate) slow: usize,
    pub(crate) slow_origin: f64,
    /// Nodes start at random within this time.
    pub(crate) spread: Duration,
    /// Nodes that die, at random within the time given.
    pub(crate) kill: usize,
    pub(crate) kill_within: Duration,
    pub(crate) claim_timeout: Duration,
    pub(crate) stall_timeout: Duration,
    pub(crate) seed: u64,
}

/// How a run went.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub(crate) struct Outcome {
    /// When each node that lived had the model, in seconds since the first could start.
    pub(crate) warm: Vec<f64>,
    /// When the tier had all of it, if it ever did.
    pub(crate) filled: Option<f64>,
    pub(crate) origin_bytes: f64,
    pub(crate) read_bytes: f64,
    pub(crate) written_bytes: f64,
    /// Requests to the tier's metadata: creates, lists, opens, others.
    pub(crate) requests: Counts,
    /// The same in the second that had most of them.
    pub(crate) peak: Counts,
    pub(crate) peak_at: f64,
    /// Claims that somebody else was faster to make.
    pub(crate) conflicts: u64,
    /// Claims of silent nodes that were taken over.
    pub(crate) takeovers: u64,
    /// Calls that took longer than the stall timeout.
    pub(crate) stalls: u64,
    /// Times that a node has left out the tier.
    pub(crate) left_out: u64,
    pub(crate) events: u64,
}

/// Runs it.
///
/// # Errors
///
/// The directory cannot be used, or the simulation stands still, which is a defect.
pub(crate) fn run(setup: &Setup) -> Result<Outcome> {
    let memory = std::path::Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory)?,
        false => tempfile::tempdir()?,
    };
    world::World::new(*setup, dir.path())?.run()
}
