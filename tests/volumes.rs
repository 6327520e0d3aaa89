//! Volumes as pods see them: the real daemon and the real plugin, real bind mounts, called as kubelet calls.

#[path = "volumes/access.rs"]
mod access;
#[path = "volumes/annotations.rs"]
mod annotations;
#[path = "volumes/api.rs"]
mod api;
#[path = "volumes/buckets.rs"]
mod buckets;
#[path = "volumes/events.rs"]
mod events;
#[path = "volumes/expose.rs"]
mod expose;
#[path = "volumes/filling.rs"]
mod filling;
#[path = "volumes/ledger.rs"]
mod ledger;
#[path = "volumes/mounts.rs"]
mod mounts;
#[path = "volumes/node.rs"]
mod node;
#[path = "volumes/recovery.rs"]
mod recovery;
#[path = "volumes/trouble.rs"]
mod trouble;
#[path = "volumes/warm.rs"]
mod warm;
