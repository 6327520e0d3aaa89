//! The places that models come from, one file a vendor.

pub mod hf;
