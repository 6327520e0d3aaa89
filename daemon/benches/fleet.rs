//! How fleets of nodes fill one shared tier together: a simulation around the real choices and claims.
//!
//! ```text
//! cargo bench -p weightd --bench fleet -- [--nodes 8,10,100,1000] [--gigabytes 65] [--json] …
//! ```
//!
//! A run that `tests/outside` can measure with real processes: eight nodes, an origin that gives each 12 MB/s.
//!
//! ```text
//! just bench-fleet --nodes 8 --gigabytes 0.256 --shards 8 --segment 16MiB --node-origin 12MB/s \
//!     --connection 12MB/s --origin-latency 5ms --tier-latency 200us --node-tier 1GB/s \
//!     --tier-read 2GB/s --tier-write 1GB/s --disk 1GB/s
//! ```
//!
//! `alone` is the same fleet without a shared tier. What is real and what is not stands in `fleet/sim.rs`.

#![allow(clippy::print_stdout, reason = "its result is what it prints")]

use std::str::FromStr;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use serde_json::{Value, json};
use weightd::config::{Bytes, Span};
use weightd_core::shared::choice::Egress;

#[path = "fleet/sim.rs"]
mod sim;

use sim::{Counts, Outcome, Setup, Speeds};

/// Simulates fleets of nodes that bring one model with the help of a shared tier.
#[derive(Debug, Parser)]
struct Options {
    /// Sizes of the fleet
    #[arg(long, value_delimiter = ',', default_value = "8,10,100,1000")]
    nodes: Vec<usize>,
    /// Size of the model
    #[arg(long, default_value_t = 65.0)]
    gigabytes: f64,
    /// Files that it is spread over
    #[arg(long, default_value_t = 17)]
    shards: usize,
    /// Bytes of a segment
    #[arg(long, default_value = "256MiB")]
    segment: Bytes,
    /// `once` or `fastest`
    #[arg(long, default_value = "once", value_parser = egress)]
    policy: Egress,
    /// From the origin to one node
    #[arg(long, default_value = "600MB/s")]
    node_origin: Speed,
    /// From the origin to all nodes
    #[arg(long, default_value = "unlimited")]
    origin: Speed,
    /// Over one connection to the origin
    #[arg(long, default_value = "100MB/s")]
    connection: Speed,
    /// Between the tier and one node
    #[arg(long, default_value = "4GB/s")]
    node_tier: Speed,
    /// From the tier to all nodes
    #[arg(long, default_value = "1.2GB/s")]
    tier_read: Speed,
    /// From all nodes to the tier; as much as from it unless it is said
    #[arg(long)]
    tier_write: Option<Speed>,
    /// Of one reader or writer of the tier that makes one call after the other
    #[arg(long, default_value = "600MB/s")]
    stream: Speed,
    /// To a node's disk
    #[arg(long, default_value = "4GB/s")]
    disk: Speed,
    /// Hashing one file
    #[arg(long, default_value = "1.5GB/s")]
    hash: Speed,
    /// Until the first byte of a ranged read
    #[arg(long, default_value = "30ms", value_parser = pause)]
    origin_latency: std::time::Duration,
    /// Of one request to the tier's metadata server
    #[arg(long, default_value = "1ms", value_parser = pause)]
    tier_latency: std::time::Duration,
    /// Of one sync of what was written to the tier
    #[arg(long, default_value = "20ms", value_parser = pause)]
    sync: std::time::Duration,
    /// Requests that the metadata server answers in a second
    #[arg(long, default_value_t = f64::INFINITY)]
    metadata: f64,
    /// Nodes start at random within this time
    #[arg(long, default_value = "5s", value_parser = pause)]
    spread: std::time::Duration,
    /// Nodes to which the origin is slower
    #[arg(long, default_value_t = 0)]
    slow: usize,
    /// What they get from it
    #[arg(long, default_value = "10MB/s")]
    slow_origin: Speed,
    /// Nodes that die
    #[arg(long, default_value_t = 0)]
    kill: usize,
    /// They die at random within this time after their start; the time that filling takes unless it is said
    #[arg(long, value_parser = pause)]
    kill_within: Option<std::time::Duration>,
    /// A claim that does not change for this long has lost its owner
    #[arg(long, default_value = "15s", value_parser = pause)]
    claim_timeout: std::time::Duration,
    /// A call that takes longer shows that the tier does not answer
    #[arg(long, default_value = "5s", value_parser = pause)]
    stall_timeout: std::time::Duration,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Prints JSON
    #[arg(long)]
    json: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// Bytes per second: `12MB/s`, `1.2GB/s`, `unlimited`.
#[derive(Debug, Clone, Copy)]
struct Speed(f64);

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(f64::INFINITY));
        }
        let bytes: Bytes = text.trim_end_matches("/s").parse()?;
        match bytes.0 {
            0 => Err("it is more than nothing".to_owned()),
            bytes => Ok(Self(bytes as f64)),
        }
    }
}

fn egress(text: &str) -> Result<Egress, String> {
    match text {
        "once" => Ok(Egress::Once),
        "fastest" => Ok(Egress::Fastest),
        _ => Err("it is `once` or `fastest`".to_owned()),
    }
}

fn pause(text: &str) -> Result<std::time::Duration, String> {
    text.parse::<Span>().map(|span| span.0)
}

impl Options {
    fn setup(&self, nodes: usize) -> Setup {
        let bytes = (self.gigabytes * 1e9) as u64;
        let speeds = Speeds {
            node_origin: self.node_origin.0,
            origin: self.origin.0,
            connection: self.connection.0,
            node_tier: self.node_tier.0,
            tier_read: self.tier_read.0,
            tier_write: self.tier_write.unwrap_or(self.tier_read).0,
            stream: self.stream.0,
            disk: self.disk.0,
            hash: self.hash.0,
            origin_latency: self.origin_latency,
            tier_latency: self.tier_latency,
            sync: self.sync,
            metadata: self.metadata,
        };
        let filled = speeds.origin.min(speeds.node_origin * nodes as f64);
        let fill = bytes as f64 / filled.min(speeds.tier_write);
        let fill = std::time::Duration::from_secs_f64(fill);
        Setup {
            nodes,
            bytes,
            shards: self.shards,
            segment: self.segment.0,
            egress: self.policy,
            speeds,
            slow: self.slow,
            slow_origin: self.slow_origin.0,
            spread: self.spread,
            kill: self.kill,
            kill_within: self.kill_within.unwrap_or(fill),
            claim_timeout: self.claim_timeout,
            stall_timeout: self.stall_timeout,
            seed: self.seed,
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut runs = Vec::new();
    for nodes in &options.nodes {
        let setup = options.setup(*nodes);
        let begun = Instant::now();
        let outcome = sim::run(&setup)?;
        let took = begun.elapsed().as_secs_f64();
        if !options.json {
            show(&setup, &outcome, took, runs.is_empty());
        }
        runs.push(report(&setup, &outcome, took));
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&runs)?);
    }
    Ok(())
}

/// The first, the one in the middle, and the last.
fn three(warm: &[f64]) -> [f64; 3] {
    [0, warm.len() / 2, warm.len().saturating_sub(1)]
        .map(|index| warm.get(index).copied().unwrap_or(f64::NAN))
}

fn show(setup: &Setup, outcome: &Outcome, took: f64, first: bool) {
    if first {
        println!(
            "{:>5} | {:>8} {:>8} {:>8} {:>8} | {:>8} {:>8} | {:>6} | {:>8} {:>7} | {:>26} {:>6} | {:>5} {:>5} {:>6} {:>5} | {:>6}",
            "nodes",
            "first s",
            "median",
            "last",
            "filled",
            "alone: m",
            "last",
            "egress",
            "read GB",
            "written",
            "peak/s create+list+open+…",
            "at s",
            "lost",
            "taken",
            "stalls",
            "away",
            "real s",
        );
    }
    let [first, median, last] = three(&outcome.warm);
    let [_, alone_median, alone_last] = three(&sim::alone(setup));
    let [create, list, open, other] = outcome.peak;
    let peak = format!("{create:.0}+{list:.0}+{open:.0}+{other:.0}");
    println!(
        "{:>5} | {:>8.1} {:>8.1} {:>8.1} {:>8.1} | {:>8.1} {:>8.1} | {:>6.3} | {:>8.1} {:>7.1} | {:>26} {:>6.0} | {:>5} {:>5} {:>6} {:>5} | {:>6.1}",
        setup.nodes,
        first,
        median,
        last,
        outcome.filled.unwrap_or(f64::NAN),
        alone_median,
        alone_last,
        outcome.origin_bytes / setup.bytes as f64,
        outcome.read_bytes / 1e9,
        outcome.written_bytes / 1e9,
        peak,
        outcome.peak_at,
        outcome.conflicts,
        outcome.takeovers,
        outcome.stalls,
        outcome.left_out,
        took,
    );
}

fn report(setup: &Setup, outcome: &Outcome, took: f64) -> Value {
    let three = |warm: &[f64]| {
        let [first, median, last] = three(warm);
        json!({ "first_s": first, "median_s": median, "last_s": last })
    };
    let requests = |counts: &Counts| {
        let [creates, lists, opens, others] = *counts;
        let all = counts.iter().sum::<f64>();
        json!({ "all": all, "creates": creates, "lists": lists, "opens": opens, "others": others })
    };
    json!({
        "nodes": setup.nodes,
        "bytes": setup.bytes,
        "seed": setup.seed,
        "warm": three(&outcome.warm),
        "warm_nodes": outcome.warm.len(),
        "alone": three(&sim::alone(setup)),
        "tier_filled_s": outcome.filled,
        "egress_ratio": outcome.origin_bytes / setup.bytes as f64,
        "origin_bytes": outcome.origin_bytes,
        "tier_read_bytes": outcome.read_bytes,
        "tier_written_bytes": outcome.written_bytes,
        "metadata_requests": requests(&outcome.requests),
        "metadata_peak_per_second": requests(&outcome.peak),
        "metadata_peak_at_s": outcome.peak_at,
        "claim_conflicts": outcome.conflicts,
        "claims_taken_over": outcome.takeovers,
        "stalled_calls": outcome.stalls,
        "tier_left_out": outcome.left_out,
        "simulated_events": outcome.events,
        "real_s": took,
    })
}
