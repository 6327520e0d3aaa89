//! The only door from async code to work that blocks: the store, hashing, file systems.

/// Runs `work` on the blocking pool. A panic in `work` goes on in the caller.
///
/// Work that was started is finished even if the caller is dropped.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    #[allow(clippy::disallowed_methods, reason = "this is the door")]
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
