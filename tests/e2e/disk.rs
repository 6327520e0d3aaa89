//! Disks that are too small, fill up, or are read-only.
//!
//! They are mounts of this test's own: the test binary runs itself again in a user and a mount
//! namespace, and there the one test that [`in_a_namespace`] names does its work. Where namespaces are
//! not allowed it says so, and what needs no mount is checked by the tests at the end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use weightd_standin::{Fault, FaultKind, Hub, Origin};

use super::crash::{MIB, Model, hub, sound};
use super::harness::{Ran, Running, Sandbox, everything, run, tree, wait_until};

/// Set in the process that has the namespaces.
const INSIDE: &str = "WEIGHTD_E2E_NAMESPACE";

/// `unshare`, with what makes mounts of one's own possible.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--"]);
    command
}

/// Runs `work` in a user and a mount namespace: `test` is the name of the calling test.
#[track_caller]
#[allow(clippy::print_stdout, reason = "a check that is left out is told")]
fn in_a_namespace(test: &str, work: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return work();
    }
    let probe = unshare()
        .args(["mount", "-t", "tmpfs", "tmpfs", "/mnt"])
        .output();
    match probe {
        Ok(output) if output.status.success() => {}
        other => {
            println!("{test}: no mount of its own, so this checks what needs none: {other:?}");
            return refuses_what_is_no_disk();
        }
    }
    let binary = std::env::current_exe().expect("this binary");
    let mut again = unshare();
    again
        .arg(binary)
        .args(["--exact", &format!("e2e::disk::{test}"), "--nocapture"]);
    let output = again.env(INSIDE, "1").output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A store on a tmpfs of 64 MiB, and a hub.
struct Scene {
    sandbox: Sandbox,
    hub: Hub,
}

impl Scene {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        fs::create_dir(sandbox.root()).expect("a directory");
        let options = Some("size=64m");
        mount(
            Some("tmpfs"),
            &sandbox.root(),
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .expect("a tmpfs");
        Self {
            sandbox,
            hub: hub(),
        }
    }

    /// A model of `shards` shards of 4 MiB that no other model has.
    fn publish(&self, number: u64, shards: u64) -> Model {
        let model = Model::new(number, number * 100..number * 100 + shards, 4 * MIB);
        model.publish(&self.hub, &format!("org/model-{number}"));
        model
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.sandbox.weightctl();
        command.env("HF_ENDPOINT", self.hub.endpoint()).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Ran {
        run(&mut self.command(words))
    }

    #[track_caller]
    fn fetches_whole(&self, number: u64, model: &Model) -> Value {
        let fetched = self.run(&["prefetch", &name(number)]).json();
        let path = PathBuf::from(fetched["path"].as_str().expect("a path"));
        assert!(
            tree(&path) == model.tree(),
            "{fetched}: it differs from the origin"
        );
        fetched
    }

    /// The models that are here, by their names without the revision.
    fn listed(&self) -> Vec<String> {
        let listed = self.run(&["ls"]).json();
        let models = listed.as_array().expect("an array").iter();
        let name = |model: &Value| {
            let model = model["model"].as_str().expect("a name");
            model.split('@').next().expect("a name").to_owned()
        };
        models.map(name).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Else its mount point, which lies outside of it, could not be removed.
        let _ = umount2(&self.sandbox.root(), MntFlags::MNT_DETACH);
    }
}

fn name(number: u64) -> String {
    format!("hf://org/model-{number}")
}

/// Last used is kept in whole seconds.
fn a_second_passes() {
    std::thread::sleep(Duration::from_millis(1050));
}

#[test]
fn a_model_larger_than_the_disk_is_refused_and_nothing_is_evicted_for_it() {
    in_a_namespace(
        "a_model_larger_than_the_disk_is_refused_and_nothing_is_evicted_for_it",
        || {
            let scene = Scene::new();
            let small = scene.publish(1, 2);
            scene.publish(2, 18);
            scene.fetches_whole(1, &small);
            scene.hub.clear_requests();

            let refused = scene.run(&["prefetch", &name(2)]);

            refused.failed(1, &["no room", "hint: free space", "weightctl rm"]);
            assert_eq!(scene.hub.cdn_bytes_sent(), 0, "it was fetched all the same");
            assert_eq!(scene.listed(), [name(1)]);
            scene.fetches_whole(1, &small);
            sound(&scene.sandbox.root());
        },
    );
}

#[test]
fn eviction_takes_the_least_recently_used_model_and_never_a_pinned_one() {
    in_a_namespace(
        "eviction_takes_the_least_recently_used_model_and_never_a_pinned_one",
        || {
            let scene = Scene::new();
            let models = [1, 2, 3, 4].map(|number| scene.publish(number, 5));
            for number in 1..=3 {
                scene.fetches_whole(number, &models[number as usize - 1]);
                a_second_passes();
            }
            scene.run(&["pin", &name(1), "--as", "serving"]).json();
            // The second is used again, so the third is the one that was used least recently.
            scene.fetches_whole(2, &models[1]);

            scene.fetches_whole(4, &models[3]);

            assert_eq!(scene.listed(), [name(1), name(2), name(4)]);
            scene.run(&["path", &name(3)]).failed(1, &["not"]);
            scene.run(&["verify"]).json();
            sound(&scene.sandbox.root());
        },
    );
}

#[test]
fn pinned_models_are_not_evicted_even_if_nothing_else_makes_room() {
    in_a_namespace(
        "pinned_models_are_not_evicted_even_if_nothing_else_makes_room",
        || {
            let scene = Scene::new();
            let models = [1, 2, 3, 4].map(|number| scene.publish(number, 5));
            for number in 1..=3 {
                scene.fetches_whole(number, &models[number as usize - 1]);
                scene.run(&["pin", &name(number), "--as", "serving"]).json();
            }

            scene
                .run(&["prefetch", &name(4)])
                .failed(1, &["no room", "unpin"]);

            assert_eq!(scene.listed(), [name(1), name(2), name(3)]);
            scene.run(&["unpin", &name(2), "--as", "serving"]).json();
            scene.fetches_whole(4, &models[3]);
            assert_eq!(scene.listed(), [name(1), name(3), name(4)]);
            sound(&scene.sandbox.root());
        },
    );
}

#[test]
fn an_eviction_that_dies_at_any_step_is_finished_by_the_next_fetch() {
    in_a_namespace(
        "an_eviction_that_dies_at_any_step_is_finished_by_the_next_fetch",
        || {
            for point in [
                "evict.renamed",
                "evict.deleted",
                "collect.renamed",
                "collect.deleted",
            ] {
                let scene = Scene::new();
                let models = [1, 2].map(|number| scene.publish(number, 9));
                scene.fetches_whole(1, &models[0]);

                let mut dying = scene.command(&["prefetch", &name(2)]);
                let died = run(dying.env("WEIGHTD_FAULT", point));

                assert_eq!(died.code, None, "{point}: {died:?}");
                sound(&scene.sandbox.root());
                scene.fetches_whole(2, &models[1]);
                assert_eq!(scene.listed(), [name(2)], "{point}");
                scene.run(&["gc", "--partial"]).json();
                let mut left =
                    fs::read_dir(scene.sandbox.root().join("staging")).expect("a folder");
                assert!(left.next().is_none(), "{point}");
                sound(&scene.sandbox.root());
            }
        },
    );
}

/// Fills what is left of the disk; the file can be removed to give it back.
fn fill(dir: &Path) -> PathBuf {
    let path = dir.join("somebody-else");
    let mut file = fs::File::create(&path).expect("a file");
    let block = vec![0; MIB as usize / 16];
    let full = loop {
        if let Err(error) = std::io::Write::write_all(&mut file, &block) {
            break error;
        }
    };
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    path
}

#[test]
fn a_disk_that_fills_up_during_a_fetch_ends_it_and_it_goes_on_once_there_is_space() {
    in_a_namespace(
        "a_disk_that_fills_up_during_a_fetch_ends_it_and_it_goes_on_once_there_is_space",
        || {
            let scene = Scene::new();
            let small = scene.publish(1, 2);
            let model = scene.publish(2, 6);
            scene.fetches_whole(1, &small);
            scene.hub.clear_requests();
            let slow = FaultKind::Slow {
                bytes_per_second: 2 * MIB,
            };
            scene.hub.fault(Fault::new(slow).on(Origin::Cdn).forever());
            let root = scene.sandbox.root();

            let fetch = Running::start(&mut scene.command(&["prefetch", &name(2)]));
            wait_until("there are blocks of every shard", || {
                model.missing_from(&root) <= model.shard_bytes() - 6 * MIB
            });
            let filler = fill(&root);
            let ended = fetch.finish();

            ended.failed(1, &["No space left on device", "hint: free space"]);
            sound(&root);
            assert_eq!(scene.listed(), [name(1)]);
            let missing = model.missing_from(&root);
            assert!(missing < model.shard_bytes(), "what it had is gone");
            fs::remove_file(filler).expect("it goes");
            scene.hub.clear_faults();
            scene.hub.clear_requests();
            scene.fetches_whole(2, &model);
            assert_eq!(scene.hub.cdn_bytes_sent(), missing, "fetched again");
            scene.fetches_whole(1, &small);
            sound(&root);
        },
    );
}

#[test]
fn a_full_disk_still_serves_lists_and_removes_what_is_there() {
    in_a_namespace(
        "a_full_disk_still_serves_lists_and_removes_what_is_there",
        || {
            let scene = Scene::new();
            let model = scene.publish(1, 3);
            scene.fetches_whole(1, &model);
            let filler = fill(&scene.sandbox.root());

            assert_eq!(scene.listed(), [name(1)]);
            scene.run(&["path", &name(1)]).json();
            scene.run(&["verify"]).json();
            scene.run(&["rm", &name(1)]).json();

            assert_eq!(scene.listed(), [""; 0]);
            assert_eq!(tree(&scene.sandbox.root().join("blobs")), []);
            drop(filler);
        },
    );
}

#[test]
fn a_read_only_disk_is_refused_with_the_remedy() {
    in_a_namespace("a_read_only_disk_is_refused_with_the_remedy", || {
        let scene = Scene::new();
        let model = scene.publish(1, 1);
        scene.fetches_whole(1, &model);
        let root = scene.sandbox.root();
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, &root, None::<&str>, flags, None::<&str>).expect("a remount");

        let refused = scene.run(&["prefetch", &name(1)]);

        refused.failed(
            1,
            &[
                "Read-only file system",
                "hint:",
                "--root",
                "mount it read-write",
            ],
        );
        sound(&root);
    });
}

#[test]
fn a_read_only_disk_without_a_store_is_refused_with_the_remedy() {
    in_a_namespace(
        "a_read_only_disk_without_a_store_is_refused_with_the_remedy",
        || {
            let scene = Scene::new();
            scene.publish(1, 1);
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
            mount(
                None::<&str>,
                &scene.sandbox.root(),
                None::<&str>,
                flags,
                None::<&str>,
            )
            .expect("a remount");

            let refused = scene.run(&["prefetch", &name(1)]);

            refused.failed(
                1,
                &[
                    "Read-only file system",
                    "hint:",
                    "--root",
                    "mount it read-write",
                ],
            );
        },
    );
}

/// What can be seen of unwritable disks without a mount.
#[track_caller]
fn refuses_what_is_no_disk() {
    let sandbox = Sandbox::new();
    for root in ["/proc/weightd", "/sys/weightd"] {
        let mut command = sandbox.bare(env!("CARGO_BIN_EXE_weightctl"));
        let refused = run(command.args(["--root", root, "ls"]));
        refused.failed(1, &[root]);
        assert!(!Path::new(root).exists(), "{root} was made");
    }
}

#[test]
fn a_root_where_no_file_can_be_made_is_refused() {
    refuses_what_is_no_disk();
}

#[test]
fn a_directory_that_holds_something_else_is_refused_and_left_alone() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.root()).expect("a directory");
    fs::write(sandbox.root().join("thesis.txt"), "years of work").expect("a file");
    let before = fs::metadata(sandbox.root()).expect("metadata").mtime();

    let refused = sandbox.run(&[], &["gc", "--partial"]);

    refused.failed(
        1,
        &[
            "is not a weightd store",
            "hint: choose an empty or a new directory",
        ],
    );
    let left = everything(&sandbox.root());
    assert_eq!(left, [("thesis.txt".to_owned(), b"years of work".to_vec())]);
    assert_eq!(
        fs::metadata(sandbox.root()).expect("metadata").mtime(),
        before
    );
}
