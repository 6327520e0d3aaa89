//! What a directory gives, and what it must not.

use std::fs;
use std::os::unix::fs::symlink;

use futures::TryStreamExt;
use tempfile::TempDir;
use weightd_core::source::Source;

use super::*;

fn model(path: &Path) -> ModelRef {
    format!("file://{}", path.display()).parse().unwrap()
}

fn open(path: &Path) -> DirectorySource {
    DirectorySource::new(model(path), None)
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn tree() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("config.json"), b"{}");
    write(&dir.path().join("sub/model.safetensors"), &[7; 3_000_000]);
    dir
}

async fn listed(source: &DirectorySource) -> Result<Listing, SourceError> {
    let revision = source.resolve().await?;
    source.list(&revision, &Patterns::default()).await
}

async fn paths(path: &Path) -> Result<Vec<String>, SourceError> {
    let files = listed(&open(path)).await?.files;
    Ok(files.iter().map(|file| file.path.to_string()).collect())
}

async fn bytes(
    source: &DirectorySource,
    file: &RemoteFile,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    let pieces: Vec<_> = source.read(file, range).await?.try_collect().await?;
    Ok(pieces.concat())
}

#[tokio::test]
async fn a_directory_is_listed_and_read_in_ranges() {
    let dir = tree();
    let source = open(dir.path());

    let files = listed(&source).await.unwrap().files;

    let found: Vec<_> = files
        .iter()
        .map(|file| (file.path.as_str(), file.size))
        .collect();
    assert_eq!(
        found,
        [("config.json", 2), ("sub/model.safetensors", 3_000_000)]
    );
    assert_eq!(bytes(&source, &files[0], 0..2).await.unwrap(), b"{}");
    let middle = bytes(&source, &files[1], 5..2_500_000).await.unwrap();
    assert!(middle.len() == 2_499_995 && middle.iter().all(|byte| *byte == 7));
    let identity = files[0].identity.clone().unwrap();
    assert!(
        identity.starts_with("file:/") && identity.contains(":2:"),
        "{identity}"
    );
}

#[tokio::test]
async fn a_snapshot_of_the_hubs_cache_is_read_through_its_links() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("blobs/abc"), b"{}");
    let snapshot = dir.path().join("snapshots/c0ffee");
    fs::create_dir_all(&snapshot).unwrap();
    symlink("../../blobs/abc", snapshot.join("config.json")).unwrap();
    let source = open(&snapshot);

    let files = listed(&source).await.unwrap().files;

    assert_eq!(files[0].path.as_str(), "config.json");
    assert_eq!(bytes(&source, &files[0], 0..2).await.unwrap(), b"{}");
}

#[tokio::test]
async fn records_and_locks_are_no_part_of_a_model() {
    let dir = tree();
    for name in [
        ".git/x.json",
        ".cache/huggingface/x.json",
        ".weightd/x.json",
        "a.json.lock",
    ] {
        write(&dir.path().join(name), b"{}");
    }
    assert_eq!(
        paths(dir.path()).await.unwrap(),
        ["config.json", "sub/model.safetensors"]
    );
}

#[tokio::test]
async fn a_link_that_leads_in_a_circle_or_nowhere_or_to_a_directory_is_refused() {
    for (target, words) in [
        ("loop.json", "leads nowhere"),
        ("absent", "leads nowhere"),
        (".", "link to a directory"),
    ] {
        let dir = tree();
        symlink(target, dir.path().join("loop.json")).unwrap();
        let error = paths(dir.path()).await.expect_err(target);
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[tokio::test]
async fn a_pipe_is_refused_and_never_waited_for() {
    let dir = tree();
    nix::unistd::mkfifo(&dir.path().join("x.json"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = paths(dir.path()).await.unwrap_err();
    assert!(
        error.to_string().contains("a socket, a device or a pipe"),
        "{error}"
    );
}

#[tokio::test]
async fn a_change_after_the_listing_is_seen() {
    let dir = tree();
    let source = open(dir.path());
    let revision = source.resolve().await.unwrap();
    let files = listed(&source).await.unwrap().files;
    let path = dir.path().join("config.json");

    write(&path, b"[]  ");
    let longer = bytes(&source, &files[0], 0..2).await.unwrap_err();
    fs::remove_file(&path).unwrap();
    let gone = bytes(&source, &files[0], 0..2).await.unwrap_err();
    let listing = source
        .list(&revision, &Patterns::default())
        .await
        .unwrap_err();
    let pinned = DirectorySource::new(model(dir.path()).at(&revision), None);
    let moved = pinned.resolve().await.unwrap_err();

    for error in [longer, gone, listing] {
        assert!(matches!(error, SourceError::Changed { .. }), "{error}");
    }
    assert!(matches!(moved, SourceError::NotFound { .. }), "{moved}");
    assert!(moved.hint().unwrap().contains("file://"), "{moved}");
}

#[tokio::test]
async fn a_change_whose_time_was_set_back_is_seen() {
    let dir = tree();
    let source = open(dir.path());
    let revision = source.resolve().await.unwrap();
    let files = listed(&source).await.unwrap().files;
    let path = dir.path().join("config.json");
    let before = fs::metadata(&path).unwrap().modified().unwrap();

    // Times on disk are as fine as the kernel's tick.
    std::thread::sleep(std::time::Duration::from_millis(20));
    write(&path, b"[]");
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(before).unwrap();

    let error = bytes(&source, &files[0], 0..2).await.unwrap_err();
    assert!(matches!(error, SourceError::Changed { .. }), "{error}");
    let again = open(dir.path());
    assert_ne!(again.resolve().await.unwrap(), revision);
    assert_ne!(
        listed(&again).await.unwrap().files[0].identity,
        files[0].identity
    );
}

#[tokio::test]
async fn a_change_in_the_middle_of_a_range_is_seen() {
    let dir = tree();
    let source = open(dir.path());
    let files = listed(&source).await.unwrap().files;
    let mut stream = source.read(&files[1], 0..3_000_000).await.unwrap();

    stream.try_next().await.unwrap();
    write(&dir.path().join("sub/model.safetensors"), &[8; 3_000_001]);
    let error = stream.try_next().await.unwrap_err();

    assert!(matches!(error, SourceError::Changed { .. }), "{error}");
    assert!(stream.try_next().await.unwrap().is_none());
}

#[tokio::test]
async fn a_daemon_reads_only_what_its_operator_allowed() {
    let dir = tree();
    let secrets = tempfile::tempdir().unwrap();
    write(&secrets.path().join("token.json"), b"secret");
    let only = |path: &Path, allowed: &Path| {
        DirectorySource::new(model(path), Some(vec![allowed.to_owned()]))
    };
    let inside = only(&dir.path().join("sub"), dir.path());
    assert_eq!(listed(&inside).await.unwrap().files.len(), 1);

    let outside = listed(&only(secrets.path(), dir.path())).await.unwrap_err();
    let absent = secrets.path().join("absent");
    let absent = listed(&only(&absent, dir.path())).await.unwrap_err();
    let none = DirectorySource::new(model(dir.path()), Some(Vec::new()));
    let none = listed(&none).await.unwrap_err();
    symlink(
        secrets.path().join("token.json"),
        dir.path().join("token.json"),
    )
    .unwrap();
    let link = listed(&only(dir.path(), dir.path())).await.unwrap_err();

    for error in [outside, absent, none, link] {
        assert!(matches!(error, SourceError::Denied { .. }), "{error}");
        assert!(error.hint().unwrap().contains("file.allow"), "{error}");
    }
}

#[tokio::test]
async fn a_link_that_is_turned_after_the_listing_does_not_lead_out() {
    let dir = tree();
    let secrets = tempfile::tempdir().unwrap();
    write(&secrets.path().join("token.json"), b"{}");
    let source = DirectorySource::new(model(dir.path()), Some(vec![dir.path().to_owned()]));
    let files = listed(&source).await.unwrap().files;
    let path = dir.path().join("config.json");

    fs::remove_file(&path).unwrap();
    symlink(secrets.path().join("token.json"), &path).unwrap();
    let error = bytes(&source, &files[0], 0..2).await.unwrap_err();

    assert!(matches!(error, SourceError::Denied { .. }), "{error}");
}

#[tokio::test]
async fn a_file_or_nothing_in_place_of_a_directory_is_explained() {
    let dir = tree();
    let file = paths(&dir.path().join("config.json")).await.unwrap_err();
    assert!(file.to_string().contains("not a directory"), "{file}");
    let absent = paths(&dir.path().join("absent")).await.unwrap_err();
    assert!(matches!(absent, SourceError::NotFound { .. }), "{absent}");
    let empty = tempfile::tempdir().unwrap();
    let empty = paths(empty.path()).await.unwrap_err();
    assert!(empty.to_string().contains("no files"), "{empty}");
}
