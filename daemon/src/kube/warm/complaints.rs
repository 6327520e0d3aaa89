//! What of the Node's annotation and the configuration cannot be had, told in Events of the Node: there, unlike in an object,
//! is no status to look at.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::desired::Origin;
use super::entry::Entry;
use crate::kube::prefetch::NodePhase;

/// The reason of an Event that tells of what makes no sense.
const INVALID: &str = "PrefetchInvalid";

/// The same, of what makes sense, but cannot be had unless somebody does something.
const FAILED: &str = "PrefetchFailed";

/// How often the same is told again: the API server keeps an Event for an hour.
///
/// Source: kube-apiserver, `--event-ttl`.
const AGAIN: Duration = Duration::from_secs(3600);

/// The least time between two Events of one reason, if there is other news.
const REST: Duration = Duration::from_secs(60);

/// Bytes of an Event's note.
///
/// Source: the API server takes at most 1,024.
const NOTE_MAX: usize = 1000;

/// Bytes of one complaint in a note of several, so that one cannot hide the others.
const ONE_MAX: usize = 300;

/// What was told, and when.
#[derive(Default)]
pub(super) struct Complaints(BTreeMap<&'static str, (String, Instant)>);

impl Complaints {
    /// What is to be told now: reasons and notes.
    pub(super) fn due(
        &mut self,
        entries: &BTreeMap<Origin, Entry>,
        now: Instant,
    ) -> Vec<(&'static str, String)> {
        let mut due = Vec::new();
        for reason in [INVALID, FAILED] {
            let Some(note) = note(entries, reason) else {
                continue;
            };
            let is_due = self.0.get(reason).is_none_or(|(told, at)| {
                let rest = if *told == note { AGAIN } else { REST };
                now.duration_since(*at) >= rest
            });
            if is_due {
                self.0.insert(reason, (note.clone(), now));
                due.push((reason, note));
            }
        }
        due
    }
}

/// All that `reason` is said of, in one note; `None` if that is nothing.
fn note(entries: &BTreeMap<Origin, Entry>, reason: &str) -> Option<String> {
    let of_node = |origin: &Origin| !matches!(origin, Origin::Object(_));
    let failed = entries
        .iter()
        .filter(|(origin, entry)| of_node(origin) && entry.phase == NodePhase::Failed);
    let messages: Vec<&str> = failed
        .filter(|(_, entry)| entry.wish.is_err() == (reason == INVALID))
        .map(|(_, entry)| entry.message.as_str())
        .collect();
    match messages[..] {
        [] => None,
        [one] => Some(cut(one, NOTE_MAX)),
        _ => {
            let all: Vec<String> = messages.iter().map(|one| cut(one, ONE_MAX)).collect();
            let note = format!("{} models: {}", all.len(), all.join("; "));
            Some(cut(&note, NOTE_MAX))
        }
    }
}

fn cut(text: &str, bytes: usize) -> String {
    match text.len() > bytes {
        true => format!("{}…", &text[..text.floor_char_boundary(bytes)]),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(texts: &[&str]) -> BTreeMap<Origin, Entry> {
        let entry = |text: &&str| {
            let wish = Err(format!("`{text}` is no model"));
            (Origin::Node((*text).to_owned()), Entry::new(wish))
        };
        texts.iter().map(entry).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn all_that_is_wrong_is_told_together_and_again_after_an_hour() {
        let (mut complaints, begun) = (Complaints::default(), Instant::now());
        let seconds = Duration::from_secs;

        assert_eq!(complaints.due(&wrong(&[]), begun), []);
        let told = complaints.due(&wrong(&["a", "b"]), begun);
        let note = "2 models: `a` is no model; `b` is no model".to_owned();
        assert_eq!(told, [(INVALID, note.clone())]);
        assert_eq!(
            complaints.due(&wrong(&["a", "b"]), begun + seconds(3599)),
            []
        );
        assert_eq!(
            complaints.due(&wrong(&["a", "b"]), begun + AGAIN),
            [(INVALID, note)]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn other_news_is_told_as_soon_as_it_may() {
        let (mut complaints, begun) = (Complaints::default(), Instant::now());
        complaints.due(&wrong(&["a"]), begun);

        assert_eq!(complaints.due(&wrong(&["b"]), begun + REST / 2), []);
        let told = complaints.due(&wrong(&["b"]), begun + REST);

        assert_eq!(told, [(INVALID, "`b` is no model".to_owned())]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_note_fits_into_an_event_and_a_long_one_hides_no_other() {
        let long = format!("a{}", "ä".repeat(3000));

        let told = Complaints::default().due(&wrong(&["zzz", &long]), Instant::now());
        let alone = Complaints::default().due(&wrong(&[&long]), Instant::now());

        assert!(told[0].1.contains("`zzz` is no model"), "{told:?}");
        assert!(told[0].1.len() <= 1024 && alone[0].1.len() <= 1024);
    }

    #[test]
    fn what_objects_ask_for_is_told_in_their_status() {
        let entry = Entry::new(Err("no model".to_owned()));
        let entries = BTreeMap::from([(Origin::Object("it".to_owned()), entry)]);

        assert_eq!(Complaints::default().due(&entries, Instant::now()), []);
    }
}
