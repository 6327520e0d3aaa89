//! Generates the wire types with a compiler written in Rust: nobody needs to install `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["csi/v1/csi.proto", "weightd/v1/weightd.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
