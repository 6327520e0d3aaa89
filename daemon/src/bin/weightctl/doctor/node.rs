//! The machine, and what kubelet knows of us.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit};

use super::Finding;

/// Where kubelet keeps its things, unless it was told otherwise.
pub(super) const KUBELET: &str = "/var/lib/kubelet";

/// Where the RAID of an EKS node's instance store is mounted.
pub(super) const INSTANCE_STORE: &str = "/mnt/k8s-disks/0";

/// The driver's name.
const DRIVER: &str = "csi.weightd.io";

/// A fetch holds one for each connection and file.
const OPEN_FILES: u64 = 4096;

/// Without instructions for it, one core hashes about 0.3 GB/s of SHA-256.
pub(super) fn cpu() -> Finding {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    let has = std::is_x86_feature_detected!("sha");
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("sha2");
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    if has {
        return Finding::ok("cpu", "it has instructions for SHA-256");
    }
    Finding::warn(
        "cpu",
        "it has no instructions for SHA-256: hashing will limit fetches to about 0.3 GB/s per core",
        "choose a machine with them (x86: sha_ni, from Ice Lake and Zen on; Arm: sha2, Graviton has it), or expect \
         fetches of one large file to be slower",
    )
}

pub(super) fn open_files() -> Finding {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= OPEN_FILES => {
            Finding::ok("open-files", format!("a process may have {hard} of them"))
        }
        Ok((_, hard)) => Finding::warn(
            "open-files",
            format!("a process may have {hard} of them, fewer than {OPEN_FILES}"),
            "raise the hard limit: `LimitNOFILE=` of a systemd unit, `ulimit -Hn`, or the container runtime's default",
        ),
        Err(error) => Finding::warn(
            "open-files",
            format!("cannot be seen: {error}"),
            "see `ulimit -Hn`",
        ),
    }
}

pub(super) fn clock() -> Finding {
    clock_at(Timestamp::now())
}

/// A clock that was never set is in 1970, or where its battery gave up.
fn clock_at(now: Timestamp) -> Finding {
    let in_2024 = Timestamp::constant(1_704_067_200, 0);
    if now >= in_2024 {
        return Finding::ok("clock", now.strftime("%Y-%m-%d %H:%M:%S UTC").to_string());
    }
    Finding::error(
        "clock",
        format!("it is in {}", now.strftime("%Y")),
        "set it, for example with chrony: no certificate is valid then, and S3 refuses what is signed so",
    )
}

/// Whether kubelet can find the plugin. In a pod kubelet's directory is out of sight, and the API server knows.
pub(super) fn csi(kubelet: &Path, in_pod: bool) -> Vec<Finding> {
    let at = kubelet.display();
    match kubelet.symlink_metadata() {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && in_pod => {
            let found = "not seen from within this pod: the Kubernetes findings say whether it is registered";
            return vec![Finding::ok("csi", found)];
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return vec![Finding::ok(
                "csi",
                format!("not a Kubernetes node: there is no {at}"),
            )];
        }
        Err(error) => return vec![unseen(&at.to_string(), &error)],
    }
    vec![
        plugin(&kubelet.join("plugins").join(DRIVER).join("csi.sock")),
        registration(&kubelet.join("plugins_registry")),
    ]
}

fn unseen(what: &str, error: &io::Error) -> Finding {
    let hint = "run `weightctl doctor` as root to see it";
    Finding::warn("csi", format!("cannot look at {what}: {error}"), hint)
}

fn plugin(socket: &Path) -> Finding {
    let at = socket.display();
    match UnixStream::connect(socket) {
        Ok(_) => Finding::ok("csi", format!("the plugin answers at {at}")),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => Finding::error(
                "csi",
                format!("there is no {at}: pods cannot mount models"),
                "see that the DaemonSet of weightd-csi runs on this node, and that the host's directory of that \
                 socket is mounted into it",
            ),
            io::ErrorKind::ConnectionRefused => Finding::error(
                "csi",
                format!("nobody serves {at}: pods cannot mount models"),
                "the plugin has ended: see `kubectl describe` and the logs of its pod on this node",
            ),
            _ => unseen(&at.to_string(), &error),
        },
    }
}

fn registration(registry: &Path) -> Finding {
    let at = registry.display();
    let entries = match registry.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Finding::error(
                "csi-registration",
                format!("there is no {at}"),
                "kubelet makes it as it starts: see that it runs, and what its --root-dir is",
            );
        }
        Err(error) => {
            return Finding {
                check: "csi-registration".into(),
                ..unseen(&at.to_string(), &error)
            };
        }
    };
    // Source: node-driver-registrar names its socket `<driver>-reg.sock`.
    let name = format!("{DRIVER}-reg.sock");
    let found = entries.flatten().any(|entry| entry.file_name() == *name);
    if found {
        return Finding::ok("csi-registration", format!("{name} is in {at}"));
    }
    Finding::warn(
        "csi-registration",
        format!("there is no {name} in {at}"),
        "see that the node-driver-registrar beside weightd-csi runs, with this directory mounted at /registration; \
         `kubectl get csinode` shows what kubelet knows",
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_clock_that_was_never_set_is_an_error() {
        assert_eq!(clock_at(Timestamp::UNIX_EPOCH).level, Level::Error);
        assert_eq!(clock().level, Level::Ok);
    }

    #[test]
    fn a_machine_without_kubelet_is_no_kubernetes_node() {
        let dir = tempfile::tempdir().unwrap();
        let says = |in_pod| {
            let findings = csi(&dir.path().join("kubelet"), in_pod);
            assert_eq!(findings.len(), 1);
            assert_eq!(findings[0].level, Level::Ok);
            findings[0].found.clone()
        };
        assert!(says(false).contains("not a Kubernetes node"));
        assert!(says(true).contains("within this pod"));
    }

    #[test]
    fn a_node_needs_the_plugins_socket_and_its_registration() {
        let dir = tempfile::tempdir().unwrap();
        let levels = || {
            csi(dir.path(), false)
                .iter()
                .map(|found| found.level)
                .collect::<Vec<_>>()
        };
        assert_eq!(levels(), [Level::Error, Level::Error]);

        let plugin = dir.path().join("plugins/csi.weightd.io");
        fs::create_dir_all(&plugin).unwrap();
        fs::create_dir(dir.path().join("plugins_registry")).unwrap();
        let listener = UnixListener::bind(plugin.join("csi.sock")).unwrap();
        assert_eq!(levels(), [Level::Ok, Level::Warn]);

        fs::write(
            dir.path().join("plugins_registry/csi.weightd.io-reg.sock"),
            "",
        )
        .unwrap();
        assert_eq!(levels(), [Level::Ok, Level::Ok]);
        drop(listener);
        let found = csi(dir.path(), false).remove(0);
        assert_eq!(found.level, Level::Error);
        assert!(found.found.contains("nobody serves"), "{found:?}");
    }
}
