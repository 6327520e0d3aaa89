//! The weightd daemon and its command line: everything of weightd that touches the outside.

pub mod config;
pub mod process;
pub mod rpc;
pub mod serve;
pub mod sources;
pub mod telemetry;
