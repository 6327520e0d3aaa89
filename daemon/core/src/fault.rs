//! Places where a test kills the process: every step that changes the disk has one.
//!
//! `WEIGHTD_FAULT=<name>` kills the process with SIGKILL the first time it gets there,
//! `WEIGHTD_FAULT=<name>:<n>` the n-th time. Release builds hold no fault points, unless built with
//! the feature `fault`.

/// Every fault point, in the order in which a fetch passes them.
pub const POINTS: &[&str] = &[
    "store.open.format",
    "fetch.recorded",
    "lease.created",
    "room.reserved",
    "part.created",
    "part.allocated",
    "part.written",
    "part.journaled",
    "journal.written",
    "journal.renamed",
    "seal.written",
    "seal.synced",
    "seal.linked",
    "seal.renamed",
    "seal.unjournaled",
    "known.written",
    "lease.linked",
    "publish.manifest",
    "publish.synced",
    "publish.renamed",
    "ref.written",
    "pin.written",
    "volume.created",
    "volume.recorded",
    "volume.linked",
    "volume.completed",
    "volume.renamed",
    "fetch.forgotten",
    "evict.renamed",
    "evict.deleted",
    "collect.renamed",
    "collect.deleted",
    "verify.set_aside",
    "verify.withdrawn",
    "repair.linked",
    "shared.format",
    "shared.leased",
    "shared.begun",
    "shared.claimed",
    "shared.part",
    "shared.written",
    "shared.synced",
    "shared.finished",
    "shared.sealed",
    "shared.published",
    "shared.set_aside",
    "shared.collect.renamed",
    "shared.collect.deleted",
    "shared.import.linked",
    "shared.import.named",
];

/// Kills the process here if a test asked for it.
#[cfg(any(debug_assertions, feature = "fault"))]
pub fn point(name: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static SEEN: AtomicU64 = AtomicU64::new(0);

    debug_assert!(POINTS.contains(&name), "{name} is missing from POINTS");
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("WEIGHTD_FAULT").ok()?;
        let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
        Some((name.to_owned(), count.parse().ok()?))
    });
    let Some((wanted, count)) = wanted else {
        return;
    };
    if wanted == name && SEEN.fetch_add(1, Ordering::Relaxed) + 1 == *count {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
    }
}

/// Kills the process here if a test asked for it; not in this build.
#[cfg(not(any(debug_assertions, feature = "fault")))]
#[inline]
pub fn point(_name: &'static str) {}
