//! The domain of weightd: what a model is, the store that holds it, the fetcher that brings it.
pub mod blocking;
pub mod digest;
pub mod errors;
pub mod fault;
pub mod fetch;
pub mod manifest;
pub mod metrics;
pub mod model;
pub mod source;
pub mod store;
