//! The weightd daemon and its command line: everything of weightd that touches the outside.

pub mod access;
pub mod config;
pub mod controller;
pub mod kube;
pub mod process;
pub mod rpc;
pub mod serve;
pub mod sources;
pub mod telemetry;
pub mod volumes;
