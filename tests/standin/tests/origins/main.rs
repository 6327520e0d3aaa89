//! The stand-ins answer as the real origins do, seen through a client that hides nothing.

mod cdn;
mod client;
mod faults;
mod hub;
mod s3;
