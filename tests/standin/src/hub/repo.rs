//! A model repo: its refs, its commits and who may read it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};
use sha1::{Digest, Sha1};

use super::file::Files;

/// Whether readers of a repo must be let in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gated {
    /// Anyone may read.
    #[default]
    No,
    /// Access is granted on request.
    Auto,
    /// A person grants access.
    Manual,
}

/// A model repo. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Repo {
    id: String,
    /// By their full names, such as `refs/heads/main`.
    refs: BTreeMap<String, String>,
    commits: BTreeMap<String, Arc<Files>>,
    pub(super) gated: Gated,
    pub(super) private: bool,
    pub(super) disabled: bool,
    grants: BTreeSet<String>,
}

impl Repo {
    /// A repo without commits. `id` is `org/model`, or `model` for one without an owner.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            refs: BTreeMap::new(),
            commits: BTreeMap::new(),
            gated: Gated::No,
            private: false,
            disabled: false,
            grants: BTreeSet::new(),
        }
    }

    /// Commits `files`, all that the commit has, to a branch or to a ref such as `refs/pr/1`.
    pub fn commit(mut self, branch: &str, files: Files) -> Self {
        let mut hash = Sha1::new();
        hash.update(format!("{} {branch} {}\n", self.id, self.commits.len()));
        for (path, file) in &files.0 {
            hash.update(format!("{} {path}\n", file.oid));
        }
        let sha = hex::encode(hash.finalize());
        self.refs.insert(full_name(branch), sha.clone());
        self.commits.insert(sha, Arc::new(files));
        self
    }

    /// Tags the commit that `main` stands at.
    pub fn tag(self, name: &str) -> Self {
        self.tag_at(name, "main")
    }

    /// Tags the commit that `revision` stands at.
    ///
    /// # Panics
    ///
    /// If there is no such revision.
    pub fn tag_at(mut self, name: &str, revision: &str) -> Self {
        let sha = self.resolve(revision).expect("the revision was committed");
        let sha = sha.to_owned();
        self.refs.insert(format!("refs/tags/{name}"), sha);
        self
    }

    /// Moves a branch to an earlier commit.
    pub fn move_branch(mut self, branch: &str, sha: &str) -> Self {
        self.refs.insert(full_name(branch), sha.to_owned());
        self
    }

    /// Lets only granted tokens read the files.
    pub fn gated(mut self, gated: Gated) -> Self {
        self.gated = gated;
        self
    }

    /// Hides the repo from all but granted tokens.
    pub fn private(mut self) -> Self {
        self.private = true;
        self
    }

    /// Answers every request for the repo with 403.
    pub fn disabled(mut self) -> Self {
        self.disabled = true;
        self
    }

    /// Grants access to a token, which is thereby a good one.
    pub fn grant(mut self, token: &str) -> Self {
        self.grants.insert(token.to_owned());
        self
    }

    /// `org/model`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The commit that a branch, tag, ref or whole sha stands for.
    pub fn resolve(&self, revision: &str) -> Option<&str> {
        let named = [
            format!("refs/heads/{revision}"),
            format!("refs/tags/{revision}"),
            revision.to_owned(),
        ];
        let by_name = named.iter().find_map(|name| self.refs.get(name));
        let by_sha = self.commits.get_key_value(revision).map(|(sha, _)| sha);
        by_sha.or(by_name).map(String::as_str)
    }

    /// The files of a revision.
    pub fn files(&self, revision: &str) -> Option<Arc<Files>> {
        self.commits.get(self.resolve(revision)?).cloned()
    }

    pub(super) fn grants(&self, token: &str) -> bool {
        self.grants.contains(token)
    }

    /// The answer to `/refs`.
    pub(super) fn refs(&self, with_pulls: bool) -> Value {
        let of = |prefix: &str| -> Vec<Value> {
            let under = self.refs.iter().filter_map(|(full, sha)| {
                let name = full.strip_prefix(prefix)?;
                Some(json!({"name": name, "ref": full, "targetCommit": sha}))
            });
            under.collect()
        };
        let mut refs = json!({
            "branches": of("refs/heads/"),
            "tags": of("refs/tags/"),
            "converts": of("refs/convert/"),
        });
        if with_pulls {
            refs["pullRequests"] = of("refs/pr/").into();
        }
        refs
    }
}

fn full_name(branch: &str) -> String {
    if branch.starts_with("refs/") {
        branch.to_owned()
    } else {
        format!("refs/heads/{branch}")
    }
}
