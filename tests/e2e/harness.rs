//! Runs `weightctl` and `weightd` as a user would: as processes, with an environment of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use weightd_core::digest::Digest;

/// A directory for one test: a store, and whatever else it needs.
pub(crate) struct Sandbox {
    dir: tempfile::TempDir,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
        }
    }
}

impl Ran {
    /// Its result, if it succeeded.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that it failed with `code`, said all of `words`, and printed no result.
    #[track_caller]
    pub(crate) fn failed(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stdout, "", "a result although it failed");
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is missing: {self:?}");
        }
    }
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The store that [`Sandbox::weightctl`] uses.
    pub(crate) fn root(&self) -> PathBuf {
        self.path("store")
    }

    /// `weightctl --root <root> --output json`, with no credentials and no home but this directory.
    pub(crate) fn weightctl(&self) -> Command {
        let mut command = self.bare(env!("CARGO_BIN_EXE_weightctl"));
        command
            .arg("--root")
            .arg(self.root())
            .args(["--output", "json"]);
        command
    }

    pub(crate) fn bare(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().stdin(Stdio::null());
        command
            .env("HOME", self.dir.path())
            .env("PATH", "/usr/bin:/bin");
        command
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("RUST_BACKTRACE", "1");
        command
    }

    /// Runs `weightctl` with these words to its end.
    pub(crate) fn run(&self, environment: &[(&str, &str)], words: &[&str]) -> Ran {
        run(self
            .weightctl()
            .envs(environment.iter().copied())
            .args(words))
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Ran {
    command.output().expect("the command starts").into()
}

/// A process that is killed when the test ends.
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(Some(command.spawn().expect("the command starts")))
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it is there until `finish`")
    }

    pub(crate) fn pid(&mut self) -> u32 {
        self.child().id()
    }

    /// Nobody reads its stderr any more.
    pub(crate) fn close_stderr(&mut self) {
        drop(self.child().stderr.take());
    }

    /// SIGKILL, and wait.
    pub(crate) fn kill(&mut self) {
        self.child().kill().expect("it can be killed");
        self.child().wait().expect("it ends");
    }

    /// Whether it has ended by itself.
    pub(crate) fn ended(&mut self) -> bool {
        self.child()
            .try_wait()
            .expect("it can be waited for")
            .is_some()
    }

    /// Waits for its end, and what it said.
    pub(crate) fn finish(mut self) -> Ran {
        let child = self.0.take().expect("it is there until now");
        child.wait_with_output().expect("it ends").into()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until `done`, or fails the test with `what`.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "waited in vain until {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// All regular files below `dir`: relative path and bytes, sorted. Fails on anything else, symlinks too.
#[track_caller]
pub(crate) fn tree(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let files = everything(dir);
    for (name, _) in &files {
        let path = dir.join(name);
        assert!(!path.is_symlink(), "{} is no plain file", path.display());
    }
    files
}

/// What [`tree`] finds in a store: there symlinks stand for short records, and their targets are the bytes.
#[track_caller]
pub(crate) fn everything(dir: &Path) -> Vec<(String, Vec<u8>)> {
    fn walk(dir: &Path, base: &Path, files: &mut Vec<(String, Vec<u8>)>) {
        for entry in fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            let kind = fs::symlink_metadata(&path).expect("metadata").file_type();
            if kind.is_dir() {
                walk(&path, base, files);
                continue;
            }
            let name = path.strip_prefix(base).expect("below");
            let name = name.to_str().expect("UTF-8").to_owned();
            let bytes = match kind.is_symlink() {
                true => {
                    let target = fs::read_link(&path).expect("readable");
                    target.into_os_string().into_encoded_bytes()
                }
                false => {
                    assert!(kind.is_file(), "{} is no plain file", path.display());
                    fs::read(&path).expect("readable")
                }
            };
            files.push((name, bytes));
        }
    }
    let mut files = Vec::new();
    walk(dir, dir, &mut files);
    files.sort();
    files
}

/// The promise without exceptions: every blob has the bytes that its name says, and every file of a
/// published snapshot those that its manifest says.
#[track_caller]
pub(crate) fn assert_sound(root: &Path) {
    for (name, bytes) in tree(&root.join("blobs/sha256")) {
        let name = name.rsplit('/').next().expect("a name");
        assert_eq!(
            Digest::of(&bytes).to_string(),
            name,
            "a blob with wrong bytes"
        );
    }
    for entry in fs::read_dir(root.join("snapshots")).expect("snapshots") {
        let dir = entry.expect("an entry").path();
        let Ok(manifest) = fs::read(dir.join("manifest.json")) else {
            continue;
        };
        let manifest: Value = serde_json::from_slice(&manifest).expect("a manifest");
        let files = manifest["files"].as_array().expect("files");
        let found = tree(&dir.join("tree"));
        assert_eq!(found.len(), files.len(), "a published tree is not whole");
        for ((path, bytes), file) in found.iter().zip(files) {
            assert_eq!(file["path"], path.as_str());
            assert_eq!(
                file["sha256"],
                Digest::of(bytes).to_string(),
                "{path} has wrong bytes"
            );
        }
    }
}
