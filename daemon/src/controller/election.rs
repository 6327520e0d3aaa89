//! One leader among the replicas, by a Lease: who holds it works, until it cannot renew it any more.
//!
//! Clocks are not compared: a lease has run out when its object has not changed for its whole duration, by the
//! clock of whoever looks. So has it for its holder, who counts from before the renewal that it last got through,
//! and stops its work before that.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use weightd_core::errors::Chain;
use weightd_kube::Cause;

/// The Lease's name.
pub(super) const LEASE: &str = "weightd-controller";

/// How an election goes.
///
/// Source of the defaults: client-go's leaderelection, as kube-controller-manager sets it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// How long a lease holds that is not renewed.
    pub lease: Duration,
    /// How long its holder tries to renew it before it lets go. The rest is for its work to end.
    pub renew: Duration,
    /// Between two tries.
    pub retry: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            renew: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// One candidate.
pub(super) struct Candidate {
    leases: Api<Lease>,
    identity: String,
    pace: Pace,
    /// The lease as it was last seen to change, and when that was.
    seen: Option<(Lease, Instant)>,
}

/// Why a term is over.
enum Ended {
    /// This process is to end.
    Asked,
    /// The lease is lost.
    Lease(String),
    /// There was nothing left to do.
    Work,
}

/// Whose the lease is.
#[derive(Debug, PartialEq, Eq)]
enum Held {
    ByUs,
    ByOther(String),
}

impl Candidate {
    /// `pod` names the candidate; no two processes are the same, though their pods may be.
    pub(super) fn new(client: Client, namespace: &str, pod: &str, pace: Pace) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            identity: format!("{pod}_{}", uuid::Uuid::new_v4()),
            pace,
            seen: None,
        }
    }

    /// Waits to be elected, works, and waits again, until `stop`. `work` gets a token that says when to end; it is
    /// dropped if it has not ended when the lease runs out.
    pub(super) async fn run<F: Future<Output = ()>>(
        mut self,
        stop: CancellationToken,
        mut leads: impl FnMut(bool),
        mut work: impl FnMut(CancellationToken) -> F,
    ) {
        while let Some(since) = stop.run_until_cancelled(self.elected()).await {
            tracing::info!(identity = self.identity, "elected to lead");
            leads(true);
            let term = stop.child_token();
            let mut working = std::pin::pin!(work(term.clone()));
            let ended = tokio::select! {
                () = &mut working => Ended::Work,
                why = self.keep(since) => Ended::Lease(why),
                () = stop.cancelled() => Ended::Asked,
            };
            term.cancel();
            // What is left of the lease after the last try to renew it.
            let margin = (self.pace.lease - self.pace.renew).mul_f64(0.8);
            if !matches!(ended, Ended::Work) && timeout(margin, working).await.is_err() {
                tracing::warn!("the leader's work did not end in time and was broken off");
            }
            leads(false);
            match ended {
                Ended::Lease(why) => tracing::warn!(why, "leads no more"),
                Ended::Asked | Ended::Work => self.release().await,
            }
        }
    }

    /// Returns when the lease is ours, and since when at least.
    async fn elected(&mut self) -> Instant {
        let mut told = None;
        loop {
            let began = Instant::now();
            let news = match timeout(self.pace.renew, self.acquire()).await {
                Ok(Ok(Held::ByUs)) => return began,
                Ok(Ok(Held::ByOther(holder))) => format!("`{holder}` leads"),
                Ok(Err(error)) => Cause::from(error).to_string(),
                Err(_) => "the API server does not answer".to_owned(),
            };
            if told.as_ref() != Some(&news) {
                tracing::info!(why = news, "not elected to lead");
                told = Some(news);
            }
            // Source of the spread: JitterFactor of client-go's leaderelection.
            sleep(self.pace.retry.mul_f64(1.0 + 1.2 * fastrand::f64())).await;
        }
    }

    /// Renews the lease for as long as that goes; returns why it does not any more.
    async fn keep(&mut self, mut since: Instant) -> String {
        let mut why = String::new();
        loop {
            let end = since + self.pace.renew;
            sleep_until(end.min(Instant::now() + self.pace.retry)).await;
            let began = Instant::now();
            match timeout_at(end, self.acquire()).await {
                Ok(Ok(Held::ByUs)) => since = began,
                Ok(Ok(Held::ByOther(holder))) => return format!("`{holder}` leads"),
                Ok(Err(error)) => why = Cause::from(error).to_string(),
                Err(_) if why.is_empty() => "the API server does not answer".clone_into(&mut why),
                Err(_) => {}
            }
            if Instant::now() >= end {
                return format!("the lease could not be renewed: {why}");
            }
        }
    }

    /// Takes the lease, or renews it, if nobody else holds it.
    async fn acquire(&mut self) -> Result<Held, kube::Error> {
        // As long as nobody else changes it, a renewal needs no look before.
        if let Some((lease, _)) = &self.seen
            && self.holds(lease)
        {
            match self.replace(lease.clone()).await {
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
                outcome => return outcome,
            }
        }
        let Some(lease) = self.leases.get_opt(LEASE).await? else {
            let lease = self.fresh();
            let made = self.leases.create(&PostParams::default(), &lease).await?;
            self.seen = Some((made, Instant::now()));
            return Ok(Held::ByUs);
        };
        let same = |seen: &Lease| seen.metadata.resource_version == lease.metadata.resource_version;
        let at = match &self.seen {
            Some((seen, at)) if same(seen) => *at,
            _ => Instant::now(),
        };
        self.seen = Some((lease.clone(), at));
        let spec = lease.spec.as_ref();
        let holder = spec.and_then(|spec| spec.holder_identity.as_deref());
        let seconds = spec.and_then(|spec| spec.lease_duration_seconds);
        let lasts = Duration::from_secs(u64::try_from(seconds.unwrap_or(0)).unwrap_or(0));
        match holder {
            Some(holder) if !holder.is_empty() && !self.holds(&lease) && at.elapsed() < lasts => {
                Ok(Held::ByOther(holder.to_owned()))
            }
            _ => self.replace(lease).await,
        }
    }

    fn holds(&self, lease: &Lease) -> bool {
        let spec = lease.spec.as_ref();
        spec.and_then(|spec| spec.holder_identity.as_ref()) == Some(&self.identity)
    }

    fn fresh(&self) -> Lease {
        let now = MicroTime(Timestamp::now());
        Lease {
            metadata: ObjectMeta {
                name: Some(LEASE.to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(self.pace.lease.as_secs()).ok(),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_transitions: Some(0),
                ..LeaseSpec::default()
            }),
        }
    }

    /// Writes the lease as ours. Its version goes along: if anybody else wrote meanwhile, the server refuses.
    async fn replace(&mut self, lease: Lease) -> Result<Held, kube::Error> {
        let mut next = self.fresh();
        let spec = next.spec.get_or_insert_default();
        let was = lease.spec.clone().unwrap_or_default();
        if self.holds(&lease) {
            spec.acquire_time = was.acquire_time;
            spec.lease_transitions = was.lease_transitions;
        } else {
            spec.lease_transitions = Some(was.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        next.metadata = lease.metadata;
        next.metadata.managed_fields = None;
        let sent = PostParams::default();
        let written = self.leases.replace(LEASE, &sent, &next).await?;
        self.seen = Some((written, Instant::now()));
        Ok(Held::ByUs)
    }

    /// Lets the next one lead at once.
    async fn release(&mut self) {
        let Some((mut lease, _)) = self.seen.take().filter(|(lease, _)| self.holds(lease)) else {
            return;
        };
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        lease.metadata.managed_fields = None;
        let sent = PostParams::default();
        let released = timeout(self.pace.retry, self.leases.replace(LEASE, &sent, &lease)).await;
        match released {
            Ok(Ok(_)) => tracing::info!("lease released"),
            Ok(Err(error)) => {
                let error = Cause::from(error);
                tracing::warn!(error = %Chain(&error), "lease not released: the next leader waits for its end");
            }
            Err(_) => tracing::warn!("lease not released: the API server does not answer"),
        }
    }
}

#[cfg(test)]
mod tests;
