//! Telling one client how far its prefetch is.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::Status;
use weightd_core::fetch::{Fetch, Fetched};
use weightd_core::warm::{Warmer, Warming};
use weightd_proto::weightd::v1 as wire;
use weightd_proto::weightd::v1::prefetch_event::Event;

use super::convert;
use super::status::of_fetch;

/// Where the client hears of it.
type Events = mpsc::Sender<Result<wire::PrefetchEvent, Status>>;

/// Reports a fetch, and then how it is read into the page cache if there is a `warmer` for that. The client may leave:
/// both go on without it.
pub(super) async fn follow(fetch: Fetch, warmer: Option<Arc<Warmer>>, events: Events) {
    let fetched = match fetched(fetch, &events).await {
        Ok(fetched) => fetched,
        Err(status) => return tell(&events, Err(status)).await,
    };
    let mut done = convert::fetched(&fetched);
    if let Some(warmer) = warmer {
        let warming = warmed(&warmer, &fetched, &events).await;
        done.warming = warming.as_ref().map(convert::warming);
    }
    tell(&events, Ok(Event::Done(done))).await;
}

async fn fetched(fetch: Fetch, events: &Events) -> Result<Fetched, Status> {
    let mut changes = fetch.progress();
    let mut outcome = std::pin::pin!(fetch.wait());
    loop {
        tokio::select! {
            biased;
            outcome = &mut outcome => return outcome.map_err(|error| of_fetch(&error)),
            Ok(()) = changes.changed() => {
                let progress = convert::progress(&changes.borrow_and_update());
                tell(events, Ok(Event::Progress(progress))).await;
            }
        }
    }
}

/// `None` if this process ends before it has begun.
async fn warmed(warmer: &Arc<Warmer>, fetched: &Fetched, events: &Events) -> Option<Warming> {
    let manifest = &fetched.snapshot.manifest;
    let mut told = warmer.warm(&manifest.model, &manifest.snapshot);
    loop {
        let now = told.borrow_and_update().clone();
        if now.state.is_end() {
            return Some(now);
        }
        tell(events, Ok(Event::Warming(convert::warming(&now)))).await;
        told.changed().await.ok()?;
    }
}

async fn tell(events: &Events, event: Result<Event, Status>) {
    let event = event.map(|event| wire::PrefetchEvent { event: Some(event) });
    // Nobody listens any more: then nobody needs it.
    let _ = events.send(event).await;
}
