//! Removing from the shared tier what no model needs, and models that were not used for long.
//!
//! Any node may do it at any time, also several at once, and may be killed at any step:
//!
//! 1. Look at the leases, and at the claims in the blobs' directories; wait; look again. What did not change
//!    lost its owner.
//! 2. Remove the notes of models that are too old, then of the least recently used ones until the rest fits.
//! 3. Take the name of each blob that nothing needs away by a rename, look at its claims and the leases once
//!    more (rule 5 of [`super`]), and give it back, or delete it. Who dies in between leaves a directory that
//!    is set aside, and the next collection deletes that.
//!
//! Only names of the form that this code gives are removed, and links are never followed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::fill::aside_name;
use super::lease::FoundLease;
use super::snapshot::{SharedSnapshot, read_json};
use super::{At, SharedError, SharedStore, new_file};
use crate::digest::Digest;
use crate::errors::Chain;
use crate::fault;
use crate::model::{ModelRef, SnapshotId};

#[cfg(test)]
mod tests;

/// What to remove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectPolicy {
    /// Models go that nobody used for so long.
    pub max_age: Option<Duration>,
    /// The least recently used models go until the blobs of the others take no more than this.
    pub max_bytes: Option<u64>,
    /// What no model needs stays until it has not changed for so long.
    pub grace: Duration,
    /// A lease or claim that does not change for so long lost its owner.
    pub silence: Duration,
    /// Only say what would be removed.
    pub dry_run: bool,
}

/// Why a model was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// Nobody used it for too long.
    Age,
    /// Others were used more recently, and not all fit.
    Room,
}

/// A model that was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CollectedSnapshot {
    /// The model at its resolved revision.
    pub model: ModelRef,
    /// The snapshot's id.
    pub id: SnapshotId,
    /// Bytes of all its files. Other models may need some of them.
    pub bytes: u64,
    /// For how long nobody used it.
    pub age_seconds: u64,
    /// Why it was removed.
    pub why: Why,
}

/// What a collection removed, or, if it was a dry run, would have removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SharedCollected {
    /// Models, the least recently used first.
    pub snapshots: Vec<CollectedSnapshot>,
    /// Whole blobs that nothing needed.
    pub blobs: u64,
    /// Unfinished blobs that nobody worked on.
    pub fills: u64,
    /// Directories that had been set aside.
    pub asides: u64,
    /// Leases of owners that are gone.
    pub leases: u64,
    /// Files that somebody who is gone did not finish writing.
    pub temporaries: u64,
    /// Names of models that stood for one that is gone.
    pub refs: u64,
    /// Bytes on disk of all blobs and directories that were removed. What is linked from elsewhere too, as
    /// after an import, is not free yet.
    pub bytes_freed: u64,
    /// Models that were to go, but a node uses them.
    pub snapshots_in_use: u64,
    /// Blobs that no model needs, but a node uses them.
    pub blobs_in_use: u64,
    /// Blobs that no model needs, but that have changed not long ago.
    pub blobs_young: u64,
    /// What could not be removed, and why. The next collection tries again.
    pub failed: Vec<String>,
}

/// One blob's directory as it was found.
struct FoundFill {
    key: String,
    path: PathBuf,
    bytes: u64,
    newest: i64,
    sealed: bool,
}

/// What a claim said when it was read: key, name, content.
type Claims = HashMap<(String, String), String>;

/// One model's note as it was found.
struct Noted {
    path: PathBuf,
    snapshot: SharedSnapshot,
    used: i64,
}

impl Noted {
    fn keys(&self) -> impl Iterator<Item = &str> {
        let files = self.snapshot.files.iter();
        files
            .filter_map(|file| file.key.as_deref())
            .collect::<HashSet<_>>()
            .into_iter()
    }
}

/// All that is noted about models.
struct Notes {
    /// The least recently used first.
    models: Vec<Noted>,
    /// Blobs of notes that this version cannot read: it neither removes those notes nor what they name.
    unread: HashSet<String>,
}

/// One run of the collector.
struct Collection<'a> {
    store: &'a SharedStore,
    policy: &'a CollectPolicy,
    /// The file system's time at the start, in seconds.
    now: i64,
    /// Owners that did not change these.
    dead_leases: HashMap<PathBuf, String>,
    dead_claims: Claims,
    /// Blobs that somebody uses.
    claimed: HashSet<String>,
    collected: SharedCollected,
    /// Tests do something at the worst of times: between the rename of a blob and the second look.
    renamed: &'a dyn Fn(&str),
}

impl SharedStore {
    /// Removes what `policy` says. `wait` sleeps; it is called at most once, with the time for silence.
    ///
    /// # Errors
    ///
    /// [`SharedError::Io`] if the tier cannot be looked at. What cannot be removed is told in the result.
    pub fn collect(
        &self,
        policy: &CollectPolicy,
        wait: &dyn Fn(Duration),
    ) -> Result<SharedCollected, SharedError> {
        let now = self.clock()?;
        self.collect_at(policy, now, wait, &|_| {})
    }

    fn collect_at(
        &self,
        policy: &CollectPolicy,
        now: i64,
        wait: &dyn Fn(Duration),
        renamed: &dyn Fn(&str),
    ) -> Result<SharedCollected, SharedError> {
        let collection = Collection {
            store: self,
            policy,
            now,
            dead_leases: HashMap::new(),
            dead_claims: Claims::new(),
            claimed: HashSet::new(),
            collected: SharedCollected::default(),
            renamed,
        };
        collection.run(wait)
    }

    /// The file system's own time in seconds, as a file shows it that is made now. Making one also shows this
    /// node what others have made there: NFS keeps listings for a while.
    fn clock(&self) -> Result<i64, SharedError> {
        let name = format!("leases/probe.{}", uuid::Uuid::new_v4());
        let path = self.root.join(name);
        let made = new_file(&path).and_then(|mut file| {
            file.write_all(b"probe")?;
            file.sync_all()?;
            Ok(file.metadata()?.mtime())
        });
        let _ = fs::remove_file(&path);
        made.at("make", &path)
    }

    fn fresh_leases(&self) -> Result<Vec<FoundLease>, SharedError> {
        self.clock()?;
        self.leases()
    }
}

impl Collection<'_> {
    fn run(mut self, wait: &dyn Fn(Duration)) -> Result<SharedCollected, SharedError> {
        let mut fills = Vec::new();
        let mut asides = Vec::new();
        for (name, path) in entries(&self.store.blobs())? {
            match form(&name) {
                Form::Blob => fills.extend(found(self.fill_at(&path, &name))?),
                Form::Aside => asides.extend(found(self.fill_at(&path, &name))?),
                Form::Other => {}
            }
        }
        let leases = self.observe(&fills, wait)?;
        let notes = self.notes()?;
        let kept = self.remove_snapshots(notes.models, &leases, &fills)?;
        let mut needed: HashSet<&str> = kept.iter().flat_map(Noted::keys).collect();
        needed.extend(notes.unread.iter().map(String::as_str));
        for fill in &fills {
            if needed.contains(fill.key.as_str()) {
                self.sweep_temporaries(&fill.path, is_of_a_blob)?;
            } else {
                self.remove_fill(fill, &leases)?;
            }
        }
        for aside in &asides {
            self.remove_aside(aside);
        }
        self.remove_dead_leases()?;
        self.sweep_refs(&kept)?;
        let root = &self.store.root;
        self.sweep_temporaries(root, |name| name == "FORMAT")?;
        self.sweep_temporaries(&root.join("snapshots"), |name| name.ends_with(".json"))?;
        self.sweep_temporaries(&root.join("leases"), |name| name == "probe")?;
        Ok(self.collected)
    }

    fn age(&self, time: i64) -> u64 {
        u64::try_from(self.now.saturating_sub(time)).unwrap_or(0)
    }

    /// Whether nothing has changed since `time`, and that is longer ago than the grace.
    fn is_old(&self, time: i64) -> bool {
        Duration::from_secs(self.age(time)) >= self.policy.grace
    }

    fn fill_at(&self, path: &Path, name: &str) -> Result<FoundFill, SharedError> {
        let fill = self.store.open_fill(path.to_owned(), 0)?;
        let (bytes, newest) = fill.usage()?;
        Ok(FoundFill {
            key: name.to_owned(),
            path: path.to_owned(),
            bytes,
            newest,
            sealed: fill.names()?.iter().any(|name| name == "blob"),
        })
    }

    /// Finds out who is alive. Returns the leases of those who are.
    fn observe(
        &mut self,
        fills: &[FoundFill],
        wait: &dyn Fn(Duration),
    ) -> Result<Vec<FoundLease>, SharedError> {
        let read_claims = || -> Result<Claims, SharedError> {
            let mut claims = Claims::new();
            for fill in fills {
                claims.extend(self.claims(&fill.path, &fill.key)?);
            }
            Ok(claims)
        };
        let leases = self.store.fresh_leases()?;
        let claims = read_claims()?;
        if leases.is_empty() && claims.is_empty() {
            return Ok(leases);
        }
        wait(self.policy.silence);
        let before: HashMap<PathBuf, String> =
            { leases.into_iter().map(|lease| (lease.path, lease.beat)) }.collect();
        let (dead, alive): (Vec<_>, Vec<_>) = { self.store.fresh_leases()?.into_iter() }
            .partition(|lease| before.get(&lease.path) == Some(&lease.beat));
        let (dead_claims, live_claims): (Claims, Claims) = read_claims()?
            .into_iter()
            .partition(|(claim, content)| claims.get(claim) == Some(content));
        self.dead_leases = { dead.into_iter().map(|lease| (lease.path, lease.beat)) }.collect();
        self.claimed = live_claims.into_keys().map(|(key, _)| key).collect();
        self.dead_claims = dead_claims;
        Ok(alive)
    }

    /// The claims in the directory `path` of the blob `key`.
    fn claims(&self, path: &Path, key: &str) -> Result<Claims, SharedError> {
        let Some(fill) = found(self.store.open_fill(path.to_owned(), 0))? else {
            return Ok(Claims::new());
        };
        let mut claims = Claims::new();
        for name in fill.names()? {
            if name.ends_with(".claim")
                && let Some(content) = fill.read(&name).at("read", &path.join(&name))?
            {
                claims.insert((key.to_owned(), name), content);
            }
        }
        Ok(claims)
    }

    fn is_leased(&self, key: &str, leases: &[FoundLease]) -> bool {
        leases.iter().any(|lease| lease.lists(key)) || self.claimed.contains(key)
    }

    /// Leases now, but for those that are known to be dead.
    fn living_leases(&self) -> Result<Vec<FoundLease>, SharedError> {
        let mut leases = self.store.fresh_leases()?;
        leases.retain(|lease| self.dead_leases.get(&lease.path) != Some(&lease.beat));
        Ok(leases)
    }

    fn notes(&self) -> Result<Notes, SharedError> {
        let mut notes = Notes {
            models: Vec::new(),
            unread: HashSet::new(),
        };
        for (name, path) in entries(&self.store.root.join("snapshots"))? {
            let Some(id) = name.strip_suffix(".json") else {
                continue;
            };
            let Some(used) = used(&path)? else {
                continue;
            };
            match read_json::<SharedSnapshot>(&path)? {
                Some(snapshot) if snapshot.snapshot.as_str() == id => notes.models.push(Noted {
                    path,
                    snapshot,
                    used,
                }),
                _ => {
                    let text = fs::read(&path).unwrap_or_default();
                    let text = String::from_utf8_lossy(&text);
                    let keys = text.split('"').filter(|word| form(word) == Form::Blob);
                    notes.unread.extend(keys.map(str::to_owned));
                }
            }
        }
        let order = |noted: &Noted| (noted.used, noted.snapshot.snapshot.clone());
        notes.models.sort_by_cached_key(order);
        Ok(notes)
    }

    /// Removes models that are too old or do not fit. Returns the others.
    fn remove_snapshots(
        &mut self,
        models: Vec<Noted>,
        leases: &[FoundLease],
        fills: &[FoundFill],
    ) -> Result<Vec<Noted>, SharedError> {
        let mut users = HashMap::<String, u64>::new();
        for key in models.iter().flat_map(Noted::keys) {
            *users.entry(key.to_owned()).or_default() += 1;
        }
        let sizes: HashMap<&str, u64> =
            { fills.iter().map(|fill| (fill.key.as_str(), fill.bytes)) }.collect();
        let held = |key: &str| self.is_leased(key, leases);
        // What nothing needs any more does not count, even while the grace keeps it: else each run until then
        // would remove one model more.
        let counted = |(key, _): &(&&str, &u64)| users.contains_key(**key) || held(key);
        let mut bytes: u64 = sizes.iter().filter(counted).map(|(_, bytes)| bytes).sum();
        let mut kept = Vec::new();
        for noted in models {
            let age = self.age(noted.used);
            let too_old = |limit: Duration| Duration::from_secs(age) > limit;
            let why = if self.policy.max_age.is_some_and(too_old) {
                Why::Age
            } else if self.policy.max_bytes.is_some_and(|limit| bytes > limit) {
                Why::Room
            } else {
                kept.push(noted);
                continue;
            };
            if self.is_in_use(&noted, leases)? {
                self.collected.snapshots_in_use += 1;
                kept.push(noted);
                continue;
            }
            if !self.policy.dry_run && !self.remove_file(&noted.path) {
                kept.push(noted);
                continue;
            }
            for key in noted.keys() {
                let users = users.get_mut(key).expect("it was counted");
                *users -= 1;
                if *users == 0 {
                    bytes -= sizes.get(key).copied().unwrap_or(0);
                }
            }
            self.collected.snapshots.push(CollectedSnapshot {
                bytes: noted.snapshot.bytes(),
                id: noted.snapshot.snapshot,
                model: noted.snapshot.model,
                age_seconds: age,
                why,
            });
        }
        Ok(kept)
    }

    /// Whether somebody uses a model, or has begun to by now.
    fn is_in_use(&self, noted: &Noted, leases: &[FoundLease]) -> Result<bool, SharedError> {
        if noted.keys().any(|key| self.is_leased(key, leases)) {
            return Ok(true);
        }
        let leases = self.living_leases()?;
        let leased = |key: &str| leases.iter().any(|lease| lease.lists(key));
        let touched = used(&noted.path)?.is_some_and(|used| used != noted.used);
        Ok(touched || noted.keys().any(leased))
    }

    /// Removes a blob that no model needs, unless it is young or in use.
    fn remove_fill(&mut self, fill: &FoundFill, leases: &[FoundLease]) -> Result<(), SharedError> {
        if self.is_leased(&fill.key, leases) {
            self.collected.blobs_in_use += 1;
            return self.sweep_temporaries(&fill.path, is_of_a_blob);
        }
        if !self.is_old(fill.newest) {
            self.collected.blobs_young += 1;
            return Ok(());
        }
        if !self.policy.dry_run {
            let aside = aside_name(&fill.path);
            if !self.rename(&fill.path, &aside) {
                return Ok(());
            }
            fault::point("shared.collect.renamed");
            (self.renamed)(&fill.key);
            let used = self.is_used_after_all(&aside, &fill.key);
            if !matches!(used, Ok(false)) {
                self.give_back(&aside, &fill.path);
                self.collected.blobs_in_use += 1;
                return used.map(|_| ());
            }
            if !self.delete(&aside) {
                return Ok(());
            }
        }
        self.collected.bytes_freed += fill.bytes;
        match fill.sealed {
            true => self.collected.blobs += 1,
            false => self.collected.fills += 1,
        }
        Ok(())
    }

    /// Whether somebody leased a blob before its name was taken away, or works on it.
    fn is_used_after_all(&self, aside: &Path, key: &str) -> Result<bool, SharedError> {
        let leases = self.living_leases()?;
        let claims = self.claims(aside, key)?;
        let mut claims = claims.iter();
        Ok(leases.iter().any(|lease| lease.lists(key))
            || claims.any(|(claim, content)| self.dead_claims.get(claim) != Some(content)))
    }

    fn give_back(&mut self, aside: &Path, path: &Path) {
        // Somebody who found no such name has begun anew: then this one stays aside. A rename replaces nothing
        // but an empty directory.
        if fs::symlink_metadata(path).is_err() {
            self.rename(aside, path);
        }
    }

    fn remove_aside(&mut self, aside: &FoundFill) {
        if !self.is_old(aside.newest) {
            return;
        }
        if !self.policy.dry_run {
            // A name of this run's own first: whoever made the old one may be about to give the blob back.
            let blob = aside.path.with_file_name(&aside.key[..KEY_DIGITS]);
            let own = aside_name(&blob);
            if !self.rename(&aside.path, &own) || !self.delete(&own) {
                return;
            }
        }
        self.collected.asides += 1;
        self.collected.bytes_freed += aside.bytes;
    }

    fn remove_dead_leases(&mut self) -> Result<(), SharedError> {
        for lease in self.store.leases()? {
            // Not if its owner came back.
            if self.dead_leases.get(&lease.path) == Some(&lease.beat)
                && (self.policy.dry_run || self.remove_file(&lease.path))
            {
                self.collected.leases += 1;
            }
        }
        Ok(())
    }

    /// Removes what names a model stood for that is not noted any more.
    fn sweep_refs(&mut self, kept: &[Noted]) -> Result<(), SharedError> {
        let kept: HashSet<&SnapshotId> =
            { kept.iter().map(|noted| &noted.snapshot.snapshot) }.collect();
        let root = self.store.root.join("refs");
        for (_, scheme) in folders(&root)? {
            for (_, model) in folders(&scheme)? {
                self.sweep_temporaries(&model, |_| true)?;
                for (_, path) in entries(&model)? {
                    if used(&path)?.is_none() {
                        continue;
                    }
                    let Some(id) = read_json::<SnapshotId>(&path)? else {
                        continue;
                    };
                    // The note may be newer than our list of them, or not be readable.
                    let note = self.store.root.join(format!("snapshots/{id}.json"));
                    let doomed = { self.collected.snapshots.iter() }.any(|gone| gone.id == id);
                    let gone = !kept.contains(&id) && (doomed || used(&note)?.is_none());
                    if gone && (self.policy.dry_run || self.remove_file(&path)) {
                        self.collected.refs += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes files that somebody began to write in `folder`, and never gave their `name`.
    fn sweep_temporaries(
        &mut self,
        folder: &Path,
        name: impl Fn(&str) -> bool,
    ) -> Result<(), SharedError> {
        for (temporary, path) in entries(folder)? {
            if name_in_the_end(&temporary).is_some_and(&name)
                && let Some(written) = used(&path)?
                && self.is_old(written)
                && (self.policy.dry_run || self.remove_file(&path))
            {
                self.collected.temporaries += 1;
            }
        }
        Ok(())
    }

    /// False if it is gone already, or cannot be renamed.
    fn rename(&mut self, from: &Path, to: &Path) -> bool {
        self.done("rename", from, fs::rename(from, to))
    }

    fn remove_file(&mut self, path: &Path) -> bool {
        self.done("remove", path, fs::remove_file(path))
    }

    fn delete(&mut self, aside: &Path) -> bool {
        let deleted = fs::remove_dir_all(aside);
        fault::point("shared.collect.deleted");
        self.done("delete", aside, deleted)
    }

    fn done(&mut self, op: &'static str, path: &Path, done: io::Result<()>) -> bool {
        match done.at(op, path) {
            Ok(()) => true,
            // Another collector was faster.
            Err(SharedError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                false
            }
            Err(error) => {
                self.collected.failed.push(Chain(&error).to_string());
                false
            }
        }
    }
}

const KEY_DIGITS: usize = 64;

/// What a name in the folder of the blobs stands for.
#[derive(Debug, PartialEq, Eq)]
enum Form {
    Blob,
    Aside,
    Other,
}

fn form(name: &str) -> Form {
    let (key, rest) = name.split_once('.').unwrap_or((name, ""));
    if key.parse::<Digest>().is_err() {
        return Form::Other;
    }
    match rest.strip_prefix("aside.") {
        None if name.len() == KEY_DIGITS => Form::Blob,
        Some(id) if uuid::Uuid::parse_str(id).is_ok() => Form::Aside,
        _ => Form::Other,
    }
}

/// What a file is called once it is written, if this is the name that it has until then.
fn name_in_the_end(temporary: &str) -> Option<&str> {
    let (name, ending) = temporary.rsplit_once('.')?;
    uuid::Uuid::parse_str(ending).is_ok().then_some(name)
}

fn is_of_a_blob(name: &str) -> bool {
    name == "blob" || name.ends_with(".sums")
}

/// Names that are text, each with its path. A folder that is gone is empty.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, SharedError> {
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.at("list", folder)?,
    };
    let mut found = Vec::new();
    for entry in listed {
        let entry = entry.at("list", folder)?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// The folders in a folder; links to some are none.
fn folders(folder: &Path) -> Result<Vec<(String, PathBuf)>, SharedError> {
    let mut found = entries(folder)?;
    found.retain(|(_, path)| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()));
    Ok(found)
}

/// When a file was changed or touched last; `None` if there is none, or it is no plain file.
fn used(path: &Path) -> Result<Option<i64>, SharedError> {
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(found.is_file().then(|| found.mtime())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("look at", path),
    }
}

/// `None` if it is gone by now, or is no directory: another collector was faster, or it is none of ours.
fn found<T>(result: Result<T, SharedError>) -> Result<Option<T>, SharedError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(SharedError::Io { source, .. })
            if matches!(
                source.raw_os_error(),
                Some(nix::libc::ENOENT | nix::libc::ENOTDIR | nix::libc::ELOOP)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
