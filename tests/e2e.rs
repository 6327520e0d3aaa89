//! What a user sees: the real binaries against stand-in origins on loopback.

mod e2e {
    mod crash;
    mod disk;
    mod harness;
    mod processes;
}
