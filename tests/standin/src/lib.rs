//! Origins on loopback, for the tests and for `weightctl demo`: a stand-in Hugging Face Hub with
//! its CDN, an S3 server, and small models with realistic files to serve from them.
//!
//! ```text
//! hub ──┐
//! s3  ──┼──► watch (request log, faults, control endpoint) ──► server (sockets, tasks)
//!       └──► content (bytes in memory, on disk, or a pattern)
//! generate (models, broken shards)
//! ```
//!
//! Every origin binds port 0 of 127.0.0.1, runs in tasks that its handle owns, and stops when the
//! handle is dropped.

pub mod content;
pub mod fault;
pub mod generate;
pub mod hub;
pub mod log;
mod outgoing;
mod range;
pub mod s3;
mod server;
mod watch;

pub use content::Pattern;
pub use fault::{Fault, FaultKind, Origin, Times};
pub use hub::{File, Files, Gated, Hub, HubConfig, Quota, Repo};
pub use log::Request;
pub use s3::{Checksum, PutOptions, S3Config, S3Server, Stored};
