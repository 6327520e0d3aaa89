//! Generates the Rust types. `protox` compiles the files, so no `protoc` has to be installed.

use std::error::Error;

const FILES: [&str; 2] = ["csi/v1/csi.proto", "weightd/v1/weightd.proto"];

/// Messages that carry credentials. They get no `Debug`, so that logging one does not compile.
const SECRET: [&str; 7] = [
    ".weightd.v1.AcquireRequest",
    ".weightd.v1.Credentials",
    ".csi.v1.CreateVolumeRequest",
    ".csi.v1.ValidateVolumeCapabilitiesRequest",
    ".csi.v1.NodeStageVolumeRequest",
    ".csi.v1.NodePublishVolumeRequest",
    ".csi.v1.NodeExpandVolumeRequest",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    tonic_prost_build::configure()
        .skip_debug(SECRET)
        .compile_fds(descriptors)?;
    Ok(())
}
