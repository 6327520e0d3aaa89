//! What origins said of whom, for a short time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weightd_core::digest::Digest;
use weightd_core::model::{ModelRef, Revision};
use weightd_core::source::SourceError;

use crate::sources::Resolved;

/// How long what a branch or a prefix stood for is taken for granted: 30 s. Hundreds of pods that start
/// together then cost the Hub one question.
const NAME: Duration = Duration::from_secs(30);

/// How long a no holds: a pod that crashes in a loop without a right must not use up the quota that the
/// Hub gives to all who come without a token.
const REFUSAL: Duration = Duration::from_secs(5);

/// Entries of one kind. What is beyond that is asked again.
const MOST: usize = 10_000;

/// What is asked of an origin: may this one read that?
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Question {
    pub(super) model: ModelRef,
    /// Which part of the model, where rights are not for the whole.
    pub(super) part: Option<Digest>,
    /// By which credentials; `None` for nobody's, and for the node's own.
    pub(super) who: Option<Digest>,
    /// The policy has to know what the origin calls the model, so that a revision that never moves is not all
    /// there is to find out.
    pub(super) by_name: bool,
}

impl Question {
    /// The same question about one revision.
    pub(super) fn at(&self, revision: &Revision) -> Self {
        Self {
            model: self.model.at(revision),
            ..self.clone()
        }
    }

    fn name(&self) -> (ModelRef, Option<Digest>) {
        (self.model.clone(), self.who)
    }

    /// Whether the same one asks for the same model, at whichever revision.
    fn is_about(&self, model: &ModelRef, who: Option<Digest>) -> bool {
        let same = self.model.scheme() == model.scheme() && self.model.name() == model.name();
        same && self.who == who
    }
}

/// Values of the last while.
struct Recent<K, V> {
    entries: HashMap<K, (V, Instant)>,
    keep: Duration,
}

impl<K: Clone + Eq + Hash, V: Clone> Recent<K, V> {
    fn new(keep: Duration) -> Self {
        Self {
            entries: HashMap::new(),
            keep,
        }
    }

    fn get(&self, key: &K, within: Duration) -> Option<V> {
        let (value, at) = self.entries.get(key)?;
        (at.elapsed() < within).then(|| value.clone())
    }

    fn insert(&mut self, key: K, value: V) {
        // A daemon meets many tokens and revisions; what is too old to count needs no memory.
        let keep = self.keep;
        self.entries.retain(|_, (_, at)| at.elapsed() < keep);
        if self.entries.len() >= MOST
            && let Some(oldest) = self.entries.iter().min_by_key(|(_, (_, at))| *at)
        {
            let oldest = oldest.0.clone();
            self.entries.remove(&oldest);
        }
        self.entries.insert(key, (value, Instant::now()));
    }
}

/// The memory of one daemon. Nothing of it is ever on disk.
pub(super) struct Memory(Mutex<Kept>);

struct Kept {
    /// What a name stood for, for whom.
    names: Recent<(ModelRef, Option<Digest>), Resolved>,
    /// Who was let in, to a model at its revision.
    accepted: Recent<Question, ()>,
    /// Who was not.
    refused: Recent<Question, SourceError>,
}

impl Memory {
    /// `keep` is how long a yes may count at most.
    pub(super) fn new(keep: Duration) -> Self {
        Self(Mutex::new(Kept {
            names: Recent::new(keep.max(NAME)),
            accepted: Recent::new(keep),
            refused: Recent::new(REFUSAL),
        }))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the model stands for, without a question to its origin.
    pub(super) fn resolved(&self, question: &Question) -> Option<Resolved> {
        self.resolved_within(question, NAME)
    }

    /// What it stood for not longer ago than that.
    pub(super) fn resolved_within(
        &self,
        question: &Question,
        within: Duration,
    ) -> Option<Resolved> {
        let named = self.kept().names.get(&question.name(), within);
        named.or_else(|| {
            let pinned = question.model.pinned().filter(|_| !question.by_name);
            pinned.map(Resolved::from)
        })
    }

    /// Whether the origin let in whom `question` at a revision is about.
    pub(super) fn accepted(&self, question: &Question, within: Duration) -> bool {
        self.kept().accepted.get(question, within).is_some()
    }

    /// What the origin said to the same question a moment ago, if that was no.
    pub(super) fn refusal(&self, question: &Question) -> Option<SourceError> {
        self.kept().refused.get(question, REFUSAL)
    }

    pub(super) fn name(&self, question: &Question, resolved: &Resolved) {
        let mut kept = self.kept();
        kept.names.insert(question.name(), resolved.clone());
    }

    pub(super) fn accept(&self, question: Question) {
        self.kept().accepted.insert(question, ());
    }

    /// The origin says no: whatever it said before of this one and this model, it holds no longer.
    pub(super) fn refuse(&self, question: &Question, error: &SourceError) {
        let (model, who) = (&question.model, question.who);
        let mut kept = self.kept();
        let accepted = &mut kept.accepted.entries;
        accepted.retain(|accepted, _| !accepted.is_about(model, who));
        let name = |named: &ModelRef| (named.scheme(), named.name().to_owned());
        let gone = name(model);
        let names = &mut kept.names.entries;
        names.retain(|(named, asked), _| *asked != who || name(named) != gone);
        kept.refused.insert(question.clone(), error.clone());
    }

    /// The name stands for something else by now.
    pub(super) fn forget_name(&self, question: &Question) {
        self.kept().names.entries.remove(&question.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn question(model: &str, who: Option<&str>) -> Question {
        Question {
            model: model.parse().unwrap(),
            part: None,
            who: who.map(|who| Digest::of(who.as_bytes())),
            by_name: false,
        }
    }

    fn revision() -> Revision {
        Revision::new(&"a".repeat(40)).unwrap()
    }

    fn no() -> SourceError {
        SourceError::Denied {
            what: String::new(),
            detail: String::new(),
            hint: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_no_ends_every_yes_to_the_same_one_for_the_same_model() {
        let memory = Memory::new(HOUR);
        let asked = question("hf://org/model", Some("a"));
        let others = [
            question("hf://org/model", Some("b")),
            question("hf://org/other", Some("a")),
        ];
        for question in others.iter().chain([&asked]) {
            memory.name(question, &revision().into());
            memory.accept(question.at(&revision()));
        }

        memory.refuse(&question("hf://org/model@v2", Some("a")), &no());

        assert!(!memory.accepted(&asked.at(&revision()), HOUR));
        assert_eq!(memory.resolved(&asked), None);
        for other in &others {
            assert!(memory.accepted(&other.at(&revision()), HOUR), "{other:?}");
            assert!(memory.resolved(other).is_some(), "{other:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_no_holds_for_moments_only() {
        let memory = Memory::new(HOUR);
        let asked = question("hf://org/model", None);
        memory.refuse(&asked, &no());
        assert!(memory.refusal(&asked).is_some());
        tokio::time::advance(REFUSAL).await;
        assert!(memory.refusal(&asked).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_an_end_to_what_is_remembered() {
        let memory = Memory::new(HOUR);
        for number in 0..MOST + 10 {
            let who = number.to_string();
            memory.refuse(&question("hf://org/model", Some(&who)), &no());
            tokio::time::advance(Duration::from_micros(1)).await;
        }
        assert_eq!(memory.kept().refused.entries.len(), MOST);
        let last = question("hf://org/model", Some(&(MOST + 9).to_string()));
        assert!(memory.refusal(&last).is_some(), "the newest was dropped");
    }
}
