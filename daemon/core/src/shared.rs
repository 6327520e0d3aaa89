//! The shared tier: a directory on a POSIX file system that many nodes mount.

pub mod lustre;
