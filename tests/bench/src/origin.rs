//! What nginx does not answer itself: listings, metadata and redirects.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use weightd_standin::{Checksum, Files, Hub, HubConfig, PutOptions, Repo, S3Config, S3Server};

/// Serves each directory under `root` as a bucket and as the model `org/<name>`, until stdin closes.
pub(crate) fn serve(root: &Path) -> Result<()> {
    let hub = Hub::spawn_thread(HubConfig::default()).context("cannot start the hub")?;
    let s3 = S3Server::spawn_thread(S3Config::default()).context("cannot start the S3 server")?;
    for entry in std::fs::read_dir(root)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .context("a name")?
            .to_string_lossy()
            .into_owned();
        let files = Files::new()
            .directory(&path)
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        hub.add_repo(Repo::new(&format!("org/{name}")).commit("main", files));
        put(&s3, &name, &path).with_context(|| format!("cannot read `{}`", path.display()))?;
    }
    let line = json!({
        "hub": hub.endpoint(),
        "cdn": hub.cdn_endpoint(),
        "s3": s3.endpoint(),
        "access_key": s3.access_key(),
        "secret_key": s3.secret_key(),
    });
    println!("{line}");
    std::io::stdout().flush()?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

/// Puts all files below `folder` into a bucket, below the prefix `model`.
fn put(s3: &S3Server, bucket: &str, folder: &Path) -> Result<()> {
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let key = format!("model/{}", path.strip_prefix(folder)?.display());
            let options = PutOptions {
                checksum: Checksum::None,
                etag: Some(nginx_etag(&path)?),
                ..PutOptions::default()
            };
            s3.put_path(bucket, &key, &path, options)?;
        }
    }
    Ok(())
}

/// The ETag that nginx gives a file: clients compare that of an object with that of the listing.
///
/// Source: nginx, `ngx_http_set_etag`: the time of the last change and the size, both in hexadecimal.
fn nginx_etag(path: &Path) -> Result<String> {
    let file = std::fs::metadata(path)?;
    Ok(format!("{:x}-{:x}", file.mtime(), file.size()))
}
