//! The generated wire types of weightd. No logic lives here.

/// The control API of the node daemon, from `weightd/v1/weightd.proto`.
pub mod weightd {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("weightd.v1");
    }
}

/// The Container Storage Interface, version 1.12, from `csi/v1/csi.proto`.
pub mod csi {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("csi.v1");
    }
}
