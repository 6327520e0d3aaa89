//! What a user sees: the real binaries against stand-in origins on loopback.

mod e2e {
    mod api_server;
    mod bench;
    mod bootstrap;
    mod cluster;
    mod crash;
    mod daemon;
    #[cfg(feature = "demo")]
    mod demo;
    mod disk;
    mod doctor;
    mod doctor_kubernetes;
    mod harness;
    mod hub;
    mod processes;
    mod s3;
    mod shared;
    mod shared_admin;
    mod warm;
}
