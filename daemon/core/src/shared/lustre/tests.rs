use std::io::Write;
use std::time::Instant;

use super::*;

/// What `lfs getstripe -d` prints of a directory with the wanted layout.
const PROGRESSIVE: &str = "\
/fsx/weightd/blobs
  lcm_layout_gen:    0
  lcm_mirror_count:  1
  lcm_entry_count:   3
    lcme_id:             N/A
    lcme_mirror_id:      N/A
    lcme_flags:          0
    lcme_extent.e_start: 0
    lcme_extent.e_end:   104857600
      stripe_count:  1       stripe_size:   1048576       pattern:       raid0       stripe_offset: -1

    lcme_id:             N/A
    lcme_mirror_id:      N/A
    lcme_flags:          0
    lcme_extent.e_start: 104857600
    lcme_extent.e_end:   10737418240
      stripe_count:  8       stripe_size:   1048576       pattern:       raid0       stripe_offset: -1

    lcme_id:             N/A
    lcme_mirror_id:      N/A
    lcme_flags:          0
    lcme_extent.e_start: 10737418240
    lcme_extent.e_end:   EOF
      stripe_count:  -1       stripe_size:   1048576       pattern:       raid0       stripe_offset: -1
";

/// An `lfs` that does what `script` says. Another process writes it: while this one held it open for writing,
/// a fork of another test would keep it from being run.
fn fake(dir: &Path, script: &str) -> Lfs {
    let program = dir.join("lfs");
    let mut shell = Command::new("/bin/sh")
        .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
        .arg(&program)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = shell.stdin.take().unwrap();
    write!(stdin, "#!/bin/sh\n{script}\n").unwrap();
    drop(stdin);
    assert!(shell.wait().unwrap().success());
    Lfs {
        program,
        patience: Duration::from_secs(20),
    }
}

#[test]
fn a_file_system_has_a_name_or_a_number() {
    assert_eq!(FileSystem(LUSTRE_MAGIC).to_string(), "lustre");
    assert!(FileSystem(LUSTRE_MAGIC).is_lustre());
    assert_eq!(FileSystem(0x9123_683E).to_string(), "btrfs");
    assert_eq!(FileSystem(0x1234).to_string(), "0x1234");
    assert!(!FileSystem::of(Path::new("/")).unwrap().is_lustre());
    let error = FileSystem::of(Path::new("/nowhere/at all")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn the_layout_is_set_with_three_components_and_a_path_that_is_no_option() {
    let dir = tempfile::tempdir().unwrap();
    let lfs = fake(dir.path(), "echo \"$@\" > \"$0.called\"");

    lfs.set_layout(Path::new("/fsx/-d")).unwrap();

    let called = std::fs::read_to_string(dir.path().join("lfs.called")).unwrap();
    let expected = "setstripe -E 100M -c 1 -E 10G -c 8 -E -1 -c -1 -- /fsx/-d\n";
    assert_eq!(called, expected);
}

#[test]
fn a_relative_path_is_made_absolute() {
    let dir = tempfile::tempdir().unwrap();
    let lfs = fake(dir.path(), "echo \"$@\"");
    let said = lfs.layout(Path::new("--help")).unwrap();
    assert!(said.starts_with("getstripe -d -- /"), "{said}");
    assert!(said.ends_with("/--help"), "{said}");
}

#[test]
fn the_layout_is_told_in_a_few_words() {
    let dir = tempfile::tempdir().unwrap();
    let lfs = fake(dir.path(), &format!("cat <<'END'\n{PROGRESSIVE}END"));
    assert_eq!(lfs.layout(dir.path()).unwrap(), WANTED_LAYOUT);
}

#[test]
fn what_is_no_progressive_layout_is_told_as_far_as_it_is_known() {
    let plain = "/fsx\nstripe_count:  2 stripe_size:   4194304 pattern: raid0 stripe_offset: -1\n";
    assert_eq!(describe(plain), "2 stripes");
    let file = "/fsx/x\nlmm_stripe_count:  1\nlmm_stripe_size:   1048576\n";
    assert_eq!(describe(file), "1 stripe");
    let odd =
        "lcme_extent.e_end: 1500\n lmm_stripe_count: 3\n lcme_extent.e_end: EOF\n stripe_count: 4";
    assert_eq!(describe(odd), "3 stripes to 1500 B, then 4 stripes");
    let unknown = "\n  one\n\ntwo \nthree\nfour\nfive\n";
    assert_eq!(describe(unknown), "one; two; three; four");
    assert_eq!(describe("stripe_count: many\n"), "stripe_count: many");
    assert_eq!(describe(""), "");
}

#[test]
fn a_failure_is_told_with_what_lfs_says() {
    let dir = tempfile::tempdir().unwrap();
    let text = "lfs setstripe: cannot set: Inappropriate ioctl for device";
    let lfs = fake(dir.path(), &format!("echo '{text}' >&2; exit 25"));

    let error = lfs.set_layout(dir.path()).unwrap_err();

    assert!(matches!(error, LustreError::Failed { .. }), "{error}");
    let message = error.to_string();
    for words in ["set the stripe layout", text, "25", "directory on Lustre"] {
        assert!(message.contains(words), "`{words}` is missing: {message}");
    }
}

#[test]
fn a_tool_that_is_missing_or_cannot_run_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut lfs = fake(dir.path(), "");
    lfs.program = dir.path().join("nothing");
    let error = lfs.layout(dir.path()).unwrap_err();
    assert!(matches!(error, LustreError::Missing { .. }), "{error}");
    assert!(error.to_string().contains("lustre-client"), "{error}");
    lfs.program = dir.path().to_owned();
    let error = lfs.layout(dir.path()).unwrap_err();
    assert!(matches!(error, LustreError::Run { .. }), "{error}");
}

#[test]
fn a_tool_that_hangs_is_killed_with_all_that_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let mut lfs = fake(dir.path(), "sleep 600 & echo $! > \"$0.pid\"; wait");
    let pid = dir.path().join("lfs.pid");
    lfs.patience = Duration::from_secs(3);
    let begun = Instant::now();

    let error = lfs.layout(dir.path()).unwrap_err();

    assert!(matches!(error, LustreError::Silent { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(60));
    let pid: i32 = std::fs::read_to_string(pid)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let gone = || {
        // An orphan stays a zombie until its new parent looks.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z "))
    };
    while !gone() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{pid} still runs"
        );
        std::thread::yield_now();
    }
}
