//! What the warm set holds in the store.

use std::collections::BTreeSet;
use std::sync::Arc;

use weightd_core::blocking;
use weightd_core::errors::Chain;
use weightd_core::model::SnapshotId;
use weightd_core::store::{FetchRecord, Holder, Snapshot, Store, StoreError};

use super::desired::{self, HOLDERS, OF_NODE, OF_OBJECTS, Target};

/// Which parts of the warm set are known: what is not known is not let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) node: bool,
    pub(super) objects: bool,
}

/// Lets go of what holders of the warm set hold that are not among `wanted`, as far as it is known what is wanted. Returns
/// the fetches of such holders that are on record.
pub(super) async fn release_stale(
    store: &Arc<Store>,
    wanted: BTreeSet<Holder>,
    known: Known,
) -> Vec<FetchRecord> {
    let store = Arc::clone(store);
    let released = blocking::run(move || {
        let stale = |holder: &Holder| is_stale(holder, &wanted, known);
        for (holder, id) in store.pins_of_operators(HOLDERS)? {
            if stale(&holder) {
                unpin(&store, &id, &holder)?;
                tracing::info!(snapshot = %id, %holder, "let go of a model that is no longer to be kept");
            }
        }
        let records = store.recorded_fetches()?;
        let of_stale = |record: &FetchRecord| record.pin.as_ref().is_some_and(stale);
        Ok::<_, StoreError>(records.into_iter().filter(of_stale).collect())
    });
    released.await.unwrap_or_else(|error| {
        tracing::warn!(error = %Chain(&error), "models that are no longer to be kept stay held");
        Vec::new()
    })
}

/// With a mark goes what it marks.
fn unpin(store: &Store, id: &SnapshotId, holder: &Holder) -> Result<(), StoreError> {
    if let Some(named) = desired::named(holder) {
        store.unpin(id, &named)?;
    }
    store.unpin(id, holder).map(drop)
}

fn is_stale(holder: &Holder, wanted: &BTreeSet<Holder>, known: Known) -> bool {
    let Some(name) = holder.as_str().strip_prefix("operator/") else {
        return false;
    };
    let is_known = match name {
        _ if name.starts_with(OF_NODE) => known.node,
        _ if name.starts_with(OF_OBJECTS) => known.objects,
        _ => name.starts_with(HOLDERS),
    };
    is_known && !wanted.contains(holder)
}

/// Lets go of what else is held for the target, since it is known what that is to be: `id`. That too if it is not to be
/// pinned, and `is_here`.
pub(super) async fn hold_only(store: &Arc<Store>, target: &Target, id: &SnapshotId, is_here: bool) {
    let Some(holder) = target.own_holder().cloned() else {
        return;
    };
    let (store, id, let_go) = (Arc::clone(store), id.clone(), is_here && !target.pin);
    let marks = is_here && target.mark.is_some();
    let released = blocking::run(move || {
        if marks {
            store.pin(&id, &holder)?;
        }
        let name = holder.as_str().trim_start_matches("operator/").to_owned();
        for (other, held) in store.pins_of_operators(&name)? {
            if other == holder && (held != id || let_go) {
                unpin(&store, &held, &holder)?;
            }
        }
        Ok::<_, StoreError>(())
    });
    if let Err(error) = released.await {
        tracing::warn!(error = %Chain(&error), "an earlier revision stays held");
    }
}

/// Whether `id` is still here; it is pinned again if it is to be.
pub(super) async fn is_here(store: &Arc<Store>, target: &Target, id: &SnapshotId) -> bool {
    let (store, id) = (Arc::clone(store), id.clone());
    let holder = target.request.pin.clone().filter(|_| target.pin);
    let mark = target.mark.clone();
    let looked = blocking::run(move || {
        for holder in holder.iter().chain(&mark) {
            match store.pin(&id, holder) {
                Err(StoreError::Missing(_)) => return Ok(false),
                outcome => outcome?,
            }
        }
        store.snapshot(&id).map(|found| found.is_some())
    });
    looked.await.unwrap_or_else(|error| {
        tracing::warn!(error = %Chain(&error), "a model of the warm set not looked at");
        true
    })
}

/// What an earlier fetch brought for the same target and holds, if its name can move.
pub(super) async fn earlier(store: &Arc<Store>, target: &Target) -> Option<Snapshot> {
    let (store, target) = (Arc::clone(store), target.clone());
    let found = blocking::run(move || {
        let request = &target.request;
        let found = store.find(&request.model, &request.patterns)?;
        let held = |found: &Snapshot| {
            let of_holder = |holder| found.pinned_by.contains(holder);
            found.manifest.patterns == request.patterns
                && (!target.pin || request.pin.as_ref().is_some_and(of_holder))
        };
        Ok::<_, StoreError>(found.filter(held))
    });
    found.await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_to_be_unwanted_is_stale() {
        let holder = |name: &str| Holder::operator(name).unwrap();
        let wanted = BTreeSet::from([holder("warm.node.a"), holder("warm.object.a")]);
        let known = |node, objects| Known { node, objects };

        for (name, known, expected) in [
            ("warm.node.a", known(true, true), false),
            ("warm.node.b", known(true, false), true),
            ("warm.node.b", known(false, false), false),
            ("warm.object.b", known(true, false), false),
            ("warm.object.b", known(true, true), true),
            ("warm.config.b", known(false, false), true),
            ("serving", known(true, true), false),
            ("warmed", known(true, true), false),
        ] {
            let stale = is_stale(&holder(name), &wanted, known);
            assert_eq!(stale, expected, "{name} {known:?}");
        }
    }
}
