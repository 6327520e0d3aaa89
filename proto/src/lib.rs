//! The wire: types, clients and servers generated from `csi/v1/csi.proto` and `weightd/v1/weightd.proto`.
//!
//! This crate holds no logic. What a message means is said beside it in the `.proto` file.

/// The Container Storage Interface, as far as a node plugin speaks it.
pub mod csi {
    /// CSI 1.x: the Identity and Node services.
    pub mod v1 {
        tonic::include_proto!("csi.v1");
    }
}

/// The daemon's own interface.
pub mod weightd {
    /// Version 1 of the control service.
    pub mod v1 {
        tonic::include_proto!("weightd.v1");
    }
}
