//! The domain of weightd: what a model is, the store that holds it, the fetcher that brings it. It knows
//! no gRPC, no Kubernetes and no vendor.
//!
//! ```text
//! weightctl main             parse the command line; ModelRef refuses a typo before any connection
//!  └ ControlClient            the daemon's socket, or the same service in this process
//!     └ rpc                    messages into calls, errors into codes
//!        └ Fetcher::fetch        a task of its own: a client that leaves cancels nothing
//!           └ bring              Source::resolve, then list; is the snapshot here? touch it, done
//!              ├ Lease            a snapshot in the making; what is here is linked in
//!              ├ Store::reserve   disk space for the rest; evict; NoSpace says what is short
//!              ├ one file         claim the bytes, or follow whoever has them
//!              │  └ parts          ranges in parallel → blocks → write, journal; one hasher follows
//!              │     ├ Share          with a shared tier: claim segments, copy those of other nodes, write ours behind
//!              │     └ Lease::seal  sync, link into the lease, then to its digest; small files together
//!              ├ check            safetensors headers and their index
//!              └ Lease::publish   sync, rename
//! ```
//!
//! | Module | Holds |
//! |---|---|
//! | [`model`] | what a user asks for and what it resolves to |
//! | [`source`] | the interface to origins, and the choice of files |
//! | [`digest`], [`manifest`] | what was claimed, what was hashed |
//! | [`store`] | one tier on disk: blobs, snapshots, pins, eviction, verification |
//! | [`fetch`] | bringing a snapshot |
//! | [`shared`] | the tier that nodes share |
//! | [`warm`], [`page_cache`] | reading a published snapshot into memory, and what the kernel has of it |
//! | [`metrics`], [`errors`], [`blocking`], [`pace`], [`fault`] | counting, explaining, the door to blocking work, being gentle, dying on order |
//!
//! # Where this is not the design as it was drawn
//!
//! - A lease is a directory of hard links, locked by its maker, not a count in memory. It holds against
//!   the collector of *another* process too, and a blob is linked there before it gets its name.
//! - Blocks are written by the connection that received them, not sent to one writer for each file, and past the page
//!   cache: they stay in memory until the hasher has them. What finds no room there is read back from the page cache.
//!   So memory has a bound whatever the order of arrival, and no channel needs one.
//! - Small files are sealed together, after one sync of the whole file system: a sync of each took three milliseconds
//!   on a virtual disk, thousands of times over. It also waits for what others have written there; a file that comes
//!   in one range can afford that, larger ones are synced by themselves. More than 128 little files of one fetch are
//!   claimed by nobody and held in memory until they are sealed: a claim cost more than their bytes, which two
//!   processes may now both bring.
//! - The blocks of two large files that arrive at the same time are hashed side by side. No library does that for files that
//!   come in pieces, so the innermost loop is our own, in a crate without any other code, `daemon/sha256`.
//! - A journal record carries the checksum of its block. After a power loss the journal may be ahead of
//!   the bytes, and not every origin names a digest that would find that out.
//! - Room for a fetch is a preallocated file that shrinks as files are staged: the kernel keeps the
//!   reservation, against other processes too.
//! - A claim in the shared tier is judged by whether its content changes while the observer's own clock runs, not by
//!   the file system's clock: Lustre's times are its clients'. It is not stolen by a rename, which could hit a
//!   fresh claim, but by making the claim's next turn, which only one can.
//! - Files whose origin says nothing of their bytes are not shared: there would be only a neighbour's word.
//! - A hung shared file system cannot be left by the process that hangs in it: its calls have a bound of their own,
//!   in time and number, and the daemon goes on.
//! - `refs/` holds the revision beside the snapshot, so that other file patterns find theirs.
//! - The S3 revision leaves the version id out of the digest: an ETag tells contents apart, and asking
//!   for versions would need one more permission. Reads name the version all the same.
//! - A volume that is no snapshot's own tree (another layout, or not complete yet) is a directory of hard
//!   links below `volumes/`, so that what is mounted never moves while it fills.
//! - A volume's holder is named after its target path (`csi/<pod uid>.<volume>`), not after its volume id:
//!   an unmount and a restart know no more than the path, and pods may share a persistent volume.
//! - A digest that an uploader wrote into S3 metadata is checked, but brings no bytes from a daemon's store: a
//!   bucket's owner could name the digest of bytes that are not theirs, and what an operator prefetched pods may
//!   mount. It does so for `weightctl` on its own; what was brought so is marked, and no pod gets it before its
//!   bytes were read from their own origin. A SHA-256 that S3 itself computed always counts.
//! - Without access rules any namespace may mount what the node's own S3 credentials can read; the daemon
//!   says so as it starts. For models of the Hub its own token never counts.

pub mod blocking;
mod buffers;
pub mod digest;
pub mod errors;
pub mod fault;
pub mod fetch;
pub mod manifest;
pub mod metrics;
pub mod model;
pub mod pace;
pub mod page_cache;
pub mod shared;
pub mod source;
pub mod store;
pub mod warm;
