//! The domain of weightd: what a model is, the store that holds it, the fetcher that brings it.
pub mod digest;
pub mod errors;
pub mod manifest;
pub mod model;
pub mod source;
