//! `weightd-bench`: what `tests/bench/bench.py` cannot do fast enough itself.
//!
//! `origin` answers what nginx passes on: listings, metadata and redirects. The other commands measure
//! what this machine can do at best. Each prints one line of JSON.

#![allow(clippy::print_stdout, reason = "its result is what it prints")]

mod generate;
mod hash;
mod origin;
mod receive;
mod write;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "weightd-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the directories under ROOT as buckets and as models, until stdin closes.
    Origin {
        /// Holds one directory per bucket, or model `org/<name>`.
        root: PathBuf,
    },
    /// Writes a model of random tensors.
    Generate {
        /// Files of weights.
        #[arg(long)]
        shards: usize,
        /// Bytes of weights per file.
        #[arg(long)]
        bytes_per_shard: u64,
        /// Where to write it.
        dir: PathBuf,
    },
    /// Reads what http:// addresses lead to in ranges, and drops it.
    Receive {
        /// Ranges that are read at once.
        #[arg(long, default_value_t = 16)]
        connections: usize,
        /// Bytes of a range.
        #[arg(long, default_value_t = 8 << 20)]
        part: u64,
        /// What is read.
        #[arg(required = true)]
        urls: Vec<String>,
    },
    /// Writes new files side by side and syncs them.
    Write {
        /// Files, each with its thread.
        #[arg(long, default_value_t = 4)]
        threads: u64,
        /// Bytes of all files together.
        #[arg(long)]
        bytes: u64,
        /// Where they come to lie.
        dir: PathBuf,
    },
    /// SHA-256 by several implementations, on one core and on all.
    Hash {
        /// Bytes that each core hashes with each.
        #[arg(long, default_value_t = 500_000_000)]
        bytes: u64,
    },
}

fn main() -> Result<()> {
    let result = match Cli::parse().command {
        Command::Origin { root } => return origin::serve(&root),
        Command::Generate {
            shards,
            bytes_per_shard,
            dir,
        } => generate::write(&dir, shards, bytes_per_shard)?,
        Command::Receive {
            connections,
            part,
            urls,
        } => receive::measure(&urls, connections, part)?,
        Command::Write {
            threads,
            bytes,
            dir,
        } => write::measure(&dir, threads, bytes)?,
        Command::Hash { bytes } => hash::measure(bytes),
    };
    println!("{result}");
    Ok(())
}
