//! Everything that is counted, in one place. Names follow the Prometheus conventions.

use std::sync::Mutex;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::fetch::Progress;
use crate::model::Scheme;
use crate::shared::choice::Reach;
use crate::store::Usage;

/// One metric, as the README describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Description {
    /// Its name as it is scraped.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// The labels, each with all its values.
    pub labels: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

macro_rules! describe {
    ($($name:literal $kind:literal $labels:literal $meaning:literal;)*) => {
        /// Every metric, in the order of the README's table.
        pub const DESCRIPTIONS: &[Description] = &[$(Description {
            name: $name, kind: $kind, labels: $labels, meaning: $meaning,
        }),*];
    };
}

describe! {
    "weightd_fetch_bytes_total" "counter" "source: hf, s3, file" "Bytes received from origins";
    "weightd_reused_bytes_total" "counter" "source: hf, s3, file" "Bytes that a fetch found in the store";
    "weightd_fetch_seconds" "histogram" "source: hf, s3, file; outcome: ok, failed, stopped" "Time from request to published snapshot";
    "weightd_fetch_failures_total" "counter" "source: hf, s3, file; reason: not_found, denied, changed, unavailable, invalid, wrong_bytes, no_space, store, defect" "Fetches that failed; what may pass is tried again and counted again";
    "weightd_fetches_active" "gauge" "" "Fetches under way";
    "weightd_fetches_waiting" "gauge" "why: room, rate_limit, origin, silence, neighbour, others, turn" "Fetches under way to which no byte comes: for want of room, by the origin's rate limit, because it is away or sends nothing, or because another node, another fetch of this node or all other fetches of this node go first";
    "weightd_fetch_connections" "gauge" "" "Ranged reads under way";
    "weightd_fetch_retries_total" "counter" "source: hf, s3, file; reason: unavailable, cut, stalled, slow" "Ranged reads that were begun again";
    "weightd_digest_mismatches_total" "counter" "source: hf, s3, file" "Files whose bytes were not what the origin claims";
    "weightd_acquires_total" "counter" "outcome: ok, denied, failed" "Volumes that pods asked for";
    "weightd_acquires_active" "gauge" "" "Volumes that kubelet waits for, also in the pauses between its calls";
    "weightd_volumes_total" "counter" "found: here, waited" "Volumes that pods were given: at once, or after somebody waited for a fetch";
    "weightd_volume_bytes_total" "counter" "found: here, waited" "Bytes of the models in them, as far as they were complete; less what was fetched, that is what pods did not download";
    "weightd_store_bytes" "gauge" "tier: local; held: pinned, unpinned, partial" "Bytes in the store";
    "weightd_store_free_bytes" "gauge" "tier: local" "Bytes free on the store's file system";
    "weightd_store_capacity_bytes" "gauge" "tier: local" "Bytes of the store's file system that weightd's user may have";
    "weightd_store_high_watermark_bytes" "gauge" "tier: local" "Snapshots are evicted when more than this is used of the file system, by whomever";
    "weightd_store_snapshots" "gauge" "tier: local" "Published snapshots";
    "weightd_evicted_bytes_total" "counter" "tier: local" "Bytes evicted to make room";
    "weightd_evicted_snapshots_total" "counter" "tier: local" "Snapshots evicted to make room";
    "weightd_verified_bytes_total" "counter" "tier: local" "Bytes hashed again by scrub and verify";
    "weightd_damaged_blobs_total" "counter" "tier: local" "Blobs found damaged and set aside";
    "weightd_page_cache_read_bytes_total" "counter" "" "Bytes that warming read from the disk into the page cache";
    "weightd_page_cache_warmings_total" "counter" "outcome: warm, partly, failed, stopped" "Models that were to be read into the page cache; partly: the ceiling was reached, memory is short, or the model was removed";
    "weightd_page_cache_bytes" "gauge" "" "Bytes of warmed models that were in the page cache when the last warming ended";
    "weightd_page_cache_ceiling_bytes" "gauge" "" "Bytes of models that warming may have there, when it last looked";
    "weightd_warm_models" "gauge" "phase: pending, fetching, ready, failed, waiting" "Models that this node is to keep";
    "weightd_node_tainted" "gauge" "taint: startup, warming" "Whether this node has a taint that weightd is to remove: 1 if so";
    "weightd_kube_failures_total" "counter" "call: watch_node, watch_prefetches, watch_csinode, taint, labels, status, event" "Requests to the API server that failed";
    "weightd_shared_configured" "gauge" "" "Whether the settings name a shared tier: 1 if so";
    "weightd_shared_up" "gauge" "" "The shared tier: 2 in use, 1 only read, 0 left out or none";
    "weightd_shared_copied_bytes_total" "counter" "" "Bytes copied from the shared tier";
    "weightd_shared_written_bytes_total" "counter" "" "Bytes written to the shared tier";
    "weightd_shared_failures_total" "counter" "reason: away, unwritable, damaged, write" "Times that the shared tier was left out, could not be written, held damaged bytes, did not take a segment";
    "weightd_leader" "gauge" "" "Of `weightd controller`: 1 while it is the one that does what only one may do";
    "weightd_certificate_end_seconds" "gauge" "" "Of `weightd controller`: when the certificate that the webhook serves ends, in seconds since 1970; 0 if there is none";
    "weightd_admission_total" "counter" "outcome: injected, unchanged, warned, invalid" "Of `weightd controller`: pods that the webhook was asked about; warned are those whose author is told of a mistake";
    "weightd_pending_fills_total" "counter" "outcome: filled, there, unshareable, denied, failed, stopped" "Of `weightd controller`: models that pods without a node wait for";
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FromSource {
    source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    source: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Retried {
    source: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfFound {
    found: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTier {
    tier: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HeldInTier {
    tier: &'static str,
    held: &'static str,
}

/// Why fetches fail.
const FAILURES: [&str; 9] = [
    "not_found",
    "denied",
    "changed",
    "unavailable",
    "invalid",
    "wrong_bytes",
    "no_space",
    "store",
    "defect",
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWhy {
    why: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPhase {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTaint {
    taint: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCall {
    call: &'static str,
}

const LOCAL: OfTier = OfTier { tier: "local" };

/// The counters of one process.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    fetch_bytes: Family<FromSource, Counter>,
    reused_bytes: Family<FromSource, Counter>,
    fetch_seconds: Family<Ended, Histogram>,
    failures: Family<Retried, Counter>,
    pub(crate) fetches_active: Gauge,
    fetches_waiting: Family<OfWhy, Gauge>,
    pub(crate) connections: Gauge,
    retries: Family<Retried, Counter>,
    mismatches: Family<FromSource, Counter>,
    acquires: Family<OfOutcome, Counter>,
    acquires_active: Gauge,
    volumes: Family<OfFound, Counter>,
    volume_bytes: Family<OfFound, Counter>,
    store_bytes: Family<HeldInTier, Gauge>,
    store_free: Family<OfTier, Gauge>,
    store_capacity: Family<OfTier, Gauge>,
    store_high: Family<OfTier, Gauge>,
    store_snapshots: Family<OfTier, Gauge>,
    evicted_bytes: Family<OfTier, Counter>,
    evicted_snapshots: Family<OfTier, Counter>,
    verified_bytes: Family<OfTier, Counter>,
    damaged_blobs: Family<OfTier, Counter>,
    page_cache_read: Counter,
    warmings: Family<OfOutcome, Counter>,
    page_cache_bytes: Gauge,
    page_cache_ceiling: Gauge,
    warm_models: Family<OfPhase, Gauge>,
    node_tainted: Family<OfTaint, Gauge>,
    kube_failures: Family<OfCall, Counter>,
    shared_configured: Gauge,
    shared_up: Gauge,
    shared_copied: Counter,
    shared_written: Counter,
    shared_failures: Family<OfReason, Counter>,
    leader: Gauge,
    certificate_end: Gauge,
    admissions: Family<OfOutcome, Counter>,
    pending_fills: Family<OfOutcome, Counter>,
}

/// From a cached model, which takes milliseconds, to a cold one over a slow link: 10 ms to 2.9 h.
fn seconds_buckets() -> Histogram {
    Histogram::new((0..20).map(|power| 0.01 * f64::from(1 << power)))
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::default()),
            fetch_bytes: Family::default(),
            reused_bytes: Family::default(),
            fetch_seconds: Family::new_with_constructor(seconds_buckets),
            failures: Family::default(),
            fetches_active: Gauge::default(),
            fetches_waiting: Family::default(),
            connections: Gauge::default(),
            retries: Family::default(),
            mismatches: Family::default(),
            acquires: Family::default(),
            acquires_active: Gauge::default(),
            volumes: Family::default(),
            volume_bytes: Family::default(),
            store_bytes: Family::default(),
            store_free: Family::default(),
            store_capacity: Family::default(),
            store_high: Family::default(),
            store_snapshots: Family::default(),
            evicted_bytes: Family::default(),
            evicted_snapshots: Family::default(),
            verified_bytes: Family::default(),
            damaged_blobs: Family::default(),
            page_cache_read: Counter::default(),
            warmings: Family::default(),
            page_cache_bytes: Gauge::default(),
            page_cache_ceiling: Gauge::default(),
            warm_models: Family::default(),
            node_tainted: Family::default(),
            kube_failures: Family::default(),
            shared_configured: Gauge::default(),
            shared_up: Gauge::default(),
            shared_copied: Counter::default(),
            shared_written: Counter::default(),
            shared_failures: Family::default(),
            leader: Gauge::default(),
            certificate_end: Gauge::default(),
            admissions: Family::default(),
            pending_fills: Family::default(),
        };
        metrics.register();
        metrics.start_at_zero();
        metrics
    }
}

fn add(registry: &mut Registry, name: &str, metric: impl prometheus_client::registry::Metric) {
    let description = DESCRIPTIONS
        .iter()
        .find(|description| description.name == name);
    let meaning = description
        .expect("DESCRIPTIONS holds every metric")
        .meaning;
    // The encoder adds the ending of counters itself.
    registry.register(name.trim_end_matches("_total"), meaning, metric);
}

/// As a gauge has it.
fn number(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

impl Metrics {
    fn register(&self) {
        let mut registry = self.registry.lock().expect("no holder of this lock panics");
        macro_rules! add {
            ($($name:literal $field:ident;)*) => {$( add(&mut registry, $name, self.$field.clone()); )*};
        }
        add! {
            "weightd_fetch_bytes_total" fetch_bytes;
            "weightd_reused_bytes_total" reused_bytes;
            "weightd_fetch_seconds" fetch_seconds;
            "weightd_fetch_failures_total" failures;
            "weightd_fetches_active" fetches_active;
            "weightd_fetches_waiting" fetches_waiting;
            "weightd_fetch_connections" connections;
            "weightd_fetch_retries_total" retries;
            "weightd_digest_mismatches_total" mismatches;
            "weightd_acquires_total" acquires;
            "weightd_acquires_active" acquires_active;
            "weightd_volumes_total" volumes;
            "weightd_volume_bytes_total" volume_bytes;
            "weightd_store_bytes" store_bytes;
            "weightd_store_free_bytes" store_free;
            "weightd_store_capacity_bytes" store_capacity;
            "weightd_store_high_watermark_bytes" store_high;
            "weightd_store_snapshots" store_snapshots;
            "weightd_evicted_bytes_total" evicted_bytes;
            "weightd_evicted_snapshots_total" evicted_snapshots;
            "weightd_verified_bytes_total" verified_bytes;
            "weightd_damaged_blobs_total" damaged_blobs;
            "weightd_page_cache_read_bytes_total" page_cache_read;
            "weightd_page_cache_warmings_total" warmings;
            "weightd_page_cache_bytes" page_cache_bytes;
            "weightd_page_cache_ceiling_bytes" page_cache_ceiling;
            "weightd_warm_models" warm_models;
            "weightd_node_tainted" node_tainted;
            "weightd_kube_failures_total" kube_failures;
            "weightd_shared_configured" shared_configured;
            "weightd_shared_up" shared_up;
            "weightd_shared_copied_bytes_total" shared_copied;
            "weightd_shared_written_bytes_total" shared_written;
            "weightd_shared_failures_total" shared_failures;
            "weightd_leader" leader;
            "weightd_certificate_end_seconds" certificate_end;
            "weightd_admission_total" admissions;
            "weightd_pending_fills_total" pending_fills;
        }
    }

    /// A counter that is there from the start lets a rate see its first step.
    fn start_at_zero(&self) {
        self.start_sources_at_zero();
        self.start_cluster_at_zero();
        for outcome in ["ok", "denied", "failed"] {
            let _ = self.acquires.get_or_create(&OfOutcome { outcome });
        }
        for outcome in ["warm", "partly", "failed", "stopped"] {
            let _ = self.warmings.get_or_create(&OfOutcome { outcome });
        }
        for found in ["here", "waited"] {
            let _ = self.volumes.get_or_create(&OfFound { found });
            let _ = self.volume_bytes.get_or_create(&OfFound { found });
        }
        for reason in ["away", "unwritable", "damaged", "write"] {
            let _ = self.shared_failures.get_or_create(&OfReason { reason });
        }
        self.observe_fetches(&[]);
        self.evicted(0, 0);
        self.verified(0, 0);
    }

    fn start_sources_at_zero(&self) {
        for source in [Scheme::Hf, Scheme::S3, Scheme::File] {
            self.fetched(source, 0);
            self.reused(source, 0);
            let _ = self.mismatches.get_or_create(&FromSource {
                source: source.as_str(),
            });
            for reason in ["unavailable", "cut", "stalled", "slow"] {
                let _ = self.retries.get_or_create(&Retried {
                    source: source.as_str(),
                    reason,
                });
            }
            for reason in FAILURES {
                let _ = self.failures.get_or_create(&Retried {
                    source: source.as_str(),
                    reason,
                });
            }
            for outcome in ["ok", "failed", "stopped"] {
                let _ = self.fetch_seconds.get_or_create(&Ended {
                    source: source.as_str(),
                    outcome,
                });
            }
        }
    }

    fn start_cluster_at_zero(&self) {
        for call in [
            "watch_node",
            "watch_prefetches",
            "watch_csinode",
            "taint",
            "labels",
            "status",
            "event",
        ] {
            let _ = self.kube_failures.get_or_create(&OfCall { call });
        }
        for phase in ["pending", "fetching", "ready", "failed", "waiting"] {
            self.warm_models(phase, 0);
        }
        for taint in ["startup", "warming"] {
            self.tainted(taint, false);
        }
        for outcome in ["injected", "unchanged", "warned", "invalid"] {
            let _ = self.admissions.get_or_create(&OfOutcome { outcome });
        }
        for outcome in [
            "filled",
            "there",
            "unshareable",
            "denied",
            "failed",
            "stopped",
        ] {
            let _ = self.pending_fills.get_or_create(&OfOutcome { outcome });
        }
    }

    pub(crate) fn shared_copied(&self, bytes: u64) {
        self.shared_copied.inc_by(bytes);
    }

    pub(crate) fn shared_written(&self, bytes: u64) {
        self.shared_written.inc_by(bytes);
    }

    pub(crate) fn shared_failed(&self, reason: &'static str) {
        let reason = OfReason { reason };
        self.shared_failures.get_or_create(&reason).inc();
    }

    /// The settings name a shared tier.
    pub(crate) fn shared_is_configured(&self) {
        self.shared_configured.set(1);
    }

    pub(crate) fn shared_reach(&self, reach: Reach) {
        self.shared_up.set(match reach {
            Reach::Away => 0,
            Reach::ReadOnly => 1,
            Reach::Full => 2,
        });
    }

    pub(crate) fn page_cache_read(&self, bytes: u64) {
        self.page_cache_read.inc_by(bytes);
    }

    pub(crate) fn page_cache_holds(&self, bytes: u64) {
        self.page_cache_bytes.set(number(bytes));
    }

    pub(crate) fn page_cache_ceiling(&self, bytes: u64) {
        self.page_cache_ceiling.set(number(bytes));
    }

    pub(crate) fn warmed(&self, outcome: &'static str) {
        self.warmings.get_or_create(&OfOutcome { outcome }).inc();
    }

    /// Shows whether this controller leads.
    pub fn leads(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// Shows when the webhook's certificate ends, in seconds since 1970.
    pub fn certificate_ends(&self, seconds: i64) {
        self.certificate_end.set(seconds);
    }

    /// Counts a pod that the webhook was asked about: `injected`, `unchanged`, `warned` or `invalid`.
    pub fn admitted(&self, outcome: &'static str) {
        self.admissions.get_or_create(&OfOutcome { outcome }).inc();
    }

    /// Counts a model that pods without a node wait for: `filled`, `there`,
    /// `unshareable`, `denied`, `failed` or `stopped`.
    pub fn pending_fill(&self, outcome: &'static str) {
        let outcome = OfOutcome { outcome };
        self.pending_fills.get_or_create(&outcome).inc();
    }

    /// Counts a volume that a pod asked for: `ok`, `denied` or `failed`.
    pub fn acquired(&self, outcome: &'static str) {
        self.acquires.get_or_create(&OfOutcome { outcome }).inc();
    }

    /// Shows how many volumes kubelet waits for.
    pub fn observe_waiting(&self, volumes: usize) {
        self.acquires_active.set(number(volumes));
    }

    /// Shows what the fetches under way wait for.
    pub fn observe_fetches(&self, fetches: &[Progress]) {
        for why in Progress::REASONS {
            let waiting = fetches.iter().filter(|now| now.waits_for() == Some(why));
            let gauge = self.fetches_waiting.get_or_create(&OfWhy { why });
            gauge.set(number(waiting.count()));
        }
    }

    /// Counts a volume that a pod was given, and its bytes if it is complete.
    pub fn volume(&self, waited: bool, bytes: Option<u64>) {
        let found = OfFound {
            found: if waited { "waited" } else { "here" },
        };
        self.volumes.get_or_create(&found).inc();
        let bytes = bytes.unwrap_or_default();
        self.volume_bytes.get_or_create(&found).inc_by(bytes);
    }

    /// Shows how many models of the warm set are in one phase.
    pub fn warm_models(&self, phase: &'static str, models: usize) {
        let gauge = self.warm_models.get_or_create(&OfPhase { phase });
        gauge.set(number(models));
    }

    /// Shows whether this node has one of our taints: `startup` or `warming`.
    pub fn tainted(&self, taint: &'static str, is_there: bool) {
        let gauge = self.node_tainted.get_or_create(&OfTaint { taint });
        gauge.set(i64::from(is_there));
    }

    /// Counts a request to the API server that failed; `call` is one of those that the metric's description lists.
    pub fn kube_failed(&self, call: &'static str) {
        self.kube_failures.get_or_create(&OfCall { call }).inc();
    }

    /// All metrics in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().expect("no holder of this lock panics");
        prometheus_client::encoding::text::encode(&mut text, &registry)
            .expect("a String takes all");
        text
    }

    pub(crate) fn fetched(&self, source: Scheme, bytes: u64) {
        self.fetch_bytes
            .get_or_create(&FromSource {
                source: source.as_str(),
            })
            .inc_by(bytes);
    }

    pub(crate) fn reused(&self, source: Scheme, bytes: u64) {
        self.reused_bytes
            .get_or_create(&FromSource {
                source: source.as_str(),
            })
            .inc_by(bytes);
    }

    pub(crate) fn fetch_ended(&self, source: Scheme, outcome: &'static str, took: Duration) {
        let labels = Ended {
            source: source.as_str(),
            outcome,
        };
        self.fetch_seconds
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }

    pub(crate) fn fetch_failed(&self, source: Scheme, reason: &'static str) {
        debug_assert!(FAILURES.contains(&reason), "{reason} is not described");
        let source = source.as_str();
        self.failures
            .get_or_create(&Retried { source, reason })
            .inc();
    }

    pub(crate) fn retried(&self, source: Scheme, reason: &'static str) {
        self.retries
            .get_or_create(&Retried {
                source: source.as_str(),
                reason,
            })
            .inc();
    }

    pub(crate) fn mismatched(&self, source: Scheme) {
        self.mismatches
            .get_or_create(&FromSource {
                source: source.as_str(),
            })
            .inc();
    }

    pub(crate) fn evicted(&self, snapshots: u64, bytes: u64) {
        self.evicted_snapshots
            .get_or_create(&LOCAL)
            .inc_by(snapshots);
        self.evicted_bytes.get_or_create(&LOCAL).inc_by(bytes);
    }

    /// Counts a scrub or a verification.
    pub fn verified(&self, bytes: u64, damaged: u64) {
        self.verified_bytes.get_or_create(&LOCAL).inc_by(bytes);
        self.damaged_blobs.get_or_create(&LOCAL).inc_by(damaged);
    }

    /// Shows what the local store holds.
    pub fn observe_store(&self, usage: &Usage) {
        let set = |held, bytes: u64| {
            let gauge = self.store_bytes.get_or_create(&HeldInTier {
                tier: "local",
                held,
            });
            gauge.set(number(bytes));
        };
        set("pinned", usage.pinned);
        set("unpinned", usage.store.saturating_sub(usage.pinned));
        set("partial", usage.partial);
        self.store_free
            .get_or_create(&LOCAL)
            .set(number(usage.free));
        self.store_capacity
            .get_or_create(&LOCAL)
            .set(number(usage.capacity));
        self.store_high
            .get_or_create(&LOCAL)
            .set(number(usage.high));
        self.store_snapshots
            .get_or_create(&LOCAL)
            .set(number(usage.snapshots));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::{Phase, Wait};

    #[test]
    fn every_described_metric_is_scraped() {
        let metrics = Metrics::default();
        metrics.fetched(Scheme::Hf, 5);
        metrics.observe_store(&Usage {
            capacity: 9,
            free: 4,
            store: 3,
            pinned: 1,
            partial: 1,
            high: 8,
            low: 7,
            snapshots: 1,
            max: None,
        });
        let text = metrics.encode();
        for description in DESCRIPTIONS {
            let name = description.name.trim_end_matches("_total");
            assert!(
                text.contains(&format!("# TYPE {name} {}", description.kind)),
                "{name} in {text}"
            );
        }
        assert!(
            text.contains("weightd_fetch_bytes_total{source=\"hf\"} 5"),
            "{text}"
        );
    }
    #[test]
    fn what_fetches_wait_for_is_counted_by_its_reason_and_no_longer_than_it_lasts() {
        let metrics = Metrics::default();
        let mut turn = Progress::of("hf://org/model".parse().unwrap());
        turn.wait = Some(Wait::Turn);
        let mut room = Progress::of("hf://org/large".parse().unwrap());
        room.phase = Phase::WaitingForRoom;

        metrics.observe_fetches(&[turn.clone(), room, turn]);

        let has = |line: &str| metrics.encode().contains(&format!("{line}\n"));
        assert!(has("weightd_fetches_waiting{why=\"turn\"} 2"));
        assert!(has("weightd_fetches_waiting{why=\"room\"} 1"));
        assert!(has("weightd_fetches_waiting{why=\"origin\"} 0"));
        metrics.observe_fetches(&[]);
        assert!(has("weightd_fetches_waiting{why=\"turn\"} 0"));
    }
}
