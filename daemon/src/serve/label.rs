//! The store's SELinux label. What is made in a directory gets the directory's type, so it is enough to label the root
//! before the store is made; a store that is older is labelled through.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, lgetxattr, lsetxattr};

/// The attribute that holds a file's label.
///
/// Source: xattr(7) and the kernel's `XATTR_NAME_SELINUX`.
const ATTRIBUTE: &str = "security.selinux";

/// The store could not be labelled.
#[derive(Debug, thiserror::Error)]
#[error("cannot give `{}` the SELinux label {label}", path.display())]
pub struct LabelError {
    path: PathBuf,
    label: String,
    #[source]
    source: io::Error,
}

/// Gives the directory `root` and all that is in it the label, unless the root has it.
///
/// # Errors
///
/// [`LabelError`] for the first file that does not take it. The next start begins anew.
pub(super) fn label(root: &Path, label: &str) -> Result<(), LabelError> {
    let failed = |path: &Path, source: io::Error| LabelError {
        path: path.to_owned(),
        label: label.to_owned(),
        source,
    };
    fs::create_dir_all(root).map_err(|error| failed(root, error))?;
    if is(root, label) {
        return Ok(());
    }
    tracing::info!(root = %root.display(), label, "labelling the store");
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).map_err(|error| failed(&dir, error))? {
            let entry = entry.map_err(|error| failed(&dir, error))?;
            let kind = entry.file_type();
            let path = entry.path();
            if kind.map_err(|error| failed(&path, error))?.is_dir() {
                left.push(path.clone());
            }
            match set(&path, label) {
                // Another process of the store moved or removed it: what it makes has the label of its directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done.map_err(|error| failed(&path, error))?,
            }
        }
    }
    // Last: a start that was cut short must not look as if it were done.
    set(root, label).map_err(|error| failed(root, error))
}

fn is(path: &Path, label: &str) -> bool {
    let mut value = [0; 512];
    let read = lgetxattr(path, ATTRIBUTE, &mut value);
    let found = read.map(|length| &value[..length]);
    found.is_ok_and(|found| found.strip_suffix(b"\0").unwrap_or(found) == label.as_bytes())
}

fn set(path: &Path, label: &str) -> io::Result<()> {
    // The tools of SELinux write the C string, with its end.
    let value = [label.as_bytes(), b"\0"].concat();
    lsetxattr(path, ATTRIBUTE, &value, XattrFlags::empty()).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "system_u:object_r:container_file_t:s0";

    /// Only root of the machine may set labels where there is no SELinux to decide.
    fn may_label(dir: &Path) -> bool {
        let probe = dir.join("probe");
        fs::write(&probe, "").unwrap();
        let may = set(&probe, LABEL).is_ok();
        fs::remove_file(&probe).unwrap();
        may
    }

    #[test]
    fn a_store_old_or_new_is_labelled_through_and_through() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("new/store");
        let blob = root.join("blobs/sha256/aa/blob");
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::write(&blob, "x").unwrap();

        let outcome = label(&root, LABEL);

        if may_label(dir.path()) {
            outcome.unwrap();
            for path in [&root, &root.join("blobs"), &blob] {
                assert!(is(path, LABEL), "{}", path.display());
            }
        } else {
            let error = outcome.unwrap_err();
            assert!(
                error.to_string().contains("SELinux label system_u"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_has_the_label_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        if !may_label(dir.path()) {
            return;
        }
        label(dir.path(), LABEL).unwrap();
        let later = dir.path().join("later");
        fs::write(&later, "x").unwrap();

        label(dir.path(), LABEL).unwrap();

        assert!(!is(&later, LABEL), "it was walked through again");
    }
}
