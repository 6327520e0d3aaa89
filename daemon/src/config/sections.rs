//! The sections of the file, and their defaults.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use weightd_core::fetch::FetchLimits;
use weightd_core::warm::WarmLimits;

use super::{Bytes, Span};
use crate::access::Rule;
use crate::telemetry::LogFormat;

macro_rules! section {
    ($name:ident { $($field:ident: $type:ty = $default:expr,)* }) => {
        #[allow(missing_docs, reason = "SETTINGS says what each key means")]
        #[derive(Debug, Clone, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name { $(pub $field: $type,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

section!(StoreSection {
    high_watermark_percent: u8 = 80,
    low_watermark_percent: u8 = 70,
    max_bytes: Option<Bytes> = None,
    keep_partial: Span = Span::hours(7 * 24),
    selinux_label: Option<String> = None,
});
section!(FetchSection {
    connections: usize = FetchLimits::default().connections,
    memory: Bytes = Bytes(FetchLimits::default().memory_bytes),
    part: Bytes = Bytes(FetchLimits::default().part_bytes),
    files_in_flight: usize = FetchLimits::default().files_in_flight,
    attempts: u32 = FetchLimits::default().attempts,
    stall_timeout: Span = Span(FetchLimits::default().stall_timeout),
});
section!(WarmSection {
    bytes_per_second: Bytes = Bytes(WarmLimits::default().bytes_per_second),
    max_memory_percent: u8 = WarmLimits::default().max_memory_percent,
});
section!(HfSection { endpoint: Option<String> = None, token_file: Option<PathBuf> = None, });
section!(S3Section {
    endpoint: Option<String> = None,
    region: Option<String> = None,
    anonymous: bool = false,
    unsigned_buckets: Vec<String> = Vec::new(),
});
section!(FileSection { allow: Vec<PathBuf> = Vec::new(), });
section!(AccessSection {
    allow: Vec<Rule> = Vec::new(),
    deny: Vec<Rule> = Vec::new(),
    remember: Span = Span(Duration::from_secs(10 * 60)),
    when_unreachable: WhenUnreachable = WhenUnreachable::Remembered,
    unreachable_window: Span = Span::hours(1),
});
section!(ScrubSection {
    interval: Span = Span::hours(7 * 24),
    bytes_per_second: Bytes = Bytes(50 << 20),
});
section!(MetricsSection { listen: Option<SocketAddr> = None, });
section!(LogSection {
    format: LogFormat = LogFormat::Auto,
    level: String = "info".to_owned(),
});
section!(ShutdownSection {
    deadline: Span = Span(Duration::from_secs(20)),
});

section!(SharedSection {
    root: Option<PathBuf> = None,
    egress: EgressPolicy = EgressPolicy::Once,
    filesystem: Option<String> = None,
    segment: Option<Bytes> = None,
    claim_timeout: Span = Span(Duration::from_secs(15)),
    stall_timeout: Span = Span(Duration::from_secs(5)),
});

section!(KubernetesSection {
    node: Option<String> = None,
    kubeconfig: Option<PathBuf> = None,
    driver: String = "csi.weightd.io".to_owned(),
    startup_taint: bool = true,
    warming_timeout: Span = Span(Duration::from_secs(10 * 60)),
    labels: usize = 16,
    warm_set: bool = true,
});

section!(ControllerSection {
    webhook: Option<SocketAddr> = None,
    service: String = "weightd-webhook".to_owned(),
    certificate_dir: Option<PathBuf> = None,
    certificate_names: Vec<String> = Vec::new(),
    pending: bool = true,
    fills: usize = 2,
    own_credentials: bool = false,
});

/// How often a byte may leave its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EgressPolicy {
    /// Once for all nodes.
    Once,
    /// As often as it takes to be fastest.
    Fastest,
}

/// What decides who may read a model while its origin cannot be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenUnreachable {
    /// What the origin said within the window.
    Remembered,
    /// Nobody gets it.
    Deny,
    /// The policy alone.
    Allow,
}
